"""Every option of a run: its type, default, help, rule and scope side by side, one class for each heading.

The help of the command line and the page of options are made from these classes; `TrainConfig` joins them. Names are
those of diffusers' unconditional training example where it has them.
"""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.choices import (
    BETA_SCHEDULES,
    LOSS_WEIGHTINGS,
    LR_SCHEDULERS,
    MASK_STRATEGIES,
    NORMS,
    PREDICTION_ALIASES,
    PREDICTION_TYPES,
    TIME_EMBEDDINGS,
    TIMESTEP_SAMPLINGS,
    TRACKERS,
)
from ddpm_hf.rules import (
    ABOVE_0,
    AT_LEAST_0,
    BELOW_1,
    FROM_0_TO_1,
    NumberOrAuto,
    Rule,
    either,
    one_of,
    option,
    whole_number,
)

SEQUENCE_NORMS = ("minmax", "meanstd")
IMAGE_NORMS = ("bits", "minmax", "meanstd")
OPTIMIZERS = ("adamw", "muon")
COMPILERS = ("auto", "none", "inductor", "graphs")


@dataclass
class DataOptions:
    """Where the items come from: exactly one source, unless a dataset is given from Python."""

    _argument_group_name = "Data"

    dataset_name: str | None = option(
        None, "Bundled data: 'digits' (8x8 images) or 'ecg' (windows of a recording); or the name of a dataset on the "
        "Hub, or a local folder that the datasets library can load."
    )  # fmt: skip
    dataset_config_name: str | None = option(
        None, "Configuration of the dataset on the Hub.", applies=scope.NAMED_TABLES
    )
    dataset_split: str = option(
        "train", "Split of a dataset on the Hub, or of a folder of tables.", applies=scope.TABLES
    )
    train_data_dir: str | None = option(
        None, "Folder of images, searched with its subfolders, in any format that Pillow reads except EPS; or of "
        "tables of images: a dataset saved to disk, .parquet, .arrow, or webdataset .tar files. TIFF files with values "
        "of any range and any number of bands, and .npy files with an image each, are images in units of their own."
    )  # fmt: skip
    train_data_file: str | None = option(
        None, "File of sequences or images. Array .npy or .npz: sequences (N, channels, length), or (N, length) for "
        "one channel; images (N, channels, height, width), or (N, height, width) where an option of images is given. "
        "Table .csv: each row is a sequence; or, with stride, each row is a point in time and each column a channel. "
        "Table .parquet: as .csv, or columns of lists, each of which is a channel. Recordings .wav, .flac, .edf or "
        "WFDB's .hea, or a folder of them; with stride, of any lengths."
    )  # fmt: skip
    channels_last: bool = option(
        False, "Arrays have their channels last: images (N, height, width, channels), also those of .npy files in a "
        "folder, and sequences (N, length, channels).", applies=scope.ARRAYS, off=False,
    )  # fmt: skip
    image_column: str | None = option(
        None, "Column of the images in a table.",
        none="the only column of images, or the one with a usual name (image, jpg, ...)", applies=scope.IMAGE_TABLES,
    )  # fmt: skip
    sequence_columns: list[str] | None = option(
        None, "Columns of the sequences in a table. Needed to read sequences with dataset_name.",
        none="all columns", applies=scope.SEQUENCE_TABLES,
    )  # fmt: skip
    class_labels: str | None = option(
        None, "The classes of the items: 'folder' for a folder of images (the names of its subfolders); 'label' for "
        "the digits; the column of a table (ClassLabel, whole numbers or texts); the name of an array in a .npz file; "
        "a file (.npy, .csv, .txt) with a class for each sequence of an array; for a dataset from Python, the entry of "
        "items that are dicts (any name for items (x, y)).",
        Rule(bool, "a name or a file"), scope.CLASSES, none="no classes",
    )  # fmt: skip
    condition_column: str | None = option(
        None, "The condition paired with each item, an image or a sequence of the item's size, or of that divided by "
        "a whole number: a column of images in a table; a column of a table of sequences, or several that commas "
        "separate; the name of an array in a .npz file; a .npy file beside an array; for a dataset from Python, the "
        "entry of items that are dicts (any name for items (x, condition), or (x, y, condition) with class_labels).",
        Rule(bool, "a name or a file"), scope.PAIRS, none="no conditions",
    )  # fmt: skip
    condition_dir: str | None = option(
        None, "Folder of the conditions of the images in train_data_dir: each under the same path, but for its ending. "
        "They have the size of the images, or that divided by a whole number, and may be .npy or TIFF files.",
        Rule(bool, "a folder"), scope.PAIR_FOLDERS, none="no conditions",
    )  # fmt: skip
    holdout: int = option(
        0, "Number of items that are kept out of training, drawn by the seed, for the held-out loss. If items are "
        "windows, whole sequences are kept out, or stretches of a single sequence; a window's length before and after "
        "each stretch is left out of training too.", whole_number(0)
    )  # fmt: skip


