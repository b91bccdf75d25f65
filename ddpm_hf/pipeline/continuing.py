"""Series without an end: windows one after the other, each of which completes what the one before has begun."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_hf.pipeline.completing import CompletingPipeline
from ddpm_hf.pipeline.guidance import Guidance, as_list, for_each_sample, make_guidance
from ddpm_hf.pipeline.pairs import encode_condition, refuse_paired
from ddpm_hf.pipeline.rules import (
    INPAINT_RULES,
    ClassLabels,
    Generators,
    check_call,
    check_rules,
    check_steps,
    is_whole,
)
from ddpm_hf.pipeline.schedulers import step_options
from ddpm_hf.pipeline.windows import choose_windows

CONTINUING_RULES = (
    (
        lambda c: c.length is None or (is_whole(c.length) and c.length >= 1),
        "length must be a whole number of at least 1, or None; got {c.length!r}",
    ),
    (
        lambda c: c.window is not None,
        "windows need the model's sample_size, which its configuration does not have",
    ),
    (
        lambda c: is_whole(c.overlap) and 1 <= c.overlap < c.window,
        "overlap must be a whole number of at least 1 and less than the window, {c.window}; got {c.overlap!r}",
    ),
    (
        lambda c: c.method in ("sequential", "joint"),
        "method must be 'sequential' or 'joint', got {c.method!r}",
    ),
)


class ContinuingPipeline(CompletingPipeline):
    """A pipeline of sequences that goes on from what it has drawn, or from a recording."""

    _methods = ("single", "joint", "sequential")

    def _generate(
        self, batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback,
        callback_inputs, return_all_timesteps, timesteps, class_labels, condition, *guidance, size=None,
        method=None, overlap=None,
    ):  # fmt: skip
        """Sample as every pipeline does, or window after window for method="sequential"."""
        if method != "sequential":
            return super()._generate(
                batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback,
                callback_inputs, return_all_timesteps, timesteps, class_labels, condition, *guidance, size=size,
                method=method, overlap=overlap,
            )  # fmt: skip
        self._windows(size, method, overlap)
        one_chain = {"latents": latents, "callback_on_step_end": callback, "timesteps": timesteps,
                     "return_all_timesteps": return_all_timesteps or None}  # fmt: skip
        if given := [name for name, value in one_chain.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} need one chain for all windows, and method='sequential' has one for each"
            )
        refuse_paired(self)
        encode_condition(self, condition, batch_size)
        scale, rescale, interval, guide = guidance
        as_tensor = "pt" if output_type == "np" else output_type
        blocks = self.stream(
            size[0], batch_size, num_inference_steps, generator, overlap, class_labels=class_labels,
            guidance_scale=scale, output_type=as_tensor, eta=eta, guidance_rescale=rescale, guidance_interval=interval,
            guide=guide,
        )  # fmt: skip
        whole = torch.cat(list(blocks), dim=-1)
        return self._output(whole if as_tensor == output_type else self._in_form(whole, output_type), None, return_dict)

    def stream(
        self,
        length: int | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        overlap: int | None = None,
        jump_length: int = 1,
        jump_n_sample: int = 10,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        output_type: str = "np",
        eta: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
    ) -> Iterator[np.ndarray | Tensor]:
        """Draw series block by block, for as long as blocks are taken; memory does not grow.

        The first block is a sample. Each further one is what a window adds whose first `overlap` values are the last
        ones of the series so far, by the completion of `inpaint`: by RePaint, or with a model that was trained for it.

        Args:
            length: length of the series; None: there is no end.
            batch_size: number of series.
            overlap: number of values that a window shares with the one before; None: half of the trained length.
            num_inference_steps, generator, class_labels, guidance_scale, output_type, eta, guidance_rescale,
                guidance_interval, guide: as in the call.
            jump_length, jump_n_sample: as in `inpaint`, where jumps of more than one step are the default.

        Returns:
            An iterator of arrays or tensors `(B, C, n)` in the units of the data: n is the trained length in the first
            one, that less `overlap` in those after it, and less in the last one if the series is full.

        Raises:
            ValueError: a value is outside its range, or the model was not trained to complete and the scheduler is not
                a `GaussianScheduler`. It is raised at once, not with the first block.
        """
        class_labels, generator = as_list(class_labels), as_list(generator)
        if isinstance(class_labels, list) and batch_size == 1:
            batch_size = len(class_labels)
        check_call(self, batch_size, generator, output_type)
        draw = self._drawing(
            batch_size, num_inference_steps, generator, eta, jump_length, jump_n_sample, class_labels, guidance_scale,
            guidance_rescale, guidance_interval, guide,
        )  # fmt: skip
        overlap = self._overlap(length, overlap)
        return (self._decode(x, output_type) for x in self._blocks(draw, None, length, overlap))

    # This function is longer than 60 lines because it documents every option of a continuation.
    @torch.no_grad()
    def extend(
        self,
        known: Any,
        length: int,
        num_inference_steps: int | None = None,
        method: str = "sequential",
        overlap: int | None = None,
        jump_length: int = 1,
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
    ):
        """Go on from given recordings.

        Args:
            known: the recordings, an array or tensor `(B, C, n)` in the units of the data, of any length n. What is
                drawn depends on the last `overlap` values of them.
            length: length of the result, the recording included; more than n.
            method: "sequential": window after window, as in `stream`; "joint": all windows are denoised together, as in
                a call, and RePaint or the trained model puts in the end of the recording.
            num_samples: number of continuations of each recording. Those of the first one come first.
            class_labels: class of the samples, of a model with classes: one for all, one per recording, or one per
                sample.
            generator: generator of all noise: one, one per recording, or one per sample.
            num_inference_steps, output_type, return_dict, eta, guidance_scale, guidance_rescale, guidance_interval,
                guide: as in the call.
            overlap, jump_length, jump_n_sample: as in `stream`.

        Returns:
            The output of a call, with sequences `(B * num_samples, C, length)`. The recording is in them as it was
            given, to the bit; they have the wider type of sample and recording.

        Raises:
            ValueError: a shape is wrong, a value is outside its range, a recording is not finite, or the model was not
                trained to complete and the scheduler is not a `GaussianScheduler`.
        """
        data = self._given(known, "known")
        if not is_whole(length) or length <= data.shape[-1]:
            raise ValueError(
                f"length must be a whole number of more than the length of known, {data.shape[-1]}; got {length!r}"
            )
        overlap = self._overlap(length, overlap, method)
        if data.shape[-1] == 0:
            raise ValueError("known must have at least one value, else call the pipeline itself; got a length of 0")
        items, output_type = len(data), output_type or self._output_types[0]
        if not data.isfinite().all():
            raise ValueError("known must be finite, got NaN or infinity: complete it by inpaint first")
        encoded = self._encode(data[..., -overlap:], "known")
        generator = for_each_sample(generator, items, num_samples)
        draw = self._drawing(
            items * num_samples, num_inference_steps, generator, eta, jump_length, jump_n_sample,
            for_each_sample(class_labels, items, num_samples), guidance_scale, guidance_rescale,
            guidance_interval, guide, num_samples,
        )  # fmt: skip
        check_call(self, items * num_samples, generator, output_type)
        tail = encoded.repeat_interleave(num_samples, dim=0)
        new = length - data.shape[-1]
        if method == "joint":
            size = max(tail.shape[-1] + new, self._size()[0])
            windows = choose_windows("length", (size,), self._size(), "joint", overlap, ("joint",))
            parts = [draw(tail, size, windows)[..., tail.shape[-1] :][..., :new]]
        else:
            parts = self._blocks(draw, tail, new, overlap)
        if output_type == "latent":
            whole = self._encode(data, "known").repeat_interleave(num_samples, dim=0)
            return self._output(torch.cat([whole, *parts], dim=-1), None, return_dict)
        drawn = torch.cat([self._decode(x, "pt").cpu() for x in parts], dim=-1)
        dtype = torch.promote_types(drawn.dtype, data.dtype)
        whole = torch.cat((data.repeat_interleave(num_samples, dim=0).to(dtype), drawn.to(dtype)), dim=-1)
        return self._output(self._in_form(whole, output_type), None, return_dict)

    def _overlap(self, length, overlap, method="sequential") -> int:
        """Return the overlap of windows, checked together with the length of a series."""
        window = self.unet.config.sample_size
        overlap = window // 2 if overlap is None and window is not None else overlap
        check_rules(CONTINUING_RULES, length=length, window=window, overlap=overlap, method=method)
        return overlap

    def _drawing(
        self, batch_size, num_inference_steps, generator, eta, jump_length, jump_n_sample, class_labels, scale, rescale,
        interval, guide, num_samples=1,
    ):  # fmt: skip
        """Return a function that draws one canvas in the model's units, of which a beginning may be known; checked."""
        refuse_paired(self)
        self._check_completion()
        check_rules(INPAINT_RULES, num_samples=num_samples, jump_length=jump_length, jump_n_sample=jump_n_sample)
        if num_inference_steps is not None:
            check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        guidance: Guidance | None = make_guidance(self, batch_size, class_labels, scale, rescale, interval, guide)
        options = step_options(self.scheduler, generator, eta)

        def draw(tail: Tensor | None, size: int, windows=None) -> Tensor:
            self._set_timesteps(num_inference_steps, None)
            shape = (batch_size, self._channels(), size)
            if tail is None:
                x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
                x = x * self.scheduler.init_noise_sigma
                x = self._denoise(x, self.scheduler.timesteps, options, guidance=guidance)
            else:
                x0, unknown = tail.new_zeros(shape), torch.arange(size) >= tail.shape[-1]
                x0[..., : tail.shape[-1]] = tail
                x = self._complete(
                    x0, unknown.expand(shape), generator, options, guidance, jump_length, jump_n_sample, windows
                )
            self.maybe_free_model_hooks()
            return x

        return draw

    def _blocks(self, draw, tail: Tensor | None, length: int | None, overlap: int):
        """Yield what each window adds, in the model's units, until `length` values are there.

        Args:
            draw: as `_drawing` returns it.
            tail: the end of what is known, at most `overlap` values; None: nothing is known.
        """
        (window,) = self._size()
        left = length
        while left is None or left > 0:
            known = 0 if tail is None else tail.shape[-1]
            new = draw(tail, window)[..., known:][..., :left]
            tail = (new if tail is None else torch.cat((tail, new), dim=-1))[..., -overlap:].clone()
            left = None if left is None else left - new.shape[-1]
            yield new
