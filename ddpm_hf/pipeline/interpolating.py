"""Interpolation between given items: in the noised data (Ho et al., arXiv:2006.11239, figure 8) or in their latents."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_hf.pipeline.encoding import ENCODING_STEPS, EncodingPipeline, at_most_ddim
from ddpm_hf.pipeline.guidance import as_list, for_each_sample, make_guidance
from ddpm_hf.pipeline.pairs import encode_condition
from ddpm_hf.pipeline.rules import ClassLabels, Generators, check_call, interpolation_numbers
from ddpm_hf.pipeline.schedulers import begin_at, step_options

INTERPOLATIONS = ("noise", "latent")


def slerp(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Interpolate between latents (B, C, *spatial) on the sphere (Song et al., arXiv:2010.02502, section 5.3).

    Between two latents of standard normal values the norm then stays that of such latents.
    """
    form = (-1, *(1,) * (z1.ndim - 1))
    a, b = z1.flatten(1).double(), z2.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    angle = torch.acos(cosine.clamp(-1, 1))
    straight = torch.sin(angle) < 1e-6
    angle = torch.where(straight, 1.0, angle)
    first = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / torch.sin(angle))
    second = torch.where(straight, weight, torch.sin(weight * angle) / torch.sin(angle))
    return first.reshape(form).to(z1.dtype) * z1 + second.reshape(form).to(z1.dtype) * z2


class InterpolatingPipeline(EncodingPipeline):
    """A pipeline that draws items between two given ones. `_encode` of the subclasses converts the ends."""

    # This function is longer than 60 lines because it documents every option of both methods.
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
        method: str = "noise",
        condition=None,
    ):
        """Noise two pieces of data, mix them, and denoise the mix (Ho et al., section 4.3).

        Both ends get the same noise, so that the mix has the noise level of its timestep. With method="latent", the
        latents of both ends are found (`encode`) and mixed spherically (Song et al., arXiv:2010.02502, section 5.3);
        weights 0 and 1 then give the ends back, but for the error of the way there and back.

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
            method: "noise" or "latent". "latent" needs a `GaussianScheduler`, goes all the way to the latents (leave
                `strength` out), and draws no noise (eta is 0). It takes the number of steps that is given, else the
                pipeline's, else 250, and if none is given at most as many as `encode` can take.
            condition: what the samples belong to, as in the call, for a model with paired conditions: one for all, or
                one per pair, which both of its ends have too.

        Returns:
            The output of a call, with len(x1) * len(weights) samples.

        Raises:
            ValueError: the ends have different or unfitting shapes, a value is outside its range, or a condition is
                missing or does not fit.
            FloatingPointError: as in the call.
        """
        if method not in INTERPOLATIONS:
            raise ValueError(f"method must be one of {', '.join(INTERPOLATIONS)}; got {method!r}")
        weights, strength = interpolation_numbers(weights, strength)
        output_type = output_type or self._output_types[0]
        given1, given2 = x1, x2
        x1, x2 = self._encode(x1, "x1"), self._encode(x2, "x2")
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        generator = as_list(generator)
        check_call(self, len(x1), generator, output_type)
        labels = for_each_sample(class_labels, len(x1), len(weights))
        guidance = make_guidance(
            self, len(x1) * len(weights), labels, guidance_scale, guidance_rescale, guidance_interval, guide
        )
        given_condition = condition
        condition = encode_condition(self, condition, len(x1), len(weights), x1.shape[2:])
        if method == "latent":
            if strength != 0.5 or eta:
                raise ValueError(f"method='latent' takes no strength and no eta but 0, got {strength} and {eta}")
            steps = num_inference_steps
            if steps is None:
                steps = at_most_ddim(self.config.num_inference_steps or ENCODING_STEPS, self.scheduler)
            ends = [
                self.encode(
                    x, steps, class_labels=class_labels, guidance_scale=guidance_scale,
                    guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, guide=guide,
                    condition=given_condition,
                )
                for x in (given1, given2)
            ]  # fmt: skip
            mixed = torch.stack([slerp(*ends, w) for w in weights], dim=1).flatten(0, 1)
            chain, options = self.scheduler.timesteps, step_options(self.scheduler, None, 0)
        else:
            self._set_timesteps(num_inference_steps, None)
            chain = self.scheduler.timesteps[begin_at(self.scheduler, strength, self.is_spaced_by_log_snr()) :]
            noise = randn_tensor(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
            t = chain[:1].expand(len(x1))
            noised1, noised2 = (self.scheduler.add_noise(x, noise, t) for x in (x1, x2))
            mixed = torch.stack([torch.lerp(noised1, noised2, w) for w in weights], dim=1).flatten(0, 1)
            options = step_options(self.scheduler, for_each_sample(generator, len(x1), len(weights)), eta)
        return self._run(mixed, chain, options, guidance, output_type, return_dict, None, (), False, condition)