@dataclass
class ImageOptions:
    """How images are read."""

    _argument_group_name = "Images"

    resolution: list[int] | None = option(
        None, "Height and width in pixels; one number gives a square. The shorter side of an image is resized, and the "
        "rest is cropped.",
        Rule(lambda sizes: len(sizes) in (1, 2) and min(sizes) >= 1, "one or two whole numbers of pixels, at least 1"),
        scope.IMAGES,
        none="64; 8 for digits; for an array, the size of its images",
    )  # fmt: skip
    image_channels: int | None = option(
        None, "1 (grey), 3 (RGB) or 4 (RGBA). With 1 and 3, transparent images are laid on white. Images in units of "
        "their own keep their channels, of any number.",
        whole_number(1), scope.IMAGES, 
        none="3; 1 for digits; for images in units of their own, the channels of the data",
    )  # fmt: skip
    image_norm: str | None = option(
        None, "Scaling of images in units of their own; samples have the same units. 'bits' scales the full range of "
        "the integer type to [-1, 1], 'minmax' the range of each channel, and 'meanstd' scales each channel to mean 0 "
        "and standard deviation 1.", one_of(*IMAGE_NORMS), scope.OWN_UNITS,
        none="pictures of 8 bits, or for arrays and scientific files, bits for whole numbers and minmax for floats",
    )  # fmt: skip
    image_range: list[float] | None = option(
        None, "Two numbers, the lowest and the highest value of images in units of their own, which are scaled to "
        "[-1, 1], as 0 4095 for 12 bits. Values outside are clipped, and a warning says how many.",
        Rule(lambda ends: len(ends) == 2 and ends[0] < ends[1], "two finite numbers, the lower first"),
        scope.OWN_UNITS, none="image_norm",
    )  # fmt: skip
    center_crop: bool = option(True, "Crop from the centre; false: at a random place.", applies=scope.IMAGES)
    random_flip: bool = option(False, "Mirror half of the images left to right.", applies=scope.IMAGES, off=False)
    on_bad_image: str = option(
        "stop", "What to do with an image that cannot be read: 'stop' ends the run and names the image, 'skip' counts "
        "it and goes on.", either("stop", "skip"), scope.CHECKED_IMAGES, changeable=True
    )  # fmt: skip


@dataclass
class SequenceOptions:
    """How sequences are read."""

    _argument_group_name = "Sequences"

    recording: bool = option(
        False, "An array (channels, points) is one recording, instead of sequences (N, length) of one channel; stride "
        "cuts its windows. An array (points,) is one anyway.", applies=scope.SEQUENCE_ARRAYS, off=False,
    )  # fmt: skip
    csv_decimal: str | None = option(
        None, "Decimal mark of a .csv file.", either(".", ","), scope.CSV,
        none="a comma if semicolons or tabs separate the cells and the numbers have commas, else a point",
    )  # fmt: skip
    on_missing: str = option(
        "stop", "What to do with missing values (NaN, empty cells): 'stop' ends the run and names the first, 'drop' "
        "leaves out the sequences or windows that have one, 'interpolate' fills them in from the line between the "
        "neighbours in time, 'mask' trains on what is known, with condition known (which does so by itself).",
        either("stop", "drop", "interpolate", "mask"), scope.MISSING, off="stop",
    )  # fmt: skip

    sequence_length: int | None = option(
        None, "Length of the sequences, in points: longer ones are cut to their beginning. With stride, and for ecg, "
        "the length of the windows.",
        whole_number(1), scope.SEQUENCES, none="the length of the data; 256 for ecg",
    )  # fmt: skip
    stride: int | None = option(
        None, "Train on windows of sequence_length points, whose starts are stride points apart.",
        whole_number(1), scope.SEQUENCES, none="whole sequences; 2 for ecg",
    )  # fmt: skip
    sequence_norm: str = option(
        "minmax", "Scaling of each channel: 'minmax' scales its range to [-1, 1], 'meanstd' scales it to mean 0 and "
        "standard deviation 1.", one_of(*SEQUENCE_NORMS), scope.SEQUENCES
    )  # fmt: skip


