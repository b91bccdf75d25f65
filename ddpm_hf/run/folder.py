"""The folder of a run: the places of its files, and the checks of it before training writes anything."""

import contextlib
import dataclasses
import shlex
import shutil
from pathlib import Path

from ddpm_hf.config import NOT_CONTINUED, TrainConfig, in_present_form
from ddpm_hf.options import ModelOptions
from ddpm_hf.reading import is_whole, read_json, read_mapping
from ddpm_hf.run import checkpoint
from ddpm_hf.run.lock import HOLDER, LOCK


class RunFolder:
    """The folder of a run, which need not exist yet.

    Attributes:
        path: the folder.
        options: config.yaml, the options of the run.
        checkpoints: the folder of the checkpoints.
        pipeline: the folder of the newest saved pipeline.
        samples: the folder of the sample pictures.
        metrics: metrics.jsonl, as a `MetricsFile`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.options = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self.samples = self.path / "samples"
        self.metrics = checkpoint.MetricsFile(self.path / "metrics.jsonl")

    def __str__(self) -> str:
        return str(self.path)

    def open(self, config: TrainConfig, kind: str, given_model: bool) -> bool:
        """Make the folder if it is not there, and return True if it holds a run of these options already.

        Args:
            config: the options of the run that is about to start.
            kind: the kind of its data, one of `scope.KINDS`.
            given_model: True if its model comes from Python.

        Raises:
            ValueError: the folder holds something else, or cannot be written.
        """
        try:
            found = self.holds_run(config, kind, given_model)
            self._try_to_write(config.to_yaml())
        except OSError as error:
            raise ValueError(f"output_dir must be a folder that can be written: {error}") from error
        return found

    def holds_run(self, config: TrainConfig, kind: str, given_model: bool) -> bool:
        """Check the folder as `open` does, without writing, and return the same."""
        if self.options.exists():
            differences = config.differences(read_mapping(self.options), kind, given_model)
            if differences:
                listed = "\n  ".join(differences)
                raise ValueError(
                    f"output_dir {self} holds a run with other options; choose another output_dir, or the same "
                    f"options to resume it. They differ in:\n  {listed}{self._way_on(differences)}"
                )
            return True
        if self.checkpoints.is_dir():
            raise ValueError(
                f"output_dir {self} holds checkpoints but no config.yaml, by which a run is known: put it back, "
                "or choose another output_dir"
            )
        if self.path.exists() and (
            not self.path.is_dir()
            # a first start that was killed leaves only these
            or any(not path.name.endswith((checkpoint.ASIDE, LOCK, HOLDER)) for path in self.path.iterdir())
        ):
            raise ValueError(
                f"output_dir must be a new or empty folder, or the folder of this run: {self} holds other files"
            )
        return False

    def _way_on(self, differences: list[str]) -> str:
        """Return a line with the options that go on from this run with other options, if that can be done."""
        shapes = {f.name for f in dataclasses.fields(ModelOptions)} - {"dropout"}
        if shapes & {line.split(":")[0] for line in differences}:
            return ""
        return f"\nTo go on from this run with other options: {self.continuation()}"

    def continuation(self) -> str:
        """Return the options, as on a command line, that continue this run in another folder."""
        other = f"{self.path}-continued"
        return f"--continue_from {shlex.quote(str(self.path))} --output_dir {shlex.quote(other)}"

    def _try_to_write(self, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / f".write{checkpoint.ASIDE}"
        try:
            probe.write_text(text)  # not an empty file, which can be made on a full disk too
        finally:
            probe.unlink(missing_ok=True)

    def changed_options(self, config: TrainConfig, kind: str, given_model: bool) -> list[str]:
        """Return "option: earlier -> now" for each option that differs and has no effect on a complete run.

        The arguments are those of `open`. Options that say where the run lies, how this process works or what is
        published are left out.
        """
        earlier = in_present_form(read_mapping(self.options))
        return [
            f"{name}: {earlier[name]} -> {now}"
            for name, now in config.applied(kind, given_model).items()
            if name in earlier and earlier[name] != now
            and name not in NOT_CONTINUED and not name.startswith(("hub_", "push_to_hub"))
        ]  # fmt: skip

    def check_space(self, needed: int) -> None:
        """Check that the disk has `needed` bytes free, where the file system tells.

        Raises:
            ValueError: the disk has less.
        """
        disk = shutil.disk_usage(self.path)
        if disk.total and disk.free < needed:
            raise ValueError(
                f"output_dir must be on a disk with room for a save, at least {needed / 1e6:,.1f} MB: "
                f"{self} has {disk.free / 1e6:,.1f} MB"
            )

    def free_space(self) -> str:
        """Return " (... MB are free there)", or an empty text where that is not known."""
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(self.path).free / 1e6:,.1f} MB are free there)"
        return ""

    def newest_checkpoint(self) -> str:
        """Return the path of the newest checkpoint, for messages, or "none"."""
        found = checkpoint.list_checkpoints(self.checkpoints)
        return str(found[-1][1]) if found else "none"

    def check_never_saved(self) -> None:
        """Check that a run without a checkpoint was stopped before its first one.

        Raises:
            ValueError: the run had checkpoints, so that it cannot go on without them.
        """
        # the first checkpoint comes before pipeline/ and before the metrics of later steps
        done = max((record["step"] for record in self.metrics.read()), default=0)
        every = read_mapping(self.options).get("checkpointing_steps")
        if self.pipeline.exists() or (is_whole(every) and done > every):
            raise ValueError(
                f"{self} holds a trained run ({done:,} steps in metrics.jsonl) but no checkpoint in "
                f"checkpoints/, so it cannot go on.{checkpoint.WAYS_OUT}"
            )

    def pipeline_step(self) -> int | None:
        """Return the step at which pipeline/ was saved, or None where it does not tell or does not exist."""
        try:
            return read_json(self.pipeline / "training.json").get("steps")
        except ValueError:
            return None
