"""The record of a run for the card of its pipeline: data, options, command, machine, time, pictures.

Paths of the machine are left out: the folder of a pipeline is made to be published.
"""

import contextlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm_hf.config import BUNDLED, TrainConfig
from ddpm_hf.plots import save_loss_plot
from ddpm_hf.run.checkpoint import ASIDE, MetricsFile
from ddpm_hf.run.lineage import Lineage
from ddpm_hf.version import __version__

PLOT_SECONDS = 60  # a plot of the losses that is older is drawn anew at the next save
SAMPLES = re.compile(r"step-([0-9]{6,})\.png")


@contextlib.contextmanager
def spare(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Write a file that a run can go on without. If writing fails, its remains are removed and a warning is printed."""
    try:
        yield
    except Exception as error:  # of the disk, of the libraries that draw, of a text that has no UTF-8
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        say(f"warning: {path} could not be written, and is left out: {type(error).__name__}: {error}")


def sample_pictures(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of each picture of samples that a run has drawn, oldest first; other files do not count."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in files if (match := SAMPLES.fullmatch(path.name)))


def without_folders(text: str) -> str:
    """Return the last name of an absolute path, or of one through ".."; return other texts unchanged."""
    path = os.path.expanduser(text)
    return Path(os.path.abspath(path)).name if os.path.isabs(path) or ".." in Path(path).parts else text


def public_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the folders of the machine."""
    return {name: without_folders(v) if isinstance(v, str) else v for name, v in options.items()}


def public_command(arguments: list[str]) -> str:
    """Return a command line as one line, without the folders of the machine."""
    parts = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        parts.append(name + equals + without_folders(value) if equals else without_folders(argument))
    return shlex.join(parts)


def machine(device: str = "cpu") -> str:
    """Return the name of the hardware that computes on a kind of device here."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return f"{device} ({platform.platform()})"
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, CPU"


def versions() -> dict[str, str]:
    """Return the versions of Python, of ddpm_hf and of the libraries that numbers depend on."""
    libraries = {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate")}
    return {"python": platform.python_version(), "ddpm_hf": __version__, **libraries}


def duration(seconds: float) -> str:
    """Return seconds as text, such as "3 h 12 min", "4 min 5 s" or "12 s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


def data_facts(
    config: TrainConfig, dataset, items: int | None, shape: tuple, class_names: Sequence[str] | None = None,
    class_counts: Sequence[int] | None = None,
) -> dict:  # fmt: skip
    """Return the facts about the data: name, number of items and their shape, `hub_id` if it is on the Hub, `classes`.

    Args:
        config: the options of the run.
        dataset: the dataset that is given from Python, if there is one.
        items: the number of items; None if it is not known.
        shape: the shape of an item, (C, *spatial).
        class_names: the names of the classes; None for data without classes.
        class_counts: the number of items of each class; None if it is not known.
    """
    given = config.dataset_name or config.train_data_dir or config.train_data_file
    name = f"a data set given from Python ({type(dataset).__name__})"
    if given:
        name = without_folders(str(Path(given))) if Path(given) != Path() else Path.cwd().name
    on_hub = config.dataset_name and config.dataset_name not in BUNDLED and not Path(config.dataset_name).exists()
    facts = {"name": name, "hub_id": name if on_hub else None, "items": items, "shape": list(shape)}
    if class_names is not None:
        facts["classes"] = dict(zip(class_names, class_counts or [None] * len(class_names)))
    return facts


class RunRecord:
    """Facts and time of a run. The time goes on over stops, as far as checkpoints record it.

    Args:
        config: the options of the run.
        data: the facts of its data; see `data_facts`.
        command: the command line that started it, or None.
        options: the options that have an effect, as `TrainConfig.applied` gives them.

    Attributes:
        lineage: the origin of the run's weights; None for new weights.
    """

    def __init__(self, config: TrainConfig, data: dict, command: list[str] | None, options: dict[str, Any]):
        self.config, self.data, self.command, self.options = config, data, command, options
        self.lineage: Lineage | None = None
        self._before = 0.0
        self._drawn: dict[str, float] = {}  # when the losses were drawn, by the name of the folder
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds that the run has taken so far."""
        return self._before + time.monotonic() - self._started

    def start(self, before: float) -> None:
        """Start the clock. `before` is the number of seconds that the run has already taken."""
        self._before, self._started = before, time.monotonic()

    def write(
        self, folder: Path, metrics: MetricsFile, step: int, device: str, say: Callable[[str], None], **more
    ) -> None:
        """Write training.json and the pictures into the folder of the pipeline saved at `step`.

        Drawing the losses takes longer than the rest of a small pipeline's save. They are drawn at the run's end, where
        samples are drawn, and where the newest plot is `PLOT_SECONDS` old; other saves take the plot of the earlier
        pipeline along.
        """
        run = Path(self.config.output_dir)
        samples_step = None
        with spare(folder / "samples.png", say):
            pictures = [(at, path) for at, path in sample_pictures(run / "samples") if at <= step]
            if pictures:
                shutil.copyfile(pictures[-1][1], folder / "samples.png")
                samples_step = pictures[-1][0]
        with spare(folder / "loss.png", say):
            earlier = folder.with_name(folder.name.removesuffix(ASIDE)) / "loss.png"
            looked_at = step in (samples_step, self.config.max_train_steps)
            old = time.monotonic() - self._drawn.get(folder.name, -math.inf) >= PLOT_SECONDS
            if looked_at or old or not earlier.exists():
                losses = [record for record in metrics.read() if "loss" in record and record["step"] <= step]
                if len(losses) > 1:
                    save_loss_plot(losses, folder / "loss.png")
                    self._drawn[folder.name] = time.monotonic()
            else:
                shutil.copyfile(earlier, folder / "loss.png")
        with spare(folder / "training.json", say):
            facts = {
                "name": os.fsencode(run.resolve().name).decode(errors="replace"),
                "steps": step, "seconds": round(self.seconds(), 1), "machine": machine(device),
                "samples_step": samples_step, "versions": versions(), "data": self.data, **more,
                **({"lineage": self.lineage.public()} if self.lineage else {}),
                "command": public_command(self.command) if self.command else None,
                "options": public_options(self.options),
            }  # fmt: skip
            (folder / "training.json").write_text(json.dumps(facts, indent=1))
