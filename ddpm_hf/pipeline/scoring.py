"""Reconstructions of given items, and scores that say how strange they are to the model."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import conv1d, pad

from ddpm_hf.pipeline.completing import CompletingPipeline
from ddpm_hf.pipeline.encoding import Predictor
from ddpm_hf.pipeline.finite import why_not_finite
from ddpm_hf.pipeline.guidance import as_list, for_each_sample, make_guidance
from ddpm_hf.pipeline.outputs import ReconstructionOutput, ScoreOutput
from ddpm_hf.pipeline.pairs import chosen_conditions, encode_condition
from ddpm_hf.pipeline.rules import ClassLabels, Generators, check_rules, is_number, is_whole
from ddpm_hf.pipeline.schedulers import is_own_scheduler
from ddpm_hf.pipeline.units import affine
from ddpm_hf.pipeline.varying import VaryingPipeline, numbers_of, read_items

STEPS_OF_SCORE = 5  # DDIM steps of the reconstruction from each strength
COMPLETION = {"num_inference_steps": 50, "jump_length": 1}  # of NaN in items to score
SCORES = ("reconstruction", "denoising", "noise")

SCORING_RULES = (
    (
        lambda c: c.method in SCORES,
        "method must be one of reconstruction, denoising, noise; got {c.method!r}",
    ),
    (
        lambda c: isinstance(c.strengths, (list, tuple)) and c.strengths
        and all(is_number(s) and 0 < s <= 1 for s in c.strengths),
        "strengths must be numbers above 0 and at most 1, got {c.strengths!r}",
    ),
    (
        lambda c: is_whole(c.num_timesteps) and c.num_timesteps >= 2,
        "num_timesteps must be a whole number of at least 2, got {c.num_timesteps!r}",
    ),
    (
        lambda c: is_number(c.smoothing) and c.smoothing >= 0,
        "smoothing must be a number of at least 0, got {c.smoothing!r}",
    ),
    (
        lambda c: is_whole(c.batch_size) and c.batch_size >= 1,
        "batch_size must be a whole number of at least 1, got {c.batch_size!r}",
    ),
    (
        lambda c: c.method != "denoising" or is_own_scheduler(c.scheduler),
        "method 'denoising' needs the bound of GaussianScheduler: set pipe.scheduler = "
        "GaussianScheduler.from_config(pipe.scheduler.config); got {c.kind}",
    ),
)  # fmt: skip


def generators_of_items(generator: Generators, items: int) -> list[torch.Generator]:
    """Return a generator for each item, so that its draws do not depend on the batch that it is in.

    Args:
        generator: one for each item, which are used as they are; or one, or None for torch's, which draws their seeds.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != items or not all(isinstance(each, torch.Generator) for each in generator):
            raise ValueError(f"generator must be one, or one per item: {items} items, got {len(generator)} generators")
        return list(generator)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(f"generator must be a torch.Generator, or one per item; got {generator!r}")
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (items,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Return maps (B, C, *spatial), filtered by a Gaussian of deviation `sigma` in pixels; borders are repeated."""
    if sigma == 0:
        return maps
    radius = max(1, math.ceil(4 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps.dtype).view(1, 1, -1)
    for axis in range(2, maps.ndim):
        moved = maps.movedim(axis, -1)
        lines = moved.reshape(-1, 1, moved.shape[-1])
        maps = conv1d(pad(lines, (radius, radius), mode="replicate"), kernel).reshape(moved.shape).movedim(-1, axis)
    return maps


class BoundTimesteps:
    """Timesteps at which the terms of the bound are computed, and their weights, so that the sum is unbiased.

    t = 0, the decoder, is always one of them. The others are drawn one from each stratum of equal probability, where
    the probability of t is proportional to the change of log(1 + SNR), near to which the terms are; with as many
    timesteps as the process has, all are taken.

    Args:
        abar: (T,) float64.
        number: how many timesteps, at least 2.
    """

    def __init__(self, abar: Tensor, number: int):
        self.total, self.number = len(abar), min(number, len(abar))
        if self.number < self.total:
            change = -torch.log1p(-abar)  # log(1 + SNR)
            self.probability = (change[:-1] - change[1:]) / (change[0] - change[-1])  # of t = 1, 2, ...
            self.cumulative = self.probability.cumsum(0)

    def draw(self, place: int, generator: torch.Generator) -> tuple[int, float]:
        """Return timestep and weight of the `place`-th of the `number` timesteps."""
        if place == 0 or self.number == self.total:
            return place, 1.0
        strata = self.number - 1
        uniform = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()
        index = torch.searchsorted(self.cumulative, (place - 1 + uniform) / strata).clamp(max=self.total - 2).item()
        return index + 1, 1 / (strata * self.probability[index].item())


class ReconstructingPipeline(VaryingPipeline):
    """A pipeline that finds the normal form of given items."""

    # This function is longer than 60 lines because it documents every option.
    def reconstruct(
        self,
        x: Any,
        strength: float = 0.25,
        num_samples: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        batch_size: int = 64,
        output_type: str = "np",
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
        eta: float | None = None,
        condition=None,
    ) -> ReconstructionOutput:
        """Find what the model takes for the normal form of given items: they are noised by a part, and denoised.

        Args:
            x: the items, in the form in which the pipeline gives its samples.
            strength: share of the chain that is run, 0 to 1, as in the call; more replaces more of an item.
            num_samples: number of draws for each item.
            num_inference_steps: number of steps of the whole chain.
            generator: one, or one per item; the draws of an item do not depend on the others.
            batch_size: largest number of samples that are denoised together.
            output_type: "np" or "pt".
            class_labels: class of the items, of a model with classes: one for all, or one per item.
            guidance_scale, guidance_rescale, guidance_interval, guide, eta: as in the call.
            condition: what the items belong to, as in the call, for a model with paired conditions: one for all, or one
                per item.

        Returns:
            A `ReconstructionOutput` with `mean` and `std` over the draws, and the `samples`, in the units of the data.

        Raises:
            ValueError: a value is outside its range, a shape is wrong, a condition is missing or does not fit, or the
                scheduler cannot start from items.
        """
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type must be one of np, pt; got {output_type!r}")
        if not (is_whole(num_samples) and num_samples >= 1 and is_whole(batch_size) and batch_size >= 1):
            raise ValueError(
                f"num_samples and batch_size must be whole numbers of at least 1, got {num_samples!r}, {batch_size!r}"
            )
        data, _ = read_items(self, x, "x")
        labels, guided = as_list(class_labels), (guidance_scale, guidance_rescale, guidance_interval, guide)
        encode_condition(self, condition, len(data), size=data.shape[2:])  # its rules
        make_guidance(self, len(data), labels, *guided)  # its rules
        draws = []
        for each in generators_of_items(generator, len(data)):
            draws += generators_of_items(each, num_samples)
        labels = for_each_sample(labels, len(data), num_samples)
        samples = []
        for first in range(0, len(draws), batch_size):
            chosen = slice(first, min(first + batch_size, len(draws)))
            numbers = [draw // num_samples for draw in range(chosen.start, chosen.stop)]
            out = self._vary(
                "x", data[numbers], strength, 1, 1, num_inference_steps, draws[chosen], None, eta, "pt", False, None,
                ("latents",), False, None, labels[chosen] if isinstance(labels, list) else labels,
                chosen_conditions(condition, numbers), *guided,
            )  # fmt: skip
            samples.append(out[0].cpu())
        samples = torch.cat(samples).unflatten(0, (len(data), num_samples))
        std = samples.std(dim=1) if num_samples > 1 else torch.zeros_like(samples[:, 0])
        found = {"mean": samples.mean(dim=1), "std": std, "samples": samples}
        if output_type == "np":
            found = {name: self._array(value) for name, value in found.items()}
        return ReconstructionOutput(**found)

    def _array(self, x: Tensor) -> np.ndarray:
        """Return a tensor (..., C, *spatial) as an array in the form of "np": channels last for images."""
        return (x.movedim(-3, -1) if self._output_types[0] == "pil" else x).cpu().numpy()


class ScoringPipeline(ReconstructingPipeline, CompletingPipeline):
    """A pipeline that scores how strange given items are."""

    # This function is longer than 60 lines because it documents every option.
    @torch.no_grad()
    def score(
        self,
        x: Any,
        method: str = "reconstruction",
        strengths: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
        num_timesteps: int = 20,
        smoothing: float = 0.0,
        generator: Generators = None,
        batch_size: int = 64,
        complete: bool = False,
        class_labels: ClassLabels = None,
        condition=None,
    ) -> ScoreOutput:
        """Score how strange items are to the model: one number for each item, and a map of its size; more is stranger.

        With method="reconstruction", each item is noised to each of the strengths, and brought back by five DDIM steps.
        The map is the squared error in the model's units, averaged over the strengths. With method="denoising", the map
        has the terms of the variational bound of -log p(x) (Ho et al., arXiv:2006.11239, equation 5) in nats, so that
        its sum is the bound, with an unbiased estimate of the sum over timesteps. p is the probability of the levels of
        pictures and of images with data_levels, and a density otherwise. With method="noise", the map is the
        squared error of the predicted noise, averaged over evenly spaced timesteps (the simple loss of Ho et al.,
        equation 14), with x0 clipped as in sampling. All take 20 calls of the model for each item at the defaults.

        Args:
            x: the items, in the form in which the pipeline gives its samples.
            method: "reconstruction", "denoising" or "noise"; "denoising" needs a `GaussianScheduler`.
            strengths: shares of the training timesteps that an item is noised by, above 0 and at most 1.
            num_timesteps: number of timesteps of "denoising" and "noise", at least 2; T computes all terms.
            smoothing: deviation, in pixels or points, of a Gaussian filter of the maps; the scores stay.
            generator: one, or one per item; the draws of an item do not depend on the others, nor on batch_size.
            batch_size: number of items at one strength or timestep in each batch, which is filled across both.
            complete: complete NaN in the items first (`inpaint`); they do not count in the scores.
            class_labels: class of the items, of a model with classes: one for all, or one per item.
            condition: what the items belong to, as in the call, for a model with paired conditions: one for all, or one
                per item. The score then says how strange an item is given its condition.

        Returns:
            A `ScoreOutput` with `scores`, the means of the maps before smoothing, `maps`, and `percentiles` among the
            scores that `calibrate_score` was given, if it was with these options.

        Raises:
            ValueError: a value is outside its range, a shape is wrong, items have NaN, a condition is missing or does
                not fit, or the scheduler has no bound.
            FloatingPointError: a score is NaN or infinity; the message has the likely cause.
        """
        check_rules(
            SCORING_RULES, method=method, strengths=strengths, num_timesteps=num_timesteps, smoothing=smoothing,
            batch_size=batch_size, scheduler=self.scheduler, kind=type(self.scheduler).__name__,
        )  # fmt: skip
        given, known = self._read_to_score(x, complete)
        labels = as_list(class_labels)
        make_guidance(self, len(given), labels)  # its rules
        told = encode_condition(self, condition, len(given), size=given.shape[2:])
        told = None if told is None else told.cpu()
        draws = generators_of_items(generator, len(given))
        if not known.all():
            given = self._completed(given, known, draws, labels, condition)
        _, x0 = read_items(self, given, "x")
        x0 = x0.cpu()
        options = {"method": method, "num_timesteps": num_timesteps}
        if method == "reconstruction":
            options = {"method": method, "strengths": list(strengths)}
        if any(label is not None for label in (labels if isinstance(labels, list) else [labels])):
            options["classes"] = True
        maps = self._maps(x0, options, draws, batch_size, labels, told)
        self.maybe_free_model_hooks()
        scale, _ = affine(self, x0.shape[1], x0.ndim)
        counted = known & (scale > 0)  # not the channels that never change
        scores = torch.where(counted, maps, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
        scores = scores.numpy()
        if not np.isfinite(scores).all():
            bad = numbers_of(torch.from_numpy(~np.isfinite(scores))[:, None])
            raise FloatingPointError(f"the score of {bad} is NaN or infinity. {why_not_finite(self.unet, x0.dtype)}")
        smooth = smoothed(maps, smoothing)  # in float64, which autocast leaves as it is
        return ScoreOutput(
            scores=scores, maps=self._array(smooth.float()),
            percentiles=self._percentiles(scores, options), options=options,
        )  # fmt: skip

    def _read_to_score(self, x, complete: bool) -> tuple[Tensor, Tensor]:
        """Return items in their own units and bools that say where they are known, each (B, C, *spatial)."""
        data = self._given(x, "x")
        missing = data.isnan()
        if missing.any() and not complete:
            raise ValueError(f"x has NaN in {numbers_of(missing)}: complete=True completes it before the scoring")
        if missing.flatten(1).all(dim=1).any():
            raise ValueError("x must have something known in each item, got an item of NaN alone")
        if missing.any():
            self._check_completion()
        return data, ~missing

    def _completed(self, data: Tensor, known: Tensor, draws: list, labels, condition) -> Tensor:
        """Return items with their unknown values drawn by `inpaint`."""
        chosen = (~known).flatten(1).any(dim=1).nonzero().flatten().tolist()
        steps = min(COMPLETION["num_inference_steps"], self.scheduler.config.num_train_timesteps)
        filled = self.inpaint(
            data[chosen], generator=[draws[i] for i in chosen], output_type="pt", return_dict=False,
            class_labels=[labels[i] for i in chosen] if isinstance(labels, list) else labels,
            condition=chosen_conditions(condition, chosen),
            **{**COMPLETION, "num_inference_steps": steps},
        )[0]  # fmt: skip
        data = data.clone()
        data[chosen] = filled.cpu().to(data.dtype)
        return data

    def _maps(
        self, x0: Tensor, options: dict, draws: list, batch_size: int, labels, condition: Tensor | None
    ) -> Tensor:
        """Return the maps of items in the model's units, float64; batches are filled across items and places."""
        device, dtype = self._execution_device, self.unet.dtype
        maps = torch.zeros(x0.shape, dtype=torch.float64)
        strengths, timesteps = options.get("strengths"), None
        total = len(self._trained.alphas_cumprod)
        if options["method"] == "denoising":
            timesteps = BoundTimesteps(self._trained.alphas_cumprod, options["num_timesteps"])
            maps += self.scheduler.prior_term(x0.double())
        places = len(strengths or ()) or min(options["num_timesteps"], total)
        pairs = [(item, place) for item in range(len(x0)) for place in range(places)]
        for first in self.progress_bar(range(0, len(pairs), batch_size)):
            batch = pairs[first : first + batch_size]
            items = torch.tensor([item for item, _ in batch])
            drawn, noise = [], []
            for item, place in batch:
                if strengths:
                    drawn.append((max(0, round(strengths[place] * total) - 1), 1 / places))
                elif timesteps:
                    drawn.append(timesteps.draw(place, draws[item]))
                else:  # the middle of each of as many equal parts
                    drawn.append(((2 * place + 1) * total // (2 * places), 1 / places))
                noise.append(randn_tensor((1, *x0.shape[1:]), generator=draws[item], device=device, dtype=dtype))
            t = torch.tensor([t for t, _ in drawn])
            weights = torch.tensor([weight for _, weight in drawn], dtype=torch.float64)
            guidance = make_guidance(
                self, len(batch), [labels[item] for item, _ in batch] if isinstance(labels, list) else labels
            )
            told = None if condition is None else condition[items].to(device)
            predict = Predictor(self, guidance, device, told)
            error = {"reconstruction": self._error, "denoising": self._bound, "noise": self._noise_error}
            found = error[options["method"]](predict, x0[items].to(device), torch.cat(noise), t).cpu().double()
            maps.index_add_(0, items, found * weights.view(-1, *(1,) * (x0.ndim - 1)))
        return maps

    def _error(self, predict: Predictor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of items that are noised to t (B,) and brought back by DDIM steps."""
        signal, spread = predict.rates(t, x0)
        x, estimate, epsilon = signal * x0 + spread * noise, None, None
        for left in range(STEPS_OF_SCORE, 0, -1):
            # evenly from t to the data, each step's place rounded up
            now = torch.div((t + 1) * left + STEPS_OF_SCORE - 1, STEPS_OF_SCORE, rounding_mode="floor") - 1
            signal, spread = predict.rates(now, x)
            if estimate is not None:
                x = signal * estimate + spread * epsilon
            estimate = predict(x, now, estimate)
            epsilon = (x - signal * estimate) / spread
        return (estimate - x0).square()

    def _noise_error(self, predict: Predictor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of the noise that is predicted at t (B,)."""
        signal, spread = predict.rates(t, x0)
        return ((x0 - predict(signal * x0 + spread * noise, t)) * signal / spread).square()

    def _bound(self, predict: Predictor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the terms of the bound at t (B,) for each value, in nats."""
        x_t = self.scheduler.add_noise(x0, noise, t.to(x0.device))
        levels = self._levels(x0.device)
        decoder = {"decoder": "density"} if levels is None else {"levels": levels}
        return self.scheduler.bound_term(
            predict.output(x_t, t).double(), x0.double(), x_t.double(), t.to(x0.device), **decoder
        )

    def _levels(self, device) -> int | Tensor | None:
        """Return the number of values that images can have, one or (1, C, 1, 1) float64; None for a density."""
        if self._output_types[0] != "pil":  # sequences
            return None
        if not self._has_units():
            return 256
        levels = self.config.get("data_levels")
        return None if levels is None else torch.tensor(levels, dtype=torch.float64, device=device).view(1, -1, 1, 1)

    def calibrate_score(self, *results: ScoreOutput, num_quantiles: int = 256):
        """Keep the distribution of the scores of normal items, such as the training data, for percentiles.

        Later calls of `score` with the same options then have `percentiles`, and a saved pipeline keeps it.

        Args:
            results: what `score` returned for the normal items, all with the same options.
            num_quantiles: how many quantiles are kept, at least 2.

        Returns:
            self

        Raises:
            ValueError: there are no results, they have different options, or num_quantiles is too small.
        """
        if not results or not all(isinstance(each, ScoreOutput) for each in results):
            raise ValueError("calibrate_score needs one or more results of score, got none or something else")
        if not (is_whole(num_quantiles) and num_quantiles >= 2):
            raise ValueError(f"num_quantiles must be a whole number of at least 2, got {num_quantiles!r}")
        options = results[0].options
        if different := [each.options for each in results if each.options != options]:
            raise ValueError(f"results must have the same options, got {options} and {different[0]}")
        scores = np.concatenate([each.scores for each in results])
        quantiles = np.quantile(scores, np.linspace(0, 1, num_quantiles)).tolist()
        kept = dict(self.config.get("score_quantiles") or {})
        self.register_to_config(
            score_quantiles={**kept, options["method"]: {"options": options, "quantiles": quantiles}}
        )
        return self

    def _percentiles(self, scores: np.ndarray, options: dict) -> np.ndarray | None:
        """Return the percentiles of scores among those of the calibration; None without one."""
        kept = (self.config.get("score_quantiles") or {}).get(options["method"])
        if kept is None:
            return None
        if dict(kept["options"]) != options:
            warnings.warn(
                f"no percentiles: the calibration was with {dict(kept['options'])}, got {options}", stacklevel=3
            )
            return None
        return np.interp(scores, kept["quantiles"], np.linspace(0, 100, len(kept["quantiles"])))
