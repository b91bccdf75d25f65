"""The origin of a run that does not begin with new weights: another run that it continues, or a pipeline.

`find_origin` checks it before anything is written. When the run folder has been opened, the origin gives the run its
weights, and the run saves a checkpoint before its first step, so that a resumed run does not need the origin again.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ddpm_hf import scope
from ddpm_hf.config import NOT_CONTINUED, SOURCES, TrainConfig, check_windows, in_present_form
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.data.feed import StoredFeed, StreamedFeed
from ddpm_hf.data.opening import kind_of_source
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.options import ModelOptions, PublishingOptions
from ddpm_hf.reading import read_json, read_mapping
from ddpm_hf.rules import declared, default_of, show
from ddpm_hf.run import checkpoint
from ddpm_hf.run.folder import RunFolder
from ddpm_hf.run.lineage import Lineage, hub_repo, published_repo, read_lineage
from ddpm_hf.run.record import public_options, without_folders
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer.progress import Run
from ddpm_hf.unet import UNet1D, UNet2D

SHAPES = tuple(f.name for f in dataclasses.fields(ModelOptions) if f.name != "dropout")
SCHEDULE = ("ddpm_num_steps", "ddpm_beta_schedule", "rescale_betas_zero_snr", "snr_shift")
# Schedules that options can name: ddpm_beta_schedule and rescale_betas_zero_snr.
NAMED_SCHEDULES = tuple(product(("sigmoid", "cosine", "linear"), (False, True)))
# Options of the size of items, by the number of their dimensions.
SIZES = {1: ("sequence_length", scope.SEQUENCES), 2: ("resolution", scope.IMAGES)}
# Arguments of the U-Net that the data or the options of a run decide.
DECIDED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "condition_channels")


class Origin:
    """The origin of a run: none, so that the weights are new, or that of a run which has a checkpoint of its own.

    Attributes:
        config: the options of the run, with those that the origin decides.
        lineage: what is recorded of the origin; None for a new run.
        lines: lines to print before training.
        size_line: the one of them that says the size of items, where the origin decides it; else empty.
    """

    def __init__(self, config: TrainConfig, lineage: Lineage | None = None):
        self.config, self.lineage, self.lines, self.size_line = config, lineage, [], ""

    @property
    def begin(self) -> int:
        """The step at which the run begins."""
        return self.lineage.step if self.lineage else 0

    def fit(self, model: nn.Module, feed: StoredFeed | StreamedFeed, given_model: bool) -> None:
        """Check that the model of the run can take the weights of the origin.

        Raises:
            ValueError: it cannot.
        """

    def settle(self, feed: StoredFeed | StreamedFeed, global_batch: int) -> None:
        """Decide where the order of the data begins."""

    def give(self, run: Run, optimizer, schedule) -> bool:
        """Give weights and progress to a run whose folder has no checkpoint; return True if the run then needs one."""
        return False


class Continued(Origin):
    """A checkpoint of another run, whose folder is only read."""

    def __init__(self, config: TrainConfig):
        self.source = RunFolder(config.continue_from)
        self.options = in_present_form(read_mapping(self.source.options))
        self.checkpoint = self._choose(config.continue_checkpoint)
        self.kept = checkpoint.read_progress(self.checkpoint)
        earlier, step = read_lineage(self.source.path), self.kept["step"]
        for name in SHAPES:
            value, now = self.options.get(name, getattr(config, name)), getattr(config, name)
            if value != now:
                raise ValueError(
                    f"{name} must be that of the run which is continued, {value!r}, because the shapes of its weights "
                    f"or what they compute follow it; got {now!r}"
                )
        if config.max_train_steps <= step:
            raise ValueError(
                f"max_train_steps must be more than the {step} steps of {self.checkpoint}, because it is the total; "
                f"got {config.max_train_steps}"
            )
        lineage = Lineage(
            "continue_from", without_folders(str(self.source.path)), step,
            base_model=published_repo(self.source.path) or (earlier and earlier.base_model),
            changed=changed_options(config, self.options),
        )  # fmt: skip
        if earlier:
            lineage.order_from, lineage.model, lineage.betas = earlier.order_from, earlier.model, earlier.betas
            if any(self.options.get(name) != getattr(config, name) for name in SCHEDULE):
                lineage.betas = None
        super().__init__(config, lineage)
        self.lines.append(
            f"continuing {self.checkpoint} after step {step}: {config.max_train_steps - step} steps remain"
        )
        _warn_of_target(self.lines, config, self.options.get("prediction_type", config.prediction_type), "run")

    def _choose(self, asked: str) -> Path:
        """Return the checkpoint that continue_checkpoint asks for, whose files are whole."""
        found = checkpoint.list_checkpoints(self.source.checkpoints)
        if not found:
            raise ValueError(f"continue_from must be a run with a checkpoint, and {self.source} has none")
        listed = ", ".join(path.name for _, path in found)
        path = found[-1][1]
        if asked == "best":
            best = checkpoint.read_progress(path)["best"]
            if best is None:
                raise ValueError(
                    f"continue_checkpoint 'best' needs a run that was evaluated, and {self.source} was not"
                )
            path = dict(found).get(best.get("step"))
            if path is None:
                raise ValueError(
                    f"continue_checkpoint 'best' is that of step {best.get('step')}, which {self.source} has not kept "
                    f"(checkpointing_steps, checkpoints_total_limit); it has {listed}. To begin anew with the best "
                    f"weights alone: --init_from {self.source.path / 'best'}"
                )
        elif asked != "newest":
            path = next(
                (p for _, p in found if asked in (p.name, str(p)) or Path(asked).resolve() == p.resolve()), None
            )
            if path is None:
                raise ValueError(
                    f"continue_checkpoint must be 'newest', 'best' or a checkpoint of {self.source} ({listed}), got "
                    f"{asked!r}"
                )
        wrong = checkpoint.damage(path)
        if wrong is not None:
            raise ValueError(
                f"the checkpoint {path} is damaged: {wrong}. continue_checkpoint names another one; there are {listed}"
            )
        return path

    def fit(self, model: nn.Module, feed: StoredFeed | StreamedFeed, given_model: bool) -> None:
        file = self.checkpoint / "model.safetensors"
        if not file.is_file():  # a form of FSDP or DeepSpeed, which is checked where it is loaded
            return
        with safe_open(file, "pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        _check_shapes(shapes, own, f"the run {self.source}", "with other classes, channels or conditions: --init_from "
                      f"{self.source.pipeline}")  # fmt: skip

    def settle(self, feed: StoredFeed | StreamedFeed, global_batch: int) -> None:
        reasons = []
        if self.kept["data"] != feed.fingerprint():
            reasons.append("the data is not that of the earlier run")
        if self.kept["global_batch"] != global_batch:
            reasons.append(f"a step has {global_batch} samples in the place of {self.kept['global_batch']}")
        names = ["seed", "holdout", *(["shuffle_buffer"] if self.kept["feed"] else [])]
        reasons += [
            f"{name} is {getattr(self.config, name)} in the place of {self.options[name]}"
            for name in names if self.options.get(name, getattr(self.config, name)) != getattr(self.config, name)
        ]  # fmt: skip
        if reasons:
            self.lineage.order_from, self.kept["feed"] = self.lineage.step, {}
            self.lines.append(f"the order of the data begins anew: {', and '.join(reasons)}")
        else:
            self.lines.append("the order of the data goes on where the earlier run was")
            feed.check(self.kept["feed"])
        before, now = self.options.get("optimizer", "adamw"), self.config.optimizer
        if before != now:
            self.lineage.made_new.append(f"the state of the optimizer, which is {now} in the place of {before}")
        if self.config.use_ema and not (self.checkpoint / "ema.safetensors").exists():
            self.lineage.made_new.append("the average of the weights, which begins with the weights")
        self.lines += [f"made new: {line}" for line in self.lineage.made_new]

    def give(self, run: Run, optimizer, schedule) -> bool:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        rates, acc, average = copy.deepcopy(schedule.state_dict()), run.accelerator, run.average
        try:
            with self._loadable(acc):
                acc.load_state(self.checkpoint)
            if (self.checkpoint / "ema.safetensors").exists():
                average.load(self.checkpoint / "ema.safetensors")
            else:
                average.start(run.model)
        except Exception as error:
            raise ValueError(f"the checkpoint {self.checkpoint} cannot be loaded: {error}") from error
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)  # rates, decay and betas are those of this run's options
        schedule.load_state_dict(rates)
        progress = run.progress
        progress.step, progress.seconds, progress.stream = self.lineage.step, self.kept["seconds"], self.kept["feed"]
        progress.order_from = self.lineage.order_from
        return True

    @contextlib.contextmanager
    def _loadable(self, acc) -> Iterator[None]:
        """Hide from accelerate the parts of the run that the checkpoint has not."""
        optimizers, scaler = acc._optimizers, acc.scaler
        if self.options.get("optimizer", "adamw") != self.config.optimizer:
            acc._optimizers = []
        if not (self.checkpoint / "scaler.pt").exists():
            acc.scaler = None
        try:
            yield
        finally:
            acc._optimizers, acc.scaler = optimizers, scaler


class Initialised(Origin):
    """A pipeline, whose weights the run begins with."""

    def __init__(self, config: TrainConfig):
        place = config.init_from
        is_file = Path(place).is_file()
        pipeline = from_denoising_diffusion_pytorch(place) if is_file else load_pipeline(place)
        self.unet, self.names = pipeline.unet, dict(pipeline.config.get("id2label") or {})
        if not isinstance(self.unet, (UNet1D, UNet2D)):
            raise ValueError(f"init_from must have a UNet2D or UNet1D, got a {type(self.unet).__name__} in {place}")
        earlier, trained = None, {}
        if Path(place).is_dir():
            with contextlib.suppress(ValueError):
                trained = read_json(Path(place) / "training.json")
            earlier = trained.get("lineage") or {}
        lineage = Lineage(
            "init_from", without_folders(place),
            base_model=hub_repo(place) or published_repo(Path(place).parent) or (earlier and earlier.get("base_model")),
        )  # fmt: skip
        lines: list[str] = []
        told_known = pipeline.config.get("condition") == "known"
        size = {} if is_file else _trained_size(config, self.unet)  # such a file does not have the size
        config = self._taken(_with(config, size), pipeline.scheduler, told_known, lineage, lines)
        check_windows(config)
        options = trained.get("options")
        lineage.changed = changed_options(config, {**in_present_form(options), **size} if options else {}, public=True)
        super().__init__(config, lineage)
        for name, value in size.items():
            self.size_line = f"{name} is {show(value)}, the size that the pipeline was trained at; --{name} changes it"
            lines.insert(0, self.size_line)
        self.lines = [f"beginning with the weights of {place}", *lines]

    def _taken(
        self, config: TrainConfig, scheduler, told_known: bool, lineage: Lineage, lines: list[str]
    ) -> TrainConfig:
        """Return the options with those of the pipeline where none was given."""
        values = _as_options(dict(self.unet.config))
        _warn_of_target(lines, config, scheduler.config.prediction_type, "pipeline", config.is_given("prediction_type"))
        values["prediction_type"] = scheduler.config.prediction_type
        for name, value in values.items():
            now = getattr(config, name)
            if name in SHAPES and config.is_given(name) and now != value:
                raise ValueError(
                    f"{name} must be that of the pipeline in init_from, {value!r}, got {now!r}: leave it out"
                )
        if told_known:  # a model with paired conditions follows condition_column instead
            values["condition"] = "known"
        betas = [float(beta) for beta in scheduler.config.get("trained_betas") or scheduler.betas.double().tolist()]
        shift = scheduler.config.get("snr_shift", 0.0)
        named = next(filter(lambda each: _is_schedule(betas, *each, shift), NAMED_SCHEDULES), None)
        values["ddpm_num_steps"] = len(betas)
        if named is not None:  # an option of the schedule that is given changes this one alone
            values.update(ddpm_beta_schedule=named[0], rescale_betas_zero_snr=named[1], snr_shift=shift)
        elif not any(map(config.is_given, SCHEDULE)):
            lineage.betas = betas
            lines.append("the noise schedule is the pipeline's, which no ddpm_beta_schedule has")
        own = self.unet.config
        lineage.model = {
            name: value for name, value in own.items()
            if not name.startswith("_") and name not in values and name not in DECIDED and value is not None
        }  # fmt: skip
        return _with(config, values)

    def fit(self, model: nn.Module, feed: StoredFeed | StreamedFeed, given_model: bool) -> None:
        if given_model:
            raise ValueError("init_from is for the model that training builds, got a model from Python too")
        if model.ndim != self.unet.ndim:
            kinds = {1: "sequences", 2: "images"}
            raise ValueError(
                f"init_from must be a pipeline of {kinds[model.ndim]}, as the data, got one of {kinds[self.unet.ndim]}"
            )
        channels, has = feed.shape[0], self.unet.config.in_channels
        if channels != has:
            raise ValueError(f"init_from must be a pipeline of the data's {channels} channels, got one of {has}")
        made_new, stored, own = self.lineage.made_new, dict(self.unet.float().state_dict()), model.state_dict()
        rows = "class_embedding.weight"
        old_rows, new_rows = stored.pop(rows, None), own.get(rows)
        if new_rows is None and old_rows is not None:
            bias = stored["time_embed.linear_2.bias"]
            stored["time_embed.linear_2.bias"] = bias + old_rows[-1]  # the embedding of "no class" is a constant
            self.lines.append("the pipeline's classes are left out: the model begins as with no class")
        elif new_rows is not None:
            stored[rows] = self._class_rows(old_rows, new_rows, feed.class_names)
        kernel, whole = stored["conv_in.weight"], own["conv_in.weight"]
        if kernel.shape[1] < whole.shape[1] and self.config.condition is not None:
            wider = torch.zeros_like(whole)
            wider[:, : kernel.shape[1]] = kernel
            stored["conv_in.weight"] = wider
            made_new.append("the input of the known part, which begins with weights of zero")
        shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in (stored, own)]
        _check_shapes(*shapes, f"the pipeline {self.config.init_from}", "")
        model.load_state_dict(stored)
        self.lines += [f"made new: {line}" for line in made_new]

    def _class_rows(self, old: torch.Tensor | None, new: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Return the class embeddings of the run: those of the pipeline by name, the others as for "no class"."""
        if old is None:
            self.lineage.made_new.append(f"the embeddings of {len(names)} classes, which begin at zero")
            return torch.zeros_like(new)
        known = {name: int(number) for number, name in self.names.items()}
        if not known and len(old) == len(new):  # classes without names
            known = {name: number for number, name in enumerate(names)}
        rows = old[-1].expand(len(names) + 1, -1).clone()
        for number, name in enumerate(names):
            if name in known:
                rows[number] = old[known[name]]
        fresh = [name for name in names if name not in known]
        if fresh:
            shown = ", ".join(fresh[:10]) + (f" and {len(fresh) - 10} more" if len(fresh) > 10 else "")
            self.lineage.made_new.append(f"the embeddings of the classes {shown}, which begin as that of no class")
        gone = [name for name in known if name not in names]
        if gone:
            self.lines.append(f"left out: {len(gone)} classes of the pipeline that the data has not")
        return rows

    def give(self, run: Run, optimizer, schedule) -> bool:
        return True  # `fit` has put the weights into the model


