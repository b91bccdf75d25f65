"""Saving and resuming a run: checkpoints, and pipelines with their cards."""

import json
import os
import reprlib
import shutil
from pathlib import Path

from safetensors.torch import save_file
from tqdm.auto import tqdm

from ddpm_hf.hub.card import write_card
from ddpm_hf.hub.contents import carry_over
from ddpm_hf.randomness import DRAWS
from ddpm_hf.run import checkpoint
from ddpm_hf.run.record import RunRecord, spare
from ddpm_hf.trainer.progress import Run


class Saver:
    """Writes and reads checkpoints and pipelines; all processes must call its methods together.

    Args:
        run: what the pieces of the trainer share.
        record: facts and time of the run, for the card.
    """

    def __init__(self, run: Run, record: RunRecord):
        self.run, self.record = run, record

    # -- pipelines -----------------------------------------------------------------------------

    def save_pipeline(self, name: str = "pipeline") -> None:
        """Save the averaged weights as a pipeline with its card in the run folder, in the place of an earlier one.

        Raises:
            TrainingError: as `Run.writing`; so does `save_checkpoint`.
        """
        acc, folder = self.run.accelerator, self.run.folder.path
        with self.run.writing(), self.run.average.weights() as model:
            if acc.is_main_process:
                aside = folder / f"{name}{checkpoint.ASIDE}"
                checkpoint.restore_folder(folder / name)  # first, for what someone has put there
                shutil.rmtree(aside, ignore_errors=True)
                self.run.pipeline(model).save_pretrained(aside)
                self._describe(aside)
                self._keep_others(folder / name, aside)
                checkpoint.replace_folder(aside, folder / name)
            acc.wait_for_everyone()

    def _keep_others(self, old: Path, new: Path) -> None:
        """Take along what the user has put into the pipeline's folder; where that fails, keep the old folder."""
        if not old.exists():
            return
        try:
            carry_over(old, new)
        except (OSError, ValueError) as error:
            kept = old.with_name(f"{old.name}.before-{self.run.progress.step:06d}")
            os.replace(old, kept)
            tqdm.write(f"warning: {old} holds files that cannot be taken along ({error}); it is now {kept}")

    def _describe(self, folder: Path) -> None:
        """Write the card and what it tells beside the weights; a file that cannot be written is left out and named."""
        run, say = self.run, tqdm.write
        if run.progress.evaluation:
            with spare(folder / "evaluation.json", say):
                (folder / "evaluation.json").write_text(json.dumps(run.progress.evaluation, indent=1))
        self.record.write(
            folder, run.folder.metrics, run.progress.step, run.accelerator.device.type, say,
            processes=run.accelerator.num_processes, global_batch=run.global_batch,
            mixed_precision=run.accelerator.mixed_precision, draws=DRAWS,
        )  # fmt: skip
        with spare(folder / "README.md", say):
            write_card(folder)

    # -- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save weights, average, optimizer, random states and progress, aside first; then delete old checkpoints."""
        run, acc, step = self.run, self.run.accelerator, self.run.progress.step
        aside = run.folder.checkpoints / f"step-{step:06d}{checkpoint.ASIDE}"
        with run.writing():
            if acc.is_main_process:
                checkpoint.begin(run.folder.checkpoints, step)
            acc.wait_for_everyone()
            acc.save_state(aside)
            average, skipped = run.average.state(), run.skipped()
            if acc.is_main_process:
                if average:
                    save_file(average, aside / "ema.safetensors")
                (aside / "progress.json").write_text(json.dumps(self._progress(skipped)))
                (aside / "clock.json").write_text(json.dumps({"seconds": self.record.seconds()}))
            acc.wait_for_everyone()
            if acc.is_main_process:
                checkpoint.finish(aside, run.config.checkpoints_total_limit or None)
            acc.wait_for_everyone()

    def _progress(self, skipped: int) -> dict:
        """Return the contents of progress.json."""
        progress, feed = self.run.progress, self.run.feed
        kept = {
            "step": progress.step, "skipped_images": skipped, "interval": progress.interval,
            "evaluation": progress.evaluation, "best": progress.best, "data": feed.fingerprint(),
            "feed": feed.state(progress.place), "files": feed.files.marks, "global_batch": self.run.global_batch,
            "draws": DRAWS,
        }  # fmt: skip
        return {**kept, "pending": progress.pending} if progress.pending else kept

    def resume(self) -> bool:
        """Load the newest checkpoint: weights, optimizer, average, random states and progress; False if there is none.

        Raises:
            ValueError: the checkpoint is damaged or cannot be loaded, or the data or the global batch is another.
        """
        run = self.run
        newest = checkpoint.latest(
            run.folder.checkpoints, skip_damaged=run.config.resume_from_checkpoint == "latest-valid"
        )
        if newest is None:
            run.folder.check_never_saved()
            run.accelerator.print(f"{run.folder} has no checkpoint yet: its run begins at step {run.progress.step}")
            return False
        kept = checkpoint.read_progress(newest)
        self._check_data(kept)  # first, because a model of other classes cannot load the weights
        try:
            run.accelerator.load_state(newest)
            run.average.load(newest / "ema.safetensors")
        except Exception as error:
            raise ValueError(f"the checkpoint {newest} cannot be loaded: {error}") from error
        if kept["draws"] != DRAWS:
            run.accelerator.print(
                f"note: up to step {kept['step']} this run drew noise and timesteps with {kept['draws']}; from here on "
                f"it draws them with {DRAWS}. Their distribution is the same, but the numbers are not those of the run "
                "that was not stopped"
            )
        if kept["feed"] and kept["global_batch"] != run.global_batch:
            raise ValueError(
                f"streamed data is resumed with the same global batch, {kept['global_batch']}; got {run.global_batch} "
                f"(another number of processes). To go on with another batch: {run.folder.continuation()}"
            )
        progress = run.progress
        progress.step, progress.interval = kept["step"], kept["interval"]
        progress.skipped = kept["skipped_images"] if run.accelerator.is_main_process else 0
        progress.evaluation, progress.best, progress.pending = kept["evaluation"], kept["best"], kept["pending"]
        progress.stream, progress.seconds = kept["feed"], kept["seconds"]
        return True

    def _check_data(self, kept: dict) -> None:
        """Check that the data is that of the checkpoint, and say which of its files were written to since."""
        feed, now = self.run.feed, self.run.feed.fingerprint()
        if kept["data"] != now:
            names = {
                "items": "number of items",
                "shape": "shape",
                "digest": "content",
                "labels": "classes of the items",
                "conditions": "conditions",
            }
            earlier = {key: kept["data"].get(key) for key in now}
            changed = ", ".join(
                names[key] + ("" if key not in ("items", "shape") else f" {reprlib.repr(earlier[key])} -> {now[key]}")
                for key in now if earlier[key] != now[key]
            )  # fmt: skip
            if feed.split and "files" not in kept:
                changed += "; or the run is of ddpm_hf 0.2.0 or earlier, which held out other items of sequences"
            raise ValueError(
                f"the data is not that of the run in {self.run.folder} ({changed}): choose another output_dir. "
                f"To go on from this run with other data: {self.run.folder.continuation()}"
            )
        written = feed.files.differing(kept.get("files", feed.files.marks))
        if written:
            self.run.accelerator.print(
                f"note: since the checkpoint of step {kept['step']} the data was written to: {written}. What is "
                "compared of its content (the scaling, or some items) is the same"
            )
        feed.check(kept["feed"])
