"""TrainConfig: every option of a run, once, with its help, unit, default and check.

Names are those of diffusers' unconditional training example where it has them.
"""

import dataclasses
import reprlib
from dataclasses import dataclass, field
from typing import Any

import yaml
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from huggingface_hub.utils import validate_repo_id

from ddpm_hf import scope
from ddpm_hf.arguments import unknown_option
from ddpm_hf.losses import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS
from ddpm_hf.reading import is_finite, is_whole, read_mapping
from ddpm_hf.scheduler import BETA_SCHEDULES, PREDICTION_ALIASES, PREDICTION_TYPES, GaussianScheduler
from ddpm_hf.unet import NORMS, TIME_EMBEDDINGS

BUNDLED = {"digits": "scikit-learn's handwritten digits", "ecg": "PyWavelets' electrocardiogram"}
TRACKERS = tuple(sorted(kind.value for kind in LoggerType if kind != LoggerType.ALL))  # accelerate's
SEQUENCE_NORMS = ("minmax", "meanstd")
OPTIMIZERS = ("adamw", "muon")
CONSTANT_LR = ("constant", "constant_with_warmup")
# What a resumed run may change: nothing here alters the weights that the steps done so far have led to.
CHANGEABLE = {
    "output_dir", "max_train_steps", "dataloader_num_workers", "cache_gb", "num_cpu_threads", "on_bad_image",
    "report_to", "logging_steps",
    "save_samples_steps", "num_samples", "ddpm_num_inference_steps", "eval_batch_size", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "dry_run", "eval_steps", "eval_metrics", "eval_num_samples",
    "eval_num_real", "feature_network", "feature_resolution", "eval_cache_dir", "metric_for_best",
    "push_to_hub", "hub_model_id", "hub_every_save", "hub_upload_state", "hub_private_repo", "hub_revision",
    "create_pr", "hub_license",
}  # fmt: skip


class Help(str):
    """The help of an option, with what the option applies to.

    The metadata of a field holds nothing else, because HfArgumentParser gives argparse everything that it finds there.
    """

    scope: scope.Scope | None
    off: Any


def _option(default: Any, help: str, applies: scope.Scope | None = None, off: Any = None) -> Any:
    """A field with its help and, where it does not always apply, its scope; `off`: the value that asks for nothing."""
    text = Help(f"{help} Applies to {applies.text}." if applies else help)
    text.scope, text.off = applies, off
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": text})


