"""The state of a run: its progress, what its pieces share, and the error that ends it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from ddpm_hf.config import TrainConfig
from ddpm_hf.data.feed import StoredFeed, StreamedFeed
from ddpm_hf.data.scaling import has_own_units, levels_of
from ddpm_hf.pipeline import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.run.folder import RunFolder
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer.ema import WeightAverage


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what was saved."""


@dataclass
class Progress:
    """How far a run has come. A checkpoint keeps all of it but `order_from`, which the lineage of the run keeps.

    Attributes:
        step: optimizer steps done.
        order_from: the step at which the order of the data began.
        skipped: images left out so far because they cannot be read: by this process, and on the main process also by
            all of them before the checkpoint that the run resumed from.
        interval: (loss, gradient norm) of each step since the last line of metrics.jsonl.
        evaluation: the records of the newest evaluation.
        best: metric, value and step of the best evaluation so far.
        pending: what is due after this step and not done yet, of `checkpoint.LOOKS`, in order.
        stream: where streamed data is read on; empty for stored data.
        seconds: training time before this process.
    """

    step: int = 0
    order_from: int = 0
    skipped: int = 0
    interval: list[list[float]] = field(default_factory=list)
    evaluation: list[dict] = field(default_factory=list)
    best: dict | None = None
    pending: list[str] = field(default_factory=list)
    stream: dict = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def place(self) -> int:
        """The number of steps that the order of the data has had."""
        return self.step - self.order_from


@dataclass(frozen=True)
class Run:
    """The objects that the pieces of the trainer share.

    Attributes:
        config: the options.
        accelerator: accelerate's `Accelerator`.
        folder: the run folder.
        feed: the source of the training batches.
        scheduler: the noise schedule of training.
        model: the model as accelerate has prepared it.
        average: the average of its weights.
        progress: how far the run has come.
        global_batch: samples of an optimizer step, over all processes.
    """

    config: TrainConfig
    accelerator: Accelerator
    folder: RunFolder
    feed: StoredFeed | StreamedFeed
    scheduler: GaussianScheduler
    model: nn.Module
    average: WeightAverage
    progress: Progress
    global_batch: int

    def pipeline(self, model: nn.Module) -> DDPMPipeline | DDPMPipeline1D:
        """Return a pipeline of `model` without a progress bar, which samples in the units of the data."""
        options: dict = {"num_inference_steps": self.config.ddpm_num_inference_steps}
        if self.feed.class_names is not None:
            options["id2label"] = dict(enumerate(self.feed.class_names))
        if self.config.condition is not None:
            options["condition"] = self.config.condition
        elif self.feed.condition_shape is not None:
            units = {name.replace("data", "condition"): v for name, v in self.feed.condition_scaling.to_json().items()}
            own = list(self.feed.condition_shape[1:])
            options |= {"condition": "paired", "condition_size": own, **units}
        scheduler = GaussianScheduler.from_config(self.scheduler.config)
        if len(self.feed.shape) == 3:
            levels = levels_of(self.feed.units) if has_own_units(self.feed.scaling) else None
            pipeline = DDPMPipeline(model, scheduler, **options, **self.feed.scaling.to_json(), data_levels=levels)
        else:
            pipeline = DDPMPipeline1D(model, scheduler, **options, **self.feed.scaling.to_json())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def skipped(self) -> int:
        """Return the number of images that all processes have left out so far. All of them must call it."""
        acc, own = self.accelerator, self.progress.skipped
        if acc.num_processes == 1:
            return own
        return acc.reduce(torch.tensor(own, device=acc.device), "sum").item()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of writing into the run folder (a full disk, a folder that became read-only) into its end.

        Raises:
            TrainingError: there was such an error within; the message names the newest checkpoint.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            raise TrainingError(
                f"step {self.progress.step}: cannot save in {self.folder}{self.folder.free_space()}: {error}. The "
                f"newest whole checkpoint is {self.folder.newest_checkpoint()}; the same command goes on from there"
            ) from error
