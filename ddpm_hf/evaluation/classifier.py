"""A classifier that the user names: the share of samples that it takes for the class that they were asked for."""

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.evaluation.networks import first_output, load_network


class Classifier:
    """A classifier of generated samples, in a TorchScript or .pt2 file.

    It gets images as float32 (B, C, H, W) in [0, 1], and sequences as float32 (B, C, length) in the units of the data.
    It returns (B, classes): a larger value means a more probable class, and the classes are in the model's order.

    Args:
        file: the file.
        shape: the shape of a sample, (C, *spatial).
        classes: the number of the model's classes.
        device: the device to compute on.

    Raises:
        ValueError: if the file cannot be loaded, or the network does not take such samples or return such an output.
    """

    def __init__(self, file: str, shape: tuple, classes: int, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.network = load_network(file, self.device, "classifier")
        output = first_output(self._run, (2, *shape), f"classifier {file}")
        if not isinstance(output, Tensor) or tuple(output.shape) != (2, classes):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"classifier {file} must return (B, {classes}), one value for each class of the model; got {got} for "
                "B = 2"
            )

    @torch.no_grad()
    def _run(self, samples: Tensor) -> Tensor:
        return self.network(samples.to(self.device, torch.float32))

    def __call__(self, samples: np.ndarray) -> Tensor:
        """Return the class that the network finds most probable for each sample, int64 (B,) on the CPU.

        Args:
            samples: images (B, H, W, C) in [0, 1], or sequences (B, C, length), as a pipeline returns them.
        """
        x = torch.from_numpy(np.ascontiguousarray(samples))
        return self._run(x.movedim(-1, 1) if x.ndim == 4 else x).argmax(dim=1).cpu()
