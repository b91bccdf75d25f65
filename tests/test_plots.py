"""Pictures of results: channels have axes of their own, and names from outside are drawn as they are."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ddpm_hf.commands.sampling import draw_sequences
from ddpm_hf.plots import MOST_AXES, save_fan_plot, save_heat_map, save_sequence_plot, save_steps_plot

NAME = r"from $0 to $\frac{50"  # as a formula it has an error
LEVELS = np.array([20.0, 1000.0, 0.5])  # of channels with units of their own


def sequences(count, channels, length=8):
    levels = np.resize(LEVELS, channels)[:, None]
    return levels * (1 + np.random.default_rng(0).normal(size=(count, channels, length)) / 100)


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Return a function that draws, and returns the visible axes with lines in the figure."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def draw(function, *arguments, **named):
        function(*arguments, path=tmp_path / "x.png", **named)
        return [axis for axis in figures[-1].axes if axis.get_visible() and axis.lines]

    return draw


def scale_of(axis):
    """The number of `LEVELS` that the axis shows; it shows one alone."""
    low, high = axis.get_ylim()
    (found,) = [n for n, level in enumerate(LEVELS) if low <= level <= high]
    return found


@pytest.mark.parametrize("names", [None, ["temperature", "pressure"]])
def test_channels_have_axes_and_names(names, axes_of):
    """A channel has one scale in all generated and real sequences, and no other channel is drawn on it."""
    axes = axes_of(save_sequence_plot, sequences(4, 2), sequences(3, 2) * 1.02, names=names)
    assert len(axes) == 3 * 2 * 2 and all(len(axis.lines) == 1 for axis in axes)
    assert [scale_of(axis) for axis in axes] == [0, 0, 1, 1] * 3
    assert len({axis.get_ylim() for axis in axes}) == 2
    labels = names or ["channel 0", "channel 1"]
    assert [axis.get_ylabel() for axis in axes[::2]] == labels * 3 and not any(a.get_ylabel() for a in axes[1::2])


def test_one_channel_is_drawn_as_it_was(axes_of):
    axes = axes_of(save_sequence_plot, sequences(4, 1), sequences(4, 1), titles=["a", "b"])
    assert len(axes) == 8 and not any(axis.get_ylabel() for axis in axes) and axes[2].get_title() == "generated: b"


def test_conditions_have_channels_of_their_own(axes_of):
    axes = axes_of(
        save_sequence_plot, sequences(2, 1), sequences(2, 1), conditions=sequences(2, 3, 4), titles=["a", "b"]
    )
    labels = [(axis.get_ylabel(), axis.get_title()) for axis in axes]
    a = [("channel 0", "condition: a"), ("", "generated: a"), ("", "real: a"), ("channel 1", ""), ("channel 2", "")]
    assert labels == a + [(name, title.replace(": a", ": b")) for name, title in a]


@pytest.mark.parametrize(("channels", "sequences_", "lines"), [(8, 4, 1), (MOST_AXES, 1, 1), (MOST_AXES + 1, 6, 37)])
def test_there_are_not_too_many_axes(channels, sequences_, lines, axes_of):
    """Fewer sequences are drawn; very many channels share their axes."""
    axes = axes_of(save_sequence_plot, sequences(6, channels), sequences(6, channels))
    assert len(axes) == 2 * sequences_ * (channels if lines == 1 else 1)
    assert {len(axis.lines) for axis in axes} == {lines}


def test_samples_completions_and_scores_name_their_channels(axes_of):
    names, items = ["temperature", "pressure"], sequences(3, 2)
    files = SimpleNamespace(labels=["a", "b", "c"], conditions=None)
    axes = axes_of(draw_sequences, list(items), files)
    assert [scale_of(axis) for axis in axes] == [0, 1] * 3
    assert [axis.get_ylabel() for axis in axes] == ["channel 0", "channel 1"] * 3
    assert [axis.get_title() for axis in axes] == ["a", "", "b", "", "c", ""]
    shown = [SimpleNamespace(truth=items[0], hidden=np.arange(8) > 4, completions=items)]
    assert [axis.get_title() for axis in axes_of(save_fan_plot, shown, names=names)] == names
    axes = axes_of(save_heat_map, items[0], items[0] * 0 + 0.5, (0.0, 1.0), names=names)
    assert [axis.get_ylabel() for axis in axes] == names


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn, and True for those in which formulas are looked for."""
    found, draw = {}, Text.draw

    def watched(self, renderer):
        found[self.get_text()] = self.get_parse_math()
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", watched)
    return found


def test_the_names_of_classes_and_channels_are_no_formulas(drawn, tmp_path):
    save_sequence_plot(*np.zeros((2, 1, 2, 8)), tmp_path / "x.png", titles=[NAME], names=[NAME, "b"])
    assert drawn[NAME] is drawn[f"generated: {NAME}"] is drawn[f"real: {NAME}"] is False


def test_the_name_of_a_pipeline_is_no_formula(drawn, tmp_path):
    records = [{"metric": "fid", "value": 1.0, "num_inference_steps": steps} for steps in (5, 10)]
    save_steps_plot(records, NAME, tmp_path / "x.png")
    assert drawn[NAME] is False
