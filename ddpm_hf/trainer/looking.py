"""Looking at a run: losses and metrics, sample pictures, evaluations."""

import math
from collections.abc import Callable

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.loading import item_labels, load_item, underlying
from ddpm_hf.data.scaling import has_own_units
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.pairs import Pairs, chosen_pairs
from ddpm_hf.evaluation.settings import HIGHER_IS_BETTER
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.pipeline.pairs import enlarged
from ddpm_hf.plots import SHOWN_CHANNELS, picture_of, save_image_grid, save_sequence_plot
from ddpm_hf.randomness import Stream, generator_seeds
from ddpm_hf.run.checkpoint import LOOKS
from ddpm_hf.run.record import spare
from ddpm_hf.trainer.progress import Run, TrainingError
from ddpm_hf.trainer.saving import Saver
from ddpm_hf.trainer.trackers import log_picture, log_values

# Steps in a row whose gradients in fp16 may overflow. The loss scaler skips them and halves its factor, 2^16 at first:
# after so many, it is the model that has no finite gradients.
OVERFLOWS = 40
PLOTTED = 12  # rows of a plot of sequences with classes, at most


class LossWatch:
    """The losses and gradient norms of the steps: checked, averaged, and written to metrics.jsonl and the trackers."""

    def __init__(self, run: Run):
        self.run = run
        self._overflows = 0  # steps without a finite gradient in a row
        self._unseen: list[Tensor] = []  # of steps whose values are still on the device

    def add(self, values: Tensor) -> None:
        """Take (2,), the loss and the gradient norm of a step, without waiting for the device."""
        self._unseen.append(values)

    def check(self) -> None:
        """Bring the values to the host, as means over the processes.

        Raises:
            TrainingError: one of them is not finite; with fp16, the norms of more than `OVERFLOWS` steps in a row.
        """
        if not self._unseen:
            return
        acc, progress = self.run.accelerator, self.run.progress
        values = acc.reduce(torch.stack(self._unseen), "mean").tolist()
        first_step = progress.step - len(values) + 1
        self._unseen = []
        allowed = OVERFLOWS if acc.mixed_precision == "fp16" else 0
        for offset, (loss, grad_norm) in enumerate(values):
            self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
            if not math.isfinite(loss) or self._overflows > allowed:
                raise TrainingError(
                    f"step {first_step + offset}: the loss is {loss} and the gradient's norm {grad_norm}; stopped. "
                    f"The last good checkpoint is {self.run.folder.newest_checkpoint()}. A lower learning_rate, longer "
                    "lr_warmup_steps or another mixed_precision may help"
                )
        progress.interval += values

    def log(self, learning_rate: float, bar: tqdm) -> None:
        """Write the means since the last line to metrics.jsonl and to the trackers, which alone get times too.

        The mean norm leaves out the steps that the loss scaler of fp16 skipped, whose gradients were not finite.
        """
        acc, progress, items = self.run.accelerator, self.run.progress, self.run.feed.items
        values = np.array(progress.interval)
        finite = np.isfinite(values)
        loss, grad_norm = (np.where(finite, values, 0).sum(axis=0) / finite.sum(axis=0).clip(1)).tolist()
        record = {"step": progress.step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate}
        if not finite[:, 1].any():
            del record["grad_norm"]
        if items is not None:
            record["epoch"] = progress.place * self.run.global_batch / items
        if skipped := self.run.skipped():
            record["skipped_images"] = skipped
        progress.interval = []
        bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.2e}")
        if acc.is_main_process:
            with self.run.writing():
                self.run.folder.metrics.append(record)
        rate = bar.format_dict["rate"]
        timing = {"samples_per_second": rate * self.run.global_batch} if rate else {}
        values = {name: value for name, value in {**record, **timing}.items() if name != "step"}
        log_values(acc, values, progress.step)


