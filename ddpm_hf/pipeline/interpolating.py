"""Interpolation between given items (Ho et al., arXiv:2006.11239, figure 8)."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.pipeline.guidance import as_list, for_each_sample, make_guidance
from ddpm_hf.pipeline.loop import SamplingPipeline
from ddpm_hf.pipeline.rules import ClassLabels, Generators, check_call, interpolation_numbers
from ddpm_hf.pipeline.schedulers import begin_at, step_options


class InterpolatingPipeline(SamplingPipeline):
    """A pipeline that draws items between two given ones. `_encode` of the subclasses converts the ends."""

    @torch.no_grad()
    def interpolate(
        self,
        x1: Any,
        x2: Any,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        weights: float | Sequence[float] = 0.5,
        generator: Generators = None,
        eta: float | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
    ):
        """Noise two pieces of data, mix them, and denoise the mix (Ho et al., section 4.3).

        Both ends get the same noise, so that the mix has the noise level of its timestep.

        Args:
            x1, x2: the ends, in the form in which the pipeline gives its samples (images: PIL, arrays `(B, H, W, C)` or
                tensors `(B, C, H, W)` in [0, 1]; sequences: `(B, C, length)` in the units of the data).
            strength: share of the chain to go back, in (0, 1]; 1 starts from the last timestep, close to pure noise.
            num_inference_steps: number of steps of the whole chain; the share `strength` of them is run.
            weights: weight of x2, in [0, 1]; several give that many samples for each pair, one after the other.
            generator: generator of all noise; one, or one per pair.
            eta, output_type, return_dict: as in the call.
            class_labels: class of the samples, of a model with classes: one for all, or one per pair.
            guidance_scale, guidance_rescale, guidance_interval, guide: as in the call.

        Returns:
            The output of a call, with len(x1) * len(weights) samples.

        Raises:
            ValueError: the ends have different or unfitting shapes, or a value is outside its range.
        """
        weights, strength = interpolation_numbers(weights, strength)
        output_type = output_type or self._output_types[0]
        x1, x2 = self._encode(x1, "x1"), self._encode(x2, "x2")
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        check_call(self, len(x1), generator, output_type)
        labels = for_each_sample(as_list(class_labels), len(x1), len(weights))
        guidance = make_guidance(
            self, len(x1) * len(weights), labels, guidance_scale, guidance_rescale, guidance_interval, guide
        )
        self._set_timesteps(num_inference_steps, None)
        chain = self.scheduler.timesteps[begin_at(self.scheduler, strength, self.is_spaced_by_log_snr()) :]
        noise = randn_tensor(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        t = chain[:1].expand(len(x1))
        noised1, noised2 = (self.scheduler.add_noise(x, noise, t) for x in (x1, x2))
        mixed = torch.stack([torch.lerp(noised1, noised2, w) for w in weights], dim=1).flatten(0, 1)
        options = step_options(self.scheduler, for_each_sample(generator, len(x1), len(weights)), eta)
        x = self._denoise(mixed, chain, options, guidance=guidance)
        self.maybe_free_model_hooks()
        return self._output(self._decode(x, output_type), None, return_dict)
