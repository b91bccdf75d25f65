"""The training loop: build, resume, step, average, sample, save.

Progress is counted in optimizer steps. Noise, timesteps and data order follow from (seed, step, place in the global
batch), so a resumed run goes on as if it had not been stopped.
"""

import contextlib
import json
import math
import os
import reprlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ddpm_hf.config import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.checking import check_shared_memory
from ddpm_hf.data.loading import Batch, load_item
from ddpm_hf.evaluation.evaluator import EvalSettings, Evaluator
from ddpm_hf.hub.card import write_card
from ddpm_hf.hub.contents import carry_over
from ddpm_hf.hub.publish import check_token, make_publisher, target_of
from ddpm_hf.losses import first_step_warning
from ddpm_hf.pipeline import IMAGE_MODES, DDPMPipeline, DDPMPipeline1D
from ddpm_hf.plots import save_image_grid, save_sequence_plot
from ddpm_hf.randomness import DRAWS, Stream, derive_seed, generator_seeds
from ddpm_hf.reading import is_whole, read_json, read_mapping
from ddpm_hf.run import checkpoint
from ddpm_hf.run.record import RunRecord, data_facts, spare
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer import launcher
from ddpm_hf.trainer.ema import WeightAverage
from ddpm_hf.trainer.memory import keep_freed_memory, return_freed_memory
from ddpm_hf.trainer.optimizer import make_optimizer, make_schedule, warmup_warning
from ddpm_hf.trainer.signals import StopRequest
from ddpm_hf.trainer.step import SampleNumbers, TrainingStep
from ddpm_hf.trainer.trackers import check_installed, log_picture, start_trackers
from ddpm_hf.unet import UNet1D, UNet2D


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what was left whole."""


@dataclass
class TrainResult:
    """`pipeline_dir`: the saved pipeline; `steps`: optimizer steps done; `already_complete`: nothing was left to do."""

    pipeline_dir: Path
    steps: int
    already_complete: bool = False


def train(config: TrainConfig, dataset=None, model=None, command: list[str] | None = None) -> TrainResult | None:
    """Train as `config` says; the command-line program is this and a parser.

    Args:
        config: the options.
        dataset: any map-style data set of float tensors (C, H, W) or (C, length) in [-1, 1], PIL images, or
            `ImageDataset` / `SequenceDataset`; None: the one that `config` names.
        model: a model to train instead of a new U-Net: called as model(x_t, t), giving `.sample`, with a diffusers
            configuration; None: `UNet2D` or `UNet1D` by the data.
        command: the command line that started it, for the model card.

    Returns:
        None after a dry run.

    Raises:
        ValueError: options or data that do not fit, before anything is written.
        TrainingError: a loss that is not finite, or data that cannot be read, in the middle.
    """
    return Trainer(config, dataset, model, command).run()


class Trainer:
    """One run. `run()` does all; the parts are methods in the order in which they happen."""

    def __init__(self, config: TrainConfig, dataset=None, model=None, command: list[str] | None = None):
        check_installed(config.report_to)
        self.config = config
        self.folder = Path(config.output_dir)
        self.feed = open_data(config, dataset)
        self.shape = self.feed.shape
        # for the card, which does not say an option that had no effect
        self.options = config.applied(self.feed.kind, model is not None)
        facts = {**data_facts(config, dataset, self.feed.items, self.shape), "held_out": self.feed.split}
        if self.feed.items is not None:  # an evaluation knows the data by it
            facts["content"] = self.feed.fingerprint()["digest"]
        self.record = RunRecord(config, facts, command, self.options)
        torch.manual_seed(derive_seed(config.seed, Stream.WEIGHTS))
        self.scheduler = GaussianScheduler(
            num_train_timesteps=config.ddpm_num_steps,
            beta_schedule=config.ddpm_beta_schedule,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            clip_sample_range=self.feed.scaling.limit,
        )
        self.model = self._build_model() if model is None else model
        self.model_name = type(self.model).__name__  # before accelerate wraps it
        self.given_model = model is not None
        self._check_model()

    # -- before anything is written ------------------------------------------------------------

    def _build_model(self):
        size = self.shape[1:]
        if len(size) == 1:
            return UNet1D(sample_size=size[0], in_channels=self.shape[0], **self.config.model_options())
        sample_size = size[0] if size[0] == size[1] else size
        return UNet2D(sample_size=sample_size, in_channels=self.shape[0], **self.config.model_options())

    def _check_model(self) -> None:
        c, model_config = self.config, self.model.config
        if self.given_model:
            c.check_scope(self.feed.kind, self.model)
            conditioned = bool(getattr(model_config, "self_condition", False))
            if conditioned != c.self_condition:
                raise ValueError(f"self_condition must be the given model's, {conditioned}, got {c.self_condition}")
            able = hasattr(self.model, "enable_gradient_checkpointing")
            able = able and getattr(self.model, "_supports_gradient_checkpointing", True)
            if c.gradient_checkpointing and not able:
                raise ValueError(f"gradient_checkpointing must be false: {self.model_name} does not support it")
        if model_config.in_channels != self.shape[0]:
            raise ValueError(f"the model takes {model_config.in_channels} channels, the data has {self.shape[0]}")
        if len(self.shape) == 3 and self.shape[0] not in IMAGE_MODES:
            raise ValueError(f"images must have 1, 2, 3 or 4 channels, the data has {self.shape[0]}")
        size, own = model_config.sample_size, self.shape[1:]
        expected = tuple(size) if isinstance(size, (tuple, list)) else (size,) * len(own)
        if expected != own:
            raise ValueError(f"the model's sample_size must be the data's {own}, got {size}")

    def _global_batch(self, processes: int) -> int:
        c = self.config
        total = c.train_batch_size * c.gradient_accumulation_steps * processes
        if self.feed.items is not None and total > self.feed.items:
            raise ValueError(
                f"a batch must not be larger than the data: train_batch_size {c.train_batch_size} x "
                f"gradient_accumulation_steps {c.gradient_accumulation_steps} x {processes} processes = {total}, "
                f"the data has {self.feed.items} items"
            )
        return total

    def describe(self) -> str:
        """The resolved options, the model's size and the data found; and what will hardly be meant so."""
        warnings = filter(None, (warmup_warning(self.config), first_step_warning(self.config)))
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.config.to_yaml()}"
            f"model: {self.model_name}, {parameters:,} parameters\n"
            f"data: {'streamed' if self.feed.items is None else f'{self.feed.items:,}'} items of shape {self.shape}"
            + "".join(f"\n{note}" for note in self.feed.notes)
            + "".join(f"\nwarning: {warning}" for warning in warnings)
        )

    def _check_folder(self) -> bool:
        """Return True if the folder holds this run already; it is made if not.

        Raises:
            ValueError: it holds something else, or cannot be written.
        """
        config_file = self.folder / "config.yaml"
        if config_file.exists():
            differences = self.config.differences(read_mapping(config_file), self.feed.kind, self.given_model)
            if differences:
                listed = "\n  ".join(differences)
                raise ValueError(
                    f"output_dir {self.folder} holds a run with other options; choose another output_dir, or the same "
                    f"options to resume it. They differ in:\n  {listed}"
                )
        elif (self.folder / "checkpoints").is_dir():
            raise ValueError(
                f"output_dir {self.folder} holds checkpoints but no config.yaml, by which a run is known: put it back, "
                "or choose another output_dir"
            )
        elif self.folder.exists() and (
            not self.folder.is_dir()
            # what a first start that was killed has left is no one's
            or any(not path.name.endswith(checkpoint.ASIDE) for path in self.folder.iterdir())
        ):
            raise ValueError(
                f"output_dir must be a new or empty folder, or the folder of this run: {self.folder} holds other files"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".write{checkpoint.ASIDE}"
            try:
                probe.write_text(self.config.to_yaml())  # more than no bytes: a full disk still makes files
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir must be a folder that can be written: {error}") from error
        return config_file.exists()

    def _check_space(self) -> None:
        """Refuse to start where a save cannot fit: weights, average, a value of the optimizer for each, and pipeline/.

        Raises:
            ValueError: the disk has less free than that.
        """
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        needed = (3 + self.config.use_ema) * weights
        disk = shutil.disk_usage(self.folder)
        if disk.total and disk.free < needed:  # some file systems do not say
            raise ValueError(
                f"output_dir must be on a disk with room for a save, at least {needed / 1e6:,.1f} MB: "
                f"{self.folder} has {disk.free / 1e6:,.1f} MB"
            )

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> TrainResult | None:
        c = self.config
        if c.dry_run:
            self._global_batch(1)
            self.accelerator = launcher.start(mixed_precision=c.mixed_precision)
            self._make_evaluator()
            if c.push_to_hub:
                check_token(target_of(c))
            self.accelerator.print(self.describe())
            self.feed.check_items()
            return None
        self._start()
        acc = self.accelerator
        global_batch = self._global_batch(acc.num_processes)
        self.evaluator = self._make_evaluator()
        with acc.main_process_first():
            try:
                resumable = self._check_folder()
            except OSError as error:
                raise ValueError(f"output_dir must be a folder that can be written: {error}") from error
        acc.wait_for_everyone()
        self._prepare()
        if resumable:
            self._resume()
        self.metrics.read()  # its errors, on every process and before anything is written
        self.publisher = make_publisher(c, acc, say=tqdm.write)
        if self.step < c.max_train_steps:
            self._check_space()
        # only now: a refused resume leaves the folder as it was
        if acc.is_main_process:
            with self._writing(OSError):
                checkpoint.write_text(self.folder / "config.yaml", c.to_yaml())
        pipeline_dir = self.folder / "pipeline"
        if self.step >= c.max_train_steps:
            if self._pipeline_step() != self.step:
                self.record.start(self._seconds_before)
                with self._writing(OSError, RuntimeError, SafetensorError):
                    self._save_pipeline()
            if self.publisher is not None and self.publisher.published_step() != self.step:
                self.publisher.submit(self.step)
                self.publisher.finish()
            acc.print(f"{self.folder}: the run is complete ({self.step} steps); nothing left to do")
            return TrainResult(pipeline_dir, self.step, already_complete=True)

        if acc.is_main_process:
            with self._writing(OSError):
                self.metrics.rewind(self.step)
        start_trackers(acc, c.report_to, self.folder, self.step)
        if self.evaluator is not None:
            self.evaluator.prepare()
        acc.print(self.describe() if self.step == 0 else f"resuming {self.folder} after step {self.step}")
        if (message := launcher.start_warning()) is not None:
            acc.print(f"warning: {message}")
        self.record.start(self._seconds_before)
        place = {"process": acc.process_index, "processes": acc.num_processes}
        batches = iter(
            self.feed.loader(self.step, **place, state=self._feed_state, pin_memory=acc.device.type == "cuda")
        )
        bar = tqdm(
            initial=self.step, total=c.max_train_steps, disable=not acc.is_main_process, desc="training", unit="step"
        )
        with bar, StopRequest(launcher.parent_launcher()) as stop:
            while self.step < c.max_train_steps:
                values = self._train_step(batches)
                self.step += 1
                self._pending.append(values)
                bar.update(1)
                stopping = self._any_process(stop.asked())
                self._after_step(bar, global_batch, save_now=stopping)
                if stopping and self.step < c.max_train_steps:
                    acc.end_training()
                    raise TrainingError(
                        f"stopped by {stop.received or 'a signal to another process'} after step {self.step}; its "
                        "checkpoint is saved, and the same command goes on from there"
                    )
        acc.end_training()
        if self.publisher is not None:
            self.publisher.finish()
        return TrainResult(pipeline_dir, self.step)

    def _start(self) -> None:
        """Accelerate, and the threads and memory of this process."""
        c = self.config
        self.accelerator = launcher.start(
            mixed_precision=c.mixed_precision,
            # the number of batches is not the loader's to say: its stream has no end
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=c.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if c.report_to == ["none"] else c.report_to,
            project_config=ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "logs")),
        )
        acc = self.accelerator
        if acc.device.type != "cpu" and c.num_cpu_threads:
            torch.set_num_threads(c.num_cpu_threads)
        if acc.device.type == "cpu":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            local = int(os.environ.get("LOCAL_WORLD_SIZE", acc.num_processes))
            torch.set_num_threads(c.num_cpu_threads or max(1, cores // local))
            return_freed_memory() if c.gradient_checkpointing else keep_freed_memory()
        if c.optimizer == "muon" and acc.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("optimizer must be adamw under DeepSpeed, which flattens the matrices, got 'muon'")

    def _make_evaluator(self) -> Evaluator | None:
        c = self.config
        if not c.eval_steps:
            return None
        settings = EvalSettings(
            metrics=c.eval_metrics, num_samples=c.eval_num_samples, num_real=c.eval_num_real,
            feature_network=c.feature_network, feature_resolution=c.feature_resolution, batch_size=c.eval_batch_size,
            seed=c.seed, cache_dir=c.eval_cache_dir, workers=c.dataloader_num_workers, on_bad_image=c.on_bad_image,
        )  # fmt: skip
        evaluator = Evaluator(self.accelerator, self.feed.dataset, self.shape, settings, self.feed.held_out)
        # training's batches wait there meanwhile
        check_shared_memory(self.feed.shared_memory + evaluator.shared_memory, c.dataloader_num_workers)
        if c.metric_for_best not in (None, *evaluator.metrics):
            raise ValueError(
                f"metric_for_best must be one of those evaluated, {', '.join(evaluator.metrics)}; "
                f"got {c.metric_for_best!r}"
            )
        return evaluator

    def _prepare(self) -> None:
        c, acc = self.config, self.accelerator
        if c.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.to(acc.device)
        self.average = WeightAverage(self.model, acc, c)
        if not self.average.sharded:  # FSDP takes the usual layout only
            if hasattr(self.model, "channels_last"):
                self.model.channels_last()
            else:  # someone's own model
                self.model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.model, c)
        self.lr_scheduler = make_schedule(optimizer, c)
        acc.register_for_checkpointing(self.lr_scheduler)
        self.model, self.optimizer = acc.prepare(self.model, optimizer)
        self.average.start(self.model)
        self.training_step = TrainingStep(self.model, self.scheduler, self.optimizer, self.average, c, acc)
        self.step = 0
        self.skipped = 0
        self._skipped_names = set()
        self._pending: list[torch.Tensor] = []  # (loss, gradient norm) of the steps not yet looked at
        self._interval: list[list[float]] = []  # those of the logging interval
        self.metrics = checkpoint.MetricsFile(self.folder / "metrics.jsonl")
        self.evaluation: list[dict] = []  # the newest evaluation, as records
        self.best: dict | None = None  # metric, value and step of the best so far
        self._feed_state: dict = {}  # where the data is read on
        self._seconds_before = 0.0  # of training, as far as the checkpoint knows

    def _next_batch(self, batches) -> torch.Tensor:
        try:
            batch: Batch = next(batches)
        except Exception as error:  # of a stream, or of a data set from Python
            raise TrainingError(
                f"step {self.step + 1}: the data cannot be read further: {type(error).__name__}: {error}. The newest "
                f"whole checkpoint is {self._newest_checkpoint()}; the same command goes on from there"
            ) from error
        for message in batch.skipped:
            self.skipped += 1
            if message not in self._skipped_names:
                self._skipped_names.add(message)
                tqdm.write(f"left out: {message}")
        if batch.error:
            raise TrainingError(f"step {self.step + 1}: {batch.error}")
        return batch.to(self.accelerator.device)

    def _train_step(self, batches) -> torch.Tensor:
        """Run one optimizer step; return (2,): the mean loss of this process and the gradient norm, on the device."""
        c, acc = self.config, self.accelerator
        self.model.train()
        torch.manual_seed(derive_seed(c.seed, Stream.DROPOUT, self.step, acc.process_index))
        parts = [self._next_batch(batches) for _ in range(c.gradient_accumulation_steps)]
        start = self.step * self._global_batch(acc.num_processes)
        places = [part * acc.num_processes + acc.process_index for part in range(len(parts))]
        numbers = SampleNumbers(self.step, [start + place * c.train_batch_size for place in places])
        # one coin for the whole batch, so that half of the steps cost less
        coin = derive_seed(c.seed, Stream.SELF_CONDITION, self.step) % 2
        values = self.training_step(parts, numbers, c.self_condition and coin == 0)
        self._lr = self.lr_scheduler.get_last_lr()[0]  # of this step
        self.lr_scheduler.step()
        return values

    def _any_process(self, flag: bool) -> bool:
        """Return True if `flag` is set on any process; all get the same answer, so that all save together."""
        acc = self.accelerator
        if acc.num_processes == 1:
            return flag
        return acc.reduce(torch.tensor(float(flag), device=acc.device), "sum").item() > 0

    def _after_step(self, bar, global_batch: int, save_now: bool = False) -> None:
        c, acc = self.config, self.accelerator
        last = self.step == c.max_train_steps
        log = last or self.step % c.logging_steps == 0
        save = last or save_now or self.step % c.checkpointing_steps == 0
        sample = last or (c.save_samples_steps and self.step % c.save_samples_steps == 0)
        evaluate = self.evaluator is not None and (last or self.step % c.eval_steps == 0)
        if log or save or sample or evaluate or acc.device.type == "cpu":
            self._look_at_losses()
        if save or sample or evaluate:
            self._check_files()
        with self._writing(OSError):
            if log:
                self._log(bar, global_batch)
            if sample:
                self._save_samples()
            if evaluate:
                self._evaluate()
        if save:
            with self._writing(OSError, RuntimeError, SafetensorError):
                # The checkpoint first, whatever may be wrong with the pipeline's place, pictures or card: a run that is
                # killed between the two saves the pipeline later. A pipeline/ tells that there was a checkpoint.
                self._save_checkpoint()
                self._save_pipeline()
            if self.publisher is not None and (c.hub_every_save or last):
                self.publisher.submit(self.step)

    def _check_files(self) -> None:
        """Stop before the data is read again, if a mapped file is not as it was: reading one that was cut would end the
        process without a word."""
        changed = self.feed.files.changed()
        if changed:
            raise TrainingError(
                f"step {self.step}: the data was written to while training read it: {changed}. The newest whole "
                f"checkpoint is {self._newest_checkpoint()}; the same command goes on from there when the data is as "
                "it was. To exchange such a file, write another one and rename it when no run reads it"
            )

    @contextlib.contextmanager
    def _writing(self, *errors: type):
        """A full disk, or a folder that is read-only by now, ends the run with what is whole."""
        try:
            yield
        except errors as error:
            room = ""
            with contextlib.suppress(OSError):
                room = f" ({shutil.disk_usage(self.folder).free / 1e6:,.1f} MB are free there)"
            raise TrainingError(
                f"step {self.step}: cannot save in {self.folder}{room}: {error}. The newest whole checkpoint is "
                f"{self._newest_checkpoint()}; the same command goes on from there"
            ) from error

    def _log(self, bar, global_batch: int) -> None:
        """A line of metrics.jsonl and a point of the trackers, means over the interval; only the trackers see times."""
        acc = self.accelerator
        loss, grad_norm = np.mean(self._interval, axis=0).tolist()
        record = {"step": self.step, "loss": loss, "grad_norm": grad_norm, "lr": self._lr}
        if self.feed.items is not None:
            record["epoch"] = self.step * global_batch / self.feed.items
        if self.skipped:
            record["skipped_images"] = self.skipped
        self._interval = []
        bar.set_postfix_str(f"loss {loss:.4f}, lr {self._lr:.2e}")
        if acc.is_main_process:
            self.metrics.append(record)
        rate = bar.format_dict["rate"]
        timing = {"samples_per_second": rate * global_batch} if rate else {}
        acc.log({name: value for name, value in {**record, **timing}.items() if name != "step"}, step=self.step)

    def _look_at_losses(self) -> None:
        """Bring the pending losses to the host, as means over the processes; stop at one that is not finite."""
        if not self._pending:
            return
        values = self.accelerator.reduce(torch.stack(self._pending), "mean").tolist()
        first_step = self.step - len(values) + 1
        self._pending = []
        for offset, (loss, grad_norm) in enumerate(values):
            # fp16 gradients overflow now and then: the loss scaler skips those steps.
            finite = math.isfinite(loss) and (math.isfinite(grad_norm) or self.accelerator.mixed_precision == "fp16")
            if not finite:
                raise TrainingError(
                    f"step {first_step + offset}: the loss is {loss} and the gradient's norm {grad_norm}; stopped. "
                    f"The last good checkpoint is {self._newest_checkpoint()}. A lower learning_rate, longer "
                    "lr_warmup_steps or another mixed_precision may help"
                )
        self._interval += values

    # -- looking -------------------------------------------------------------------------------

    def _pipeline(self, model):
        steps = self.config.ddpm_num_inference_steps
        scheduler = GaussianScheduler.from_config(self.scheduler.config)
        if len(self.shape) == 3:
            pipeline = DDPMPipeline(model, scheduler, num_inference_steps=steps)
        else:
            pipeline = DDPMPipeline1D(model, scheduler, num_inference_steps=steps, **self.feed.scaling.to_json())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _save_samples(self) -> None:
        """Samples from the EMA weights, the same x_T every time, made by all processes."""
        c, acc = self.config, self.accelerator
        samples = []
        with self.average.weights() as model, acc.split_between_processes(list(range(c.num_samples))) as indices:
            pipeline = self._pipeline(model)
            for start in range(0, len(indices), c.eval_batch_size):
                part = indices[start : start + c.eval_batch_size]
                seeds = generator_seeds(c.seed, Stream.SAMPLES, part)
                generators = [torch.Generator().manual_seed(s) for s in seeds]
                samples += list(pipeline(batch_size=len(part), generator=generators, return_dict=False)[0])
        samples = gather_object(samples)
        if not acc.is_main_process:
            return
        path = self.folder / "samples" / f"step-{self.step:06d}.png"
        with spare(path, say=tqdm.write):
            self._draw_samples(samples, path)
        if path.exists():
            log_picture(acc, "samples", path, self.step)

    def _draw_samples(self, samples: list, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        if len(self.shape) == 3:
            save_image_grid(samples, path)
        else:
            rng = np.random.default_rng(self.config.seed)
            real = [
                load_item(self.feed.dataset, int(i))
                for i in rng.choice(self.feed.items, min(6, self.feed.items), replace=False)
            ]
            pipeline_units = self._pipeline(self.accelerator.unwrap_model(self.model))
            save_sequence_plot(np.stack(samples), pipeline_units._decode(torch.stack(real), "np"), path)
            np.save(path.with_suffix(".npy"), np.stack(samples))

    def _evaluate(self) -> None:
        """Metrics of the EMA weights; where they are the best so far, the pipeline in best/."""
        c, acc = self.config, self.accelerator
        with self.average.weights() as model:
            pipeline = self._pipeline(model)
            values = self.evaluator(pipeline, c.ddpm_num_inference_steps, self.scheduler)
        self.evaluation = self.evaluator.records(values, pipeline, c.ddpm_num_inference_steps, step=self.step)
        if acc.is_main_process:
            tqdm.write(f"step {self.step}:\n{self.evaluator.describe(values)}")
        record = {f"eval/{name}": value for name, value in values.items()}
        record["eval/num_samples"] = c.eval_num_samples
        if acc.is_main_process:
            self.metrics.append({"step": self.step, **record})
        acc.log(record, step=self.step)
        metric = c.metric_for_best or self.evaluator.metrics[0]
        best = self.best
        # a value that is not a number is beaten by any
        if best is None or best["metric"] != metric or math.isnan(best["value"]) or values[metric] < best["value"]:
            self.best = {"metric": metric, "value": values[metric], "step": self.step}
            self._save_pipeline("best")

    # -- saving and resuming -------------------------------------------------------------------

    def _save_pipeline(self, name: str = "pipeline") -> None:
        acc = self.accelerator
        with self.average.weights() as model:
            if acc.is_main_process:
                aside = self.folder / f"{name}{checkpoint.ASIDE}"
                shutil.rmtree(aside, ignore_errors=True)
                self._pipeline(model).save_pretrained(aside)
                self._describe_pipeline(aside)
                self._keep_others(self.folder / name, aside)
                checkpoint.replace_folder(aside, self.folder / name)
        acc.wait_for_everyone()

    def _keep_others(self, old: Path, new: Path) -> None:
        """Take what someone has put into the pipeline's folder along; where that fails, the old folder stays."""
        if not old.exists():
            return
        try:
            carry_over(old, new)
        except (OSError, ValueError) as error:
            kept = old.with_name(f"{old.name}.before-{self.step:06d}")
            os.replace(old, kept)
            tqdm.write(f"warning: {old} holds files that cannot be taken along ({error}); it is now {kept}")

    def _describe_pipeline(self, folder: Path) -> None:
        """Put what the card tells, and the card, beside the weights; what cannot be written is left out and named."""
        acc, say = self.accelerator, tqdm.write
        if self.evaluation:
            with spare(folder / "evaluation.json", say):
                (folder / "evaluation.json").write_text(json.dumps(self.evaluation, indent=1))
        self.record.write(
            folder, self.metrics, self.step, acc.device.type, say, processes=acc.num_processes,
            global_batch=self._global_batch(acc.num_processes), mixed_precision=acc.mixed_precision,
            draws=DRAWS,
        )  # fmt: skip
        with spare(folder / "README.md", say):
            write_card(folder)

    def _pipeline_step(self) -> int | None:
        """Return the step at which pipeline/ was saved, or None where there is none that says so."""
        try:
            return read_json(self.folder / "pipeline" / "training.json").get("steps")
        except ValueError:
            return None

    def _newest_checkpoint(self) -> str:
        found = checkpoint.list_checkpoints(self.folder / "checkpoints")
        return str(found[-1][1]) if found else "none"

    def _save_checkpoint(self) -> None:
        c, acc = self.config, self.accelerator
        folder = self.folder / "checkpoints"
        if acc.is_main_process:
            checkpoint.begin(folder, self.step)
        acc.wait_for_everyone()
        aside = folder / f"step-{self.step:06d}{checkpoint.ASIDE}"
        acc.save_state(aside)
        average = self.average.state()
        if acc.is_main_process:
            if average:
                save_file(average, aside / "ema.safetensors")
            progress = {
                "step": self.step, "skipped_images": self.skipped, "interval": self._interval,
                "evaluation": self.evaluation, "best": self.best, "data": self.feed.fingerprint(),
                "feed": self.feed.state(self.step), "files": self.feed.files.marks,
                "global_batch": self._global_batch(acc.num_processes), "draws": DRAWS,
            }  # fmt: skip
            (aside / "progress.json").write_text(json.dumps(progress))
            (aside / "clock.json").write_text(json.dumps({"seconds": self.record.seconds()}))
        acc.wait_for_everyone()
        if acc.is_main_process:
            checkpoint.finish(aside, c.checkpoints_total_limit or None)
        acc.wait_for_everyone()

    def _resume(self) -> None:
        newest = checkpoint.latest(
            self.folder / "checkpoints", skip_damaged=self.config.resume_from_checkpoint == "latest-valid"
        )
        if newest is None:
            # the first checkpoint comes before pipeline/ and before later metrics
            done = max((record["step"] for record in self.metrics.read()), default=0)
            every = read_mapping(self.folder / "config.yaml").get("checkpointing_steps")
            if (self.folder / "pipeline").exists() or (is_whole(every) and done > every):
                raise ValueError(
                    f"{self.folder} holds a trained run ({done:,} steps in metrics.jsonl) but no checkpoint in "
                    f"checkpoints/, so it cannot go on.{checkpoint.WAYS_OUT}"
                )
            self.accelerator.print(f"{self.folder} has no checkpoint yet: its run begins at step 0")
            return
        progress = checkpoint.read_progress(newest)
        try:
            self.accelerator.load_state(newest)
            self.average.load(newest / "ema.safetensors")
        except Exception as error:
            raise ValueError(f"the checkpoint {newest} cannot be loaded: {error}") from error
        data = self.feed.fingerprint()
        if progress["data"] != data:
            what = {"items": "number of items", "shape": "shape", "digest": "content", "labels": "classes of the items",
                    "conditions": "conditions"}  # fmt: skip
            earlier = {key: progress["data"].get(key) for key in data}
            changed = ", ".join(
                what[key] + ("" if key not in ("items", "shape") else f" {reprlib.repr(earlier[key])} -> {data[key]}")
                for key in data if earlier[key] != data[key]
            )  # fmt: skip
            if self.feed.split and "files" not in progress:
                changed += "; or the run is of ddpm_hf 0.2.0 or earlier, which held out other items of sequences"
            raise ValueError(f"the data is not that of the run in {self.folder} ({changed}): choose another output_dir")
        changed = self.feed.files.differing(progress.get("files", self.feed.files.marks))
        if changed:
            self.accelerator.print(
                f"note: since the checkpoint of step {progress['step']} the data was written to: {changed}. What is "
                "compared of its content (the scaling, or some items) is the same"
            )
        if progress["draws"] != DRAWS:
            self.accelerator.print(
                f"note: up to step {progress['step']} this run drew noise and timesteps with {progress['draws']}; from "
                f"here on it draws them with {DRAWS}. Their distribution is the same, but the numbers are not those of "
                "the run that was not stopped"
            )
        self._feed_state = progress["feed"]
        self.feed.check(self._feed_state)
        now = self._global_batch(self.accelerator.num_processes)
        if self._feed_state and progress["global_batch"] != now:
            raise ValueError(
                f"streamed data is resumed with the same global batch, {progress['global_batch']}; got {now} (another "
                "number of processes)"
            )
        self.step, self.skipped = progress["step"], progress["skipped_images"]
        self._interval = progress["interval"]
        self.evaluation, self.best = progress["evaluation"], progress["best"]
        self._seconds_before = progress["seconds"]