@dataclass
class LoadingOptions:
    """How items get into memory."""

    _argument_group_name = "Loading"

    dataloader_num_workers: int | None = option(
        None, "Number of processes that load data, for each training process; 0: the training process loads them "
        "itself.", whole_number(0), changeable=True,
        none="0; on a card, for images that are read from files or tables, the cores of this machine, divided among "
        "its training processes, but at most 8",
    )  # fmt: skip
    streaming: bool = option(
        False,
        "Read tables of images (dataset_name, or train_data_dir) as they come, without a copy on disk.",
        applies=scope.STREAMS,
        off=False,
    )
    shuffle_buffer: int = option(
        1000, "Number of undecoded images that streaming shuffles together; each process has up to twice as many in "
        "memory.", whole_number(1), scope.STREAMING
    )  # fmt: skip
    cache_gb: float = option(
        1.0, "Memory for decoded images, in GB per training process (Linux). Images that fit are decoded only once.",
        AT_LEAST_0, scope.KEPT_IMAGES, off=0, changeable=True,
    )  # fmt: skip


@dataclass
class RunOptions:
    """The run folder, and what holds for the run as a whole."""

    _argument_group_name = "Run"

    output_dir: str = option(
        "runs/run", "Run folder. Running the same command again resumes the run in it.", changeable=True
    )
    seed: int = option(0, "Seed for initial weights, data order, noise and samples.", whole_number(0))
    resume_from_checkpoint: str = option(
        "latest", "Checkpoint to resume from: 'latest' takes the newest one and stops if it is damaged, 'latest-valid' "
        "takes the newest undamaged one.", either("latest", "latest-valid"), changeable=True
    )  # fmt: skip
    continue_from: str | None = option(
        None, "Folder of a run to continue in another output_dir: weights, their average, optimizer, step count and "
        "place in the data are taken from one of its checkpoints, and options that are not given from its config.yaml. "
        "All options but those of the model may differ. The learning rate's schedule covers the remaining steps; "
        "max_train_steps is the total.", none="a new run",
    )  # fmt: skip
    continue_checkpoint: str = option(
        "newest", "Checkpoint to continue from: 'newest', 'best' (the one of the best evaluation), or the folder of a "
        "checkpoint, such as step-001000.", applies=scope.CONTINUED,
    )  # fmt: skip
    init_from: str | None = option(
        None, "Fine-tuning: begin with the weights of this pipeline, a folder, a repo on the Hub, or a model-*.pt file "
        "of denoising-diffusion-pytorch. The options of the model and of the noise schedule are taken from it; data, "
        "size and classes may differ.", none="new weights",
    )  # fmt: skip
    dry_run: bool = option(
        False, "Print the resolved options, the size of the model and the data found, read every item, list those that "
        "cannot be read, and stop.", changeable=True
    )  # fmt: skip
    num_cpu_threads: int | None = option(
        None, "Number of threads of each process when training on CPU.",
        whole_number(1, 1024),
        none="OMP_NUM_THREADS where it is set by the user, else the cores of this machine divided among its processes",
        changeable=True,
    )  # fmt: skip
    compile: str = option(
        "auto", "How training steps run. 'none': operation by operation; 'inductor': the model compiled by "
        "torch.compile; 'graphs': whole steps captured as CUDA graphs, with inductor inside if the run is long enough "
        "to make up for its compilation; 'auto': as 'graphs' on a card, as 'none' elsewhere.",
        either(*COMPILERS), changeable=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Use only deterministic algorithms, so that on a card too a resumed run is bit for bit the run that was "
        "not stopped. It costs time."
    )  # fmt: skip