@dataclass
class TrainConfig:
    """Options of `ddpm_hf.train` and of training/train.py; checked when made.

    Raises:
        ValueError: naming the option, its rule and the value.
    """

    # Data: exactly one source, unless a dataset is given from Python
    dataset_name: str | None = _option(
        None, "Bundled data: 'digits' (8x8 images) or 'ecg' (windows of a recording); or the name of a data set on "
        "the Hub, or a local folder that the datasets library can load."
    )  # fmt: skip
    dataset_config_name: str | None = _option(None, "Configuration of the data set on the Hub.", scope.NAMED_TABLES)
    dataset_split: str = _option("train", "Split of a data set of the Hub, or of a folder of tables.", scope.TABLES)
    train_data_dir: str | None = _option(
        None, "Folder of images, searched with its subfolders, any format of Pillow; or of tables of images: a data "
        "set saved to disk, .parquet, .arrow, or webdataset .tar files."
    )  # fmt: skip
    train_data_file: str | None = _option(
        None, "File of sequences. Array .npy or .npz: (N, channels, length), or (N, length) for one channel. Table "
        ".csv: one row a sequence; or, with stride, one row a point in time and one column a channel. Table "
        ".parquet: as .csv, or columns of lists, each a channel."
    )  # fmt: skip
    image_column: str | None = _option(
        None, "Column of the images in a table. Default: the only one that can be meant.", scope.IMAGE_TABLES
    )
    sequence_columns: list[str] | None = _option(
        None,
        "Columns of the sequences in a table. Default: all. Needed to read sequences with dataset_name.",
        scope.SEQUENCE_TABLES,
    )
    resolution: list[int] | None = _option(
        None, "Height and width in pixels (one number: square): the shorter side is resized, the rest is cropped. "
        "Default: 64; 8 for digits.", scope.IMAGES
    )  # fmt: skip
    image_channels: int | None = _option(
        None,
        "1 (grey), 3 (RGB) or 4 (RGBA); transparency is laid on white for 1 and 3. Default: 3; 1 for digits.",
        scope.IMAGES,
    )
    center_crop: bool = _option(True, "Crop from the centre; else at a random place.", scope.IMAGES)
    random_flip: bool = _option(False, "Mirror half of the images left to right.", scope.IMAGES, off=False)
    sequence_length: int | None = _option(
        None, "Length of the sequences in samples: shortens longer ones to their start; windows of ecg. "
        "Default: the data's; 256 for ecg.", scope.SEQUENCES
    )  # fmt: skip
    stride: int | None = _option(
        None, "Train on windows of sequence_length samples, every stride-th, of each sequence. Default: whole "
        "sequences; 2 for ecg.", scope.SEQUENCES
    )  # fmt: skip
    sequence_norm: str = _option(
        "minmax",
        "Scaling of each channel: 'minmax', to [-1, 1] by its range; 'meanstd', to mean 0 and deviation 1.",
        scope.SEQUENCES,
    )
    on_bad_image: str = _option(
        "stop", "A picture that cannot be read: 'stop' with its name, or 'skip' and count it.", scope.CHECKED_IMAGES
    )
    dataloader_num_workers: int = _option(0, "Processes that load data, per training process; 0: in the main one.")
    streaming: bool = _option(
        False,
        "Read tables of images (dataset_name, or train_data_dir) as they come, without a copy of them.",
        scope.STREAMS,
        off=False,
    )
    shuffle_buffer: int = _option(
        1000, "Images that streaming shuffles together, undecoded; each process has up to twice as many in memory.",
        scope.STREAMING,
    )  # fmt: skip
    cache_gb: float = _option(
        1.0,
        "Memory for decoded images, in GB per training process: as many as fit are decoded once only (Linux).",
        scope.KEPT_IMAGES,
        off=0,
    )

    # Run folder
    output_dir: str = _option("runs/run", "Run folder; running the same command again resumes it.")
    num_cpu_threads: int | None = _option(
        None, "Threads of each process when training on CPU. Default: this machine's cores, shared by its processes "
        "(accelerate itself starts each with one)."
    )  # fmt: skip
    seed: int = _option(0, "Seed for initial weights, data order, noise and samples.")
    resume_from_checkpoint: str = _option(
        "latest", "'latest': the newest checkpoint, which must be undamaged; 'latest-valid': the newest undamaged one."
    )
    dry_run: bool = _option(
        False,
        "Print the resolved options, the model's size and the data found, read every item and list those that cannot "
        "be read, and stop.",
    )

    # Model (see UNet2D and UNet1D)
    dim: int = _option(64, "Width of the U-Net that dim_mults multiply.", scope.NEW_MODEL)
    init_dim: int | None = _option(None, "Width after the first convolution. Default: dim.", scope.NEW_MODEL)
    dim_mults: list[int] = _option(
        [1, 2, 4, 8], "Width of each stage over dim; every stage but the last halves the size.", scope.NEW_MODEL
    )
    self_condition: bool = _option(False, "Condition on the previous x0 estimate (in half of the training steps).")
    norm: str = _option("rms", "Norm of the residual blocks: 'rms' or 'group'.", scope.NEW_MODEL)
    norm_groups: int = _option(8, "Groups of norm 'group'.", scope.GROUP_NORM)
    dropout: float = _option(
        0.0, "Dropout probability in the residual blocks; the masks are each process's own.", scope.NEW_MODEL
    )
    attn_heads: list[int] = _option([4], "Attention heads: one number, or one per stage.", scope.NEW_MODEL)
    attn_dim_head: list[int] = _option(
        [32], "Size of an attention head: one number, or one per stage.", scope.NEW_MODEL
    )
    full_attn: list[str] | None = _option(
        None,
        "Full attention, true or false: one, or one per stage. Default: images, the last stage; sequences, none.",
        scope.NEW_MODEL,
    )
    num_mem_kv: int | None = _option(
        None, "Memory key-values in each attention. Default: 4 for images, 0 for sequences.", scope.NEW_MODEL
    )
    time_embedding: str = _option("sinusoidal", "'sinusoidal', 'learned_fourier' or 'random_fourier'.", scope.NEW_MODEL)
    fourier_dim: int = _option(16, "Features of a Fourier time embedding.", scope.FOURIER)
    theta: float = _option(10000.0, "Longest period of the sinusoidal time embedding, over 2 pi.", scope.SINUSOIDAL)
    gradient_checkpointing: bool = _option(False, "Save memory by recomputing activations in the backward pass.")

    # Diffusion (see GaussianScheduler)
    ddpm_num_steps: int = _option(1000, "Training timesteps T.")
    ddpm_beta_schedule: str = _option("sigmoid", "'sigmoid', 'cosine' or 'linear'.")
    prediction_type: str = _option(
        "v_prediction", "Prediction target of the model: 'epsilon', 'sample' (x0) or 'v_prediction'."
    )
    loss_weighting: str | None = _option(
        None, "'uniform': 1 at every timestep; 'snr': by the target, as denoising-diffusion-pytorch, and by "
        "min_snr_gamma. Default: uniform; snr with min_snr_gamma."
    )  # fmt: skip
    min_snr_gamma: float = _option(0.0, "Min-SNR loss weighting with this gamma (5 is usual); 0: off.")
    noise_offset: float = _option(0.0, "Strength of offset noise (0.1 is usual).")
    timestep_sampling: str = _option(
        "uniform", "Timesteps of training: 'uniform', or 'logit_normal', more often in the middle of the schedule."
    )
    logit_mean: float = _option(
        0.0, "Mean of the logit-normal distribution; positive values favour noisier timesteps.", scope.LOGIT_NORMAL
    )
    logit_std: float = _option(
        1.0,
        "Standard deviation of the logit-normal distribution; small values favour the middle of the schedule.",
        scope.LOGIT_NORMAL,
    )
    immiscible: bool = _option(False, "Re-assign noise to the nearest data within train_batch_size samples.")
    rescale_betas_zero_snr: bool = _option(
        False,
        "Rescale the schedule to end in pure noise (not with epsilon); loss_weighting snr counts SNR as at least 1.",
    )

    # Optimization
    max_train_steps: int = _option(100_000, "Optimizer steps in all.")
    train_batch_size: int = _option(16, "Samples per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.")
    optimizer: str = _option(
        "adamw", "'adamw'; or 'muon', for the weights of linear layers and convolutions, with AdamW for the others."
    )
    learning_rate: float = _option(4e-4, "Peak learning rate of AdamW.")
    muon_learning_rate: float = _option(
        2.5e-3, "Peak learning rate of Muon: an update's root mean square is 0.2 of it. Small models in few steps like "
        "more (9e-3).", scope.MUON
    )  # fmt: skip
    lr_scheduler: str = _option(
        "cosine", "A schedule of diffusers.optimization: constant, constant_with_warmup, cosine, ..."
    )
    lr_warmup_steps: int = _option(
        100, "Optimizer steps of warm-up: step k of n has k / (n + 1) of the rate.", scope.WARM_UP, off=0
    )
    adam_beta1: float = _option(0.9, "AdamW's beta1.")
    adam_beta2: float = _option(0.99, "AdamW's beta2.")
    adam_weight_decay: float = _option(0.0, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Clip the gradient's norm to this.")
    mixed_precision: str | None = _option(None, "'no', 'bf16' or 'fp16'. Default: what accelerate is configured for.")
    use_ema: bool = _option(True, "Sample from and publish an exponential moving average of the weights.")
    ema_max_decay: float = _option(0.9999, "Largest decay of the average.", scope.EMA)
    ema_inv_gamma: float = _option(1.0, "Warm-up of the decay: 1 - (1 + step / inv_gamma) ** -power.", scope.EMA)
    ema_power: float = _option(0.75, "Power of that warm-up.", scope.EMA)
    ema_update_after_step: int = _option(
        0, "Steps after which averaging starts; the weights are copied before.", scope.EMA
    )
    ema_update_every: int = _option(1, "Steps between updates of the average.", scope.EMA)

    # Looking and saving
    logging_steps: int = _option(
        50, "Steps between lines of metrics.jsonl and tracker points (means over the interval)."
    )
    report_to: list[str] = _option(
        ["tensorboard"], "Trackers: 'tensorboard' and 'wandb', which also show the sample pictures; any other of "
        "accelerate's (comet_ml, mlflow, ...); or 'none'. metrics.jsonl is always written."
    )  # fmt: skip
    save_samples_steps: int = _option(
        1000, "Steps between sample pictures; the last step always has one. 0: only the last."
    )
    num_samples: int = _option(25, "Samples in a picture.")
    ddpm_num_inference_steps: int = _option(50, "Sampling steps, of the pictures and as the saved pipeline's default.")
    eval_batch_size: int = _option(64, "Samples generated at once, per process.")
    holdout: int = _option(
        0, "Items kept out of training, drawn by the seed, for the held-out loss. Of windows: those of whole "
        "sequences, or of stretches of a single one; what is nearer to those than a window's length is left out of "
        "training too."
    )  # fmt: skip
    eval_steps: int = _option(0, "Steps between evaluations; the last step then always has one. 0: none.")
    eval_metrics: list[str] | None = _option(
        None, "Images: fid, kid, memorization, held_out_loss, held_out_weighted_loss; sequences: frechet, "
        "spectral_frechet, sliced_wasserstein, autocorrelation_error, memorization, held_out_loss, "
        "held_out_weighted_loss. Default: all; those of held-out items with holdout.", scope.EVALUATION
    )  # fmt: skip
    eval_num_samples: int = _option(
        1000, "Samples generated for an evaluation; FID below 10,000 is biased.", scope.EVALUATION
    )
    eval_num_real: int = _option(50_000, "Real items that samples are compared with, at most.", scope.EVALUATION)
    feature_network: str = _option(
        "inception", "Features of FID and KID: 'inception' (clean-fid's), a TorchScript file (B, 3, S, S) in [0, 255] "
        "-> (B, D), or 'pixels' (no file needed; coarse).", scope.FEATURES
    )  # fmt: skip
    feature_resolution: int = _option(299, "S of a TorchScript feature network, in pixels.", scope.TORCHSCRIPT)
    eval_cache_dir: str | None = _option(
        None, "Folder for the statistics of real images. Default: ddpm_hf/ in the Hugging Face cache.", scope.FEATURES
    )
    metric_for_best: str | None = _option(
        None,
        "Metric whose lowest value's pipeline is kept in best/. Default: the first of eval_metrics.",
        scope.EVALUATION,
    )
    checkpointing_steps: int = _option(1000, "Steps between checkpoints; the last step always has one.")
    checkpoints_total_limit: int = _option(2, "Newest checkpoints to keep; 0: all.")

    # Publishing (the token: `hf auth login`, or the environment's HF_TOKEN)
    push_to_hub: bool = _option(False, "Publish the pipeline, with its model card, on the Hub when training ends.")
    hub_model_id: str | None = _option(
        None, "The repo, 'user/name' or 'name'. Default: the name of the run folder, of the token's user.", scope.HUB
    )
    hub_every_save: bool = _option(False, "Publish at every save too, in the background.", scope.HUB, off=False)
    hub_upload_state: bool = _option(
        False, "Publish the newest checkpoint too (optimizer, random states), in training_state/.", scope.HUB, off=False
    )
    hub_private_repo: bool | None = _option(
        None, "Make a new repo private. Default: as the account's settings say.", scope.HUB
    )
    hub_revision: str | None = _option(
        None, "Branch to publish on; made if it is not there. Default: the main one.", scope.HUB
    )
    create_pr: bool = _option(
        False, "Publish as a pull request (one a run) instead of writing to the branch.", scope.HUB, off=False
    )
    hub_license: str | None = _option(
        None, "Licence of the weights, by its name on the Hub ('mit', 'cc-by-4.0', ...). Default: not stated."
    )

    def __new__(cls, *args, **options):
        """Remember which options were given, so that one at its default can be refused where it does not apply."""
        config = super().__new__(cls)
        # most of them together are a copy or a saved config.yaml, which names options that nobody gave
        config._given = frozenset(options) if 2 * len(options) < len(cls.__dataclass_fields__) else frozenset()
        return config

    def __post_init__(self):
        if self.mixed_precision is False:  # YAML reads a bare no as false
            self.mixed_precision = "no"
        if self.min_snr_gamma is None:  # as YAML may say it, and older runs do
            self.min_snr_gamma = 0.0
        if self.loss_weighting is None:
            self.loss_weighting = "snr" if self.min_snr_gamma else "uniform"
        for name in (
            "attn_heads",
            "attn_dim_head",
            "dim_mults",
            "resolution",
            "full_attn",
            "report_to",
            "sequence_columns",
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (list, tuple)):
                value = [value]
            setattr(self, name, None if value is None else list(value))
        if self.full_attn is not None:
            words = {"true": True, "false": False}
            parsed = [words.get(str(item).lower()) for item in self.full_attn]
            if None in parsed:
                raise ValueError(f"full_attn must hold true or false, got {self.full_attn}")
            self.full_attn = [str(item).lower() for item in parsed]
        self._check_types()
        self.prediction_type = PREDICTION_ALIASES.get(self.prediction_type, self.prediction_type)
        self._check()
        self.check_scope()

    def _check_types(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            optional = kind not in TYPE_RULES
            if optional and value is None:
                continue
            base = next(part for part in kind.__args__ if part is not type(None)) if optional else kind
            holds, text = TYPE_RULES[base]
            if not holds(value):
                raise ValueError(f"{name} must be {text}, got {reprlib.repr(value)}")

    def _check(self) -> None:
        def rule(holds: bool, name: str, text: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {text}, got {getattr(self, name)!r}")

        sources = [name for name in ("dataset_name", "train_data_dir", "train_data_file") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"give one source of data, got {' and '.join(sources)}")
        if self.resolution is not None:
            good = len(self.resolution) in (1, 2) and all(n >= 1 for n in self.resolution)
            rule(good, "resolution", "one or two whole numbers of pixels, at least 1")
        rule(self.image_channels in (None, 1, 3, 4), "image_channels", "1, 3 or 4")
        rule(self.on_bad_image in ("stop", "skip"), "on_bad_image", "'stop' or 'skip'")
        rule(self.resume_from_checkpoint in ("latest", "latest-valid"), "resume_from_checkpoint",
             "'latest' or 'latest-valid'")  # fmt: skip
        rule(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}")
        rule(self.time_embedding in TIME_EMBEDDINGS, "time_embedding", f"one of {', '.join(TIME_EMBEDDINGS)}")
        rule(self.ddpm_beta_schedule in BETA_SCHEDULES, "ddpm_beta_schedule", f"one of {', '.join(BETA_SCHEDULES)}")
        rule(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        rule(self.loss_weighting in LOSS_WEIGHTINGS, "loss_weighting", f"one of {', '.join(LOSS_WEIGHTINGS)}")
        rule(self.timestep_sampling in TIMESTEP_SAMPLINGS, "timestep_sampling",
             f"one of {', '.join(TIMESTEP_SAMPLINGS)}")  # fmt: skip
        rule(self.prediction_type in PREDICTION_TYPES, "prediction_type", f"one of {', '.join(PREDICTION_TYPES)}")
        rule(self.mixed_precision in (None, "no", "bf16", "fp16"), "mixed_precision", "'no', 'bf16' or 'fp16'")
        trackers = self.report_to == ["none"] or (self.report_to and set(self.report_to) <= set(TRACKERS))
        rule(trackers, "report_to", f"'none', or one or more of {', '.join(TRACKERS)}")
        rule(self.sequence_norm in SEQUENCE_NORMS, "sequence_norm", f"one of {', '.join(SEQUENCE_NORMS)}")
        for name in ("eval_num_samples", "eval_num_real"):
            rule(getattr(self, name) >= 2, name, "a whole number of at least 2")
        rule(self.cache_gb >= 0, "cache_gb", "at least 0")
        if self.streaming:
            refused = [name for name in ("train_data_file", "sequence_columns", "holdout", "eval_steps")
                       if getattr(self, name)]  # fmt: skip
            refused += [self.dataset_name] if self.dataset_name in BUNDLED else []
            if refused:
                raise ValueError(f"streaming is for tables of images, and not with {', '.join(refused)} "
                                 "(evaluate such a run with training/evaluate.py)")  # fmt: skip
        if self.create_pr and self.hub_revision is not None:
            raise ValueError(f"create_pr is for the main branch; got it with hub_revision {self.hub_revision!r}")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        if self.stride is not None and self.sequence_length is None and self.dataset_name != "ecg":
            raise ValueError(f"stride needs sequence_length, the length of its windows; got stride {self.stride} alone")
        schedules = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
        rule(self.lr_scheduler in schedules, "lr_scheduler", f"one of {', '.join(schedules)}")
        for name in ("dim", "ddpm_num_steps", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
                     "ema_update_every", "logging_steps", "num_samples", "ddpm_num_inference_steps", "eval_batch_size",
                     "checkpointing_steps", "norm_groups", "feature_resolution", "shuffle_buffer"):  # fmt: skip
            rule(getattr(self, name) >= 1, name, "a whole number of at least 1")
        rule(self.num_cpu_threads is None or self.num_cpu_threads <= 1024, "num_cpu_threads", "at most 1024")
        for name in ("init_dim", "sequence_length", "stride", "num_cpu_threads"):
            value = getattr(self, name)
            rule(value is None or value >= 1, name, "a whole number of at least 1")
        for name in (
            "dataloader_num_workers",
            "seed",
            "lr_warmup_steps",
            "ema_update_after_step",
            "save_samples_steps",
            "checkpoints_total_limit",
            "holdout",
            "eval_steps",
        ):
            rule(getattr(self, name) >= 0, name, "a whole number of at least 0")
        for name in ("learning_rate", "muon_learning_rate", "adam_epsilon", "max_grad_norm", "ema_inv_gamma",
                     "ema_power", "theta", "logit_std"):  # fmt: skip
            rule(getattr(self, name) > 0, name, "greater than 0")
        for name in ("adam_beta1", "adam_beta2", "dropout"):
            rule(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        rule(0 <= self.ema_max_decay <= 1, "ema_max_decay", "in [0, 1]")
        rule(self.min_snr_gamma >= 0, "min_snr_gamma", "at least 0")
        rule(not self.min_snr_gamma or self.loss_weighting == "snr", "min_snr_gamma", "0 with loss_weighting 'uniform'")
        rule(self.noise_offset >= 0, "noise_offset", "at least 0")
        rule(self.adam_weight_decay >= 0, "adam_weight_decay", "at least 0")
        try:  # the rules between its options are its own
            GaussianScheduler(self.ddpm_num_steps, self.ddpm_beta_schedule, prediction_type=self.prediction_type,
                              rescale_betas_zero_snr=self.rescale_betas_zero_snr)  # fmt: skip
        except ValueError as error:
            raise ValueError(
                f"ddpm_beta_schedule {self.ddpm_beta_schedule!r} with ddpm_num_steps {self.ddpm_num_steps}: {error}"
            ) from error
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                "ddpm_num_inference_steps must be at most ddpm_num_steps, got "
                f"{self.ddpm_num_inference_steps} and {self.ddpm_num_steps}"
            )

    def model_options(self) -> dict:
        """The options that the U-Net takes, None left out."""

        def one_or_all(values):
            return values[0] if values is not None and len(values) == 1 else values

        names = ("dim", "init_dim", "dim_mults", "self_condition", "norm", "norm_groups", "dropout", "attn_heads",
                 "attn_dim_head", "full_attn", "num_mem_kv", "time_embedding", "fourier_dim", "theta")  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        if options["full_attn"] is not None:
            options["full_attn"] = [item == "true" for item in options["full_attn"]]
        for name in ("attn_heads", "attn_dim_head", "full_attn"):
            options[name] = one_or_all(options[name])
        return {name: value for name, value in options.items() if value is not None}

    # -- what options apply to -----------------------------------------------------------------

    def applied(self, kind: str | None = None, given_model: bool = False) -> dict[str, Any]:
        """The options that have an effect, with their values.

        Args:
            kind: the kind of data, of `scope.KINDS`; None: not known yet, and every kind counts.
            given_model: whether the model comes from Python.
        """
        scopes = {f.name: f.metadata["help"].scope for f in dataclasses.fields(self)}
        return {
            name: value for name, value in dataclasses.asdict(self).items()
            if scopes[name] is None or scopes[name].reason_against(self, kind, given_model) is None
        }  # fmt: skip

    def also_given(self, names: set[str]) -> None:
        """Take these options as given, even where they are at their defaults, and check them."""
        self._given = self._given | names
        self.check_scope()

    def _is_given(self, f: dataclasses.Field) -> bool:
        value = getattr(self, f.name)
        if value is None or value == f.metadata["help"].off:
            return False
        return f.name in self._given or value != default_of(f)

    def check_scope(self, kind: str | None = None, model: Any = None) -> None:
        """Check that every option that was given applies.

        Args:
            kind: the kind of data, of `scope.KINDS`; None: not known yet.
            model: the model given from Python, if there is one; an option that says what this model is may be given.

        Raises:
            ValueError: an option was given that has no effect here.
        """
        has = _plain(dict(model.config)) if model is not None and hasattr(model, "config") else {}
        for f in dataclasses.fields(self):
            applies, value = f.metadata["help"].scope, getattr(self, f.name)
            if applies is None or not self._is_given(f):
                continue
            if applies.new_model and f.name in has and has[f.name] == _plain(self.model_options()).get(f.name):
                continue
            reason = applies.reason_against(self, kind, model is not None)
            if reason is not None:
                raise ValueError(f"{f.name} applies to {applies.text}; got {value!r} with {reason}: leave it out")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def differences(self, earlier: dict, kind: str | None = None, given_model: bool = False) -> list:
        """Lines "option: earlier -> now" for what another run's options say differently and a resumed run must keep.

        `kind` and `given_model` are as in `applied`.
        """
        lines = []
        if earlier.get("min_snr_gamma", 0.0) is None:
            earlier = {**earlier, "min_snr_gamma": 0.0}
        earlier = {"loss_weighting": "snr", **earlier}  # which was the only one when it was no option
        # an option that does not apply has no effect: where another option's value took it out, that one is listed
        applied = self.applied(kind, given_model)
        for name, now in dataclasses.asdict(self).items():
            changed = name in earlier and earlier[name] != now and name in applied
            if name == "max_train_steps" and changed and self.lr_scheduler not in CONSTANT_LR:
                lines.append(
                    f"max_train_steps: {earlier[name]} -> {now} (the '{self.lr_scheduler}' learning rate follows it)"
                )
            elif changed and name not in CHANGEABLE:
                lines.append(f"{name}: {earlier[name]} -> {now}")
        return lines


def _is_text(value) -> bool:
    """Return True for text that has a UTF-8 form, which a name of a file need not have (Python keeps surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def default_of(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default is dataclasses.MISSING else f.default


def _plain(options: dict) -> dict:
    """Options with lists for tuples, and one number for a list of one."""
    plain = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in options.items()}
    return {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in plain.items()}


# The types as written: HfArgumentParser strips "| None" off those of the class.
TYPES = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
TYPE_RULES = {
    bool: (lambda v: isinstance(v, bool), "true or false"),
    int: (is_whole, "a whole number (of at most 64 bits)"),
    float: (is_finite, "a finite number"),
    str: (_is_text, "a text in UTF-8"),
    list[int]: (lambda v: isinstance(v, list) and v and all(map(is_whole, v)), "one or more whole numbers"),
    list[str]: (lambda v: isinstance(v, list) and all(map(_is_text, v)), "a list of texts in UTF-8"),
}


def read_yaml(path: str) -> dict:
    """Options from a YAML file.

    Raises:
        ValueError: not a mapping, or an unknown option (the closest name is given).
    """
    options = read_mapping(path, f"--config {path}")
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"--config {path}: {unknown_option(str(name), known)}")
    return options
