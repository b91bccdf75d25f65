"""Networks of the user in files of TorchScript or of torch.export, for features and for classes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddpm_hf.evaluation.shares import Shares

EXPORTED = ".pt2"  # the ending of the files that torch.export.save writes
ROWS = 256  # sequences that a network gets at once


def load_network(path: str | Path, device: str | torch.device, option: str, others: str = ""):
    """Load a network from a file, for computing only: torch.export's if it ends in .pt2, else TorchScript's.

    Args:
        path: the file.
        device: the device to compute on.
        option: the name of the option that names the file, for messages.
        others: what else the option may be, as words before "a TorchScript file".

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    exported = str(path).lower().endswith(EXPORTED)
    kind = "torch.export file" if exported else "TorchScript file"
    if not Path(path).is_file():
        raise ValueError(f"{option} must be {others}a TorchScript or torch.export file; there is no file {path}")
    try:
        if not exported:
            return torch.jit.load(str(path), map_location=device).eval()
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(torch.export.load(str(path)), torch.device(device)).module()
    except Exception as error:
        raise ValueError(f"{option} {path} is not a {kind}: {error}") from error


def first_output(run: Callable[[Tensor], Tensor], shape: tuple, what: str, why: str = ""):
    """Return what a network gives for zeros, to be looked at before anything long is computed.

    Args:
        run: runs the network.
        shape: the shape of the zeros, with the number of items first.
        what: the option and the file, for messages.
        why: words after the rule in the message.

    Raises:
        ValueError: if the network does not take such zeros.
    """
    try:
        return run(torch.zeros(shape))
    except Exception as error:  # a network of the user may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        form = f"float32 (B, {', '.join(map(str, shape[1:]))})"
        raise ValueError(f"{what} must take {form}{why}: {reason}") from error


class SequenceFeatures:
    """A network of the user that turns sequences into feature vectors.

    Args:
        name: the file, of a network from float32 (B, C, length), in the units of the data, to (B, D).
        shape: the shape (C, length) of a sequence.
        shares: the exchange between processes, which share the sequences.

    Attributes:
        digest: the SHA-256 of the file.

    Raises:
        ValueError: if the file cannot be loaded, or does not hold such a network.
    """

    def __init__(self, name: str, shape: tuple, shares: Shares):
        self.name, self.shares, self.device = name, shares, shares.accelerator.device
        self.network = load_network(name, self.device, "feature_network")
        self.digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        features = first_output(self._run, (3, *shape), f"feature_network {name}", ", for any B")
        if features.ndim != 2 or len(features) != 3:
            raise ValueError(f"feature_network {name} must give (B, D), got {tuple(features.shape)} for B = 3")

    @torch.no_grad()
    def _run(self, sequences: Tensor) -> Tensor:
        return self.network(sequences.to(self.device, torch.float32)).double().cpu()

    def __call__(self, sequences: Tensor) -> Tensor:
        """Return the features (n, D), float64, of sequences (n, C, length), which all processes must give alike."""
        share = self.shares.of(len(sequences))
        parts = sequences[share.start : share.stop].split(ROWS) if len(share) else ()
        return self.shares.collect(parts, self._run)[0]