@dataclass
class ModelOptions:
    """Arguments of UNet2D and UNet1D, under their names there."""

    _argument_group_name = "Model"

    dim: int = option(64, "Base width of the U-Net, which dim_mults multiply.", whole_number(1), scope.NEW_MODEL)
    init_dim: int | None = option(
        None, "Width after the first convolution.",
        whole_number(1), scope.NEW_MODEL, none="dim",
    )  # fmt: skip
    dim_mults: list[int] = option(
        [1, 2, 4, 8],
        "Width of each stage as a multiple of dim. Every stage but the last halves the size, for which the model pads "
        "sizes that are not multiples of 2 ** (stages - 1).",
        applies=scope.NEW_MODEL,
    )
    self_condition: bool = option(
        False, "Condition the model on its previous estimate of x0, in half of the training steps."
    )
    learned_variance: bool = option(
        False, "Train a model that predicts the variance of its DDPM steps too (Nichol & Dhariwal), for a better "
        "likelihood; see vlb_weight.",
    )  # fmt: skip
    norm: str = option("rms", "Norm of the residual blocks: 'rms' or 'group'.", one_of(*NORMS), scope.NEW_MODEL)
    norm_groups: int = option(8, "Number of groups of norm 'group'.", whole_number(1), scope.GROUP_NORM)
    dropout: float = option(
        0.0, "Dropout probability in the residual blocks. Each process draws its own masks.", BELOW_1, scope.NEW_MODEL
    )
    attn_heads: list[int] = option(
        [4], "Number of attention heads: one number, or one per stage.", applies=scope.NEW_MODEL
    )
    attn_dim_head: list[int] = option(
        [32], "Size of an attention head: one number, or one per stage.", applies=scope.NEW_MODEL
    )
    full_attn: list[str] | None = option(
        None, "Full instead of linear attention: true or false, once or per stage.",
        none="in the last stage for images, in none for sequences", applies=scope.NEW_MODEL,
    )  # fmt: skip
    mid_full_attn: bool = option(
        True, "Full attention in the middle of the network, between the last stage down and the first one up. Linear "
        "attention there (false) lets the cost of a step grow linearly with the length of sequences and the pixels of "
        "images.", applies=scope.NEW_MODEL,
    )  # fmt: skip
    num_mem_kv: int | None = option(
        None, "Number of memory key-value pairs in each attention.",
        none="4 for images, 0 for sequences", applies=scope.NEW_MODEL,
    )  # fmt: skip
    time_embedding: str = option(
        "sinusoidal",
        "Embedding of the timestep: 'sinusoidal', 'learned_fourier' or 'random_fourier'.",
        one_of(*TIME_EMBEDDINGS),
        scope.NEW_MODEL,
    )
    fourier_dim: int = option(16, "Number of features of a Fourier time embedding.", applies=scope.FOURIER)
    theta: float = option(
        10000.0,
        "Longest period of the sinusoidal time embedding, divided by 2 pi.",
        ABOVE_0,
        scope.SINUSOIDAL,
    )


