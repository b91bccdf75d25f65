"""The training loop: start, resume, step, look, save.

Progress is counted in optimizer steps. Noise, timesteps and data order follow from (seed, step, place in the global
batch), so a resumed run goes on as if it had not been stopped.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.config import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import Batch
from ddpm_hf.data.scaling import levels_of
from ddpm_hf.data.sequences import write_scans
from ddpm_hf.hub.publish import check_token, make_publisher, target_of
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.run import checkpoint
from ddpm_hf.run.folder import RunFolder
from ddpm_hf.run.lock import RunLock
from ddpm_hf.run.record import RunRecord, data_facts
from ddpm_hf.trainer import build, compiling, device, launcher
from ddpm_hf.trainer.batches import Batches
from ddpm_hf.trainer.compiling import Runner
from ddpm_hf.trainer.ema import WeightAverage
from ddpm_hf.trainer.graphs import StepBackend
from ddpm_hf.trainer.looking import Looks, LossWatch
from ddpm_hf.trainer.optimizer import make_optimizer, make_schedule
from ddpm_hf.trainer.origin import find_origin
from ddpm_hf.trainer.progress import Progress, Run, TrainingError
from ddpm_hf.trainer.saving import Saver
from ddpm_hf.trainer.signals import StopAsked, StopRequest
from ddpm_hf.trainer.step import TrainingStep
from ddpm_hf.trainer.trackers import check_installed, start_trackers


@dataclass
class TrainResult:
    """The result of a run.

    Attributes:
        pipeline_dir: the folder of the saved pipeline.
        steps: optimizer steps done.
        already_complete: True if nothing was left to do.
    """

    pipeline_dir: Path
    steps: int
    already_complete: bool = False


def train(
    config: TrainConfig, dataset=None, model=None, command: list[str] | None = None,
    data_range: Sequence[float] | None = None,
) -> TrainResult | None:  # fmt: skip
    """Train as `config` says. The command-line program is this function and a parser.

    Args:
        config: the options.
        dataset: a map-style dataset of float tensors (C, H, W) or (C, length) in [-1, 1], of 8-bit images (H, W, C) or
            (C, H, W), of PIL images, or an `ImageDataset` or `SequenceDataset`. Defaults to the data that `config`
            names. Tensors and arrays may have any range with `data_range`, or with the option image_norm.
        model: a model to train: called as model(x_t, t), with the output in `.sample` and a diffusers configuration.
            Defaults to a new `UNet2D` or `UNet1D`, by the data.
        command: the command line of the run, for the model card.
        data_range: lowest and highest value of a dataset from Python, which become -1 and 1 for the model; samples are
            in the units of the data. It is the option image_range of the run.

    Returns:
        The result, or None after a dry run.

    Raises:
        ValueError: options or data do not fit together; nothing was written.
        TrainingError: training had to end in the middle: a loss that is not finite, data that cannot be read, a full
            disk, or a signal.
    """
    return Trainer(_with_range(config, dataset, data_range), dataset, model, command).run()


def _with_range(config: TrainConfig, dataset, data_range: Sequence[float] | None) -> TrainConfig:
    """Return the options with the range of a dataset from Python.

    Raises:
        ValueError: there is no such dataset, the range is none, or the options have a range or a norm.
    """
    if data_range is None:
        return config
    given = config.image_range if config.image_norm is None else config.image_norm
    if dataset is None or given is not None:
        got = "no dataset" if dataset is None else f"data_range {data_range!r} with image_norm or image_range {given!r}"
        raise ValueError(
            "data_range is the range of a dataset given from Python, in place of the options image_norm and "
            f"image_range; got {got}"
        )
    config = copy.copy(config)
    config.image_range = list(data_range)
    try:
        config.__post_init__()
    except ValueError as error:
        raise ValueError(f"data_range: {error}") from error
    return config


# This class is longer than 250 lines because the parts of a run stand in the order in which they happen.
class Trainer:
    """One run. `run()` does all of it; the other methods are its parts, in the order in which they happen."""

    def __init__(self, config: TrainConfig, dataset=None, model=None, command: list[str] | None = None):
        self.lock: RunLock | None = None
        check_installed(config.report_to)
        compiling.check_choice(config.compile)
        self.origin = find_origin(config)
        self.config = config = device.resolved(self.origin.config, dataset)
        self.origin.config = config
        self.folder = RunFolder(config.output_dir)
        try:
            self.feed = open_data(config, dataset)
        except ValueError as error:
            if self.origin.size_line:  # the user may not know of a size that the message has
                raise ValueError(f"{error} ({self.origin.size_line})") from error
            raise
        self.given_model = model is not None
        # for the card, which does not name options without effect
        self.options = config.applied(self.feed.kind, self.given_model)
        feed = self.feed
        named = data_facts(config, dataset, feed.items, feed.shape, feed.class_names, feed.class_counts)
        facts = {**named, "held_out": feed.split}
        if self.feed.items is not None:  # an evaluation knows the data by it
            facts["content"] = self.feed.fingerprint()["digest"]
        self.record = RunRecord(config, facts, command, self.options)
        torch.manual_seed(derive_seed(config.seed, Stream.WEIGHTS))
        lineage = self.origin.lineage
        self.scheduler = build.make_scheduler(config, self.feed, lineage and lineage.betas)
        self.model = build.make_model(config, self.feed, lineage and lineage.model) if model is None else model
        build.check_model(config, self.feed, self.model, self.given_model)
        self.origin.fit(self.model, self.feed, self.given_model)
        self.record.lineage = lineage
        self.description = build.describe(config, self.feed, self.model, self.origin.begin)
        self.progress = Progress(order_from=lineage.order_from if lineage else 0)

    def run(self) -> TrainResult | None:
        """Train to the last step, from the newest checkpoint on, and return the result; None after a dry run."""
        with device.settings(self.config):
            if self.config.dry_run:
                return self._dry_run()
            try:
                return self._run()
            finally:
                if self.lock is not None:
                    self.lock.release()
                if self.given_model:  # its owner may use it, or train it in another precision
                    model = extract_model_from_parallel(self.model, keep_fp32_wrapper=False)
                    vars(model).pop("_is_accelerate_prepared", None)

    def _run(self) -> TrainResult:
        self._start()
        self._open_folder()
        if self._is_complete():
            return self._end_complete_run()
        self._announce()
        self.batches = Batches(self.parts)
        if self.begins_elsewhere:  # from here on the run does not need its origin
            self.saver.save_checkpoint()
        with self._bar() as bar, self.stop:
            if self.progress.pending:
                self._finish_step(save=True, resumed=True)
            while self.progress.step < self.config.max_train_steps:
                values = self._train_step(self.batches)
                self.progress.step += 1
                self.losses.add(values)
                bar.update(1)
                self._after_step(bar)
        self.accelerator.end_training()
        if self.publisher is not None:
            self.publisher.finish()
        return TrainResult(self.folder.pipeline, self.progress.step)

    # -- before the first step -----------------------------------------------------------------

    def _dry_run(self) -> None:
        """Print the options and what was found, and check every item of the data."""
        build.global_batch_size(self.config, self.feed, 1)
        accelerator = launcher.start(mixed_precision=self.config.mixed_precision)
        build.make_evaluator(self.config, accelerator, self.feed)
        self._check_determinism(accelerator)
        if self.config.push_to_hub:
            check_token(target_of(self.config))
        self.origin.settle(self.feed, build.global_batch_size(self.config, self.feed, accelerator.num_processes))
        accelerator.print("\n".join([self.description, *self.origin.lines]))
        self.feed.check_items()

    def _start(self) -> None:
        """Start accelerate, and check the options that depend on it."""
        self.accelerator = build.start_accelerator(self.config)
        self.global_batch = build.global_batch_size(self.config, self.feed, self.accelerator.num_processes)
        self.origin.settle(self.feed, self.global_batch)
        self.evaluator = build.make_evaluator(self.config, self.accelerator, self.feed)
        self._check_determinism(self.accelerator)

    def _check_determinism(self, accelerator) -> None:
        if self.config.deterministic:
            device.check_deterministic(self.model, self.scheduler, self.feed.shape, self.config, accelerator)

    def _prepare(self) -> None:
        """Put the model on the device, and make the pieces that train it, look at it and save it."""
        c, acc = self.config, self.accelerator
        if c.gradient_checkpointing:
            build.enable_checkpointing(c, self.model, self.given_model)
        self.model.to(acc.device)
        average = WeightAverage(self.model, acc, c)
        if not average.sharded:  # FSDP takes the usual layout only
            if hasattr(self.model, "channels_last"):
                self.model.channels_last()
            elif acc.device.type == "cpu":  # on a card a model from Python keeps its own layout
                self.model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.model, c)
        self.lr_scheduler = make_schedule(optimizer, c, self.origin.begin)
        acc.register_for_checkpointing(self.lr_scheduler)
        self.model, optimizer = acc.prepare(self.model, optimizer)
        self.model.train()  # a model from Python may be in eval mode
        average.start(self.model)
        self.optimizer = optimizer
        self.parts = Run(
            c, acc, self.folder, self.feed, self.scheduler, self.model, average, self.progress, self.global_batch
        )
        classes = None if self.feed.class_names is None else len(self.feed.class_names)
        levels = levels_of(self.feed.units)
        self.training_step = TrainingStep(self.model, self.scheduler, optimizer, average, c, acc, classes, levels)
        plan = compiling.make_plan(c, acc)
        self.runner = Runner(self.training_step, plan, StepBackend(acc.device) if plan.graphs else None, tqdm.write)
        self.losses = LossWatch(self.parts)
        self.saver = Saver(self.parts, self.record)
        self.stop = StopRequest(launcher.parent_launcher(), acc)
        self.looks = Looks(self.parts, self.saver, self.evaluator, self.stop.check)

    def _open_folder(self) -> None:
        """Check the run folder, load its newest checkpoint, and only then write there: an error leaves it as it was."""
        acc = self.accelerator
        self._take_folder()
        # again, because another run may have ended here meanwhile
        holds_run = self.folder.holds_run(self.config, self.feed.kind, self.given_model)
        acc.wait_for_everyone()
        self._prepare()
        resumed = holds_run and self.saver.resume()
        self.begins_elsewhere = not resumed and self.origin.give(self.parts, self.optimizer, self.lr_scheduler)
        self.folder.metrics.read()  # its errors come on every process, before anything is written
        self.publisher = make_publisher(self.config, acc, say=tqdm.write)
        if self._is_complete():
            return
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        # the weights, the average, one value of the optimizer for each, and pipeline/
        self.folder.check_space((3 + self.config.use_ema) * weights)
        if acc.is_main_process:
            with self.parts.writing():
                checkpoint.write_text(self.folder.options, self.config.to_yaml())
                write_scans(self.feed.units, self.folder.path)
                if self.begins_elsewhere:
                    self.origin.lineage.write(self.folder.path)
                self.folder.metrics.rewind(self.progress.step, evaluated="evaluation" not in self.progress.pending)

    def _take_folder(self) -> None:
        """Check and lock the run folder in the main process.

        Raises:
            ValueError: on every process, if the folder holds something else, or another run has the lock.
        """
        refusal: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self.folder.open(self.config, self.feed.kind, self.given_model)
                self.lock = RunLock(self.folder.path)
                refusal = [self.lock.take()]
            except ValueError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise ValueError(refusal[0])

    def _is_complete(self) -> bool:
        return self.progress.step >= self.config.max_train_steps and not self.progress.pending

    def _end_complete_run(self) -> TrainResult:
        """Save and publish what a complete run lacks, and say that nothing is left to do."""
        acc, step = self.accelerator, self.progress.step
        changed = self.folder.changed_options(self.config, self.feed.kind, self.given_model)
        lacking = self.folder.pipeline_step() != step
        acc.wait_for_everyone()  # all have looked before the main process writes
        if lacking:
            self.record.start(self.progress.seconds)
            self.saver.save_pipeline()
        if self.publisher is not None and self.publisher.published_step() != step:
            self.publisher.submit(step)
            self.publisher.finish()
        listed = f". Options that differ from those of the run have no effect: {', '.join(changed)}" if changed else ""
        acc.print(f"{self.folder}: the run is complete ({step} steps); nothing left to do{listed}")
        return TrainResult(self.folder.pipeline, step, already_complete=True)

    def _announce(self) -> None:
        """Start trackers, evaluator and clock, and print what is about to be trained."""
        acc, step = self.accelerator, self.progress.step
        start_trackers(acc, self.config.report_to, self.folder.path, step)
        if self.evaluator is not None:
            self.evaluator.prepare()
        new = step == 0 or self.begins_elsewhere
        acc.print(
            "\n".join([self.description, *self.origin.lines]) if new else f"resuming {self.folder} after step {step}"
        )
        if (message := launcher.start_warning()) is not None:
            acc.print(f"warning: {message}")
        if self.runner.plan.reason is not None:
            acc.print(self.runner.plan.reason)
        self.record.start(self.progress.seconds)

    def _bar(self) -> tqdm:
        hidden = not self.accelerator.is_main_process
        steps = {"initial": self.progress.step, "total": self.config.max_train_steps}
        return tqdm(**steps, disable=hidden, desc="training", unit="step")

    # -- one step ------------------------------------------------------------------------------

    def _train_step(self, batches: Iterator[Batch]) -> Tensor:
        """Run one optimizer step; return (2,): the mean loss of this process and the gradient norm, on the device."""
        c, acc, step = self.config, self.accelerator, self.progress.step
        # for a step on CPU, torch's function would queue the seed for each kind of card, with a trace of the stack
        set_seed = torch.default_generator.manual_seed if acc.device.type == "cpu" else torch.manual_seed
        set_seed(derive_seed(c.seed, Stream.DROPOUT, step, acc.process_index))
        parts = [next(batches) for _ in range(c.gradient_accumulation_steps)]
        # one coin for the whole batch, so that half of the steps cost less
        conditioned = c.self_condition and derive_seed(c.seed, Stream.SELF_CONDITION, step) % 2 == 0
        values = self.runner(parts, self.training_step.numbers(step), conditioned, c.max_train_steps - step)
        self.batches.launched()
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]  # of this step
        self.lr_scheduler.step()
        return values

    # -- after a step --------------------------------------------------------------------------

    def _after_step(self, bar: tqdm) -> None:
        """Log, look, save and stop, where these are due.

        Raises:
            TrainingError: a stop was asked for.
        """
        c, step = self.config, self.progress.step
        stopping = self.stop.asked_anywhere()
        last = step == c.max_train_steps
        log = last or step % c.logging_steps == 0
        save = last or stopping or step % c.checkpointing_steps == 0
        self.progress.pending = self.looks.due()
        if log or save or self.progress.pending or self.accelerator.device.type == "cpu":
            self.losses.check()
        if save or self.progress.pending:
            self.batches.check_files()
        if log:
            self.losses.log(self.learning_rate, bar)
        self._finish_step(save, stopping)

    def _finish_step(self, save: bool, stopping: bool = False, resumed: bool = False) -> None:
        """Make what is pending, save, and stop if that was asked for.

        Args:
            save: save in any case.
            stopping: a stop was asked for, so that what is pending waits for the next start.
            resumed: this step has a checkpoint already.

        Raises:
            TrainingError: a stop was asked for.
        """
        stopping = stopping or self._look()
        if save or stopping:
            # The checkpoint comes first: it is saved whatever is wrong with the pipeline's folder, pictures or card,
            # and a run that is killed between the two saves the pipeline later. A step that has a checkpoint gets the
            # pipeline first: until both are saved, that checkpoint says that something is pending.
            saves = [self.saver.save_checkpoint, self.saver.save_pipeline]
            for save_one in reversed(saves) if resumed else saves:
                save_one()
            self.runner.paused()
            if self.publisher is not None and (self.config.hub_every_save or self._is_complete()):
                self.publisher.submit(self.progress.step)
        if stopping and not self._is_complete():
            self.accelerator.end_training()
            pending = " and the ".join(self.progress.pending)
            raise TrainingError(
                f"stopped by {self.stop.received or 'a signal to another process'} after step {self.progress.step}; "
                "its checkpoint is saved, and the same command goes on from there"
                + (f", with the {pending} of that step first" if pending else "")
            )

    def _look(self) -> bool:
        """Make what is pending, in order; return True if a stop was asked for before all of it was made.

        Where that fails, memory for samples is short, say, the steps are saved first, so that the next start begins
        with what is pending. (On several processes the others may not have failed, and cannot save alone.)
        """
        if self.progress.pending:
            self.runner.set_aside()
        try:
            while self.progress.pending:
                self.stop.check()
                with device.deterministic_where_possible():
                    self.looks.make(self.progress.pending[0])
                del self.progress.pending[0]
        except StopAsked:
            return True
        except Exception:
            if self.accelerator.num_processes == 1:
                with contextlib.suppress(TrainingError):
                    self.saver.save_checkpoint()
                    tqdm.write(f"step {self.progress.step} is saved without its {self.progress.pending[0]}, which fail")
            raise
        return False
