"""Networks of the user in TorchScript files, for features and for classes."""

from pathlib import Path

import torch


def load_torchscript(path: str | Path, device: str | torch.device, option: str, others: str = ""):
    """Load a network from a TorchScript file, for computing only.

    Args:
        path: the file.
        device: the device to compute on.
        option: the name of the option that names the file, for messages.
        others: what else the option may be, as words before "a TorchScript file".

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{option} must be {others}a TorchScript file; there is no file {path}")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:
        raise ValueError(f"{option} {path} is not a TorchScript file: {error}") from error
