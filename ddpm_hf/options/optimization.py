"""Options of the optimizer steps, and of the average of the weights."""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.choices import LR_SCHEDULERS
from ddpm_hf.rules import ABOVE_0, AT_LEAST_0, BELOW_1, FROM_0_TO_1, either, one_of, option, whole_number

OPTIMIZERS = ("adamw", "muon")


@dataclass
class OptimizationOptions:
    """Steps, batches, optimizer and precision."""

    _argument_group_name = "Optimization"

    max_train_steps: int = option(100_000, "Number of optimizer steps in all.", whole_number(1), changeable=True)
    train_batch_size: int = option(16, "Number of samples per process and forward pass.", whole_number(1))
    gradient_accumulation_steps: int = option(1, "Number of forward passes per optimizer step.", whole_number(1))
    optimizer: str = option(
        "adamw", "'adamw', or 'muon' for the weights of linear layers and convolutions, with AdamW for the others.",
        one_of(*OPTIMIZERS),
    )  # fmt: skip
    learning_rate: float = option(4e-4, "Peak learning rate of AdamW.", ABOVE_0)
    muon_learning_rate: float = option(
        2.5e-3, "Peak learning rate of Muon. The root mean square of an update is 0.2 of it. Small models that train "
        "for few steps do better with more (9e-3).", ABOVE_0, scope.MUON
    )  # fmt: skip
    lr_scheduler: str = option(
        "cosine",
        f"Schedule of the learning rate, from diffusers.optimization: {', '.join(LR_SCHEDULERS)}. "
        "cosine_with_restarts differs from cosine by lr_num_cycles above 1, and polynomial from linear by an lr_power "
        "other than 1 (its last rate is 1e-7).",
        one_of(*LR_SCHEDULERS),
    )
    lr_num_cycles: int = option(
        1, "Number of cosines after the warm-up, each of which begins at the peak.", whole_number(1), scope.RESTARTS
    )
    lr_power: float = option(
        1.0, "Power p: the learning rate follows the remaining share of the steps to the power p.",
        ABOVE_0, scope.POLYNOMIAL,
    )  # fmt: skip
    lr_warmup_steps: int = option(
        100, "Number n of warm-up steps: in step k of them the learning rate is multiplied by k / (n + 1).",
        whole_number(0), scope.WARM_UP, off=0,
    )  # fmt: skip
    adam_beta1: float = option(0.9, "AdamW's beta1.", BELOW_1)
    adam_beta2: float = option(0.99, "AdamW's beta2.", BELOW_1)
    adam_weight_decay: float = option(0.0, "AdamW's weight decay.", AT_LEAST_0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", ABOVE_0)
    max_grad_norm: float = option(1.0, "Largest norm of the gradient, to which it is clipped.", ABOVE_0)
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
