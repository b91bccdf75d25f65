"""accelerate's trackers: their names, starting them, and the sample pictures that two of them show."""

import hashlib
from pathlib import Path

import numpy as np
from accelerate.tracking import get_available_trackers
from PIL import Image

PACKAGES = {"comet_ml": "comet-ml"}  # of another name than the tracker


def check_installed(names: list[str]) -> None:
    """Nothing is started.

    Raises:
        ValueError: a tracker whose package is missing; it names the package.
    """
    installed = [kind.value for kind in get_available_trackers()]
    missing = [name for name in names if name != "none" and name not in installed]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise ValueError(f"report_to names {', '.join(missing)}, which must be installed: pip install {packages}")


def start_trackers(accelerator, names: list[str], folder: Path, step: int) -> None:
    """A run that is resumed after `step` takes the place of what was logged after that (TensorBoard, W&B).

    Raises:
        ValueError: one of them cannot be started.
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


def log_picture(accelerator, name: str, file: Path, step: int) -> None:
    """Show a picture, pixel for pixel, in TensorBoard and W&B; accelerate gives the other trackers no common way."""
    showing = [tracker for tracker in accelerator.trackers if tracker.name in ("tensorboard", "wandb")]
    if not showing:
        return
    with Image.open(file) as picture:
        shown = Image.new("RGBA", picture.size, "white")  # TensorBoard has no transparency
        shown.alpha_composite(picture.convert("RGBA"))
    shown = shown.convert("RGB")
    for tracker in showing:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(shown)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [shown]}, step=step)