@dataclass
class DiffusionOptions:
    """The noise schedule, the target and the loss; see GaussianScheduler."""

    _argument_group_name = "Diffusion"

    ddpm_num_steps: int = option(1000, "Number of training timesteps T.", whole_number(1))
    ddpm_beta_schedule: str = option("sigmoid", "'sigmoid', 'cosine' or 'linear'.", one_of(*BETA_SCHEDULES))
    prediction_type: str = option(
        "v_prediction",
        "Prediction target of the model: 'epsilon', 'sample' (x0) or 'v_prediction'.",
        Rule(
            lambda value: value in PREDICTION_TYPES or value in PREDICTION_ALIASES,
            f"one of {', '.join(PREDICTION_TYPES)}",
            is_choice=True,
        ),
    )
    loss_weighting: str | None = option(
        None, "Weight of a sample's loss: 'uniform' is 1 at every timestep; 'snr' follows the prediction target, as in "
        "denoising-diffusion-pytorch, and min_snr_gamma.",
        one_of(*LOSS_WEIGHTINGS), none="snr with min_snr_gamma, else uniform",
    )  # fmt: skip
    min_snr_gamma: float = option(
        0.0, "Min-SNR loss weighting with this gamma; 5 is usual, and 0 turns it off.", AT_LEAST_0
    )
    vlb_weight: float = option(
        0.001, "Weight of the variational bound, in bits per dimension, in the loss of a learned variance. Its "
        "gradient goes to the variance alone.", ABOVE_0, scope.LEARNED_VARIANCE,
    )  # fmt: skip
    noise_offset: float = option(0.0, "Strength of offset noise; 0.1 is usual, and 0 turns it off.", AT_LEAST_0)
    timestep_sampling: str = option(
        "uniform", "Distribution of the training timesteps: 'uniform', or 'logit_normal', which draws the middle of "
        "the schedule more often.", one_of(*TIMESTEP_SAMPLINGS)
    )  # fmt: skip
    logit_mean: float = option(
        0.0,
        "Mean of the logit-normal distribution; positive values favour noisier timesteps.",
        applies=scope.LOGIT_NORMAL,
    )
    logit_std: float = option(
        1.0,
        "Standard deviation of the logit-normal distribution; small values favour the middle of the schedule.",
        ABOVE_0,
        scope.LOGIT_NORMAL,
    )
    class_dropout_prob: float = option(
        0.1, "Probability with which an item is trained without its class, so that samples can be guided towards a "
        "class (guidance_scale). 0: every item with its class.", FROM_0_TO_1, scope.WITH_CLASSES, off=0,
    )  # fmt: skip
    condition: str | None = option(
        None, "'known': train a model that completes items of which a part is known (pipe.inpaint). It is given the "
        "known values and where they are, and the loss is on the rest. Sequences may then have missing values (NaN). "
        "Nothing is known of a tenth of the items, so that the model samples as usual too.",
        one_of("known"), none="the model is given no part of the item",
    )  # fmt: skip
    mask_strategy: str = option(
        "mixed", "Which part is known. 'random': single positions, a share of them that is drawn for each item; "
        "'blocks': all but a gap in a sequence or a rectangle in an image, an eighth to three quarters of the item "
        "long; 'forecast' (sequences): all but an end of that length; 'mixed': one of these for each item.",
        one_of(*MASK_STRATEGIES), scope.KNOWN,
    )  # fmt: skip
    immiscible: bool = option(
        False, "Immiscible diffusion: within each batch of train_batch_size samples, noise is assigned to near data."
    )
    rescale_betas_zero_snr: bool = option(
        False, "Rescale the schedule so that it ends in pure noise; not with epsilon. The loss_weighting 'snr' then "
        "counts the SNR as at least 1."
    )  # fmt: skip
    snr_shift: NumberOrAuto = option(
        0.0, "A number, added to the log-SNR of the noise schedule at every timestep. Negative values add noise, "
        "which large images and long sequences need more of (Hoogeboom et al.). 'auto' takes it from the size: "
        "2 log(64 / size) for images, with the root of height times width as their size, and log(256 / length) for "
        "sequences, but at most 0.",
    )  # fmt: skip


@dataclass
class OptimizationOptions:
    """Steps, batches, optimizer and precision."""

    _argument_group_name = "Optimization"

    max_train_steps: int = option(100_000, "Number of optimizer steps in all.", whole_number(1), changeable=True)
    train_batch_size: int = option(16, "Number of samples per process and forward pass.", whole_number(1))
    gradient_accumulation_steps: int = option(1, "Number of forward passes per optimizer step.", whole_number(1))
    optimizer: str = option(
        "adamw", "'adamw'; or 'muon', for the weights of linear layers and convolutions, with AdamW for the others.",
        one_of(*OPTIMIZERS),
    )  # fmt: skip
    learning_rate: float = option(4e-4, "Peak learning rate of AdamW.", ABOVE_0)
    muon_learning_rate: float = option(
        2.5e-3, "Peak learning rate of Muon. The root mean square of an update is 0.2 of it. Small models that train "
        "for few steps do better with more (9e-3).", ABOVE_0, scope.MUON
    )  # fmt: skip
    lr_scheduler: str = option(
        "cosine",
        f"Schedule of the learning rate, from diffusers.optimization: {', '.join(LR_SCHEDULERS)}.",
        one_of(*LR_SCHEDULERS),
    )
    lr_warmup_steps: int = option(
        100, "Number n of warm-up steps: in step k of them the learning rate is multiplied by k / (n + 1).",
        whole_number(0), scope.WARM_UP, off=0,
    )  # fmt: skip
    adam_beta1: float = option(0.9, "AdamW's beta1.", BELOW_1)
    adam_beta2: float = option(0.99, "AdamW's beta2.", BELOW_1)
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.", AT_LEAST_0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", ABOVE_0)
    max_grad_norm: float = option(1.0, "The gradient's norm is clipped to this.", ABOVE_0)
    mixed_precision: str | None = option(
        None, "Precision of the computation: 'no' (float32; on a card TF32), 'bf16' or 'fp16'.",
        either("no", "bf16", "fp16"),
        none="the precision of the run in output_dir; for a new run the one that accelerate is configured for, or else "
        "bf16 on a card that computes in it, and no elsewhere",
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "Save memory by recomputing activations in the backward pass.")
    release_memory: bool = option(
        False, "Give freed memory back to the system at once, on a CPU (Linux). With gradient_checkpointing the peak "
        "is about a quarter lower, and a step takes 1.35 to 1.7 times as long.", changeable=True,
    )  # fmt: skip


