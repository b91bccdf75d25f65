"""The lists of choices are those of the files and libraries that they stand for; listing them loads none of these."""

import subprocess
import sys
from importlib.metadata import version

from accelerate.utils import LoggerType
from conftest import ROOT
from diffusers.optimization import SchedulerType

from ddpm_hf import choices, scheduler, unet


def test_the_choices_are_those_of_their_owners():
    for owner, names in ((unet, ("NORMS", "TIME_EMBEDDINGS")),
                         (scheduler, ("BETA_SCHEDULES", "PREDICTION_TYPES", "PREDICTION_ALIASES"))):  # fmt: skip
        for name in names:
            assert getattr(choices, name) == getattr(owner, name)
    assert set(choices.LR_SCHEDULERS) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}
    assert set(choices.TRACKERS) == {kind.value for kind in LoggerType} - {"all"}


def test_the_command_line_loads_nothing_heavy():
    """Help and errors of options come without torch, diffusers and what training and plots need, in every program."""
    heavy = ("torch", "diffusers", "accelerate", "matplotlib", "scipy", "datasets", "torchvision", "gradio", "pandas",
             "sklearn", "ddpm_hf.trainer.loop", "ddpm_hf.unet")  # fmt: skip
    if version("transformers").startswith("4."):
        heavy = tuple(name for name in heavy if name != "torch")  # its parser of options loads torch before version 5
    programs = sorted(file.stem for file in (ROOT / "training").glob("*.py"))
    assert {"train", "sample", "score", "evaluate", "convert", "publish", "demo"} <= set(programs)
    code = f"""
import importlib, sys
for name in {programs}:
    program = importlib.import_module("ddpm_hf.commands." + name)
    for option in ("--help", "--no_such_option"):
        try:
            print(name, option, "returned", program.main([option]))
        except SystemExit as exit:
            print(name, option, "exited", exit.code)
print("loaded:", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in programs:
        assert f"{name} --help exited 0\n" in done.stdout and f"{name} --no_such_option exited 2\n" in done.stdout
    assert all(option in done.stdout for option in ("--train_data_dir", "--feature_network", "--jump_length", "--maps"))
    assert done.stdout.endswith("loaded: []\n")
