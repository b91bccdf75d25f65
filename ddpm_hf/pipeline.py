"""Sampling pipelines: `DDPMPipeline` (images) and `DDPMPipeline1D` (sequences).

The loop is algorithm 2 of Ho et al. (arXiv:2006.11239), with the step of any diffusers scheduler in the place of its
update. Self-conditioning follows Chen et al. (arXiv:2208.04202), guidance Ho & Salimans (arXiv:2207.12598) and Karras
et al. (arXiv:2406.02507), the completion of known parts Lugmayr et al. (RePaint, arXiv:2201.09865).

This file is longer than 600 lines because it ships inside every saved pipeline: from the Hub, diffusers fetches one
file of code for a pipeline and no helper files. For the same reason it imports nothing from ddpm_hf. From top to bottom
it has the outputs, the rules for arguments, the saved folder, the schedulers, the pieces of the loop, classes and
guidance, CUDA graphs, the loop, interpolation and completion of given data, and the two pipelines.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import re
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from PIL import Image
from torch import Tensor

logger = logging.get_logger(__name__)
Generators = torch.Generator | list[torch.Generator] | None
ClassLabels = int | str | Sequence[int | str | None] | None

# ---------------------------------------------------------------------------------------------
# Outputs

IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # PIL's mode for each number of channels


@dataclass
class ImageOutput(BaseOutput):
    """Sampled images.

    Attributes:
        images: a list of PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`; floats lie in [0, 1].
        trajectory: None, or with `return_all_timesteps` the images from x_T to x_0: a list of PIL images for each
            sample, an array `(B, steps + 1, H, W, C)` or a tensor `(B, steps + 1, C, H, W)`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[list[Image.Image]] | np.ndarray | Tensor | None = None


@dataclass
class SequenceOutput(BaseOutput):
    """Sampled sequences, in the units of the data.

    Attributes:
        sequences: an array or tensor `(B, C, length)`.
        trajectory: None, or with `return_all_timesteps` the sequences from x_T to x_0, `(B, steps + 1, C, length)`.
    """

    sequences: np.ndarray | Tensor
    trajectory: np.ndarray | Tensor | None = None


# ---------------------------------------------------------------------------------------------
# Rules for arguments


def _check_rules(rules, **arguments) -> None:
    """Raise ValueError with the message of the first rule that the arguments break.

    Args:
        rules: pairs of a function, which is given the arguments as attributes and is true where the rule holds, and a
            message, a format string in which `{c.name}` is an argument.
    """
    c = SimpleNamespace(**arguments)
    for holds, message in rules:
        if not holds(c):
            raise ValueError(message.format(c=c))


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


CALL_RULES = (
    (
        lambda c: _is_whole(c.batch_size) and c.batch_size >= 1,
        "batch_size must be a whole number of at least 1, got {c.batch_size!r}",
    ),
    (
        lambda c: c.output_type in c.output_types,
        "output_type must be one of {c.allowed_output_types}; got {c.output_type!r}",
    ),
    (
        lambda c: all(g is None or isinstance(g, torch.Generator) for g in c.generators),
        "generator must be a torch.Generator, or one per sample; got {c.generator!r}",
    ),
    (
        lambda c: c.generators == [c.generator] or len(c.generators) == c.batch_size,
        "generator must be one, or one per sample: "
        "batch_size is {c.batch_size}, got {c.number_of_generators} generators",
    ),
    (
        lambda c: c.latents is None or (isinstance(c.latents, Tensor) and tuple(c.latents.shape) == c.shape),
        "latents must be a tensor of the shape {c.shape}, got {c.shape_of_latents}",
    ),
    (
        lambda c: c.latents is None or torch.isfinite(c.latents).all(),
        "latents must be finite, got NaN or infinity",
    ),
    (
        lambda c: c.output_type != "pil" or c.channels in IMAGE_MODES,
        "output_type 'pil' needs 1, 2, 3 or 4 channels, the model has {c.channels}: use 'np' or 'pt'",
    ),
    (
        lambda c: c.callback is None or callable(c.callback),
        "callback_on_step_end must be callable, got {c.callback!r}",
    ),
    (
        lambda c: all(isinstance(name, str) and name in c.allowed_inputs for name in c.callback_names),
        "callback_on_step_end_tensor_inputs must be of {c.allowed_inputs}, got {c.callback_inputs!r}",
    ),
)
GUIDANCE_RULES = (
    (
        lambda c: c.classes or c.class_labels is None,
        "class_labels needs a model with classes (num_class_embeds), and this one has none; got {c.class_labels!r}",
    ),
    (
        lambda c: _is_number(c.scale) and c.scale >= 0,
        "guidance_scale must be a finite number of at least 0, got {c.scale!r}",
    ),
    (
        lambda c: c.classes or c.guide is not None or c.scale == 1,
        "guidance_scale needs a model with classes (num_class_embeds), and this one has none, or a guide; got "
        "{c.scale!r}",
    ),
    (
        lambda c: _is_number(c.rescale) and 0 <= c.rescale <= 1,
        "guidance_rescale must be a number from 0 to 1, got {c.rescale!r}",
    ),
    (
        lambda c: isinstance(c.interval, (list, tuple)) and len(c.interval) == 2 and all(map(_is_number, c.interval)),
        "guidance_interval must be two numbers, got {c.interval!r}",
    ),
    (
        lambda c: 0 <= c.interval[0] <= c.interval[1] <= 1,
        "guidance_interval must ascend and lie in [0, 1], got {c.interval!r}",
    ),
)
INPAINT_RULES = tuple(
    (
        lambda c, name=name: _is_whole(getattr(c, name)) and getattr(c, name) >= 1,
        f"{name} must be a whole number of at least 1, got {{c.{name}!r}}",
    )
    for name in ("num_samples", "jump_length", "jump_n_sample")
)
INTERPOLATION_RULES = (
    (
        lambda c: c.weights and all(0 <= w <= 1 for w in c.weights),
        "weights must lie in [0, 1], got {c.weights}",
    ),
    (
        lambda c: 0 < c.strength <= 1,
        "strength must lie in (0, 1], got {c.strength}",
    ),
)


def _check_call(
    pipeline, batch_size, generator, output_type, latents=None, callback=None, callback_inputs=("latents",)
) -> None:
    """Raise ValueError for arguments of a call that break one of `CALL_RULES`."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    got, shape = type(latents).__name__, None
    if isinstance(latents, Tensor):
        got = tuple(latents.shape)
    if latents is not None:
        # a model without a size of its own takes any
        free = pipeline.unet.config.sample_size is None and isinstance(latents, Tensor)
        shape = (batch_size, pipeline._channels(), *(latents.shape[2:] if free else pipeline._size()))
    _check_rules(
        CALL_RULES, batch_size=batch_size, output_type=output_type, output_types=pipeline._output_types,
        allowed_output_types=", ".join(pipeline._output_types), generator=generator, generators=generators,
        number_of_generators=len(generators), latents=latents, shape=shape, shape_of_latents=got,
        channels=pipeline._channels(), callback=callback, callback_inputs=callback_inputs,
        callback_names=callback_inputs if isinstance(callback_inputs, (list, tuple)) else [callback_inputs],
        allowed_inputs=pipeline._callback_tensor_inputs,
    )  # fmt: skip


def _interpolation_numbers(weights, strength) -> tuple[list[float], float]:
    """Return the weights and the strength of an interpolation as numbers, checked."""
    try:
        weights = [float(w) for w in np.ravel(weights)]
        strength = float(strength)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights and strength must be numbers, got {weights!r} and {strength!r}") from error
    _check_rules(INTERPOLATION_RULES, weights=weights, strength=strength)
    return weights, strength


def _check_parts(pipeline, unet, num_inference_steps: int | None, condition, ndim: int, other: str) -> None:
    """Check the arguments of a pipeline's constructor; `other` is the name of the pipeline of other data."""
    if getattr(unet, "ndim", ndim) != ndim:
        raise ValueError(f"{type(pipeline).__name__} was given a {type(unet).__name__}: use {other}")
    if condition not in (None, "known"):
        raise ValueError(f"condition must be 'known' or None, got {condition!r}")
    channels, got = 2 * unet.config.in_channels, getattr(unet.config, "condition_channels", None)
    if condition == "known" and got != channels:
        raise ValueError(f"condition='known' needs a model with condition_channels={channels}, got {got!r}")
    if num_inference_steps is not None:
        _check_steps(num_inference_steps)


def _check_steps(steps, total: int | None = None) -> None:
    """Check a number of model calls against the number of training timesteps, `total` (None: not known yet)."""
    if not _is_whole(steps) or steps < 1 or (total is not None and steps > total):
        allowed = "of at least 1" if total is None else f"from 1 to {total}"
        raise ValueError(f"num_inference_steps must be a whole number {allowed}; got {steps!r}")


# ---------------------------------------------------------------------------------------------
# The saved folder

# Saved pipelines carry their code: unet_ddpm_hf_0_2_0.py is unet.py of version 0.2.0. diffusers keeps all such files of
# a process in one namespace by their names, so the version is part of the name.
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


def _carried_name(cls: type) -> str | None:
    """Return the name of the module of code that a class is saved with; None for classes of other libraries."""
    package, stem = cls.__module__.split(".")[0], cls.__module__.split(".")[-1]
    if CARRIED.fullmatch(stem):
        return stem
    if package == "ddpm_hf" and CARRIED.fullmatch(f"{stem}_ddpm_hf_0"):
        return f"{stem}_ddpm_hf_" + re.sub(r"\W", "_", sys.modules[package].__version__)
    return None


def _source(cls: type) -> str:
    """Return the text of the file that defines a class."""
    return Path(sys.modules[cls.__module__].__file__).read_text(encoding="utf-8")


def sign_card(text: str) -> str:
    """Return a model card with a mark that shows that a program wrote it and that nobody has edited it since."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"{text.strip()}\n\n<!-- card of ddpm_hf {digest}: one that is edited is kept -->\n"


def is_own_card(text: str) -> bool:
    """Return True if a model card has the mark of `sign_card` and has not been edited."""
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


def _carry_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Put the code of our classes beside a saved pipeline, name it in model_index.json, and remove local paths."""
    index_file = folder / pipeline.config_name
    index = json.loads(index_file.read_text())
    for name, component in pipeline.components.items():
        component = getattr(component, "_orig_mod", component)  # a compiled model holds the model
        if code := _carried_name(type(component)):
            (folder / name / f"{code}.py").write_text(_source(type(component)), encoding="utf-8")
            index[name] = [code, type(component).__name__]
    if code := _carried_name(type(pipeline)):
        (folder / f"{code}.py").write_text(_source(type(pipeline)), encoding="utf-8")
        index["_class_name"] = [code, type(pipeline).__name__]
    index.pop("_name_or_path", None)
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*/*config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if not (card := folder / "README.md").exists():
        card.write_text(sign_card(FIRST_CARD.format(name=type(pipeline).__name__)), encoding="utf-8")


def _saved_files(pipeline: DiffusionPipeline, folder: Path) -> list[str]:
    """Return the names of the files of a saved pipeline. Other files of its folder are not uploaded."""
    kinds = ("*config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    patterns = [pipeline.config_name, "README.md", "pipeline_ddpm_hf_*.py"]
    patterns += [f"{name}/{kind}" for name in pipeline.components for kind in (*kinds, "*_ddpm_hf_*.py")]
    files = [path for pattern in patterns for path in folder.glob(pattern) if not path.is_symlink()]
    return [path.relative_to(folder).as_posix() for path in files]


class _SavedWithCode(DiffusionPipeline):
    """A pipeline whose saved folder carries the code that it needs, and which reads such folders."""

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save weights, configurations and the code that they need.

        The folder then loads where ddpm_hf is not installed (`trust_remote_code=True`), and can be saved again there.

        Args:
            save_directory: a folder, which is made if it does not exist. A README.md in it stays.
            push_to_hub: upload the folder too. `repo_id` (defaults to the folder's name), `token`, `private`,
                `commit_message` and `create_pr` are those of the method `push_to_hub`.
        """
        names = ("repo_id", "token", "private", "commit_message", "create_pr")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        _carry_code(self, Path(save_directory))
        if push_to_hub:
            self._upload(save_directory, **{"repo_id": Path(save_directory).name, **upload})

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, token: str | None = None,
        create_pr: bool = False, safe_serialization: bool = True, variant: str | None = None,
    ) -> str:  # fmt: skip
        """Save into a repo on the Hub, as `save_pretrained` does. A model card that someone has written there stays.

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
            allow_patterns=_saved_files(self, Path(folder)),
            ignore_patterns=["README.md"] if card_to_keep(repo_id, token=token) else None,
        )  # fmt: skip

    # The package reads the names of carried code as its own classes, so it needs no trust in a folder's code. Two
    # methods do that: a download looks for the components' files by the names in the index, and must still find them.

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        index = super()._dict_from_json_file(json_file, **options)
        name = index.get("_class_name")
        if __name__ == "ddpm_hf.pipeline" and isinstance(name, list) and CARRIED.fullmatch(str(name[0])):
            index["_class_name"] = name[1]
        return index

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Read model_index.json, with the names of carried code replaced by those of the package's own classes."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if __name__ == "ddpm_hf.pipeline":
            for name, value in index.items():
                if isinstance(value, list) and len(value) == 2 and CARRIED.fullmatch(str(value[0])):
                    module = f"ddpm_hf.{value[0].split('_ddpm_hf_')[0]}"
                    importlib.import_module(module)  # diffusers looks among the modules that are imported
                    index[name] = [module, value[1]]
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved pipeline, as diffusers does. A `scheduler` that is given is checked as one that is set later.

        Raises:
            ValueError: the scheduler cannot sample from the saved model.
        """
        scheduler = kwargs.pop("scheduler", None)
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if scheduler is not None:
            pipeline.scheduler = scheduler
        return pipeline

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Read the options from a configuration. diffusers only warns about keys that it does not know.

        Raises:
            ValueError: an unknown key is close to one of ours, so it is taken for a misspelling.
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
        """Make a new pipeline with the parts and settings of another one; `kwargs` replace some of them.

        The parts are passed on by name, because diffusers takes a model only if the constructor names its class, and
        this file knows no model.
        """
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler")}
        made = super().from_pipe(pipeline, **{**parts, **kwargs})
        if kwargs.get("scheduler") is not None:
            made.scheduler = kwargs["scheduler"]  # again: the settings still belong to the other pipeline's scheduler
        return made


# ---------------------------------------------------------------------------------------------
# Schedulers

FAST = {"solver_order": 2, "algorithm_type": "dpmsolver++", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
# The fast sampler spreads its steps below this ratio of noise to signal.
HIGHEST_NOISE = 500.0
# Stock schedulers of the process that our models are trained in, which still cannot sample from them.
UNFIT = {
    "DDIMInverseScheduler": "it goes from data to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise",
    "LCMScheduler": "it needs a model that was distilled into a consistency model",
    "UnCLIPScheduler": "it must be told the next timestep in each step, which the pipelines here do not do",
}
# Schedulers that take no prediction of x0, and those whose first steps are wrong for epsilon at very high noise.
NOT_OF_SAMPLE = ("DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                 "KDPM2DiscreteScheduler", "PNDMScheduler")  # fmt: skip
POOR_WITH_EPSILON, SMALL_ABAR = ("KDPM2DiscreteScheduler", "PNDMScheduler"), 3e-5
CUTS_AT_THREE = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")
LEARNED = ("learned", "learned_range")  # variance types with twice the channels
SEE_SAMPLERS = "docs/samplers.md has all schedulers of diffusers and which of them work"


def log_snr_timesteps(alphas_cumprod: Tensor, steps: int) -> list[int]:
    """Return the timesteps of a short chain, descending from T-1 and even in log(abar / (1 - abar)).

    Steps that are even in t cross the highest noise in the first of them. But that is where large images take their
    brightness and layout: what all n pixels share is seen through n times the noise. The place of t = 0 is left out,
    as the last step goes from the one before to x0.

    Noise above `HIGHEST_NOISE` times the signal says nothing about x0, so the steps are spread below it. Where the last
    beta is a jump from far lower noise, so that the second step would lie inside it, they are spread from T-2 on.

    Args:
        alphas_cumprod: `(T,)`, descending.
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
    # where there are too few timesteps for distinct ones, the last steps go down by one each
    return [max(t, steps - 1 - i) for i, t in enumerate(chain)]


def _fast_scheduler(scheduler) -> DPMSolverMultistepScheduler:
    """Make the scheduler of the fast sampler. What it changes is kept in its configuration, for the way back."""
    config = scheduler.config
    fast = DPMSolverMultistepScheduler.from_config(config, **FAST)
    own = {"timestep_spacing": config.get("timestep_spacing", "trailing"), **config.get("_gaussian", {})}
    fast.register_to_config(_gaussian=own)
    if config.get("variance_type") in LEARNED:
        # stock solvers keep the first three channels of a model with learned variance, whatever the data has: the loop
        # drops the half that predicts the variance instead
        fast.register_to_config(variance_type=None, _gaussian={**own, "variance_type": config.variance_type})
    return fast


class _Trained(NamedTuple):
    """The target and schedule that the model was trained with, from the first scheduler of its pipeline."""

    prediction_type: str | None
    alphas_cumprod: Tensor  # (T,), float64 on the CPU


def _scheduler_fault(scheduler) -> str | None:
    """Return the reason why a scheduler cannot sample from any model that was trained on betas; None if it can."""
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


def _training_of(scheduler) -> _Trained:
    """Return what a scheduler says that a model was trained with."""
    return _Trained(scheduler.config.get("prediction_type"), scheduler.alphas_cumprod.double().cpu())


def _check_scheduler(scheduler, unet, trained: _Trained | None) -> _Trained:
    """Raise ValueError for a scheduler that cannot sample here, and warn about one whose samples will hardly be right.

    Args:
        trained: what the model was trained with; None: what this scheduler says, as the first one of its pipeline.

    Returns:
        What the model was trained with.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if fault := _scheduler_fault(scheduler):
        raise ValueError(f"{kind} cannot be the scheduler of this pipeline: {fault}. {SEE_SAMPLERS}")
    prediction, abar = own = _training_of(scheduler)
    trained = trained or own
    keep = f"{kind}.from_config(pipe.scheduler.config) keeps what the model was trained with"
    if prediction != trained.prediction_type:
        raise ValueError(
            f"{kind} cannot be the scheduler of this pipeline: its prediction_type is {prediction!r}, the model "
            f"was trained with {trained.prediction_type!r}. {keep}; for another model, make another pipeline"
        )
    if unet is not None and config.get("variance_type") in LEARNED:
        _check_variance(scheduler, unet.config)
    warned = None
    if len(abar) != len(trained.alphas_cumprod):
        warned = f"it has {len(abar)} timesteps, the model was trained with {len(trained.alphas_cumprod)}. {keep}"
    elif (difference := (abar - trained.alphas_cumprod).abs().max().item()) > 1e-3:
        warned = f"its betas are not those of the model: alphas_cumprod differs by up to {difference:.2g}. {keep}"
    elif prediction == "epsilon" and kind in POOR_WITH_EPSILON and abar[-1] < SMALL_ABAR:
        warned = f"its error is large for epsilon where alphas_cumprod ends below {SMALL_ABAR}. {SEE_SAMPLERS}"
    if warned:
        warnings.warn(f"samples of {kind} will hardly be right: {warned}", stacklevel=3)
    return trained


def _check_variance(scheduler, unet) -> None:
    """Check a scheduler of a learned variance against the channels in the configuration of the model, `unet`."""
    kind, variance, channels = type(scheduler).__name__, scheduler.config.variance_type, unet.in_channels
    if kind in CUTS_AT_THREE and channels > 3:
        raise ValueError(
            f"{kind} with variance_type={variance!r} keeps 3 of {channels} channels: "
            "give from_config variance_type=None"
        )
    predicted = unet.get("out_channels") or channels * (2 if unet.get("learned_variance") else 1)
    if _is_own(scheduler) and predicted != 2 * channels:
        raise ValueError(
            f"variance_type={variance!r} needs a model with {2 * channels} output channels "
            f"(learned_variance=True), got one with {predicted}"
        )


def _is_own(scheduler) -> bool:
    """Return True for `GaussianScheduler`, which this file cannot import."""
    return hasattr(scheduler, "clip_x0")


def _takes_variance(scheduler) -> bool:
    """Return True if the scheduler's step reads the half of the channels in which a model predicts its variance."""
    known = _is_own(scheduler) or isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
    return known and scheduler.config.get("variance_type") in LEARNED


def _step_options(scheduler, generator: Generators, eta: float | None) -> dict:
    """Return those of `generator` and `eta` that the scheduler's step takes.

    Raises:
        ValueError: `eta` is given and the step takes none, or it does not lie in [0, 1].
    """
    parameters = inspect.signature(scheduler.step).parameters
    options = {}
    if "generator" in parameters:
        options["generator"] = generator
    if eta is not None:
        if "eta" not in parameters:
            raise ValueError(f"eta was given, but {type(scheduler).__name__} has no eta")
        if not isinstance(eta, (int, float)) or isinstance(eta, bool) or not 0 <= eta <= 1:
            raise ValueError(f"eta must be a number from 0 to 1, got {eta!r}")
        options["eta"] = eta
    return options


def _begin_at(scheduler, strength: float, by_timestep: bool) -> int:
    """Let a scheduler begin at the share `strength` of its chain, and return the index of that timestep.

    Args:
        by_timestep: take the share of the training timesteps instead of the steps, for steps of unequal length.
    """
    chain = scheduler.timesteps
    # schedulers of order n take n entries a step, and start at whole steps only
    order = scheduler.order
    steps = -(-len(chain) // order)
    if by_timestep:
        aim = strength * scheduler.config.num_train_timesteps - 1
        start = (chain - aim).abs().argmin().item()
    else:
        start = (steps - max(1, round(steps * strength))) * order
    if start and isinstance(scheduler, PNDMScheduler):
        raise ValueError("PNDMScheduler cannot start in the middle of its chain: strength must be 1, "
                         f"or the scheduler another; got {strength}")  # fmt: skip
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return start


# ---------------------------------------------------------------------------------------------
# Pieces of the loop


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


class _X0Estimate:
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
        if c.get("thresholding"):
            return _threshold(x0, c.get("dynamic_thresholding_ratio", 0.995), c.get("sample_max_value", 1.0))
        if c.get("clip_sample"):
            limit = c.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        return x0


def _without_known(x: Tensor | None, known: Tensor | None) -> Tensor | None:
    """Return x with 0 where the model is told the value itself, as in training: what it predicts there is not trained.

    Args:
        x: x_t or an estimate of x0, `(B, C, *spatial)`; None stays None.
        known: bools, shaped as x; None: nothing is known.
    """
    return x if x is None or known is None else x.masked_fill(known, 0)


def _moves(model) -> bool:
    """Return True if the weights of a model move between its calls (offloading), or are shards of several devices."""
    hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in model.modules())
    return hooked or any(type(weight.data) is not Tensor for weight in model.parameters())


def _use_channels_last(model) -> None:
    """Give a model of ours weights in the memory layout of its activations, which makes its calls faster.

    Moving a model to another device or type keeps its layout, and saving writes the usual one. Other models, and
    weights that are offloaded or sharded, stay as they are.
    """
    if isinstance(model, torch.nn.Module) and hasattr(model, "channels_last") and not _moves(model):
        model.channels_last()


# ---------------------------------------------------------------------------------------------
# Classes and guidance. In what a model is given, the number `num_class_embeds` stands for "no class".


def _class_names(id2label: dict | None, classes: int | None) -> dict[int, str] | None:
    """Return the names of a model's classes by their numbers, checked. Keys that JSON has made texts become numbers."""
    if id2label is None:
        return None
    if not classes:
        raise ValueError(
            f"id2label needs a model with classes (num_class_embeds), and this one has none; got {id2label}"
        )
    try:
        names = {int(number): str(name) for number, name in dict(id2label).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"id2label must map numbers of classes to names, got {id2label!r}") from error
    if sorted(names) != list(range(classes)) or len(set(names.values())) != classes:
        raise ValueError(f"id2label must give each of the {classes} classes a name of its own, got {id2label!r}")
    return names


def _class_number(label: int | str | None, classes: int, names: dict[int, str] | None) -> int:
    """Return the number of the class that a number or a name says; that of "no class" for None."""
    if label is None:
        return classes
    if isinstance(label, str):
        numbers = {name: number for number, name in (names or {}).items()}
        if label in numbers:
            return numbers[label]
        known = f"the classes are {', '.join(list(numbers)[:20])}" if numbers else "its classes have no names"
        raise ValueError(f"class_labels has a name that the model does not know: {label!r}; {known}")
    if not _is_whole(label) or not 0 <= label < classes:
        raise ValueError(f"class_labels must be names, None, or whole numbers from 0 to {classes - 1}; got {label!r}")
    return label


def _deviation(x: Tensor, known: Tensor | None) -> Tensor:
    """Return the standard deviation of each sample in float32, `(B, 1, ...)`, over what is unknown."""
    x, axes = x.float(), tuple(range(1, x.ndim))
    if known is None:
        return x.std(axes, keepdim=True)
    counted = ~known
    number = counted.sum(axes, keepdim=True)
    residual = x - torch.where(counted, x, 0).sum(axes, keepdim=True) / number.clamp(min=1)
    return (torch.where(counted, residual**2, 0).sum(axes, keepdim=True) / (number - 1).clamp(min=1)).sqrt()


class _Guidance:
    """Guided predictions: weak + scale * (strong - weak), where both are epsilon, both x0, or both v.

    In classifier-free guidance (Ho & Salimans, arXiv:2207.12598) the strong prediction is the model's for the class and
    the weak one the model's for no class, from one call. In autoguidance (Karras et al., arXiv:2406.02507) the strong
    one is the model's and the weak one a worse model's, the guide's, for the same class if there are classes. Scale 1
    is the strong prediction alone, from a call without the weak one, and so is every step outside of the interval.

    Args:
        numbers: the number of each sample's class; None for a model without classes.
        classes: number of classes of the model.
        scale, rescale, interval: as in the call of a pipeline.
        device: where the model runs.
        guide: the function that predicts with the guide; None for classifier-free guidance.
        guide_has_classes: the guide takes class labels.
    """

    def __init__(
        self, numbers: list[int] | None, classes: int | None, scale: float, rescale: float, interval, device,
        guide: Callable[..., Tensor] | None = None, guide_has_classes: bool = False,
    ):  # fmt: skip
        self.scale, self.rescale, self.interval, self.guide = scale, rescale, interval, guide
        self.labels, self.guide_labels = {}, {}
        if numbers is not None:
            self.labels = {"class_labels": torch.tensor(numbers, dtype=torch.int64, device=device)}
            self.guide_labels = self.labels if guide_has_classes else {}
            if guide is None:
                if all(number == classes for number in numbers):
                    self.scale = 1  # without a class, both predictions are the same
                twice = numbers + [classes] * len(numbers)
                self.labels_twice = torch.tensor(twice, dtype=torch.int64, device=device)

    def __call__(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, level: float, channels: int, **optional: Tensor | None
    ) -> Tensor:
        """Return the guided prediction, `(B, C, *spatial)` or with a predicted variance `(B, 2 * C, *spatial)`.

        Args:
            x, t, optional: the inputs of the model.
            level: the noise level, from 0 (data) to 1 (the last training timestep).
            channels: C, those that are guided. A predicted variance is that of the strong prediction.
        """
        if self.scale == 1 or not self.interval[0] <= level <= self.interval[1]:
            return model(x, t, **self.labels, **optional)
        if self.guide is not None:
            whole, weak = model(x, t, **self.labels, **optional), self.guide(x, t, **self.guide_labels, **optional)
        else:
            twice = {name: None if value is None else torch.cat((value, value)) for name, value in optional.items()}
            whole, weak = model(torch.cat((x, x)), t, class_labels=self.labels_twice, **twice).chunk(2)
        strong, weak = whole[:, :channels], weak[:, :channels]
        guided = weak + self.scale * (strong - weak)
        if self.rescale:  # Lin et al., arXiv:2305.08891, equations 15 and 16
            condition = optional.get("condition")
            known = None if condition is None else condition[:, channels:] > 0
            deviation = _deviation(guided, known).clamp(min=torch.finfo(torch.float32).tiny)
            ratio = _deviation(strong, known) / deviation
            guided = guided * (self.rescale * ratio + 1 - self.rescale).to(guided.dtype)
        return torch.cat((guided, whole[:, channels:]), dim=1)


def _check_guide_schedule(scheduler, trained: _Trained) -> None:
    """Check that a guide's scheduler is of the process and the target that a model was trained with."""
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(f"guide must have the schedule of the model, which has betas; got {type(scheduler).__name__}")
    kind, abar = _training_of(scheduler)
    if kind != trained.prediction_type:
        raise ValueError(f"guide must have the prediction_type of the model, {trained.prediction_type!r}; got {kind!r}")
    steps = len(trained.alphas_cumprod)
    if len(abar) != steps or (abar - trained.alphas_cumprod).abs().max() > 1e-3:
        got = "other betas" if len(abar) == steps else f"{len(abar)} timesteps"
        raise ValueError(f"guide must have the schedule of the model, of {steps} timesteps; got {got}")


def _guide_model(pipeline, guide):
    """Return the model of a guide, which is a model or a pipeline, checked against the pipeline that it is to guide."""
    model = getattr(guide, "unet", guide)
    if not isinstance(getattr(model, "_orig_mod", model), ModelMixin):
        raise ValueError(f"guide must be a model or a pipeline, got {type(guide).__name__}")

    def size(value):  # 8 and [8, 8] are the same
        return (tuple(np.ravel(value)) * 2)[:2]

    for name in ("in_channels", "sample_size", "self_condition", "condition_channels"):
        ours, theirs = (each.config.get(name) or None for each in (pipeline.unet, model))
        free = name == "sample_size" and None in (ours, theirs)
        if not free and size(ours) != size(theirs):
            raise ValueError(f"guide must have the {name} of the model, {ours}; got {theirs}")
    if _classes(model) not in (None, _classes(pipeline.unet)):
        raise ValueError(
            f"guide must have the classes of the model (num_class_embeds={_classes(pipeline.unet)}) or none; "
            f"got {_classes(model)}"
        )
    if model is not guide:
        _check_guide_schedule(guide.scheduler, pipeline._trained)
    place, dtype = pipeline._execution_device, pipeline.unet.dtype
    if model.dtype != dtype or (model.device != place and not _moves(model)):
        raise ValueError(
            f"guide must be on the device of the model and of its type: guide.to({str(place)!r}, {dtype}); "
            f"got {model.device}, {model.dtype}"
        )
    return model


def _as_list(class_labels: ClassLabels):
    """Return arrays and tensors of labels as lists, and other labels as they are."""
    return class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels


def _for_each_sample(values, items: int, samples: int):
    """Repeat a list with one value for each item, for the samples of each. Other values stay as they are."""
    if isinstance(values, (list, tuple)) and len(values) == items:
        return [value for value in values for _ in range(samples)]
    return values


def _make_guidance(
    pipeline, batch_size: int, class_labels=None, scale=1.0, rescale=0.0, interval=(0.0, 1.0), guide=None
) -> _Guidance | None:
    """Return the `_Guidance` of a call, checked; None where the model has no classes and nothing is guided."""
    classes = _classes(pipeline.unet)
    _check_rules(
        GUIDANCE_RULES, classes=classes, class_labels=class_labels, scale=scale, rescale=rescale, interval=interval,
        guide=guide,
    )  # fmt: skip
    numbers, device = None, pipeline._execution_device
    guide = None if guide is None else _guide_model(pipeline, guide)
    if classes:
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels] * batch_size
        if len(labels) != batch_size:
            raise ValueError(
                f"class_labels must be one, or one per sample: batch_size is {batch_size}, got {len(labels)} labels"
            )
        names = pipeline.config.get("id2label")
        numbers = [_class_number(label, classes, names) for label in labels]
        if isinstance(pipeline.unet, UNet2DModel) and (classes in numbers or (scale != 1 and guide is None)):
            raise ValueError(
                "a stock UNet2DModel with classes knows no prediction without a class: class_labels must be a class "
                f"for each sample, and guidance_scale 1; got {class_labels!r} and {scale!r}"
            )
    elif guide is None or scale == 1:
        return None
    if guide is None or scale == 1:
        return _Guidance(numbers, classes, scale, rescale, interval, device)
    predict = pipeline._model_to_call(device, guide)
    return _Guidance(numbers, classes, scale, rescale, interval, device, predict, _classes(guide) is not None)


def _classes(unet) -> int | None:
    """Return the number of classes of a model; None for a model without."""
    return getattr(unet.config, "num_class_embeds", None)


# ---------------------------------------------------------------------------------------------
# CUDA graphs

WARM_UP_CALLS = 2  # before a capture: libraries choose algorithms and allocate workspaces in a first call


class _CudaBackend:
    """The stream and the memory of one graphics card's graphs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: only one of them runs at a time

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the stream of the captures, between the work before it and the work after it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record `work` without running it. The returned function runs it; its result is always at the same place."""
        graph = torch.cuda.CUDAGraph()
        # other threads (loaders that pin memory) may go on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def free(self, graphs: dict) -> None:
        """Forget the graphs once they have run, and give their memory back to the card."""
        torch.cuda.synchronize(self.device)
        graphs.clear()
        torch.cuda.empty_cache()


class _Graph(NamedTuple):
    """A captured call: the tensors that it reads, by the names of the arguments, and the function that replays it."""

    inputs: dict[str, Tensor]
    replay: Callable[[], Tensor]


class GraphedModel:
    """A model whose calls are captured once as CUDA graphs and replayed from then on.

    An ordinary call launches several hundred kernels one by one, which takes the host longer than a small batch takes
    the card. A replay launches them together, with the same result. One graph is captured for each form of the inputs:
    their shapes and types, which of the optional ones are given, and the type of autocast. A graph reads the weights
    at their addresses, so new values are seen, but graphs are captured again after weights have moved or changed type,
    or the model has changed between training and evaluation.

    Where graphs cannot be used, the model is called as usual: not on a graphics card, with weights that are offloaded
    or sharded, or if a capture fails. One warning gives the reason.

    Two threads must not call one object at the same time, as the inputs of a graph are shared.

    Args:
        backend: a function of the device that returns an object with the methods of `_CudaBackend`; None: the graphics
            card's. Tests give a stand-in, which works on any device.
        most: number of graphs that are kept. The one that was used longest ago is dropped for a new one.
    """

    def __init__(self, backend: Callable | None = None, most: int = 8):
        self.make_backend, self.most = backend, most
        self.backend, self.model, self.state = None, None, None
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.reason: str | None = None  # why the model is called as usual

    def prepare(self, model, device: torch.device):
        """Look at the model before a chain of calls, and forget the graphs if it is another or has changed.

        Returns:
            self
        """
        state = self._state_of(model, device)
        if model is not self.model or state != self.state:
            self.release()
            self.model, self.state, self.reason = model, state, None
            if self.make_backend is None and device.type != "cuda":
                self.reason = f"the model runs on {device.type}"
                logger.info("CUDA graphs are not used: %s", self.reason)
            elif _moves(model):
                self._give_up("its weights are offloaded or sharded, so they have no fixed place on the card")
            else:
                self.backend = (self.make_backend or _CudaBackend)(device)
        return self

    @staticmethod
    def _state_of(model, device: torch.device) -> tuple:
        tensors = [*model.parameters(), *model.buffers()]
        weights = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        return device, weights, tuple(part.training for part in model.modules())

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor, **optional: Tensor | None) -> Tensor:
        """Return the model's prediction, in memory of its own.

        Args:
            sample, timestep: those of the model's call, on its device.
            optional: further arguments of the model's call: tensors, or None for those that are not given.
        """
        inputs = {"sample": sample, "timestep": timestep, **{k: x for k, x in optional.items() if x is not None}}
        if self.reason is not None:
            return self._call(inputs)
        kind = sample.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # tensors of inference mode cannot be written to outside of it
        form = (
            autocast,
            torch.is_inference_mode_enabled(),
            *((name, x.shape, x.dtype, x.device) for name, x in inputs.items()),
        )
        if form not in self.graphs:
            try:
                self.graphs[form] = self._capture(inputs)
            except Exception as error:  # a read by the host, too little memory, a library that allocates, ...
                lines = str(error).strip().splitlines()
                self._give_up(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
                return self._call(inputs)
            if len(self.graphs) > self.most:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(form)
        graph = self.graphs[form]
        for name, x in inputs.items():
            graph.inputs[name].copy_(x, non_blocking=True)
        # the next replay, of this or of another graph in the same memory, writes over the result
        return graph.replay().clone()

    def _call(self, inputs: dict[str, Tensor]) -> Tensor:
        optional = dict(inputs)
        return self.model(optional.pop("sample"), optional.pop("timestep"), **optional).sample

    def _capture(self, inputs: dict[str, Tensor]) -> _Graph:
        held = {name: x.clone() for name, x in inputs.items()}
        kind = held["sample"].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def work() -> Tensor:
            # autocast must not keep casts of the weights from one call to the next: their memory is the graph's
            with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                return self._call(held)

        with self.backend.aside():
            for _ in range(WARM_UP_CALLS):
                work()
        return _Graph(held, self.backend.capture(work))

    def _give_up(self, reason: str) -> None:
        state = self.state  # no new attempt for this one
        self.release()
        self.state, self.reason = state, reason
        warnings.warn(f"the model is called without CUDA graphs: {reason}", stacklevel=2)

    def release(self) -> None:
        """Forget the graphs and free their memory. The next `prepare` begins afresh."""
        if self.backend is not None:
            self.backend.free(self.graphs)
        self.backend = self.state = None


# ---------------------------------------------------------------------------------------------
# The loop


class _SamplingPipeline(_SavedWithCode):
    """The sampling loop. `_size`, `_encode`, `_decode` and `_output` of the subclasses say what the data is."""

    _output_types: tuple
    _callback_tensor_inputs = ["latents"]
    _interrupt = False
    _graphs: GraphedModel | None = None
    _guide_graphs: GraphedModel | None = None

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after that step; the next call starts afresh."""
        return self._interrupt

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute. A new scheduler is checked, and ends the fast sampler.

        The fast sampler's spacing then goes, and the number of steps that the pipeline had before returns.

        Raises:
            ValueError: the scheduler cannot sample from the model; the message has the reason.
        """
        if name == "scheduler":
            unet, trained = self.__dict__.get("unet"), self.__dict__.get("_trained")
            self.__dict__["_trained"] = _check_scheduler(value, unet, trained)
        super().__setattr__(name, value)
        if name == "unet":
            _use_channels_last(value)
        if name == "scheduler" and self.config.get("log_snr_spacing"):
            own = self.config.get("steps_before_fast")
            self.register_to_config(num_inference_steps=own, log_snr_spacing=False, steps_before_fast=None)

    def use_fast_sampler(self, num_inference_steps: int = 15):
        """Sample with few calls of the model, by DPM-Solver++ of order 2 (Lu et al., arXiv:2211.01095).

        The solver is diffusers' own, on the schedule that the model was trained on, at `log_snr_timesteps`.
        docs/studies.md compares its samples with those of other samplers.

        The pipeline's scheduler is replaced, and a saved pipeline keeps that. Setting any scheduler ends it: the
        spacing is then the scheduler's own, and the number of steps the one that the pipeline had before. The way
        back is `pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config)`.

        Args:
            num_inference_steps: default number of steps from now on; 1 to T.

        Returns:
            self

        Raises:
            ValueError: num_inference_steps is outside its range.
        """
        _check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        self.scheduler = _fast_scheduler(self.scheduler)
        self.register_to_config(
            steps_before_fast=self.config.num_inference_steps,
            num_inference_steps=num_inference_steps,
            log_snr_spacing=True,
        )
        return self

    def use_cuda_graphs(self, enabled: bool = True):
        """Capture the model's calls as CUDA graphs and replay them, which spares the host its time on a graphics card.

        The first call of each size is slower, as its graph is captured. See `GraphedModel` for when a graph is
        captured again, and when the model is called as usual; on a CPU it always is. A saved pipeline does not keep
        this setting, and a pipeline with it must not be called from two threads at the same time.

        Args:
            enabled: False ends it and frees the memory of the graphs.

        Returns:
            self
        """
        if enabled:
            self._graphs = self._graphs or GraphedModel()
        else:
            for graphs in filter(None, (self._graphs, self._guide_graphs)):
                graphs.release()
            self._graphs = self._guide_graphs = None
        return self

    def is_spaced_by_log_snr(self) -> bool:
        """Return True if the steps are those of the fast sampler. Another scheduler has its own."""
        return self.config.log_snr_spacing and isinstance(self.scheduler, DPMSolverMultistepScheduler)

    def _size(self) -> tuple:
        raise AssertionError("a pipeline of images or of sequences says its size")

    def _channels(self) -> int:
        return self.unet.config.in_channels

    def _set_timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        """Choose the timesteps of the chain: those given, or as many as a call or the pipeline says.

        They stay on the CPU, whatever device the model is on. Every scheduler reads them back in its steps, for its
        tables, and would wait for a graphics card there. No scheduler of docs/samplers.md needs them elsewhere.
        (`UniPCMultistepScheduler` also copies numbers to the device in each step, and solves a small system there.)
        """
        scheduler = self.scheduler
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(f"give num_inference_steps or timesteps, not both; got {num_inference_steps} and them")
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} takes no explicit timesteps; give num_inference_steps")
            scheduler.set_timesteps(timesteps=timesteps, device="cpu")
            return
        total = scheduler.config.num_train_timesteps
        steps = num_inference_steps if num_inference_steps is not None else self.config.num_inference_steps or total
        _check_steps(steps, total)
        if self.is_spaced_by_log_snr():
            scheduler.set_timesteps(timesteps=log_snr_timesteps(scheduler.alphas_cumprod, steps), device="cpu")
        else:
            scheduler.set_timesteps(steps, device="cpu")

    def _model_to_call(self, device: torch.device, guide=None) -> Callable[..., Tensor]:
        """Return the function that predicts in one chain: the model or a guide, or the graphs of its calls."""
        if self._graphs is None:
            model = self.unet if guide is None else guide
            return lambda *inputs, **optional: model(*inputs, **optional).sample
        if guide is None:
            return self._graphs.prepare(self.unet, device)
        self._guide_graphs = self._guide_graphs or GraphedModel(self._graphs.make_backend, self._graphs.most)
        return self._guide_graphs.prepare(guide, device)

    @torch.no_grad()
    def _denoise(
        self, x: Tensor, timesteps, options: dict, trajectory: list | None = None, callback=None, callback_inputs=(),
        guidance: _Guidance | None = None, condition: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the chain from x_T to x_0. Nothing is read back from the device.

        Args:
            x: x_T, `(B, C, *spatial)`.
            timesteps: those of the chain, in its order, on the CPU.
            options: further arguments of the scheduler's step.
            trajectory: a list to which the x of each step is appended; None: they are not kept.
            guidance: the predictions of a model with classes, or with a guide; None: those of the model as they are.
            condition: known values and where they are, for a model that takes them; None: nothing is known.
        """
        self_condition = self.unet.config.get("self_condition", False)
        estimate_x0 = _X0Estimate(self.scheduler) if self_condition else None
        channels = 2 * x.shape[1] if _takes_variance(self.scheduler) else x.shape[1]
        model = self._model_to_call(x.device)
        timesteps_for_model = timesteps.to(x.device)  # one copy for all steps
        last = max(self.scheduler.config.num_train_timesteps - 1, 1)
        constant = {} if condition is None else {"condition": condition}
        known = None if condition is None else condition[:, x.shape[1] :] > 0
        self._interrupt = False
        x0 = None
        for i, t in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(x, t)
            seen = _without_known(model_input, known)
            extra = {"x_self_cond": _without_known(x0, known), **constant} if self_condition else constant
            if guidance is None:
                prediction = model(seen, timesteps_for_model[i], **extra)
            else:
                level = float(t) / last
                prediction = guidance(model, seen, timesteps_for_model[i], level, x.shape[1], **extra)
            prediction = prediction[:, :channels]
            result = self.scheduler.step(prediction, int(t) if _is_own(self.scheduler) else t, x, **options)
            x = result.prev_sample
            if self_condition:
                x0 = getattr(result, "pred_original_sample", None)
                if x0 is None:
                    x0 = estimate_x0(prediction[:, : x.shape[1]], model_input, t)
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
        callback_on_step_end, callback_inputs, return_all_timesteps, timesteps, class_labels, *guidance,
    ):  # fmt: skip
        """Sample, as the calls of the subclasses say; `guidance` is its scale, rescaling, interval and guide."""
        class_labels = _as_list(class_labels)
        if isinstance(class_labels, (list, tuple)) and batch_size == 1:
            batch_size = len(class_labels)
        _check_call(self, batch_size, generator, output_type, latents, callback_on_step_end, callback_inputs)
        callback_inputs = [callback_inputs] if isinstance(callback_inputs, str) else callback_inputs
        guidance = _make_guidance(self, batch_size, class_labels, *guidance)
        self._set_timesteps(num_inference_steps, timesteps)
        options = _step_options(self.scheduler, generator, eta)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            shape = (batch_size, self._channels(), *self._size())
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        trajectory = [x] if return_all_timesteps else None
        x = self._denoise(
            x, self.scheduler.timesteps, options, trajectory, callback_on_step_end, callback_inputs, guidance
        )
        self.maybe_free_model_hooks()
        samples = self._decode(x, output_type)
        if trajectory is not None:
            n = len(trajectory)
            flat = self._decode(torch.stack(trajectory, dim=1).flatten(0, 1), output_type)  # the steps of each sample
            if isinstance(flat, list):
                trajectory = [flat[i * n : (i + 1) * n] for i in range(batch_size)]
            else:
                trajectory = flat.reshape(batch_size, n, *flat.shape[1:])
        return self._output(samples, trajectory, return_dict)


# ---------------------------------------------------------------------------------------------
# From given data: interpolation, and the completion of what is known. A mask is true, or white, where data is unknown.


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


def _resampling_plan(steps: int, jump_length: int, jump_n_sample: int) -> list[tuple[int, int]]:
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


class _Repaint:
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
        self.plan = _resampling_plan(len(self.chain), jump_length, jump_n_sample)
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


class _FromDataPipeline(_SamplingPipeline):
    """The methods that start from given data. `_tensor` and `_in_form` of the subclasses read and return the data."""

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
        weights, strength = _interpolation_numbers(weights, strength)
        output_type = output_type or self._output_types[0]
        x1, x2 = self._encode(x1, "x1"), self._encode(x2, "x2")
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        _check_call(self, len(x1), generator, output_type)
        labels = _for_each_sample(_as_list(class_labels), len(x1), len(weights))
        guidance = _make_guidance(
            self, len(x1) * len(weights), labels, guidance_scale, guidance_rescale, guidance_interval, guide
        )
        self._set_timesteps(num_inference_steps, None)
        chain = self.scheduler.timesteps[_begin_at(self.scheduler, strength, self.is_spaced_by_log_snr()) :]
        noise = randn_tensor(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        t = chain[:1].expand(len(x1))
        noised1, noised2 = (self.scheduler.add_noise(x, noise, t) for x in (x1, x2))
        mixed = torch.stack([torch.lerp(noised1, noised2, w) for w in weights], dim=1).flatten(0, 1)
        options = _step_options(self.scheduler, _for_each_sample(generator, len(x1), len(weights)), eta)
        x = self._denoise(mixed, chain, options, guidance=guidance)
        self.maybe_free_model_hooks()
        return self._output(self._decode(x, output_type), None, return_dict)

    # This function is longer than 60 lines because it documents every option of a completion.
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

        Returns:
            The output of a call, with len(known) * num_samples samples. The known part is as it was given: to the bit
            in "np" and "pt", which have the wider type of sample and data, and to the 8-bit value in "pil".

        Raises:
            ValueError: a shape is wrong, a value is outside its range, nothing or everything is unknown, or the model
                was not trained for it and the scheduler is not a `GaussianScheduler`.
        """
        _check_rules(INPAINT_RULES, num_samples=num_samples, jump_length=jump_length, jump_n_sample=jump_n_sample)
        data, unknown = self._read_known(known, mask)
        items, output_type = len(data), output_type or self._output_types[0]
        labels = _for_each_sample(_as_list(class_labels), items, num_samples)
        generator = _for_each_sample(generator, items, num_samples)
        _check_call(self, items * num_samples, generator, output_type)
        guidance = _make_guidance(
            self, items * num_samples, labels, guidance_scale, guidance_rescale, guidance_interval, guide
        )
        data, unknown = (x.repeat_interleave(num_samples, dim=0) for x in (data, unknown))
        options = _step_options(self.scheduler, generator, eta)
        self._set_timesteps(num_inference_steps, None)
        x = self._complete(data, unknown, generator, options, guidance, jump_length, jump_n_sample)
        self.maybe_free_model_hooks()
        samples = self._decode(x, "pt")
        dtype = torch.promote_types(samples.dtype, data.dtype)
        unknown, data = unknown.to(samples.device), data.to(samples.device, dtype)
        return self._output(
            self._in_form(torch.where(unknown, samples.to(dtype), data), output_type), None, return_dict
        )

    def _read_known(self, known, mask) -> tuple[Tensor, Tensor]:
        """Return the data in its own units, with 0 where it is unknown, and bools that say where; `(B, C, ...)`."""
        if not self.config.get("condition") and not _is_own(self.scheduler):
            raise ValueError(
                "a model that was not trained to complete is sampled by RePaint, whose jumps need GaussianScheduler: "
                "set pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config); got "
                f"{type(self.scheduler).__name__}"
            )
        data = self._tensor(known, "known").cpu()
        if self._output_types[0] == "pil" and not hasattr(known, "dtype"):
            data = data.float()  # PIL images, of 8 bits
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

    def _complete(self, data, unknown, generator, options, guidance, jump_length, jump_n_sample) -> Tensor:
        """Return samples in the model's units for data in its own units, `(B, C, *spatial)`."""
        x0 = self._encode(data, "known")
        unknown = unknown.to(x0.device)
        x = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x = x * self.scheduler.init_noise_sigma
        if self.config.get("condition"):
            condition = torch.cat((x0.masked_fill(unknown, 0), (~unknown).to(x0.dtype)), dim=1)
            return self._denoise(x, self.scheduler.timesteps, options, guidance=guidance, condition=condition)
        repaint = _Repaint(self.scheduler, x0, unknown, jump_length, jump_n_sample, generator)
        return self._denoise(
            x, repaint.timesteps, options, callback=repaint, callback_inputs=("latents",), guidance=guidance
        )


# ---------------------------------------------------------------------------------------------
# The two pipelines


class DDPMPipeline(_FromDataPipeline):
    """Unconditional generation of images.

    Args:
        unet: a `UNet2D`, or a stock `UNet2DModel`. A `UNet2D` is given channels-last weights, for speed.
        scheduler: a `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: number of steps of calls that give none; None: every training step.
        log_snr_spacing, steps_before_fast: settings of `use_fast_sampler`, which sets them.
        id2label: names of the classes, by their numbers, of a model with classes; None: they have no names.
        condition: "known" for a model that is also given the known values and where they are; None for other models.

    Raises:
        ValueError: the model is one of sequences, the scheduler cannot sample from it, or num_inference_steps is no
            whole number of at least 1.
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
        id2label: dict[int, str] | None = None,
        condition: str | None = None,
    ):
        super().__init__()
        _check_parts(self, unet, num_inference_steps, condition, 2, "DDPMPipeline1D")
        names = _class_names(id2label, _classes(unet))
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            log_snr_spacing=log_snr_spacing,
            steps_before_fast=steps_before_fast,
            # other pipelines are saved as they always were
            **({} if names is None else {"id2label": names}),
            **({} if condition is None else {"condition": condition}),
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
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
    ) -> ImageOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images.
            num_inference_steps: number of steps, 1 to T; None: the pipeline's default.
            generator: generator of all noise: one, or one per sample (a sample then does not depend on the others).
            latents: x_T, standard normal, `(B, C, H, W)`; None: it is drawn.
            eta: share of DDIM's noise, 0 to 1; None: the scheduler's own.
            output_type: "pil" (8-bit grey, RGB or RGBA by channels), "np" or "pt" (floats in [0, 1]).
            return_dict: return an `ImageOutput` if true, else the tuple `(images,)`, with the trajectory if asked for.
            callback_on_step_end: a function that is called as (pipeline, step index, timestep, {"latents": x}) after
                each step, and may return new latents in such a dictionary.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback is given; only "latents".
            return_all_timesteps: return the trajectory from x_T to x_0 too.
            timesteps: explicit timesteps instead of a number of steps, for schedulers that take them.
            class_labels: number or name of the class, or None for no class, of a model with classes: one for all
                samples, or a list with one per sample. batch_size may then be left out.
            guidance_scale: weight of classifier-free guidance, or with a guide of autoguidance, at least 0: 1 is none,
                more follows the class, or leaves what the guide does wrong, more closely; 0 ignores the class, or is
                the guide alone. Other values than 1 take a second prediction in each step.
            guidance_rescale: share, in [0, 1], to which the deviation of a guided prediction is put back to that of the
                prediction for the class (Lin et al., arXiv:2305.08891, section 3.4).
            guidance_interval: lowest and highest noise level that is guided, as shares of the training timesteps, from
                0 (data) to 1 (noise) (Kynkäänniemi et al., arXiv:2404.07724).
            guide: a worse model of the same data, for autoguidance (Karras et al., arXiv:2406.02507): an earlier
                checkpoint, or a smaller model that was trained for a shorter time. It is a model or a pipeline with the
                channels, size, schedule and prediction type of this one; with classes it is given the same labels.

        Raises:
            ValueError: a value is outside its range, a shape is wrong, the guide is a model of other data, or PIL has
                no mode for the number of channels.
        """
        return self._generate(
            batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, return_all_timesteps, timesteps, class_labels, guidance_scale,
            guidance_rescale, guidance_interval, guide,
        )  # fmt: skip

    def _size(self) -> tuple:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def _tensor(self, images, name: str) -> Tensor:
        """Convert PIL images, arrays (B, H, W, C) or tensors (B, C, H, W) to (B, C, H, W), in their own units."""
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
        return images

    def _encode(self, images, name: str) -> Tensor:
        """Convert PIL images, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1] to (B, C, H, W) in [-1, 1]."""
        images = self._tensor(images, name)
        if len(images) == 0 or not (images.min() >= 0 and images.max() <= 1):  # NaN too
            if len(images) == 0:
                raise ValueError(f"{name} must hold at least one image")
            raise ValueError(f"{name} must lie in [0, 1]; got {images.min():.4g} to {images.max():.4g}")
        return images.to(self._execution_device, self.unet.dtype) * 2 - 1

    def _decode(self, x: Tensor, output_type: str):
        """Convert (B, C, H, W) in [-1, 1] to images in the form of `output_type`."""
        return self._in_form((x.float() / 2 + 0.5).clamp(0, 1), output_type)

    def _in_form(self, images: Tensor, output_type: str):
        """Convert (B, C, H, W) in [0, 1] to the form of `output_type`."""
        if output_type == "pt":
            return images
        array = images.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return array
        eight_bit = (array * 255).round().astype(np.uint8)
        mode = IMAGE_MODES[array.shape[-1]]
        return [Image.fromarray(image[..., 0] if mode == "L" else image) for image in eight_bit]

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return ImageOutput(images=samples, trajectory=trajectory)


class DDPMPipeline1D(_FromDataPipeline):
    """Unconditional generation of sequences, in the units of the data that the model was trained on.

    Args:
        unet: a `UNet1D`. It is given weights in the memory layout of its activations, for speed.
        scheduler: a `GaussianScheduler`, or a stock scheduler.
        num_inference_steps: number of steps of calls that give none; None: every training step.
        data_shift, data_scale: one number per channel: data = x * scale + shift for the model's x in [-1, 1]; None:
            the data is x. A channel with the scale 0 is the constant `shift`, and its x is 0.
        log_snr_spacing, steps_before_fast: settings of `use_fast_sampler`, which sets them.
        id2label: names of the classes, by their numbers, of a model with classes; None: they have no names.
        condition: "known" for a model that is also given the known values and where they are; None for other models.

    Raises:
        ValueError: the model is one of images, the scheduler cannot sample from it, or a value is outside its range.
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
        id2label: dict[int, str] | None = None,
        condition: str | None = None,
    ):
        super().__init__()
        _check_parts(self, unet, num_inference_steps, condition, 1, "DDPMPipeline")
        names = _class_names(id2label, _classes(unet))
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
            # other pipelines are saved as they always were
            **({} if names is None else {"id2label": names}),
            **({} if condition is None else {"condition": condition}),
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
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide=None,
    ) -> SequenceOutput | tuple:
        """Sample sequences.

        The arguments are those of a call of `DDPMPipeline`, but `latents` is `(B, C, length)`, and `output_type` is
        "np" or "pt".

        Returns:
            A `SequenceOutput`, or with return_dict=False a tuple.

        Raises:
            ValueError: a value is outside its range, or a shape is wrong.
        """
        return self._generate(
            batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, return_all_timesteps, timesteps, class_labels, guidance_scale,
            guidance_rescale, guidance_interval, guide,
        )  # fmt: skip

    def _size(self) -> tuple:
        if self.unet.config.sample_size is None:
            raise ValueError(
                "the model's configuration has no sample_size: give latents, or set it when building the model"
            )
        return (self.unet.config.sample_size,)

    def _affine(self) -> tuple:
        """Return scale and shift of data = x * scale + shift, each (1, C, 1) in float64."""
        ones = [1.0] * self._channels()
        scale, shift = self.config.data_scale or ones, self.config.data_shift or [0.0] * self._channels()
        return tuple(torch.tensor(v, dtype=torch.float64)[None, :, None] for v in (scale, shift))

    def _encode(self, sequences, name: str) -> Tensor:
        """Convert arrays or tensors (B, C, length) from the units of the data to those of the model."""
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
        """Convert (B, C, length) from the model's units to the data's; float64 where float32 has too few digits."""
        scale, shift = self._affine()
        constant = (scale == 0) & (shift.float() == shift)
        wide_enough = (scale > 1e-4 * shift.abs()) & (scale > 1e-37)
        narrow = (constant | wide_enough).all() and (scale + shift.abs()).max() < 1e37
        exact = x.cpu().double() * scale + shift
        out = exact.to(torch.promote_types(x.dtype, torch.float32)) if narrow else exact
        return out.to(x.device) if output_type == "pt" else out.numpy()

    def _tensor(self, sequences, name: str) -> Tensor:
        """Convert arrays or tensors (B, C, length) to a tensor on the CPU, in the units of the data.

        Lists and whole numbers become float64.
        """
        try:
            x = torch.as_tensor(sequences, device="cpu", dtype=None if hasattr(sequences, "dtype") else torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be an array or tensor, got {type(sequences).__name__}") from error
        if x.ndim != 3 or x.shape[1] != self._channels():
            raise ValueError(f"{name} must have the shape (B, {self._channels()}, length); got {tuple(x.shape)}")
        return x if x.is_floating_point() else x.double()

    def _in_form(self, sequences: Tensor, output_type: str):
        """Convert (B, C, length) to the form of `output_type`."""
        return sequences if output_type == "pt" else sequences.cpu().numpy()

    def _output(self, samples, trajectory, return_dict: bool):
        if not return_dict:
            return (samples,) if trajectory is None else (samples, trajectory)
        return SequenceOutput(sequences=samples, trajectory=trajectory)