@dataclass
class AveragingOptions:
    """The exponential moving average (EMA) of the weights."""

    _argument_group_name = "Averaged weights"

    use_ema: bool = option(True, "Sample from and publish an exponential moving average of the weights.")
    ema_max_decay: float = option(0.9999, "Largest decay of the average.", FROM_0_TO_1, scope.EMA)
    ema_inv_gamma: float = option(
        1.0, "Warm-up of the decay: 1 - (1 + step / ema_inv_gamma) ** -ema_power.", ABOVE_0, scope.EMA
    )
    ema_power: float = option(0.75, "Power of the warm-up of the decay; see ema_inv_gamma.", ABOVE_0, scope.EMA)
    ema_update_after_step: int = option(
        0, "Step after which averaging starts; before it, the average is a copy of the weights.", whole_number(0),
        scope.EMA,
    )  # fmt: skip
    ema_update_every: int = option(
        1, "Number of steps between updates of the average.", whole_number(1), scope.EMA
    )  # fmt: skip


@dataclass
class SavingOptions:
    """A run records, draws and saves at intervals."""

    _argument_group_name = "Logging, samples and checkpoints"

    logging_steps: int = option(
        50, "Number of steps between lines of metrics.jsonl and points of the trackers; each is a mean over these "
        "steps.", whole_number(1), changeable=True
    )  # fmt: skip
    report_to: list[str] = option(
        ["tensorboard"], "Trackers: 'tensorboard' and 'wandb', which also show the samples; any other of accelerate's "
        "(comet_ml, mlflow, ...); or 'none'. metrics.jsonl is always written.",
        Rule(
            lambda names: names == ["none"] or (bool(names) and set(names) <= set(TRACKERS)),
            f"'none', or one or more of {', '.join(TRACKERS)}", is_choice=True,
        ),
        changeable=True,
    )  # fmt: skip
    save_samples_steps: int = option(
        1000, "Number of steps between pictures of samples; 0: only after the last step, which always has one.",
        whole_number(0), changeable=True,
    )  # fmt: skip
    num_samples: int = option(25, "Number of samples in a picture.", whole_number(1), changeable=True)
    ddpm_num_inference_steps: int = option(
        50, "Number of sampling steps, for pictures and as the default of the saved pipeline.", whole_number(1),
        changeable=True,
    )  # fmt: skip
    eval_batch_size: int = option(
        64, "Number of samples that each process generates at once.", whole_number(1), changeable=True
    )
    checkpointing_steps: int = option(
        1000, "Number of steps between checkpoints; the last step always has one.", whole_number(1), changeable=True
    )
    checkpoints_total_limit: int = option(
        2, "Number of newest checkpoints to keep; 0: all.", whole_number(0), changeable=True
    )


