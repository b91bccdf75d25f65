"""Sampling pipelines: `DDPMPipeline` (images) and `DDPMPipeline1D` (sequences).

The loop is algorithm 2 of Ho et al. (arXiv:2006.11239) with any diffusers scheduler in the place of its update;
self-conditioning as in Chen et al. (arXiv:2208.04202).
This file imports nothing of ddpm_hf: it ships inside saved pipelines.
"""

import hashlib
import importlib
import inspect
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from PIL import Image
from torch import Tensor

# Saved pipelines carry their code: unet_ddpm_hf_0_2_0.py is unet.py of version 0.2.0. diffusers keeps all such files of
# a process in one namespace by their names, so the version is part of it.
CARRIED = re.compile(r"(unet|scheduler|pipeline)_ddpm_hf_[0-9]\w*")
OWN_CARD = re.compile(r"(.*)<!-- card of ddpm_hf ([0-9a-f]{16}): [^\n]*-->\s*", re.DOTALL)
FIRST_CARD = """---
library_name: diffusers
tags: [ddpm_hf]
---
# {name}

A pipeline of ddpm_hf. Where ddpm_hf is installed: `ddpm_hf.{name}.from_pretrained(this)`; where only diffusers is:
`diffusers.DiffusionPipeline.from_pretrained(this, trust_remote_code=True)`, which runs the Python files that lie beside
this card: read them first. How the model was trained was not recorded here.
"""
IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
FAST = {"solver_order": 2, "algorithm_type": "dpmsolver++", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
# The fast sampler spreads its steps below this ratio of noise to signal.
HIGHEST_NOISE = 500.0
# Stock schedulers of the process that our models are trained in, which cannot sample from them all the same.
UNFIT = {
    "DDIMInverseScheduler": "it goes from data to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise",
    "LCMScheduler": "it needs a model that was distilled into a consistency model",
    "UnCLIPScheduler": "it must be told the next timestep in each step, which the pipelines here do not do",
}
# Those that take no prediction of x0, and those whose first steps are wrong for epsilon at very high noise.
NOT_OF_SAMPLE = ("DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                 "KDPM2DiscreteScheduler", "PNDMScheduler")  # fmt: skip
POOR_WITH_EPSILON, SMALL_ABAR = ("KDPM2DiscreteScheduler", "PNDMScheduler"), 3e-5
CUTS_AT_THREE = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")
LEARNED = ("learned", "learned_range")  # variance types with twice the channels
SEE_SAMPLERS = "docs/samplers.md has all schedulers of diffusers and which of them work"
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class ImageOutput(BaseOutput):
    """`images`: a list of PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`, both float in [0, 1].

    `trajectory`: with `return_all_timesteps`, x_T first and x_0 last: a list of PIL images a sample, or
    `(B, steps + 1, H, W, C)` / `(B, steps + 1, C, H, W)`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[list[Image.Image]] | np.ndarray | Tensor | None = None


@dataclass
class SequenceOutput(BaseOutput):
    """`sequences`: array or tensor `(B, C, length)`, in the data's units; `trajectory`: `(B, steps + 1, C, length)`."""

    sequences: np.ndarray | Tensor
    trajectory: np.ndarray | Tensor | None = None


def _carried_name(cls: type) -> str | None:
    """The name of the file of code that a class is saved with; None for classes of other libraries."""
    package, stem = cls.__module__.split(".")[0], cls.__module__.split(".")[-1]
    if CARRIED.fullmatch(stem):
        return stem
    if package == "ddpm_hf" and CARRIED.fullmatch(f"{stem}_ddpm_hf_0"):
        return f"{stem}_ddpm_hf_" + re.sub(r"\W", "_", sys.modules[package].__version__)
    return None


def _source(cls: type) -> str:
    return Path(sys.modules[cls.__module__].__file__).read_text(encoding="utf-8")


def sign_card(text: str) -> str:
    """A model card with a mark, by which it is known as written by a program and not edited since."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"{text.strip()}\n\n<!-- card of ddpm_hf {digest}: one that is edited is kept -->\n"


def is_own_card(text: str) -> bool:
    match = OWN_CARD.fullmatch(text)
    return match is not None and hashlib.sha256(match[1].strip().encode()).hexdigest()[:16] == match[2]


def card_to_keep(repo_id: str, revision: str | None = None, token: str | None = None) -> bool:
    """Return True if the repo has a model card that someone has written or edited."""
    try:
        # not from the cache: where there is no connection, that must be an error
        card = hf_hub_download(repo_id, "README.md", revision=revision, token=token, force_download=True)
    except LocalEntryNotFoundError:
        raise
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not is_own_card(Path(card).read_text(encoding="utf-8"))


def _check_steps(steps, total: int | None = None) -> None:
    """That the model can be called as often as that, of `total` timesteps (None: not known yet)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or (total is not None and steps > total):
        allowed = "of at least 1" if total is None else f"from 1 to {total}"
        raise ValueError(f"num_inference_steps must be a whole number {allowed}; got {steps!r}")


def log_snr_timesteps(alphas_cumprod: Tensor, steps: int) -> list[int]:
    """Timesteps of a short chain, descending from T-1: evenly in log(abar / (1 - abar)) down to t = 0 (left out).

    Evenly in t, a chain crosses the highest noise in its first step. But that is where large pictures take their
    brightness and layout: what all of n pixels share is seen through n times the noise.

    Noise above `HIGHEST_NOISE` times the signal says nothing of x0, so the steps are spread below it. Where the last
    beta is a jump from far lower noise, so that the second step would lie inside it, they are spread from T-2 on.

    Args:
        alphas_cumprod: (T,), descending.
        steps: 1 to T.
    """
    smallest = 2.0**-24  # keeps log-SNR finite where abar is 0, or 1 in float32
    abar = alphas_cumprod.double().cpu().clamp(smallest, 1 - smallest)
    last = len(abar) - 1
    if steps == 1 or last == 0:
        return [last]
    log_snr = (abar / (1 - abar)).log()
    first = log_snr[last].clamp(min=-2 * math.log(HIGHEST_NOISE))
    wanted = torch.lerp(first, log_snr[0], torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1])
    if wanted[0] < log_snr[last - 1]:
        wanted = torch.lerp(log_snr[last - 1], log_snr[0], torch.linspace(0, 1, steps, dtype=torch.float64)[:-1])
    nearest = (log_snr[:last, None] - wanted).abs().argmin(dim=0).tolist()
    chain = [last]
    for t in nearest:
        chain.append(min(t, chain[-1] - 1))
    # where timesteps are too few for all to be distinct: the last ones by one each
    return [max(t, steps - 1 - i) for i, t in enumerate(chain)]


def _scheduler_fault(scheduler) -> str | None:
    """Why a scheduler cannot sample from a model that was trained on betas, whichever the model; None: it can."""
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    config = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type")
    if reasons := [reason for name, reason in UNFIT.items() if name in names]:
        return reasons[0]
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or config.get("use_flow_sigmas"):
        return (
            "it is of another process than the one that the model was trained in, which has betas: schedulers of flow "
            "matching, VE, EDM, consistency models and discrete data have none"
        )
    arguments = list(inspect.signature(scheduler.step).parameters.values())[3:]
    if needs := [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]:
        return f"its steps need {', '.join(needs)}, which the pipelines here do not have"
    if prediction == "sample" and names & set(NOT_OF_SAMPLE):
        return "it cannot use a model that predicts x0 (prediction_type='sample')"
    return None


def _threshold(x0: Tensor, ratio: float, highest: float) -> Tensor:
    """Dynamic thresholding (Saharia et al., section 2.3): clamp to [-s, s] and divide by s, the percentile `ratio` of
    |x0| in each sample, from 1 to `highest`."""
    magnitudes = x0.flatten(1).abs().float().sort(dim=1).values
    last = magnitudes.shape[1] - 1
    rank = ratio * last
    low = int(rank)
    s = torch.lerp(magnitudes[:, low], magnitudes[:, min(low + 1, last)], rank - low)
    s = s.clamp(1, highest).to(x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


class _SamplingPipeline(DiffusionPipeline):
    """The sampling loop; what the data is (images, sequences) is in `_encode`, `_decode`, `_size` and `_output`."""

    _output_types: tuple
    _callback_tensor_inputs = ["latents"]
    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after that step; the next call starts afresh."""
        return self._interrupt

    def _check_parts(self, unet, num_inference_steps: int | None, ndim: int, other: str) -> None:
        if getattr(unet, "ndim", ndim) != ndim:
            raise ValueError(f"{type(self).__name__} was given a {type(unet).__name__}: use {other}")
        if num_inference_steps is not None:
            _check_steps(num_inference_steps)

    # -- the saved folder ----------------------------------------------------------------------

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save weights, configurations and the code that they need, so that the folder loads where ddpm_hf is not
        installed (`trust_remote_code=True`), and after being saved again from there.

        Args:
            save_directory: a folder; made if it is not there. A README.md in it stays.
            push_to_hub: upload it, to the `repo_id` given, or of the folder's name; `token`, `private`,
                `commit_message` and `create_pr` as in `push_to_hub`.
        """
        names = ("repo_id", "token", "private", "commit_message", "create_pr")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        self._carry_code(Path(save_directory))
        if push_to_hub:
            self._upload(save_directory, **{"repo_id": Path(save_directory).name, **upload})

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, token: str | None = None,
        create_pr: bool = False, safe_serialization: bool = True, variant: str | None = None,
    ) -> str:  # fmt: skip
        """Save into a repo of the Hub, as `save_pretrained`; a model card that someone has written there stays.

        Returns:
            The commit's address, as huggingface_hub gives it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._upload(folder, repo_id, commit_message, private, token, create_pr)

    def _upload(self, folder, repo_id, commit_message=None, private=None, token=None, create_pr=False) -> str:
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        return upload_folder(
            repo_id=repo_id, folder_path=folder, token=token, create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            allow_patterns=self._parts_of(Path(folder)),
            ignore_patterns=["README.md"] if card_to_keep(repo_id, token=token) else None,
        )  # fmt: skip

    def _parts_of(self, folder: Path) -> list[str]:
        """Names of the files that the saved pipeline consists of: what else lies in its folder is not uploaded."""
        kinds = ("*config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
        patterns = [self.config_name, "README.md", "pipeline_ddpm_hf_*.py"]
        patterns += [f"{name}/{kind}" for name in self.components for kind in (*kinds, "*_ddpm_hf_*.py")]
        files = [path for pattern in patterns for path in folder.glob(pattern) if not path.is_symlink()]
        return [path.relative_to(folder).as_posix() for path in files]

    def _carry_code(self, folder: Path) -> None:
        """Put the code of our classes beside what was saved, name it in model_index.json, and take paths out."""
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text())
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # compiled
            if code := _carried_name(type(component)):
                (folder / name / f"{code}.py").write_text(_source(type(component)), encoding="utf-8")
                index[name] = [code, type(component).__name__]
        if code := _carried_name(type(self)):
            (folder / f"{code}.py").write_text(_source(type(self)), encoding="utf-8")
            index["_class_name"] = [code, type(self).__name__]
        index.pop("_name_or_path", None)
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in folder.glob("*/*config.json"):
            config = json.loads(file.read_text())
            if config.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not (card := folder / "README.md").exists():
            card.write_text(sign_card(FIRST_CARD.format(name=type(self).__name__)), encoding="utf-8")

    # The package reads carried code's names as its own classes, so no trust in a folder's code is needed. Two places:
    # a download looks for the components' files by the names in the index, and must still find them.

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        index = super()._dict_from_json_file(json_file, **options)
        name = index.get("_class_name")
        if __name__ == "ddpm_hf.pipeline" and isinstance(name, list) and CARRIED.fullmatch(str(name[0])):
            index["_class_name"] = name[1]
        return index

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved pipeline, as diffusers does; a `scheduler` given beside it is checked as one set afterwards.

        Raises:
            ValueError: a scheduler that cannot sample from the saved model.
        """
        scheduler = kwargs.pop("scheduler", None)
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if scheduler is not None:
            pipeline.scheduler = scheduler
        return pipeline

    @classmethod
    def load_config(cls, *args, **kwargs):
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if __name__ == "ddpm_hf.pipeline":
            for name, value in index.items():
                if isinstance(value, list) and len(value) == 2 and CARRIED.fullmatch(str(value[0])):
                    module = f"ddpm_hf.{value[0].split('_ddpm_hf_')[0]}"
                    importlib.import_module(module)  # diffusers looks among the modules that are there
                    index[name] = [module, value[1]]
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Read the options from a configuration. diffusers only warns of keys that it does not know.

        Raises:
            ValueError: an unknown key is close to one of ours, so it is taken for misspelt.
        """
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in config_dict:
            if name not in known and not name.startswith("_") and (close := get_close_matches(name, known, 1, 0.75)):
                raise ValueError(
                    f"{cls.__name__} does not know: {name} (did you mean {close[0]}?), in the configuration"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a new pipeline with the parts and settings of another one, as diffusers; `kwargs` replace some of them.

        The parts are passed on by name, because diffusers takes a model only if the constructor names its class, and
        this file knows no model.
        """
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler")}
        made = super().from_pipe(pipeline, **{**parts, **kwargs})
        if kwargs.get("scheduler") is not None:
            made.scheduler = kwargs["scheduler"]  # the settings came with that of the other pipeline
        return made

    # -- samplers ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value) -> None:
        """Setting the scheduler checks it, and ends the fast sampler: its spacing goes, the pipeline's own number of
        steps returns.

        Raises:
            ValueError: a scheduler that cannot sample from the model; the message has the reason.
        """
        if name == "scheduler":
            self._check_scheduler(value)
        super().__setattr__(name, value)
        if name == "scheduler" and self.config.get("log_snr_spacing"):
            own = self.config.get("steps_before_fast")
            self.register_to_config(num_inference_steps=own, log_snr_spacing=False, steps_before_fast=None)

    def _check_scheduler(self, scheduler) -> None:
        """Raise ValueError for a scheduler that cannot work here; warn of one whose samples will hardly be right.

        What the model was trained with is read off the first scheduler that the pipeline was given.
        """
        kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
        if fault := _scheduler_fault(scheduler):
            raise ValueError(f"{kind} cannot be the scheduler of this pipeline: {fault}. {SEE_SAMPLERS}")
        prediction, abar = config.get("prediction_type"), scheduler.alphas_cumprod.double().cpu()
        trained_prediction, trained_abar = self.__dict__.setdefault("_trained", (prediction, abar))
        keep = f"{kind}.from_config(pipe.scheduler.config) keeps what the model was trained with"
        if prediction != trained_prediction:
            raise ValueError(
                f"{kind} cannot be the scheduler of this pipeline: its prediction_type is {prediction!r}, the model "
                f"was trained with {trained_prediction!r}. {keep}; for another model, make another pipeline"
            )
        self._check_variance(scheduler)
        warned = None
        if len(abar) != len(trained_abar):
            warned = f"it has {len(abar)} timesteps, the model was trained with {len(trained_abar)}. {keep}"
        elif (difference := (abar - trained_abar).abs().max().item()) > 1e-3:
            warned = f"its betas are not those of the model: alphas_cumprod differs by up to {difference:.2g}. {keep}"
        elif prediction == "epsilon" and kind in POOR_WITH_EPSILON and abar[-1] < SMALL_ABAR:
            warned = f"its error is large for epsilon where alphas_cumprod ends below {SMALL_ABAR}. {SEE_SAMPLERS}"
        if warned:
            warnings.warn(f"samples of {kind} will hardly be right: {warned}", stacklevel=3)

    def _check_variance(self, scheduler) -> None:
        kind, config = type(scheduler).__name__, scheduler.config
        if config.get("variance_type") not in LEARNED or self.unet is None:
            return
        channels = self._channels()
        if kind in CUTS_AT_THREE and channels > 3:
            raise ValueError(
                f"{kind} with variance_type={config.variance_type!r} keeps 3 of {channels} channels: "
                "give from_config variance_type=None"
            )
        unet = self.unet.config
        predicted = unet.get("out_channels") or channels * (2 if unet.get("learned_variance") else 1)
        if hasattr(scheduler, "clip_x0") and predicted != 2 * channels:
            raise ValueError(
                f"variance_type={config.variance_type!r} needs a model with {2 * channels} output channels "
                f"(learned_variance=True), got one with {predicted}"
            )

    def use_fast_sampler(self, num_inference_steps: int = 15):
        """Sample with few calls of the model: DPM-Solver++ of order 2 (Lu et al., arXiv:2211.01095), diffusers' own, on
        the schedule that the model was trained on, at `log_snr_timesteps`. docs/studies.md has its distances to data
        beside those of others.

        The pipeline's scheduler is replaced; a saved pipeline keeps that. Setting any scheduler ends it, with that
        scheduler's own spacing and the number of steps that the pipeline had before. The way back is
        `pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config)`.

        Args:
            num_inference_steps: default number of steps from now on; 1 to T.

        Returns:
            self

        Raises:
            ValueError: num_inference_steps outside its range.
        """
        _check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        config = self.scheduler.config
        scheduler = DPMSolverMultistepScheduler.from_config(config, **FAST)
        # the way back finds here what is changed
        own = {"timestep_spacing": config.get("timestep_spacing", "trailing"), **config.get("_gaussian", {})}
        scheduler.register_to_config(_gaussian=own)
        if config.get("variance_type") in LEARNED:
            # of a learned variance stock solvers keep the first three channels, whatever the data has: `_denoise` drops
            # that half
            scheduler.register_to_config(variance_type=None, _gaussian={**own, "variance_type": config.variance_type})
        self.scheduler = scheduler
        self.register_to_config(
            steps_before_fast=self.config.num_inference_steps,
            num_inference_steps=num_inference_steps,
            log_snr_spacing=True,
        )
        return self

    def is_spaced_by_log_snr(self) -> bool:
        """Return True if the steps are those of the fast sampler; another scheduler, put in its place, has its own."""
        return self.config.log_snr_spacing and isinstance(self.scheduler, DPMSolverMultistepScheduler)

    # -- what differs by data ------------------------------------------------------------------

    def _size(self) -> tuple:
        raise AssertionError("a pipeline of images or of sequences says its size")

    def _channels(self) -> int:
        return self.unet.config.in_channels

    # -- pieces of the loop --------------------------------------------------------------------

    def _check(self, batch_size, generator, output_type, latents=None) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if output_type not in self._output_types:
            raise ValueError(f"output_type must be one of {', '.join(self._output_types)}; got {output_type!r}")
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(g is None or isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"generator must be a torch.Generator, or one per sample; got {generator!r}")
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one, or one per sample: batch_size is {batch_size}, got {len(generator)} generators"
            )
        if latents is not None:
            shape = (batch_size, self._channels(), *self._size())
            if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
                got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
                raise ValueError(f"latents must be a tensor of the shape {shape}, got {got}")
            if not torch.isfinite(latents).all():
                raise ValueError("latents must be finite, got NaN or infinity")

    def _set_timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        device = self._execution_device
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(f"give num_inference_steps or timesteps, not both; got {num_inference_steps} and them")
            if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"{type(self.scheduler).__name__} takes no explicit timesteps; give num_inference_steps"
                )
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            return
        total = self.scheduler.config.num_train_timesteps
        steps = num_inference_steps if num_inference_steps is not None else self.config.num_inference_steps or total
        _check_steps(steps, total)
        if self.is_spaced_by_log_snr():
            chain = log_snr_timesteps(self.scheduler.alphas_cumprod, steps)
            self.scheduler.set_timesteps(timesteps=chain, device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _step_options(self, generator: Generators, eta: float | None) -> dict:
        """Those of `generator` and `eta` that the scheduler's step takes."""
        parameters = inspect.signature(self.scheduler.step).parameters
        options = {}
        if "generator" in parameters:
            options["generator"] = generator
        if eta is not None:
            if "eta" not in parameters:
                raise ValueError(f"eta was given, but {type(self.scheduler).__name__} has no eta")
            if not isinstance(eta, (int, float)) or isinstance(eta, bool) or not 0 <= eta <= 1:
                raise ValueError(f"eta must be a number from 0 to 1, got {eta!r}")
            options["eta"] = eta
        return options

    def _estimate_x0(self, prediction: Tensor, model_input: Tensor, t) -> Tensor:
        """x0 by the prediction at x_t, clipped as configured: for self-conditioning under stock schedulers."""
        config = self.scheduler.config
        if config.prediction_type == "sample":
            x0 = prediction
        else:
            # Between whole timesteps (Euler, Heun) the noise level sqrt((1 - abar) / abar) is interpolated linearly.
            abar = self.scheduler.alphas_cumprod.double().cpu()
            sigmas = ((1 - abar) / abar).sqrt()
            t = float(t)
            low = min(max(int(t), 0), len(sigmas) - 1)
            high = min(low + 1, len(sigmas) - 1)
            sigma = torch.lerp(sigmas[low], sigmas[high], t - low).item()
            root, root_noise = (1 / (1 + sigma**2)) ** 0.5, (sigma**2 / (1 + sigma**2)) ** 0.5
            if config.prediction_type == "epsilon":
                x0 = (model_input - root_noise * prediction) / root
            else:
                x0 = root * model_input - root_noise * prediction
        if config.get("thresholding"):
            return _threshold(x0, config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
        if config.get("clip_sample"):
            limit = config.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        return x0

    def _takes_variance(self) -> bool:
        """Return True if the scheduler's step reads the half of the channels in which a model predicts its variance."""
        own = hasattr(self.scheduler, "clip_x0")
        stock = isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler))
        return (own or stock) and self.scheduler.config.get("variance_type") in LEARNED

    @torch.no_grad()
    def _denoise(
        self, x: Tensor, timesteps, options: dict, trajectory: list | None, callback, callback_inputs
    ) -> Tensor:
        """x_T -> x_0 along `timesteps`; appends each x to `trajectory`."""
        self_condition = self.unet.config.get("self_condition", False)
        channels = 2 * x.shape[1] if self._takes_variance() else x.shape[1]
        self._interrupt = False
        x0 = None
        for i, t in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(x, t)
            extra = {"x_self_cond": x0} if self_condition else {}
            prediction = self.unet(model_input, t, **extra).sample[:, :channels]
            result = self.scheduler.step(prediction, t, x, **options)
            x = result.prev_sample
            if self_condition:
                x0 = getattr(result, "pred_original_sample", None)
                if x0 is None:
                    x0 = self._estimate_x0(prediction[:, : x.shape[1]], model_input, t)
            if callback is not None:
                # The contract of diffusers: callback(pipeline, step, timestep, tensors) -> tensors to go on with.
                tensors = {name: {"latents": x}[name] for name in callback_inputs}
                x = (callback(self, i, t, tensors) or {}).get("latents", x)
            if trajectory is not None:
                trajectory.append(x)
            if self._interrupt:  # set by a callback, or from another thread, as in diffusers' own pipelines
                break
        return x

    def _generate(
        self, batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict,
        callback_on_step_end, callback_inputs, return_all_timesteps, timesteps,
    ):  # fmt: skip
        self._check(batch_size, generator, output_type, latents)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        names = callback_inputs if isinstance(callback_inputs, (list, tuple)) else [callback_inputs]
        if not all(isinstance(name, str) and name in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {self._callback_tensor_inputs}, got {callback_inputs!r}"
            )
        callback_inputs = names
        self._set_timesteps(num_inference_steps, timesteps)
        options = self._step_options(generator, eta)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            shape = (batch_size, self._channels(), *self._size())
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        trajectory = [x] if return_all_timesteps else None
        x = self._denoise(x, self.scheduler.timesteps, options, trajectory, callback_on_step_end, callback_inputs)
        self.maybe_free_model_hooks()
        samples = self._decode(x, output_type)
        whole = None
        if trajectory is not None:
            flat = self._decode(torch.stack(trajectory, dim=1).flatten(0, 1), output_type)
            n = len(trajectory)
            whole = (
                [flat[i * n : (i + 1) * n] for i in range(batch_size)]
                if isinstance(flat, list)
                else flat.reshape(batch_size, n, *flat.shape[1:])
            )
        return self._output(samples, whole, return_dict)

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
    ):
        """Noise two pieces of data, mix them, and denoise the mix (DDPM, section 4.3).

        Both ends are noised with the same noise, so that the mix has the noise level of its timestep.

        Args:
            x1, x2: the ends, in the data's natural range: what the pipeline gives (images: PIL, arrays
                `(B, H, W, C)` or tensors `(B, C, H, W)` in [0, 1]; sequences `(B, C, length)` in their own units).
            strength: share of the chain to go back, in (0, 1]; 1 starts from the last timestep, close to pure noise.
            num_inference_steps: of the whole chain; `strength` of them are run.
            weights: of x2, in [0, 1]; several give that many samples a pair, one after the other.
            generator: of all noise; one, or one per pair.
            eta, output_type, return_dict: as in the call.

        Returns:
            As the call: len(x1) * len(weights) samples.

        Raises:
            ValueError: ends of different or unfitting shapes, or a value outside its range.
        """
        output_type = output_type or self._output_types[0]
        try:
            weights = [float(w) for w in np.ravel(weights)]
            strength = float(strength)
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights and strength must be numbers, got {weights!r} and {strength!r}") from error
        if not weights or not all(0 <= w <= 1 for w in weights):
            raise ValueError(f"weights must lie in [0, 1], got {weights}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        x1, x2 = self._encode(x1, "x1"), self._encode(x2, "x2")
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        self._check(len(x1), generator, output_type)
        self._set_timesteps(num_inference_steps, None)
        chain = self.scheduler.timesteps
        # schedulers of order n take n entries a step, and start at whole steps only
        order = self.scheduler.order
        steps = -(-len(chain) // order)
        if self.is_spaced_by_log_snr():  # the step that begins nearest to that share of the training timesteps
            aim = strength * self.scheduler.config.num_train_timesteps - 1
            start = (chain - aim).abs().argmin().item()
        else:
            start = (steps - max(1, round(steps * strength))) * order
        if start and isinstance(self.scheduler, PNDMScheduler):
            raise ValueError("PNDMScheduler cannot start in the middle of its chain: strength must be 1, "
                             f"or the scheduler another; got {strength}")  # fmt: skip
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)

        noise = randn_tensor(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        t = chain[start : start + 1].expand(len(x1))
        noised1, noised2 = (self.scheduler.add_noise(x, noise, t) for x in (x1, x2))
        mixed = torch.stack([torch.lerp(noised1, noised2, w) for w in weights], dim=1).flatten(0, 1)
        if isinstance(generator, (list, tuple)):
            generator = [g for g in generator for _ in weights]
        x = self._denoise(mixed, chain[start:], self._step_options(generator, eta), None, None, [])
        self.maybe_free_model_hooks()
        return self._output(self._decode(x, output_type), None, return_dict)


class DDPMPipeline(_SamplingPipeline):
    """Unconditional image generation.

    Args:
        unet: `UNet2D`, or a stock `UNet2DModel`.
        scheduler: `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: steps where a call gives none; None: every training step.
        log_snr_spacing, steps_before_fast: as `use_fast_sampler` sets them.
    """

    model_cpu_offload_seq = "unet"
    _output_types = ("pil", "np", "pt")

    def __init__(
        self,
        unet,
        scheduler,
        num_inference_steps: int | None = None,
        log_snr_spacing: bool = False,
        steps_before_fast: int | None = None,
    ):
        super().__init__()
        self._check_parts(unet, num_inference_steps, 2, "DDPMPipeline1D")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            log_snr_spacing=log_snr_spacing,
            steps_before_fast=steps_before_fast,
        )

    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_all_timesteps: bool = False,
        timesteps: Sequence[int] | None = None,
    ) -> ImageOutput | tuple:
        """Sample images.

        Args:
            batch_size: how many.
            num_inference_steps: 1 to T; None: the pipeline's default.
            generator: one, or one per sample (a sample then does not depend on the others).
            latents: x_T, standard normal, `(B, C, H, W)`; None: drawn.
            eta: DDIM's noise, 0 to 1; None: the scheduler's own.
            output_type: "pil" (8-bit grey, RGB or RGBA by channels), "np" or "pt" ([0, 1]).
            return_dict: an `ImageOutput` if true, else the tuple `(images,)`, with the trajectory if asked for.
            callback_on_step_end: called as (pipeline, step index, timestep, {"latents": x}); may return new latents.
            return_all_timesteps: give the trajectory x_T ... x_0 too.
            timesteps: explicit timesteps instead of a number, where the scheduler takes them.

        Raises:
            ValueError: a value outside its range, a wrong shape, a number of channels that no PIL mode has.
        """
        return self._generate(
            batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, return_all_timesteps, timesteps,
        )  # fmt: skip

    def _check(self, batch_size, generator, output_type, latents=None) -> None:
        super()._check(batch_size, generator, output_type, latents)
        if output_type == "pil" and self._channels() not in IMAGE_MODES:
            raise ValueError(
                f"output_type 'pil' needs 1, 2, 3 or 4 channels, the model has {self._channels()}: use 'np' or 'pt'"
            )

    def _size(self) -> tuple:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def _encode(self, images, name: str) -> Tensor:
        """PIL image(s), arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1] -> (B, C, H, W) in [-1, 1]."""
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, (list, tuple)) and images and isinstance(images[0], Image.Image):
            mode = IMAGE_MODES.get(self._channels())
            arrays = [np.asarray(image.convert(mode) if mode else image) / 255.0 for image in images]
            images = np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1) if images.ndim == 4 else images
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != self._channels():
            got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"{name} must be PIL images, an array (B, H, W, C) or a tensor (B, C, H, W) with "
                             f"{self._channels()} channels; got {got}")  # fmt: skip
        if len(images) == 0 or not (images.min() >= 0 and images.max() <= 1):  # NaN too
            if len(images) == 0:
                raise ValueError(f"{name} must hold at least one image")
            raise ValueError(f"{name} must lie in [0, 1]; got {images.min():.4g} to {images.max():.4g}")
        return images.to(self._execution_device, self.unet.dtype) * 2 - 1

    def _decode(self, x: Tensor, output_type: str):
        """(B, C, H, W) in [-1, 1] -> images as `output_type` says."""
        x = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = x.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return array
        eight_bit = (array * 255).round().astype(np.uint8)
        mode = IMAGE_MODES[array.shape[-1]]
        return [Image.fromarray(image[..., 0] if mode == "L" else image) for image in eight_bit]

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return ImageOutput(images=samples, trajectory=trajectory)


