"""Pictures of results: names from outside are drawn as they are."""

import numpy as np
import pytest
from matplotlib.text import Text

from ddpm_hf.plots import save_sequence_plot, save_steps_plot

NAME = r"from $0 to $\frac{50"  # as a formula it has an error


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn, and True for those in which formulas are looked for."""
    found, draw = {}, Text.draw

    def watched(self, renderer):
        found[self.get_text()] = self.get_parse_math()
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", watched)
    return found


def test_the_names_of_classes_are_no_formulas(drawn, tmp_path):
    save_sequence_plot(np.zeros((1, 1, 8)), np.zeros((1, 1, 8)), tmp_path / "x.png", titles=[NAME])
    assert drawn[f"generated: {NAME}"] is drawn[f"real: {NAME}"] is False


def test_the_name_of_a_pipeline_is_no_formula(drawn, tmp_path):
    records = [{"metric": "fid", "value": 1.0, "num_inference_steps": steps} for steps in (5, 10)]
    save_steps_plot(records, NAME, tmp_path / "x.png")
    assert drawn[NAME] is False
