"""TrainConfig: the options of a run, checked when they are put together.

`ddpm_hf.options` declares each option with its type, default, help, rule and scope. This file has what concerns several
options at once: their normal form, the rules between them, their scopes, and the differences between two runs.
"""

import dataclasses
import functools
import os
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddpm_hf import options
from ddpm_hf.arguments import unknown_option
from ddpm_hf.choices import PREDICTION_ALIASES
from ddpm_hf.reading import read_mapping
from ddpm_hf.rules import TYPE_RULES, NumberOrAuto, declared, default_of, split_optional

BUNDLED = {"digits": "scikit-learn's handwritten digits", "ecg": "PyWavelets' electrocardiogram"}
SOURCES = ("dataset_name", "train_data_dir", "train_data_file")
CONSTANT_LR = ("constant", "constant_with_warmup")
# Options that say where a run lies, where it comes from and how a process works.
NOT_CONTINUED = (
    "output_dir", "resume_from_checkpoint", "dry_run", "num_cpu_threads", "dataloader_num_workers", "cache_gb",
    "continue_from", "continue_checkpoint", "init_from",
)  # fmt: skip


@dataclass
class TrainConfig(  # dataclasses collect the fields from the last base to the first: the headings in reverse
    options.PublishingOptions,
    options.EvaluationOptions,
    options.SavingOptions,
    options.AveragingOptions,
    options.OptimizationOptions,
    options.DiffusionOptions,
    options.ModelOptions,
    options.RunOptions,
    options.LoadingOptions,
    options.SequenceOptions,
    options.ImageOptions,
    options.DataOptions,
):
    """Options of `ddpm_hf.train` and of training/train.py, checked when made.

    Raises:
        ValueError: an option breaks its rule or a rule between options, or has no effect with the others; the message
            has the option, the rule and the value.
    """

    def __new__(cls, *args, **given):
        """Remember which options were given, so that one at its default can be refused where it does not apply."""
        config = super().__new__(cls)
        # most of them together are a copy or a saved config.yaml, which names options that nobody gave
        config._given = frozenset(given) if 2 * len(given) < len(cls.__dataclass_fields__) else frozenset()
        return config

    def __post_init__(self):
        if self.continue_from is not None and self.init_from is not None:
            raise ValueError(
                f"give one of continue_from and init_from, got {self.continue_from!r} and {self.init_from!r}"
            )
        if self.continue_from is not None and self._given:
            self._inherit()
        self._normalize()
        self._check_each()
        self.prediction_type = PREDICTION_ALIASES.get(self.prediction_type, self.prediction_type)
        self._check_together()
        self.check_scope()

    def _inherit(self) -> None:
        """Take the options that were not given from the run that this one continues.

        Options of the data are taken if no other data is given; options of this process and of publishing are not.
        """
        earlier = in_present_form(options_to_continue(self.continue_from, self.output_dir))
        headings = [options.PublishingOptions]
        if self._given.intersection(SOURCES):
            headings += [options.DataOptions, options.ImageOptions, options.SequenceOptions, options.LoadingOptions]
        left = {f.name for heading in headings for f in dataclasses.fields(heading)} | set(NOT_CONTINUED) | self._given
        taken = [f for f in dataclasses.fields(self) if f.name in earlier and f.name not in left]
        for f in taken:
            setattr(self, f.name, earlier[f.name])
        for f in taken:  # what was given may turn off what an option of the earlier run belongs to
            applies = declared(f).scope
            if applies is not None and not applies.holds(self):
                setattr(self, f.name, default_of(f))

    def is_given(self, name: str) -> bool:
        """Return True if someone asked for something with the option of this name."""
        field, value = self.__dataclass_fields__[name], getattr(self, name)
        if value is None or value == declared(field).off:
            return False
        return name in self._given or value != default_of(field)

    def _normalize(self) -> None:
        """Bring the forms that YAML, older runs and single values have into the form of each option's type."""
        if isinstance(self.output_dir, str):  # YAML and --output_dir=~/runs keep the ~, which would name a new folder
            self.output_dir = os.path.expanduser(self.output_dir)
        if self.mixed_precision is False:  # YAML reads a bare no as false
            self.mixed_precision = "no"
        if self.min_snr_gamma is None:  # as YAML may say it, and older runs do
            self.min_snr_gamma = 0.0
        self.snr_shift = NumberOrAuto(self.snr_shift)  # one form for a number and its text
        if self.loss_weighting is None:
            self.loss_weighting = "snr" if self.min_snr_gamma else "uniform"
        for name, (kind, _) in kinds().items():
            value = getattr(self, name)
            if typing.get_origin(kind) is list and value is not None:
                setattr(self, name, list(value) if isinstance(value, (list, tuple)) else [value])
        if self.full_attn is not None:
            words = [str(item).lower() for item in self.full_attn]
            if not set(words) <= {"true", "false"}:
                raise ValueError(f"full_attn must hold true or false, got {self.full_attn}")
            self.full_attn = words

    def _check_each(self) -> None:
        """Check every option by the rule of its type and its own."""
        for field in dataclasses.fields(self):
            kind, is_optional = kinds()[field.name]
            value, rule = getattr(self, field.name), declared(field).rule
            if is_optional and value is None:
                continue
            if not TYPE_RULES[kind].holds(value):
                raise ValueError(f"{field.name} must be {TYPE_RULES[kind].text}, got {reprlib.repr(value)}")
            if rule is not None and not rule.holds(value):
                raise ValueError(f"{field.name} must be {rule.text}, got {value!r}")

    def _check_together(self) -> None:
        """Check the rules between options, and the one rule that another library has."""
        # here, because they are slow to import and the command line prints its help without them
        from huggingface_hub.utils import validate_repo_id

        from ddpm_hf.scheduler import GaussianScheduler

        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        self._check_source()
        for name in ("condition_column", "condition_dir"):
            if self.condition is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"a model is given the known part (condition) or a paired condition ({name}), not both; got "
                    f"condition {self.condition!r} and {name} {getattr(self, name)!r}"
                )
        if self.image_norm is not None and self.image_range is not None:
            raise ValueError(
                f"image_norm and image_range exclude each other, got {self.image_norm!r} and {self.image_range}"
            )
        if self.init_from is None:  # or else the length may be that of the pipeline, which is not read yet
            check_windows(self)
        if self.deterministic and self.compile == "inductor":
            raise ValueError(
                "deterministic must be false with compile 'inductor', which chooses kernels by their measured times, "
                "got true"
            )
        if self.create_pr and self.hub_revision is not None:
            raise ValueError(f"create_pr is for the main branch; got it with hub_revision {self.hub_revision!r}")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError(
                "learning_rate must be above 1e-7 with lr_scheduler 'polynomial', which ends there, got "
                f"{self.learning_rate!r}"
            )
        if self.min_snr_gamma and self.loss_weighting != "snr":
            raise ValueError(f"min_snr_gamma must be 0 with loss_weighting 'uniform', got {self.min_snr_gamma!r}")
        try:  # the scheduler has the rules between its options
            GaussianScheduler(
                self.ddpm_num_steps,
                self.ddpm_beta_schedule,
                prediction_type=self.prediction_type,
                rescale_betas_zero_snr=self.rescale_betas_zero_snr,
                snr_shift=0.0 if self.snr_shift == "auto" else self.snr_shift,  # that of "auto" follows the data
            )
        except ValueError as error:
            raise ValueError(
                f"ddpm_beta_schedule {self.ddpm_beta_schedule!r} with ddpm_num_steps {self.ddpm_num_steps}: {error}"
            ) from error
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                "ddpm_num_inference_steps must be at most ddpm_num_steps, got "
                f"{self.ddpm_num_inference_steps} and {self.ddpm_num_steps}"
            )

    def _check_source(self) -> None:
        """Check that there is one source of data at most, which can be streamed if that is asked for."""
        sources = [name for name in SOURCES if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"give one source of data, got {' and '.join(sources)}")
        if self.streaming:
            not_streamed = ("train_data_file", "sequence_columns", "holdout", "eval_steps")
            refused = [name for name in not_streamed if getattr(self, name)]
            refused += [self.dataset_name] if self.dataset_name in BUNDLED else []
            if refused:
                raise ValueError(
                    f"streaming is for tables of images, and not with {', '.join(refused)} "
                    "(evaluate such a run with training/evaluate.py)"
                )

    def model_options(self) -> dict[str, Any]:
        """Return the arguments of the U-Net, without those that are None."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(options.ModelOptions)}
        if chosen["full_attn"] is not None:
            chosen["full_attn"] = [item == "true" for item in chosen["full_attn"]]
        for name in ("attn_heads", "attn_dim_head", "full_attn"):  # a list for the U-Net has an entry for each stage
            if chosen[name] is not None and len(chosen[name]) == 1:
                (chosen[name],) = chosen[name]
        return {name: value for name, value in chosen.items() if value is not None}

    # -- what options apply to -----------------------------------------------------------------

    def applied(self, kind: str | None = None, given_model: bool = False) -> dict[str, Any]:
        """Return the options that have an effect, with their values.

        Args:
            kind: the kind of data, of `scope.KINDS`; None: not known yet, so that every kind counts.
            given_model: True if the model comes from Python.
        """
        scopes = {f.name: declared(f).scope for f in dataclasses.fields(self)}
        return {
            name: value for name, value in dataclasses.asdict(self).items()
            if scopes[name] is None or scopes[name].reason_against(self, kind, given_model) is None
        }  # fmt: skip

    def also_given(self, names: set[str]) -> None:
        """Take these options as given, even where they are at their defaults, and check the scopes again."""
        self._given = self._given | names
        self.check_scope()

    def check_scope(self, kind: str | None = None, model: Any = None) -> None:
        """Check that every option that was given applies.

        Args:
            kind: the kind of data, of `scope.KINDS`; None: not known yet.
            model: the model given from Python, if there is one. An option may be given that says what it is.

        Raises:
            ValueError: an option was given that has no effect here.
        """
        has = _plain(dict(model.config)) if model is not None and hasattr(model, "config") else {}
        for f in dataclasses.fields(self):
            applies, value = declared(f).scope, getattr(self, f.name)
            if applies is None or not self.is_given(f.name):
                continue
            if applies.new_model and f.name in has and has[f.name] == _plain(self.model_options()).get(f.name):
                continue
            reason = applies.reason_against(self, kind, model is not None)
            if reason is not None:
                raise ValueError(f"{f.name} applies to {applies.text}; got {value!r} with {reason}: leave it out")

    def to_yaml(self) -> str:
        """Return the options as YAML that `read_yaml` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def differences(self, earlier: dict, kind: str | None = None, given_model: bool = False) -> list[str]:
        """Return a line "option: earlier -> now" for each option that differs and that a resumed run must keep.

        Args:
            earlier: the options of the earlier run, as its config.yaml has them. An option that is newer than the run
                counts as its default.
            kind: as in `applied`.
            given_model: as in `applied`.
        """
        defaults = {f.name: default_of(f) for f in dataclasses.fields(self)}
        earlier = in_present_form({**defaults, **in_present_form(earlier)})
        lines, current = [], in_present_form(dataclasses.asdict(self))
        # an option that does not apply has no effect; the option that took it out is listed where it differs
        applied = self.applied(kind, given_model)
        for f in dataclasses.fields(self):
            name, now = f.name, current[f.name]
            changed = earlier[name] != now and name in applied
            if name == "max_train_steps" and changed and self.lr_scheduler not in CONSTANT_LR:
                lines.append(
                    f"max_train_steps: {earlier[name]} -> {now} (the '{self.lr_scheduler}' learning rate follows it)"
                )
            elif changed and not declared(f).changeable:
                lines.append(f"{name}: {earlier[name]} -> {now}")
        return lines