class DDPMPipeline1D(_SamplingPipeline):
    """Unconditional generation of sequences, in the units of the data that the model was trained on.

    Args:
        unet: `UNet1D`.
        scheduler: `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: steps where a call gives none; None: every training step.
        data_shift, data_scale: per channel, data = x * scale + shift for the model's x in [-1, 1]; None: x itself. A
            channel with the scale 0 is the constant `shift`, and its x is 0.
        log_snr_spacing, steps_before_fast: as `use_fast_sampler` sets them.
    """

    model_cpu_offload_seq = "unet"
    _output_types = ("np", "pt")

    def __init__(
        self,
        unet,
        scheduler,
        num_inference_steps: int | None = None,
        data_shift: Sequence[float] | None = None,
        data_scale: Sequence[float] | None = None,
        log_snr_spacing: bool = False,
        steps_before_fast: int | None = None,
    ):
        super().__init__()
        self._check_parts(unet, num_inference_steps, 1, "DDPMPipeline")
        channels = unet.config.in_channels
        for name, values in (("data_shift", data_shift), ("data_scale", data_scale)):
            if values is not None and (len(values) != channels or not np.isfinite(values).all()):
                raise ValueError(f"{name} must be one finite number per channel ({channels}), got {values}")
        if data_scale is not None and not all(scale >= 0 for scale in data_scale):
            raise ValueError(f"data_scale must be at least 0 (0: a channel that never changes), got {data_scale}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            log_snr_spacing=log_snr_spacing,
            steps_before_fast=steps_before_fast,
            data_shift=None if data_shift is None else [float(v) for v in data_shift],
            data_scale=None if data_scale is None else [float(v) for v in data_scale],
        )

    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_all_timesteps: bool = False,
        timesteps: Sequence[int] | None = None,
    ) -> SequenceOutput | tuple:
        """Sample sequences; the arguments are those of `DDPMPipeline`, with `latents` `(B, C, length)` and
        `output_type` "np" or "pt".

        Raises:
            ValueError: a value outside its range, or a wrong shape.
        """
        return self._generate(
            batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, return_all_timesteps, timesteps,
        )  # fmt: skip

    def _size(self) -> tuple:
        if self.unet.config.sample_size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (self.unet.config.sample_size,)

    def _affine(self) -> tuple:
        """(scale, shift) of data = x * scale + shift, (1, C, 1) in float64."""
        ones = [1.0] * self._channels()
        scale, shift = self.config.data_scale or ones, self.config.data_shift or [0.0] * self._channels()
        return tuple(torch.tensor(v, dtype=torch.float64)[None, :, None] for v in (scale, shift))

    def _encode(self, sequences, name: str) -> Tensor:
        """Arrays or tensors (B, C, length) in the data's units -> the same in the model's."""
        try:
            x = torch.as_tensor(sequences, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be an array or tensor, got {type(sequences).__name__}") from error
        if x.ndim != 3 or len(x) == 0 or x.shape[1] != self._channels() or not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, (B, {self._channels()}, length); got the shape {tuple(x.shape)}")
        scale, shift = self._affine()
        x = torch.where(scale > 0, x - shift, 0.0) / torch.where(scale > 0, scale, 1.0)
        return x.to(self._execution_device, self.unet.dtype)

    def _decode(self, x: Tensor, output_type: str):
        """(B, C, length) of the model -> in the data's units; float64 where float32 has too few digits for them."""
        scale, shift = self._affine()
        constant = (scale == 0) & (shift.float() == shift)
        wide_enough = (scale > 1e-4 * shift.abs()) & (scale > 1e-37)
        narrow = (constant | wide_enough).all() and (scale + shift.abs()).max() < 1e37
        exact = x.cpu().double() * scale + shift
        out = exact.to(torch.promote_types(x.dtype, torch.float32)) if narrow else exact
        return out.to(x.device) if output_type == "pt" else out.numpy()

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return SequenceOutput(sequences=samples, trajectory=trajectory)
