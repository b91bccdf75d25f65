"""Latents of given items: DDIM run backwards (Song et al., arXiv:2010.02502, section 4.3).

In terms of the angle a = atan(sqrt((1 - abar) / abar)) a DDIM step is a rotation (Salimans & Ho, arXiv:2202.00512,
appendix D): from x_t, with the prediction v there, to x_s = cos(a_t - a_s) x_t - sin(a_t - a_s) v. A step backwards is
its inverse, for which v at the x_t that is looked for has to be known.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.pipeline.guidance import Guidance, as_list, make_guidance
from ddpm_hf.pipeline.loop import SamplingPipeline
from ddpm_hf.pipeline.pairs import encode_condition
from ddpm_hf.pipeline.rules import ClassLabels, is_whole
from ddpm_hf.pipeline.schedulers import is_own_scheduler
from ddpm_hf.pipeline.steps import X0Estimate
from ddpm_hf.pipeline.varying import read_items

ENCODINGS = ("corrected", "ddim")
ENCODING_STEPS = 250  # of a call of encode that gives no number, if the chain has as many


def at_most_ddim(steps: int, scheduler) -> int:
    """Return a default number of steps, or where the chain has fewer DDIM steps than that, as many as it has."""
    total = scheduler.config.num_train_timesteps
    return min(steps, total if scheduler.config.get("sampler") == "ddim" else total - 1)


class Predictor:
    """The model's estimates of x0 outside of the loop, at any timesteps.

    Args:
        pipeline: its model, scheduler and what the model was trained with are used.
        guidance: as in the loop.
        device: where the model runs.
        condition: a paired condition in the size of the items, as the model takes it; None: it takes none.
    """

    def __init__(self, pipeline, guidance: Guidance | None, device, condition: Tensor | None = None):
        self.guidance, self.model, self.dtype = guidance, pipeline._model_to_call(device), pipeline.unet.dtype
        self.prediction_type, abar = pipeline._trained
        self.signal, self.spread = abar.sqrt(), (1 - abar).sqrt()
        self.angle = torch.atan2(self.spread, self.signal)
        self.clip = X0Estimate(pipeline.scheduler).clip
        self.self_condition = pipeline.unet.config.get("self_condition", False)
        self.constant = {} if condition is None else {"condition": condition}

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t) for t, 0-d or (B,) on the CPU, broadcasting against `like`."""
        form = (-1, *(1,) * (like.ndim - 1))
        return tuple(table[t].reshape(form).to(like.device, like.dtype) for table in (self.signal, self.spread))

    def output(self, x: Tensor, t: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return the model's prediction at x (B, C, *spatial) and t; x0 is an estimate for self-conditioning."""
        x, there = x.to(self.dtype), t.to(x.device)
        extra = dict(self.constant)
        if self.self_condition:
            extra["x_self_cond"] = None if x0 is None else x0.to(self.dtype)
        if self.guidance is None:
            return self.model(x, there, **extra)
        level = t.float().mean().item() / max(len(self.signal) - 1, 1)
        return self.guidance(self.model, x, there, level, x.shape[1], **extra)

    def __call__(self, x: Tensor, t: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return the estimate of x0, clipped as configured; the arguments are those of `output`."""
        prediction = self.output(x, t, x0)[:, : x.shape[1]].to(x.dtype)
        signal, spread = self.rates(t, x)
        if self.prediction_type == "epsilon":
            prediction = (x - spread * prediction) / signal
        elif self.prediction_type == "v_prediction":
            prediction = signal * x - spread * prediction
        return self.clip(prediction)

    def velocity(self, x: Tensor, t: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the v and the x0 that the model estimates; the arguments are those of `output`."""
        x0 = self(x, t, x0)
        signal, spread = self.rates(t, x)
        return (signal * x - x0) / spread, x0


class EncodingPipeline(SamplingPipeline):
    """A pipeline that finds the latents of given items."""

    # This function is longer than 60 lines because it documents every option.
    @torch.no_grad()
    def encode(
        self,
        x: Any,
        num_inference_steps: int | None = None,
        method: str = "corrected",
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
        condition=None,
    ) -> Tensor:
        """Find the latents from which the model draws given items.

        `pipe(latents=pipe.encode(x, n), batch_size=len(x), eta=0, num_inference_steps=n)` brings the items back, with
        the same number of steps n, condition, classes and guidance. Each step takes one call of the model, the first
        one two.

        Args:
            x: the items, in the form in which the pipeline gives its samples.
            num_inference_steps: number of DDIM steps, 2 to T - 1 (T with a scheduler whose sampler is "ddim"). None:
                250, or the largest number where that is smaller; `len(pipe.scheduler.timesteps)` says it after the
                call.
            method: "ddim" takes what the model predicts before a step for the step (Song et al., section 4.3);
                "corrected" extrapolates the prediction to the end of the step, asks the model there, and makes the step
                with its answer, which comes far closer to the items with the same number of calls.
            class_labels: class of the items, of a model with classes: one for all, or one per item.
            guidance_scale, guidance_rescale, guidance_interval, guide: as in the call. Guidance of other scales than 1
                makes the latents less like standard normal noise.
            condition: what the items belong to, as in the call, for a model with paired conditions: one for all, or one
                per item.

        Returns:
            x_T, `(B, C, *spatial)` in the model's units, on its device.

        Raises:
            ValueError: a shape is wrong, a value is outside its range, a condition is missing or does not fit, or the
                scheduler does not make DDIM steps.
        """
        if method not in ENCODINGS:
            raise ValueError(f"method must be one of {', '.join(ENCODINGS)}; got {method!r}")
        if num_inference_steps is None:
            num_inference_steps = at_most_ddim(ENCODING_STEPS, self.scheduler)
        if is_whole(num_inference_steps) and num_inference_steps < 2:
            raise ValueError(f"encode needs num_inference_steps of at least 2, got {num_inference_steps}")
        if not is_own_scheduler(self.scheduler):
            raise ValueError(
                "encode needs the DDIM steps of GaussianScheduler: set pipe.scheduler = "
                f"GaussianScheduler.from_config(pipe.scheduler.config); got {type(self.scheduler).__name__}"
            )
        _, x = read_items(self, x, "x")
        guidance = make_guidance(
            self, len(x), as_list(class_labels), guidance_scale, guidance_rescale, guidance_interval, guide
        )
        condition = encode_condition(self, condition, len(x), size=x.shape[2:])
        self._set_timesteps(num_inference_steps, None)
        chain = self.scheduler.timesteps.flip(0)
        sampler, total = self.scheduler.config.sampler, self.scheduler.config.num_train_timesteps
        if sampler == "ddpm" or (sampler == "auto" and len(chain) == total):
            raise ValueError(
                "encode needs DDIM steps, whose way back exists: fewer steps than training timesteps, or a scheduler "
                f"with sampler='ddim'; got {len(chain)} steps and sampler={sampler!r}"
            )
        x = self._invert(x, chain, Predictor(self, guidance, x.device, condition), method)
        self.maybe_free_model_hooks()
        return x

    def _invert(self, x: Tensor, chain: Tensor, predict: Predictor, method: str) -> Tensor:
        """Return x at the last of the timesteps `chain`, which ascend, for x0 in the model's units."""
        dtype = x.dtype
        x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        x0 = v = slope = before = None
        last = 0.0
        for t, angle in zip(self.progress_bar(chain), predict.angle[chain].tolist()):
            turn = angle - last
            cos, sin = math.cos(turn), math.sin(turn)
            if v is None:
                # data has no timestep of its own: the model is asked at the first one
                guess, x0 = predict.velocity(cos * x, t)
            else:
                if method == "ddim":
                    v, x0 = predict.velocity(x, before, x0)
                # x0 and epsilon stay, or v goes on as it changed in the step before
                guess = cos * v - sin * x if slope is None else v + slope * turn
            there = (x + sin * guess) / cos
            if method == "corrected":
                new, x0 = predict.velocity(there, t, x0)
                slope = None if v is None else (new - v) / turn
                guess, there = new, (x + sin * new) / cos
            x, v, last, before = there, guess, angle, t
        return x.to(dtype)
