"""Completion of given data: RePaint (Lugmayr et al., arXiv:2201.09865), or a model that is trained for it.

A mask is true, or white, where data is unknown.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ddpm_hf.pipeline.guidance import for_each_sample, make_guidance
from ddpm_hf.pipeline.loop import SamplingPipeline
from ddpm_hf.pipeline.pairs import encode_condition
from ddpm_hf.pipeline.rules import INPAINT_RULES, ClassLabels, Generators, check_call, check_rules
from ddpm_hf.pipeline.schedulers import is_own_scheduler, step_options


def _read_mask(mask, shape: tuple[int, ...]) -> Tensor:
    """Return a mask as a tensor of bools on the CPU, True where the data is unknown.

    Args:
        mask: PIL images, of which white is unknown, or an array or tensor of bools or of 0 (known) and 1 (unknown).
        shape: that of the data, `(B, C, *spatial)`, to which a mask with one item, one channel or neither is expanded.
            Arrays of images have their channels last.
    """
    if isinstance(mask, Image.Image):
        mask = [mask]
    if isinstance(mask, (list, tuple)) and mask and isinstance(mask[0], Image.Image):
        size, got = tuple(shape[:1:-1]), {image.size for image in mask}
        if got != {size}:
            raise ValueError(f"mask must have the size of the images, {size}; got {sorted(got)}")
        mask = np.stack([np.asarray(image.convert("L")) >= 128 for image in mask])[..., None]
    if isinstance(mask, np.ndarray) and mask.ndim == len(shape) == 4:
        mask = np.moveaxis(mask, -1, 1)
    try:
        mask = mask.copy() if isinstance(mask, np.ndarray) else mask  # torch warns of arrays that it may not write to
        tensor = torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"mask must be PIL images, an array or a tensor, got {type(mask).__name__}") from error
    if not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError(f"mask must have only 0 (known) and 1 (unknown), got {tensor.min():.4g} to {tensor.max():.4g}")
    whole = tensor[None, None] if tensor.ndim == len(shape) - 2 else tensor
    fits = whole.shape[2:] == shape[2:] and all(n in (1, full) for n, full in zip(whole.shape[:2], shape))
    if whole.ndim != len(shape) or not fits:
        raise ValueError(
            "mask must have the shape of the data, where batch and channels may be 1 or both left out; as (batch, "
            f"channels, ...) the data has {tuple(shape)}, mask {tuple(tensor.shape)}"
        )
    return (whole != 0).expand(shape)


def resampling_plan(steps: int, jump_length: int, jump_n_sample: int) -> list[tuple[int, int]]:
    """Return RePaint's schedule (Lugmayr et al., appendix B): for each call of the model two places in the chain.

    Places count the steps that have been made, from 0 (x_T) to `steps` (x_0). A call's step leads from the first place
    to the next one. The second place is where the chain is then: that next one, or `jump_length` places before it. From
    the last noisy place on, every `jump_length`-th one is arrived at `jump_n_sample` times, if there is room to jump.
    """
    left = dict.fromkeys(range(steps - 1, jump_length - 1, -jump_length), jump_n_sample - 1)
    plan, place = [], 0
    while place < steps:
        start, place = place, place + 1
        if left.get(place, 0):
            left[place] -= 1
            place -= jump_length
        plan.append((start, place))
    return plan


class Repaint:
    """RePaint's part of each step (Lugmayr et al., algorithm 1), called by the loop after the step.

    The known part is replaced by the known data at the new noise level, and after a jump all of it is noised again, by
    the transition of the forward process between two timesteps of the chain.

    Args:
        scheduler: a `GaussianScheduler` whose chain is chosen.
        known: the data in the model's units, `(B, C, *spatial)`; what is unknown in it is not read.
        unknown: bools, shaped as `known`.
        jump_length, jump_n_sample: as in `inpaint`.
        generator: as in `inpaint`, with one per sample.
    """

    def __init__(self, scheduler, known: Tensor, unknown: Tensor, jump_length: int, jump_n_sample: int, generator):
        self.scheduler, self.known, self.unknown, self.generator = scheduler, known, unknown, generator
        self.chain = scheduler.timesteps.tolist()
        snr = [scheduler.snr(t).item() for t in self.chain]
        self.abar = [each / (1 + each) for each in snr]
        self.plan = resampling_plan(len(self.chain), jump_length, jump_n_sample)
        self.timesteps = scheduler.timesteps[[start for start, _ in self.plan]]

    def __call__(self, pipeline, i: int, t, tensors: dict) -> dict:
        """Return the latents to go on with after call `i` of the model."""
        start, place = self.plan[i]
        x, known = tensors["latents"], self.known
        if start + 1 < len(self.chain):
            known = self.scheduler.add_noise(known, self._noise(), self.chain[start + 1])
        x = torch.where(self.unknown, x, known)
        if place != start + 1:
            kept = self.abar[place] / self.abar[start + 1]  # the product of 1 - beta between the two places
            x = math.sqrt(kept) * x + math.sqrt(1 - kept) * self._noise()
        return {"latents": x}

    def _noise(self) -> Tensor:
        x = self.known
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)


class CompletingPipeline(SamplingPipeline):
    """A pipeline that draws the unknown part of given items.

    `_tensor`, `_encode` and `_in_form` of the subclasses read, convert and return the data.
    """

    # This function is longer than 60 lines because it documents every option of a completion.
    @torch.no_grad()
    def inpaint(
        self,
        known: Any,
        mask: Any = None,
        num_inference_steps: int | None = None,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        num_samples: int = 1,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: str | None = None,
        return_dict: bool = True,
        eta: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
        condition=None,
    ):
        """Complete data of which a part is known: holes of images, gaps and the future of sequences.

        A model that was trained for it (the pipeline's `condition` is "known") is given the known part in ordinary
        sampling, with any scheduler. Any other model is sampled by RePaint (Lugmayr et al., arXiv:2201.09865), with the
        DDPM or DDIM steps of `GaussianScheduler`: in each step the known part is put in at the noise level of the step,
        and again and again the chain goes `jump_length` steps back, so that both parts come to fit each other. With S
        steps this takes about S * jump_n_sample calls of the model.

        Args:
            known: the data. Images: PIL, an array `(B, H, W, C)` or a tensor `(B, C, H, W)` in [0, 1]; sequences: an
                array or tensor `(B, C, length)` in the units of the data. NaN marks what is unknown.
            mask: marks what is unknown too: PIL images, white where the image is unknown, or an array or tensor that is
                True or 1 there. It has the shape of the data, with batch and channels 1 or left out for all items and
                channels. None: only NaN does.
            num_inference_steps: number of steps of the chain, 1 to T; None: the pipeline's default.
            jump_length, jump_n_sample: RePaint's steps of a jump, and how often the chain passes each place that it
                jumps from; at least 1. With jump_n_sample=1, and for chains of at most jump_length steps, there are no
                jumps. Models that were trained for it do not use them.
            num_samples: number of completions of each item. Those of the first item come first.
            class_labels: class of the samples, of a model with classes: one for all, one per item, or one per sample.
            generator: generator of all noise: one, one per item, or one per sample.
            output_type, return_dict, eta, guidance_scale, guidance_rescale, guidance_interval, guide: as in the call.
            condition: what the items belong to, as in the call, for a model with paired conditions: one for all, one
                per item, or one per sample.

        Returns:
            The output of a call, with len(known) * num_samples samples. The known part is as it was given: to the bit
            in "np" and "pt", which have the wider type of sample and data, and to the 8-bit value in "pil"; in "latent"
            it has the model's units and type.

        Raises:
            ValueError: a shape is wrong, a value is outside its range, nothing or everything is unknown, a condition
                is missing or does not fit, or the model was not trained for it and the scheduler is not a
                `GaussianScheduler`.
            FloatingPointError: as in the call.
        """
        check_rules(INPAINT_RULES, num_samples=num_samples, jump_length=jump_length, jump_n_sample=jump_n_sample)
        data, unknown = self._read_known(known, mask)
        items, output_type = len(data), output_type or self._output_types[0]
        labels = for_each_sample(class_labels, items, num_samples)
        generator = for_each_sample(generator, items, num_samples)
        check_call(self, items * num_samples, generator, output_type)
        guidance = make_guidance(
            self, items * num_samples, labels, guidance_scale, guidance_rescale, guidance_interval, guide
        )
        condition = encode_condition(self, condition, items, num_samples, data.shape[2:])
        data, unknown = (x.repeat_interleave(num_samples, dim=0) for x in (data, unknown))
        options = step_options(self.scheduler, generator, eta)
        self._set_timesteps(num_inference_steps, None)
        x = self._complete(
            self._encode(data, "known"), unknown, generator, options, guidance, jump_length, jump_n_sample,
            condition=condition,
        )  # fmt: skip
        self.maybe_free_model_hooks()
        if output_type == "latent":
            x = torch.where(unknown.to(x.device), x, self._encode(data, "known"))
            return self._output(x, None, return_dict)
        samples = torch.where(unknown, self._decode(x, "pt").cpu(), data)
        return self._output(self._in_form(samples, output_type), None, return_dict)

    def _check_completion(self) -> None:
        if self.config.get("condition") != "known" and not is_own_scheduler(self.scheduler):
            raise ValueError(
                "a model that was not trained to complete is sampled by RePaint, whose jumps need GaussianScheduler: "
                "set pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config); got "
                f"{type(self.scheduler).__name__}"
            )

    def _read_known(self, known, mask) -> tuple[Tensor, Tensor]:
        """Return the data in its own units, with 0 where it is unknown, and bools that say where; `(B, C, ...)`."""
        self._check_completion()
        data = self._given(known, "known")
        unknown = data.isnan()
        if mask is not None:
            unknown = unknown | _read_mask(mask, data.shape)
        if len(data) == 0 or not unknown.any():
            raise ValueError("known must have something unknown, marked by mask or NaN; got nothing unknown")
        if unknown.all():
            raise ValueError("known must have something known, else call the pipeline itself; got everything unknown")
        data = data.masked_fill(unknown, 0)
        if not data.isfinite().all():
            raise ValueError(f"known must be finite where it is known, got {data.min():.4g} to {data.max():.4g}")
        return data, unknown

    def _complete(
        self, x0, unknown, generator, options, guidance, jump_length, jump_n_sample, windows=None, condition=None
    ) -> Tensor:
        """Return samples in the model's units for x0, `(B, C, *spatial)`, which may be anything where it is unknown.

        `condition` is a paired one, as the model takes it.
        """
        unknown = unknown.to(x0.device)
        x = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x = x * self.scheduler.init_noise_sigma
        if self.config.get("condition") == "known":
            condition = torch.cat((x0.masked_fill(unknown, 0), (~unknown).to(x0.dtype)), dim=1)
            return self._denoise(
                x, self.scheduler.timesteps, options, guidance=guidance, condition=condition, windows=windows
            )
        repaint = Repaint(self.scheduler, x0, unknown, jump_length, jump_n_sample, generator)
        return self._denoise(
            x, repaint.timesteps, options, callback=repaint, callback_inputs=("latents",), guidance=guidance,
            condition=condition, windows=windows,
        )  # fmt: skip