def picture_classes(count: int, classes: int) -> list[int]:
    """Return the class of each sample of a picture with at most `count` samples (but one at least), row by row.

    Each class has a row of equally many; of more classes than samples, the first have one sample each.
    """
    return [number for number in range(min(count, classes)) for _ in range(max(1, count // classes))]


class Looks:
    """Sample pictures and evaluations of the averaged weights, made by all processes together.

    Args:
        run: what the pieces of the trainer share.
        saver: saves the best pipeline.
        evaluator: measures; None: there are no evaluations.
        between: called before each batch of samples, equally often on every process; what it raises ends the look.
    """

    def __init__(self, run: Run, saver: Saver, evaluator: Evaluator | None, between: Callable[[], None]):
        self.run, self.saver, self.evaluator, self.between = run, saver, evaluator, between
        names, count = run.feed.class_names, run.config.num_samples
        self._classes = None if names is None else picture_classes(count, len(names))
        pairs, held_out = Pairs.of_feed(run.feed)
        self._pairs = held_out or pairs
        if self._pairs is not None:
            self._asked = chosen_pairs(len(self._pairs.dataset), count, run.config.seed)
            if names is not None:
                self._classes = item_labels(self._pairs.dataset, run.feed.labels)[self._asked].tolist()
        # pictures of 8 bits are drawn as the pipeline gives them, and other images by their values
        shape, self._own_units = run.feed.shape, has_own_units(run.feed.scaling)
        self._by_values = len(shape) == 3 and (self._own_units or shape[0] not in SHOWN_CHANNELS)
        self._form = {"output_type": "np"} if self._by_values else {}

    def due(self) -> list[str]:
        """Return what is to be made after this step, of `LOOKS`."""
        c, step = self.run.config, self.run.progress.step
        last = step == c.max_train_steps
        samples = last or (c.save_samples_steps and step % c.save_samples_steps == 0)
        evaluation = self.evaluator is not None and (last or step % c.eval_steps == 0)
        return [name for name, due in zip(LOOKS, (samples, evaluation)) if due]

    def make(self, name: str) -> None:
        """Make one of `LOOKS`; an evaluation that the options no longer ask for is left out."""
        if name == "samples":
            self.save_samples()
        elif self.evaluator is not None:
            self.evaluate()

    def _pipeline(self, model):
        """Return a pipeline of the model; on a card it replays the model's calls, unless nothing is to be captured."""
        return self.run.pipeline(model).use_cuda_graphs(self.run.config.compile != "none")

    def save_samples(self) -> None:
        """Sample from the averaged weights, from the same x_T every time, and draw the samples in one picture.

        With classes, the picture has a row of each class. With paired conditions, it has the condition and the true
        item beside each sample, of held-out pairs if there are any.
        """
        c, acc, shares = self.run.config, self.run.accelerator, Shares(self.run.accelerator)
        count = c.num_samples if self._classes is None else len(self._classes)
        numbers, size, samples, faults = shares.of(count), c.eval_batch_size, [], []
        with self.run.average.weights() as model:
            pipeline = self._pipeline(model)
            for start in range(0, shares.largest(count), size):
                self.between()
                part = numbers[start : start + size]
                if not part or faults:
                    continue
                seeds = generator_seeds(c.seed, Stream.SAMPLES, part)
                generators = [torch.Generator().manual_seed(s) for s in seeds]
                classes = None if self._classes is None else [self._classes[number] for number in part]
                named = {"generator": generators, "class_labels": classes, "return_dict": False}
                if self._pairs is not None:
                    named["condition"] = self._pairs.conditions(self._asked[list(part)])
                try:
                    samples += list(pipeline(batch_size=len(part), **named, **self._form)[0])
                except FloatingPointError as error:  # training goes on: the next average may be better
                    faults.append(str(error))
        samples, faults = gather_object(samples), gather_object(faults)
        if not acc.is_main_process:
            return
        if faults:
            tqdm.write(f"warning: step {self.run.progress.step}: there is no picture of samples: {faults[0]}")
            return
        step = self.run.progress.step
        path = self.run.folder.samples / f"step-{step:06d}.png"
        with spare(path, say=tqdm.write):
            self._draw(samples, path)
        if path.exists():
            log_picture(acc, "samples", path, step)

    def _draw(self, samples: list, path) -> None:
        path.parent.mkdir(exist_ok=True)
        feed, rows_of_classes = self.run.feed, self._classes is not None and self._pairs is None
        a_class = self._classes.count(0) if rows_of_classes else 1
        if self._by_values:
            values = np.moveaxis(np.stack(samples), -1, 1)
            if self._own_units:
                np.save(path.with_suffix(".npy"), values)
                samples = [picture_of(levels) for levels in feed.scaling.to_levels(values)]
            else:
                samples = [picture_of(levels) for levels in values]
        if len(feed.shape) == 3:
            if self._pairs is not None:
                samples = self._beside_pairs(samples)
            columns = 3 if self._pairs is not None else a_class if a_class > 1 else None
            save_image_grid(samples, path, columns=columns)
            return
        shown, titles, conditions = samples, None, None
        if rows_of_classes:
            shown = samples[::a_class][:PLOTTED]
            titles = [feed.class_names[number] for number in range(len(shown))]
        if self._pairs is None:
            real = torch.stack([self._item(index) for index in self._real_items()])
        else:
            numbers = self._asked[:PLOTTED]
            real, conditions = self._pairs.items(numbers), self._pairs.conditions(numbers).numpy()
        in_units = self.run.pipeline(self.run.accelerator.unwrap_model(self.run.model))
        rows = PLOTTED if rows_of_classes else 6
        names = getattr(underlying(feed.dataset), "channel_names", None)
        save_sequence_plot(np.stack(shown), in_units._decode(real, "np"), path, rows, titles, conditions, names)
        np.save(path.with_suffix(".npy"), np.stack(samples))

    def _beside_pairs(self, samples: list) -> list:
        """Return three pictures for each sample: its condition in the size of the sample, the sample, the true item."""
        conditions = enlarged(self._pairs.levels(self._asked), tuple(self.run.feed.shape[1:])).numpy()
        truths = (self._pairs.items(self._asked) / self.run.feed.scaling.limit / 2 + 0.5).clamp(0, 1).numpy()
        rows = zip(map(picture_of, conditions), samples, map(picture_of, truths))
        return [picture for row in rows for picture in row]

    def _real_items(self) -> list[int | None]:
        """Draw the items that are plotted beside samples: one of each class (None: it has none), or any six."""
        feed, rng = self.run.feed, np.random.default_rng(self.run.config.seed)
        if self._classes is None:
            return rng.choice(feed.items, min(6, feed.items), replace=False).tolist()
        of_classes = [np.flatnonzero(feed.item_labels == number) for number in dict.fromkeys(self._classes)]
        return [int(rng.choice(items)) if len(items) else None for items in of_classes[:PLOTTED]]

    def _item(self, index: int | None) -> Tensor:
        feed = self.run.feed
        return torch.full(feed.shape, torch.nan) if index is None else load_item(feed.dataset, index)

    def evaluate(self) -> None:
        """Measure the averaged weights; where they are the best so far, save the pipeline in best/."""
        c, acc, progress = self.run.config, self.run.accelerator, self.run.progress
        steps = c.ddpm_num_inference_steps
        with self.run.average.weights() as model:
            pipeline = self._pipeline(model)
            try:
                values = self.evaluator(pipeline, steps, self.run.scheduler, self.between)
            except FloatingPointError as error:  # on every process; training goes on
                if acc.is_main_process:
                    tqdm.write(f"warning: step {progress.step}: the evaluation is left out: {error}")
                return
        progress.evaluation = self.evaluator.records(values, pipeline, steps, step=progress.step)
        record = {f"eval/{name}": value for name, value in values.items()}
        record["eval/num_samples"] = c.eval_num_samples
        if acc.is_main_process:
            tqdm.write(f"step {progress.step}:\n{self.evaluator.describe(values)}")
            with self.run.writing():
                self.run.folder.metrics.append({"step": progress.step, **record})
        log_values(acc, record, progress.step)
        metric, best = c.metric_for_best or self.evaluator.metrics[0], progress.best
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        # any value is better than one that is not a number
        worse = best is None or best["metric"] != metric or math.isnan(best["value"])
        if worse or sign * values[metric] < sign * best["value"]:
            self.saver.save_pipeline("best")
            progress.best = {"metric": metric, "value": values[metric], "step": progress.step}
