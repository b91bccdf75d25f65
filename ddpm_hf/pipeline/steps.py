"""Pieces of a step of the loop: the estimate of x0 for self-conditioning, known values, memory layout."""

import torch
from torch import Tensor


def _threshold(x0: Tensor, ratio: float, highest: float) -> Tensor:
    """Apply dynamic thresholding (Saharia et al., arXiv:2205.11487, section 2.3): clamp to [-s, s] and divide by s.

    s is the percentile `ratio` of |x0| in each sample, clamped to [1, `highest`].
    """
    magnitudes = x0.flatten(1).abs().float().sort(dim=1).values
    last = magnitudes.shape[1] - 1
    rank = ratio * last
    low = int(rank)
    s = torch.lerp(magnitudes[:, low], magnitudes[:, min(low + 1, last)], rank - low)
    s = s.clamp(1, highest).to(x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


class X0Estimate:
    """Estimates of x0 from predictions, clipped as a scheduler is configured.

    Self-conditioning needs them under stock schedulers, whose steps do not all return theirs.
    """

    def __init__(self, scheduler):
        self.config = scheduler.config
        abar = scheduler.alphas_cumprod.double().cpu()
        self.sigmas = ((1 - abar) / abar).sqrt()

    def __call__(self, prediction: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Return the estimate of x0, shaped as x_t, for the prediction at x_t; t may lie between whole timesteps."""
        c = self.config
        if c.prediction_type == "sample":
            x0 = prediction
        else:
            # Between whole timesteps (Euler, Heun) the noise level sqrt((1 - abar) / abar) is interpolated linearly.
            t = float(t)
            low = min(max(int(t), 0), len(self.sigmas) - 1)
            high = min(low + 1, len(self.sigmas) - 1)
            sigma = torch.lerp(self.sigmas[low], self.sigmas[high], t - low).item()
            root, root_noise = (1 / (1 + sigma**2)) ** 0.5, (sigma**2 / (1 + sigma**2)) ** 0.5
            if c.prediction_type == "epsilon":
                x0 = (x_t - root_noise * prediction) / root
            else:
                x0 = root * x_t - root_noise * prediction
        return self.clip(x0)

    def clip(self, x0: Tensor) -> Tensor:
        """Return an estimate of x0, clipped or thresholded as the scheduler is configured; same shape."""
        c = self.config
        if c.get("thresholding"):
            return _threshold(x0, c.get("dynamic_thresholding_ratio", 0.995), c.get("sample_max_value", 1.0))
        if c.get("clip_sample"):
            limit = c.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        return x0


def without_known(x: Tensor | None, known: Tensor | None) -> Tensor | None:
    """Return x with 0 where the model is told the value itself, as in training: what it predicts there is not trained.

    Args:
        x: x_t or an estimate of x0, `(B, C, *spatial)`; None stays None.
        known: bools, shaped as x; None: nothing is known.
    """
    return x if x is None or known is None else x.masked_fill(known, 0)


def weights_move(model) -> bool:
    """Return True if the weights of a model move between its calls (offloading), or are shards of several devices."""
    hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in model.modules())
    return hooked or any(type(weight.data) is not Tensor for weight in model.parameters())


def use_channels_last(model) -> None:
    """Give a model of ours weights in the memory layout of its activations, which makes its calls faster.

    Moving a model to another device or type keeps its layout, and saving writes the usual one. Other models, and
    weights that are offloaded or sharded, stay as they are.
    """
    if isinstance(model, torch.nn.Module) and hasattr(model, "channels_last") and not weights_move(model):
        model.channels_last()