@dataclass
class EvaluationOptions:
    """Metrics can be measured while the run trains."""

    _argument_group_name = "Evaluation"

    eval_steps: int = option(
        0, "Number of steps between evaluations, and the last step then always has one; 0: none.", whole_number(0),
        changeable=True,
    )  # fmt: skip
    eval_metrics: list[str] | None = option(
        None, "Images: fid, kid, memorization, held_out_loss, held_out_weighted_loss; sequences: frechet, "
        "spectral_frechet, sliced_wasserstein, autocorrelation_error, memorization, held_out_loss, "
        "held_out_weighted_loss; both, if named: precision, recall, density, coverage, bits_per_dim.",
        none="all but the last five; those of held-out items only with holdout", applies=scope.EVALUATION,
        changeable=True,
    )  # fmt: skip
    eval_num_samples: int = option(
        1000, "Number of samples that an evaluation generates; the FID of fewer than 10,000 is biased.",
        whole_number(2), scope.EVALUATION, changeable=True,
    )  # fmt: skip
    eval_num_real: int = option(
        50_000, "Largest number of real items that samples are compared with.", whole_number(2), scope.EVALUATION,
        changeable=True,
    )  # fmt: skip
    eval_likelihood_items: int = option(
        256, "Largest number of items that bits_per_dim is computed on: held-out items, or without holdout those that "
        "are trained on.", whole_number(1), scope.LIKELIHOOD, changeable=True,
    )  # fmt: skip
    eval_likelihood_timesteps: int = option(
        100, "Number of timesteps, and so of calls of the model, that bits_per_dim takes for each item. From "
        "ddpm_num_steps on, the bound is computed term by term; below, it is estimated without bias.",
        whole_number(2), scope.LIKELIHOOD, changeable=True,
    )  # fmt: skip
    feature_network: str = option(
        "inception", "Features of images for metrics: 'inception' (clean-fid's network), a TorchScript or torch.export "
        "(.pt2) file that maps (B, 3, S, S) in [0, 255] to (B, D), or 'pixels' (needs no file, but is coarse).",
        applies=scope.FEATURES, changeable=True,
    )  # fmt: skip
    feature_resolution: int = option(
        299, "Height and width S of the input of a feature network in a file, in pixels.", whole_number(1),
        scope.TORCHSCRIPT, changeable=True,
    )  # fmt: skip
    eval_num_neighbours: int | None = option(
        None, "Number k of the neighbour that a ball reaches to, for precision, recall, density and coverage.",
        whole_number(1), scope.FIDELITY, none="3 for precision and recall, 5 for density and coverage",
        changeable=True,
    )  # fmt: skip
    eval_cache_dir: str | None = option(
        None, "Folder for the statistics of real images.",
        none="ddpm_hf/ in the Hugging Face cache", applies=scope.FEATURES, changeable=True,
    )  # fmt: skip
    metric_for_best: str | None = option(
        None, "The pipeline with the lowest value of this metric is kept in best/; for precision, recall, density and "
        "coverage, that with the highest.",
        none="the first of eval_metrics", applies=scope.EVALUATION, changeable=True,
    )  # fmt: skip


@dataclass
class PublishingOptions:
    """Publishing on the Hub. The token is that of `hf auth login`, or HF_TOKEN in the environment."""

    _argument_group_name = "Publishing"

    push_to_hub: bool = option(
        False, "Publish the pipeline, with its model card, on the Hub when training ends.", changeable=True
    )
    hub_model_id: str | None = option(
        None, "Repository to publish in: 'user/name' or 'name'.",
        none="the name of the run folder, under the user of the token", applies=scope.HUB, changeable=True,
    )  # fmt: skip
    hub_every_save: bool = option(
        False, "Publish at every save too, in the background.", applies=scope.HUB, off=False, changeable=True
    )
    hub_upload_state: bool = option(
        False, "Publish the newest checkpoint too, with optimizer and random states, in training_state/.",
        applies=scope.HUB, off=False, changeable=True,
    )  # fmt: skip
    hub_private_repo: bool | None = option(
        None, "Make a new repository private.",
        none="as the settings of the account say", applies=scope.HUB, changeable=True,
    )  # fmt: skip
    hub_revision: str | None = option(
        None, "Branch to publish on, which is made if it does not exist.",
        none="the main branch", applies=scope.HUB, changeable=True,
    )  # fmt: skip
    create_pr: bool = option(
        False, "Publish as a pull request (one for the run) instead of writing to the branch.", applies=scope.HUB,
        off=False, changeable=True,
    )  # fmt: skip
    hub_license: str | None = option(
        None, "Licence of the weights, by its name on the Hub ('mit', 'cc-by-4.0', ...).",
        none="not stated", changeable=True,
    )  # fmt: skip
