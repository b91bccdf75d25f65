"""Options of the model, and of the diffusion process that it is trained for."""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.choices import (
    BETA_SCHEDULES,
    LOSS_WEIGHTINGS,
    MASK_STRATEGIES,
    NORMS,
    PREDICTION_ALIASES,
    PREDICTION_TYPES,
    TIME_EMBEDDINGS,
    TIMESTEP_SAMPLINGS,
)
from ddpm_hf.rules import ABOVE_0, AT_LEAST_0, BELOW_1, FROM_0_TO_1, NumberOrAuto, Rule, one_of, option, whole_number


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
        None, "Full (true) or linear (false) attention: one value, or one per stage.",
        none="in the last stage for images, in none for sequences", applies=scope.NEW_MODEL,
    )  # fmt: skip
    mid_full_attn: bool = option(
        True, "Full (true) or linear (false) attention in the middle of the network, between the last stage down and "
        "the first one up. With linear attention, the cost of a step grows linearly with the length of sequences and "
        "the pixels of images.", applies=scope.NEW_MODEL,
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
    ddpm_beta_schedule: str = option(
        "sigmoid", "Noise schedule: 'sigmoid', 'cosine' or 'linear'.", one_of(*BETA_SCHEDULES)
    )
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
        None, "Weight of a sample's loss: 'uniform' is 1 at every timestep; 'snr' depends on the signal-to-noise "
        "ratio, the prediction target and min_snr_gamma, as in denoising-diffusion-pytorch (for epsilon without "
        "min_snr_gamma, it is 1).",
        one_of(*LOSS_WEIGHTINGS), none="snr with min_snr_gamma, else uniform",
    )  # fmt: skip
    min_snr_gamma: float = option(
        0.0, "Min-SNR loss weighting with this gamma; 5 is usual, and 0 turns it off.", AT_LEAST_0
    )
    vlb_weight: float = option(
        0.001, "Weight of the variational bound, in bits per dimension, in the loss with a learned variance. The "
        "bound trains the variance alone.", ABOVE_0, scope.LEARNED_VARIANCE,
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
        "class (guidance_scale). With 0, every item has its class.", FROM_0_TO_1, scope.WITH_CLASSES, off=0,
    )  # fmt: skip
    condition: str | None = option(
        None, "'known' trains a model to complete partly known items (pipe.inpaint). It is given the known values and "
        "where they are, and the loss is on the rest. Sequences may then have missing values (NaN). Nothing is known "
        "of a tenth of the items, so that the model samples as usual too.",
        one_of("known"), none="the model is given no part of the item",
    )  # fmt: skip
    mask_strategy: str = option(
        "mixed", "Which part of an item is known. 'random': a random share of its positions; 'blocks': all but a gap "
        "in a sequence or a rectangle in an image, whose sides are an eighth to three quarters of the item's; "
        "'forecast' (sequences): all but an end of that length; 'mixed': one of these for each item.",
        one_of(*MASK_STRATEGIES), scope.KNOWN,
    )  # fmt: skip
    immiscible: bool = option(
        False, "Immiscible diffusion: within each batch of train_batch_size samples, noise is assigned to near data.",
        applies=scope.SEVERAL, off=False,
    )  # fmt: skip
    rescale_betas_zero_snr: bool = option(
        False, "Rescale the noise schedule so that it ends in pure noise; cannot be used with prediction_type epsilon. "
        "loss_weighting 'snr' then counts the SNR as at least 1."
    )  # fmt: skip
    snr_shift: NumberOrAuto = option(
        0.0, "Number that is added to the log of the signal-to-noise ratio (SNR) at every timestep. Negative values "
        "add noise, for large images and long sequences (Hoogeboom et al.). 'auto' computes it from the size: "
        "2 log(64 / size) for images, with the root of height times width as their size, and log(256 / length) for "
        "sequences, but at most 0.",
    )  # fmt: skip