def find_origin(config: TrainConfig) -> Origin:
    """Return the origin of a run, checked as far as that can be done without its data.

    Raises:
        ValueError: the origin is not there, is damaged, or does not fit the options.
    """
    option = "continue_from" if config.continue_from is not None else "init_from"
    if getattr(config, option) is None:
        return Origin(config)
    folder = RunFolder(config.output_dir)
    if folder.options.is_file() and checkpoint.list_checkpoints(folder.checkpoints):
        own = read_mapping(folder.options)
        if own.get(option) == getattr(config, option):
            lineage = read_lineage(folder.path)
            if lineage is None:
                raise ValueError(f"{folder} has no lineage.json, without which a run with {option} cannot be resumed")
            if option == "init_from":
                taken = (*SHAPES, "dropout", "condition", "prediction_type", *SCHEDULE, "resolution", "sequence_length")
                config = _with(config, {name: own[name] for name in taken if name in own})
            return Origin(config, lineage)
    if folder.path.is_dir() and folder.path.resolve() == Path(getattr(config, option)).resolve():
        raise ValueError(f"output_dir must be another folder than that of {option}, which is only read")
    return Continued(config) if option == "continue_from" else Initialised(config)


def changed_options(config: TrainConfig, earlier: dict, public: bool = False) -> list[str]:
    """Return a line "option: earlier -> now" for each option that differs, without folders of the machine.

    Args:
        earlier: the options of the source.
        public: True if folders were left out of `earlier`.
    """
    left = {*NOT_CONTINUED, *(f.name for f in dataclasses.fields(PublishingOptions))}
    now = public_options(dataclasses.asdict(config))
    earlier = earlier if public else public_options(earlier)
    return [
        f"{name}: {earlier[name]} -> {value}"
        for name, value in now.items() if name in earlier and earlier[name] != value and name not in left
    ]  # fmt: skip


