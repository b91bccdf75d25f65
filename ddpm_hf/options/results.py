"""Options of what a run gives: logs, samples, checkpoints, evaluations, and a pipeline on the Hub."""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.choices import TRACKERS
from ddpm_hf.rules import Rule, option, whole_number


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
        0, "Number of steps between evaluations; 0: none. If it is not 0, the last step always has one.",
        whole_number(0), changeable=True,
    )  # fmt: skip
    eval_metrics: list[str] | None = option(
        None, "Metrics to compute. Images: fid, kid. Sequences: frechet, spectral_frechet, sliced_wasserstein, "
        "autocorrelation_error. Both: memorization, held_out_loss, held_out_weighted_loss, and if they are named "
        "precision, recall, density, coverage, bits_per_dim.",
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
        None, "Number k of neighbours, for precision, recall, density and coverage: balls reach to the k-th nearest.",
        whole_number(1), scope.FIDELITY, none="3 for precision and recall, 5 for density and coverage",
        changeable=True,
    )  # fmt: skip
    eval_cache_dir: str | None = option(
        None, "Folder for the statistics of real images.",
        none="ddpm_hf/ in the Hugging Face cache", applies=scope.FEATURES, changeable=True,
    )  # fmt: skip
    metric_for_best: str | None = option(
        None, "Metric by which best/ keeps the best pipeline: the one with the lowest value, or the highest of "
        "precision, recall, density and coverage.",
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
