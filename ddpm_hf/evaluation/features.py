"""Features of pictures, such as FID compares: of clean-fid's Inception, a network in a file, or plain pixels.

The network is loaded before any long work; an error says which file is missing and where to put it.
"""

import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_hf.evaluation.networks import first_output, load_network

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION
PIXELS = 8  # the features "pixels" are the values of a picture resized to this side


class FeatureNetwork:
    """A network that turns pictures into feature vectors.

    Args:
        name: "inception", clean-fid's network; the path of that file or of any TorchScript or .pt2 file, a network
            (B, 3, S, S) float32 in [0, 255] -> (B, D); or "pixels", the values of the picture at 8x8 pixels, which
            needs no file and compares runs with each other, not with published values.
        resolution: S, the side in pixels of the input of a network in a file.
        device: the device to compute on.

    Attributes:
        digest: the SHA-256 of the network's file (or "pixels") and the resolution, by which networks are told apart.
        dimensions: D, the number of features.

    Raises:
        ValueError: if the file is missing (the error says what to put where), or is not such a network.
    """

    def __init__(self, name: str = "inception", resolution: int = 299, device: str | torch.device = "cpu"):
        from cleanfid.resize import make_resizer

        self.name, self.device = name, torch.device(device)
        if name == "pixels":
            resolution, self.network, self.digest = PIXELS, lambda x: x.flatten(1) / 255, "pixels"
        else:
            path = _inception_path() if name == "inception" else Path(name)
            if path.name == INCEPTION:
                resolution, self.network = 299, _inception(path, name, self.device)
            else:
                self.network = load_network(path, self.device, "feature_network", "'inception', 'pixels' or ")
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.digest += f"-{resolution}"
        self._resize = make_resizer("PIL", False, "bicubic", (resolution, resolution))
        self.dimensions = self._check(resolution)

    def _check(self, resolution: int) -> int:
        """Run the network on two blank pictures, and return the number of features."""
        blank = (2, 3, resolution, resolution)
        features = first_output(self._run, blank, f"feature_network {self.name}", ", as feature_resolution says")
        if features.ndim != 2 or len(features) != 2:
            raise ValueError(f"feature_network {self.name} must give (B, D), got {tuple(features.shape)} for B = 2")
        return features.shape[1]

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        features = self.network(images.to(self.device))
        while features.ndim > 2 and features.shape[-1] == 1:
            features = features[..., 0]
        return features.float().cpu()

    def __call__(self, images: np.ndarray) -> Tensor:
        """Compute the features of pictures.

        Args:
            images: 8-bit pictures (B, H, W, C) with 1, 3 or 4 channels.

        Returns:
            The features, float32 (B, D) on the CPU.

        Raises:
            ValueError: if the pictures have another type or number of channels.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4):
            raise ValueError(f"images must be 8-bit (B, H, W, 1, 3 or 4), got {images.dtype} {images.shape}")
        resized = np.stack([self._resize(_to_rgb(image)) for image in images])
        return self._run(torch.from_numpy(resized).movedim(-1, 1))


def _to_rgb(image: np.ndarray) -> np.ndarray:
    """Turn a picture (H, W, C) into RGB: grey is repeated three times, and transparent pixels lie on white."""
    if image.shape[2] == 1:
        return image.repeat(3, axis=2)
    if image.shape[2] == 4:
        white = Image.new("RGBA", image.shape[1::-1], "white")
        return np.asarray(Image.alpha_composite(white, Image.fromarray(image)).convert("RGB"))
    return image


def _inception_path() -> Path:
    """Return the path at which clean-fid keeps its network."""
    return Path("./" if platform.system() == "Windows" else "/tmp") / INCEPTION


def _inception(path: Path, name: str, device: torch.device):
    """Load clean-fid's network, which is downloaded if its file is missing and there is a connection."""
    from cleanfid.inception_torchscript import InceptionV3W

    if not path.is_file():
        reason = "not found"
        if name == "inception" and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no"):
            try:
                from cleanfid.downloads_helper import check_download_inception

                check_download_inception(fpath=str(path.parent))
                reason = None
            except Exception as error:
                reason = f"its download failed: {error}"
                path.unlink(missing_ok=True)  # half a file would be taken for a whole one
        if reason:
            raise ValueError(
                f"feature_network {name} needs the file {path} ({reason}): put {INCEPTION_URL} there, or give another "
                "TorchScript file, or 'pixels'"
            )
    try:
        return InceptionV3W(str(path.parent), download=False).to(device).eval()
    except Exception as error:
        raise ValueError(f"feature_network: {path} cannot be loaded as clean-fid's Inception: {error}") from error