def _warn_of_target(lines: list[str], config: TrainConfig, earlier: str, what: str, given: bool = True) -> None:
    if given and config.prediction_type != earlier:
        lines.append(
            f"warning: prediction_type is {config.prediction_type}, and the {what} predicts {earlier}: the model has "
            "to learn its output anew"
        )


def _trained_size(config: TrainConfig, unet: UNet1D | UNet2D) -> dict:
    """Return the option of the size with the size that a U-Net was trained at, if it applies and is not given."""
    name, applies = SIZES[unet.ndim]
    size, given = unet.config.sample_size, getattr(config, name) is not None
    named = any(getattr(config, source) for source in SOURCES)  # a dataset from Python has its own size
    if given or size is None or not named or kind_of_source(config) not in applies.kinds:
        return {}
    return {name: size if unet.ndim == 1 else list(size) if isinstance(size, (list, tuple)) else [size]}


def _as_options(unet: dict) -> dict:
    """Return a U-Net's arguments in the form of the options of a run."""
    values = {f.name: unet[f.name] for f in dataclasses.fields(ModelOptions) if f.name in unet}
    for name in ("dim_mults", "attn_heads", "attn_dim_head", "full_attn"):
        value = values.get(name)
        if value is not None:
            values[name] = list(value) if isinstance(value, (list, tuple)) else [value]
    if values.get("full_attn") is not None:
        values["full_attn"] = [str(item).lower() for item in values["full_attn"]]
    return values


