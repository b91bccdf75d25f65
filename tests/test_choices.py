"""The lists of choices are those of the files and libraries that they stand for; listing them loads none of these."""

import subprocess
import sys

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
    """The options are parsed, and the help is printed, without torch, diffusers and what training and plots need."""
    heavy = ("torch", "diffusers", "accelerate", "matplotlib", "scipy", "datasets", "torchvision", "gradio", "pandas",
             "sklearn", "ddpm_hf.trainer.loop", "ddpm_hf.unet")  # fmt: skip
    program = f"""
import sys
import ddpm_hf.commands.convert, ddpm_hf.commands.demo, ddpm_hf.commands.publish
import ddpm_hf.commands.evaluate, ddpm_hf.commands.train
for program in (ddpm_hf.commands.train, ddpm_hf.commands.evaluate):
    try:
        program.main(["--help"])
    except SystemExit:
        pass
print("loaded:", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--train_data_dir" in done.stdout and "--feature_network" in done.stdout
    assert done.stdout.endswith("loaded: []\n")
