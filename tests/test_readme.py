"""README says what the program does: its table of options and its tree are current."""

import dataclasses
import re
import subprocess

import pytest
from conftest import ROOT

from ddpm_hf.config import TrainConfig

README = (ROOT / "README.md").read_text()


def table_row(f) -> str:
    default = f.default_factory() if f.default is dataclasses.MISSING else f.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"| `{f.name}` | {'' if shown is None else f'`{shown}`'} | {f.metadata['help']} |"


@pytest.mark.parametrize("f", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_every_option_is_in_the_table(f):
    assert table_row(f) in README


@pytest.mark.parametrize("page", ["README.md", "docs/clusters.md"])
def test_the_same_losses_on_any_number_of_processes_but_for_two_options(page):
    """Beside the promise stand the options that it does not hold for."""
    promise = re.search(r"same losses.{,700}", (ROOT / page).read_text(), re.DOTALL)[0]
    assert "--dropout" in promise and "--immiscible" in promise


def test_the_tree_names_every_file():
    listed = subprocess.run(["git", "ls-files", "ddpm_hf", "training"], cwd=ROOT, capture_output=True, text=True).stdout
    for path in listed.split():
        assert path.rsplit("/", 1)[-1] in README, path