def _with(config: TrainConfig, values: dict) -> TrainConfig:
    """Return the options with these values where none was given, checked anew."""
    config = copy.copy(config)
    taken = [f for f in dataclasses.fields(config) if f.name in values and not config.is_given(f.name)]
    for f in taken:
        setattr(config, f.name, values[f.name])
    for f in taken:
        applies = declared(f).scope
        if applies is not None and not applies.holds(config):
            setattr(config, f.name, default_of(f))
    config.__post_init__()
    return config


def _is_schedule(betas: list[float], name: str, zero_snr: bool, shift: float) -> bool:
    more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr, "snr_shift": shift}
    try:
        found = GaussianScheduler(len(betas), name, **more)
    except ValueError:  # a linear schedule of few steps
        return False
    return list(found.config["trained_betas"]) == betas


def _check_shapes(stored: dict, own: dict, source: str, way_out: str) -> None:
    """Check that the weights of the source have the names and shapes of the model's.

    Raises:
        ValueError: they have not; the message has the first that differs.
    """
    for name in sorted({*stored, *own}):
        if stored.get(name) != own.get(name):
            raise ValueError(
                f"the weights of {source} do not fit the model: {name} has the shape {stored.get(name)}, and the model "
                f"needs {own.get(name)}{'. To begin anew ' + way_out if way_out else ''}"
            )
