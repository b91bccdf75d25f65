"""accelerate's trackers: a check of their packages, their start, and what they are given: values and sample images."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate.tracking import get_available_trackers
from PIL import Image
from tqdm.auto import tqdm

PACKAGES = {"comet_ml": "comet-ml"}  # of another name than the tracker


def check_installed(names: list[str]) -> None:
    """Check that the packages of these trackers are installed. Nothing is started.

    Raises:
        ValueError: if a package is missing; the message names it.
    """
    installed = [kind.value for kind in get_available_trackers()]
    missing = [name for name in names if name != "none" and name not in installed]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise ValueError(f"report_to names {', '.join(missing)}, which must be installed: pip install {packages}")


def start_trackers(accelerator, names: list[str], folder: Path, step: int) -> None:
    """Start the trackers. A run that resumes after `step` replaces what TensorBoard logged after it, and goes on in the
    same run of W&B.

    Raises:
        ValueError: if a tracker cannot be started.
    """
    if names == ["none"]:
        return
    tensorboard = {"purge_step": step + 1} if step else {}
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    wandb = {"dir": str(folder / "logs"), "name": folder.name, "id": identity, "resume": "allow"}
    if accelerator.is_main_process:
        (folder / "logs").mkdir(exist_ok=True)
    try:
        accelerator.init_trackers("ddpm_hf", init_kwargs={"tensorboard": tensorboard, "wandb": wandb})
    except Exception as error:  # not logged in, no network, a tracker's own kinds
        hint = " (wandb works without an account or network with WANDB_MODE=offline)" if "wandb" in names else ""
        raise ValueError(f"report_to {' '.join(names)} cannot be started: {error}{hint}") from error


def log_values(accelerator, values: dict, step: int) -> None:
    """Give the trackers the values of a step."""
    for tracker in accelerator.trackers:
        with _spared(tracker, step):
            tracker.log(values, step=step)


@contextlib.contextmanager
def _spared(tracker, step: int) -> Iterator[None]:
    """Let training go on without a point that a tracker cannot take, for instance because its server is down."""
    try:
        yield
    except Exception as error:  # a tracker's own kinds
        tqdm.write(f"warning: step {step}: {tracker.name} has not logged this step: {type(error).__name__}: {error}")


def log_picture(accelerator, name: str, file: Path, step: int) -> None:
    """Show an image file, pixel for pixel, in TensorBoard and W&B.

    accelerate has no common way to do so for the other trackers.
    """
    showing = [tracker for tracker in accelerator.trackers if tracker.name in ("tensorboard", "wandb")]
    if not showing:
        return
    with Image.open(file) as picture:
        shown = Image.new("RGBA", picture.size, "white")  # TensorBoard has no transparency
        shown.alpha_composite(picture.convert("RGBA"))
    shown = shown.convert("RGB")
    for tracker in showing:
        with _spared(tracker, step):
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(shown)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [shown]}, step=step)