def check_windows(config: TrainConfig) -> None:
    """Check that the windows that stride asks for have a length.

    Raises:
        ValueError: they have not.
    """
    if config.stride is not None and config.sequence_length is None and config.dataset_name != "ecg":
        raise ValueError(f"stride needs sequence_length, the length of its windows; got stride {config.stride} alone")


def options_to_continue(source: str, output_dir: str) -> dict[str, Any]:
    """Return the options of the run that is continued, or those of the run in output_dir if that continues it already.

    Raises:
        ValueError: there is no such run, or it is the run in output_dir itself.
    """
    own, file = Path(output_dir) / "config.yaml", Path(source) / "config.yaml"
    if Path(source).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"output_dir must be another folder than that of continue_from, which is only read; got {output_dir} for "
            "both"
        )
    if own.is_file() and (found := read_mapping(own)).get("continue_from") == source:
        return found
    if not Path(source).is_dir():
        raise ValueError(f"continue_from must be the folder of a run, but there is no folder {source}")
    if not file.is_file():
        raise ValueError(f"continue_from must be the folder of a run, but {source} has no config.yaml")
    return read_mapping(file)


def in_present_form(earlier: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an earlier run with the values that null and missing options had in earlier versions."""
    # the only weighting, kind of variance and shift before they were options
    present = {"loss_weighting": "snr", "learned_variance": False, "snr_shift": 0.0, **earlier}
    present["snr_shift"] = NumberOrAuto(present["snr_shift"])
    if present.get("min_snr_gamma", 0.0) is None:
        present["min_snr_gamma"] = 0.0
    if present.get("mixed_precision", "no") in (None, False):
        present["mixed_precision"] = accelerate_precision() or "no"
    return present


def accelerate_precision() -> str | None:
    """Return the precision that accelerate is configured for, or None for float32 or nothing: its launcher says "no"
    for both."""
    value = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if value == "no" else value


def _plain(values: dict) -> dict:
    """Return options with lists for tuples, and one number for a list of one."""
    plain = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}
    return {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in plain.items()}


HEADINGS = tuple(reversed(TrainConfig.__bases__))


@functools.cache
def kinds() -> dict[str, tuple[Any, bool]]:
    """Return the type of each option, and True if the option may be None.

    The annotations tell it: HfArgumentParser changes the types of the fields.
    """
    return {name: split_optional(hint) for name, hint in typing.get_type_hints(TrainConfig).items()}


def read_yaml(path: str) -> dict[str, Any]:
    """Read options from a YAML file.

    Raises:
        ValueError: the file is not a mapping, or has an unknown option (the message has the closest name).
    """
    given = read_mapping(path, f"--config {path}")
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in given:
        if name not in known:
            raise ValueError(f"--config {path}: {unknown_option(str(name), known)}")
    return given
