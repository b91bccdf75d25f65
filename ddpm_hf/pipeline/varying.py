"""Variations of given items (SDEdit, Meng et al., arXiv:2108.01073), and what the model makes of them on average."""

import warnings

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_hf.pipeline.guidance import for_each_sample, make_guidance
from ddpm_hf.pipeline.loop import SamplingPipeline
from ddpm_hf.pipeline.pairs import encode_condition
from ddpm_hf.pipeline.rules import check_call, check_rules, is_number, is_whole
from ddpm_hf.pipeline.schedulers import begin_at, step_options
from ddpm_hf.pipeline.units import affine

FAR = 8.0  # |x| in the model's units: standardised data reaches about 6, data scaled to [-1, 1] hardly more than 2

VARYING_RULES = (
    (
        lambda c: is_number(c.strength) and 0 <= c.strength <= 1,
        "strength must be a number from 0 (the items as they are) to 1 (ordinary sampling), got {c.strength!r}",
    ),
    (
        lambda c: is_whole(c.num_samples) and c.num_samples >= 1,
        "num_samples must be a whole number of at least 1, got {c.num_samples!r}",
    ),
    (
        lambda c: c.latents is None,
        "give {c.name} or latents, not both: the noise of given items is drawn",
    ),
    (
        lambda c: hasattr(c.scheduler, "add_noise"),
        "strength needs a scheduler with add_noise, got {c.kind}",
    ),
)


def numbers_of(items: Tensor) -> str:
    """Return the first numbers of the items for which a tensor of bools (B, ...) has a True, for a message."""
    numbers = items.flatten(1).any(dim=1).nonzero().flatten().tolist()
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"item{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:10]))}{more}"


def read_items(pipeline, items, name: str) -> tuple[Tensor, Tensor]:
    """Return given items in their own units, on the CPU, and in the model's, each `(B, C, *spatial)`.

    Values far outside of what the model was trained on are warned of, with both ranges.

    Raises:
        ValueError: a form or shape is wrong, or a value is not finite.
    """
    data = pipeline._given(items, name)
    if len(data) and not data.isfinite().all():
        raise ValueError(f"{name} must be finite; NaN or infinity is in {numbers_of(~data.isfinite())}")
    x = pipeline._encode(items, name)
    far = x.float().abs() > FAR
    for channel in far.movedim(1, 0).flatten(1).any(dim=1).nonzero().flatten().tolist():
        scale, shift = (each.flatten()[channel].item() for each in affine(pipeline, data.shape[1], data.ndim))
        low, high = data[:, channel].min(), data[:, channel].max()
        warnings.warn(
            f"channel {channel} of {name} has values from {low:.4g} to {high:.4g}, far outside of what the model was "
            f"trained on, about {shift - scale:.4g} to {shift + scale:.4g}: are the units the same?",
            stacklevel=4,
        )
    return data, x


class VaryingPipeline(SamplingPipeline):
    """A pipeline whose call can start from given items."""

    def _vary_or_generate(self, name: str, items, strength, num_samples: int, batch_size: int, *arguments, **larger):
        """Sample from noise, or from given items where there are some; the other arguments are those of `_generate`."""
        if items is None:
            if strength is not None or num_samples != 1:
                given = f"strength={strength!r}" if strength is not None else f"num_samples={num_samples!r}"
                raise ValueError(f"{given} needs {name}, the items to start from")
            return self._generate(batch_size, *arguments, **larger)
        if any(value is not None for value in larger.values()):
            raise ValueError(
                f"{self._size_names}, method and overlap are of samples from noise, and {name} has a size of its own; "
                f"got {larger}"
            )
        return self._vary(name, items, 0.5 if strength is None else strength, num_samples, batch_size, *arguments)

    @torch.no_grad()
    def _vary(
        self, name, items, strength, num_samples, batch_size, num_inference_steps, generator, latents, eta,
        output_type, return_dict, callback_on_step_end, callback_inputs, return_all_timesteps, timesteps, class_labels,
        condition, *guidance,
    ):  # fmt: skip
        """Noise items to the timestep that `strength` means, and denoise them from there."""
        check_rules(
            VARYING_RULES, name=name, strength=strength, num_samples=num_samples, latents=latents,
            scheduler=self.scheduler, kind=type(self.scheduler).__name__,
        )  # fmt: skip
        data, x0 = read_items(self, items, name)
        n = len(data) * num_samples
        if batch_size not in (1, n):
            raise ValueError(
                f"batch_size must be left out with {name}, or be {n}: {len(data)} items, num_samples={num_samples}; "
                f"got {batch_size!r}"
            )
        generator = for_each_sample(generator, len(data), num_samples)
        check_call(self, n, generator, output_type, None, callback_on_step_end, callback_inputs)
        callback_inputs = [callback_inputs] if isinstance(callback_inputs, str) else callback_inputs
        guidance = make_guidance(self, n, for_each_sample(class_labels, len(data), num_samples), *guidance)
        condition = encode_condition(self, condition, len(data), num_samples, x0.shape[2:])
        options = step_options(self.scheduler, generator, eta)
        self._set_timesteps(num_inference_steps, timesteps)
        if strength == 0:
            samples = (x0 if output_type == "latent" else data).repeat_interleave(num_samples, dim=0)
            samples = samples if output_type == "latent" else self._in_form(samples, output_type)
            kept = None
            if return_all_timesteps:
                kept = [[image] for image in samples] if isinstance(samples, list) else samples[:, None]
            return self._output(samples, kept, return_dict)
        chain = self.scheduler.timesteps
        if strength < 1:
            chain = chain[begin_at(self.scheduler, strength, self.is_spaced_by_log_snr()) :]
        noise = randn_tensor((n, *x0.shape[1:]), generator=generator, device=x0.device, dtype=x0.dtype)
        if strength < 1:
            x = self.scheduler.add_noise(x0.repeat_interleave(num_samples, dim=0), noise, chain[:1].expand(n))
        else:
            x = noise * self.scheduler.init_noise_sigma
        return self._run(
            x, chain, options, guidance, output_type, return_dict, callback_on_step_end, callback_inputs,
            return_all_timesteps, condition,
        )  # fmt: skip
