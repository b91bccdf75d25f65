"""The losses of the steps: how they are checked, averaged and written."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from tqdm.auto import tqdm

from ddpm_hf.trainer.looking import LossWatch
from ddpm_hf.trainer.progress import Progress, TrainingError


def pretended_losses(precision, step=3):
    """A `LossWatch` of a run that has done `step` steps; its lines are in `lines`."""
    lines = []
    acc = SimpleNamespace(
        mixed_precision=precision, num_processes=1, is_main_process=True, trackers=[], reduce=lambda x, _: x
    )
    folder = SimpleNamespace(metrics=SimpleNamespace(append=lines.append), newest_checkpoint=lambda: "none")
    run = SimpleNamespace(
        accelerator=acc, progress=Progress(step=step), folder=folder, feed=SimpleNamespace(items=None),
        global_batch=8, skipped=lambda: 0, writing=contextlib.nullcontext,
    )  # fmt: skip
    return LossWatch(run), lines


def test_steps_that_the_scaler_of_fp16_skips():
    """They have no part in the mean norm, which JSON could not hold. A model whose gradients stay infinite ends the
    run: every further step would be skipped."""
    watch, lines = pretended_losses("fp16")
    for norm in (math.inf, 1.0, 2.0):
        watch.add(torch.tensor([0.5, norm]))
    watch.check()
    watch.log(1e-3, tqdm(disable=True))
    assert lines == [{"step": 3, "loss": 0.5, "grad_norm": 1.5, "lr": 1e-3}]
    watch.add(torch.tensor([0.5, math.nan]))
    watch.check()
    watch.log(1e-3, tqdm(disable=True))
    assert lines[1] == {"step": 3, "loss": 0.5, "lr": 1e-3}
    with pytest.raises(TrainingError, match="step 3: .* norm inf"):
        for _ in range(41):
            watch.add(torch.tensor([0.5, math.inf]))
            watch.check()
    watch, _ = pretended_losses("bf16")
    watch.add(torch.tensor([0.5, math.inf]))
    with pytest.raises(TrainingError, match="norm inf"):
        watch.check()
