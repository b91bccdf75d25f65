"""The work of the program evaluate.py: a pipeline is measured against data, and the results are saved and drawn."""

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from ddpm_hf import GaussianScheduler
from ddpm_hf.commands.sample_choices import check_jumps, use_scheduler_class
from ddpm_hf.data.loading import underlying
from ddpm_hf.evaluation.classes import has_classes
from ddpm_hf.evaluation.completion import Completion, CompletionSettings, describe, make_records
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.likelihood import check_bound
from ddpm_hf.evaluation.options import EvaluateConfig
from ddpm_hf.evaluation.run_data import RealData, open_real_data, read_record, trained_mirrored
from ddpm_hf.evaluation.settings import HELD_OUT, LIKELIHOOD, EvalSettings
from ddpm_hf.hub.card import write_card
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.plots import save_bound_plot, save_completed_images, save_fan_plot, save_steps_plot
from ddpm_hf.run.checkpoint import write_text
from ddpm_hf.run.record import without_folders
from ddpm_hf.trainer.memory import keep_freed_memory


def load(config: EvaluateConfig):
    """Load the pipeline, and give it the sampler that is asked for.

    Returns:
        The pipeline and its own scheduler.

    Raises:
        ValueError: if there is no such pipeline or scheduler, or they do not fit each other.
    """
    pipeline = load_pipeline(config.pipeline)
    own = pipeline.scheduler
    if config.sampler == "fast":
        pipeline.use_fast_sampler()
    elif config.sampler is not None:
        use_scheduler_class(pipeline, config.sampler, "--sampler", "'fast'")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, own


def evaluate(config: EvaluateConfig) -> list[dict]:
    """Evaluate a pipeline, and save and print the results.

    Returns:
        The records of this evaluation, one for each metric, number of steps and scale of guidance.

    Raises:
        ValueError: if options, pipeline or data do not fit.
    """
    for name in ("pipeline", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} must be given")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    pipeline, own = load(config)
    if config.class_labels is not None and not has_classes(pipeline):
        raise ValueError(
            f"--class_labels applies to a pipeline whose model has classes, and this one has none; got "
            f"{config.class_labels!r}: leave it out"
        )
    facts = read_record(config.pipeline)
    data = open_real_data(config, facts, pipeline, accelerator.print)
    config = replace(data.config, num_samples=data.config.num_samples or (20 if data.config.task else 1000))
    if config.task:
        return complete(config, data, pipeline, own, accelerator)
    if data.held_out is not None and not isinstance(own, GaussianScheduler):
        raise ValueError(f"the held-out loss needs a pipeline with a GaussianScheduler, got {type(own).__name__}")
    if set(LIKELIHOOD) & set(config.metrics or ()):
        check_bound(own)
    steps = _numbers_of_steps(config, pipeline, own)
    scales = config.guidance_scale or [1.0]
    evaluator = make_evaluator(config, facts, data, accelerator)
    evaluator.check(pipeline, scales)
    pipeline.to(accelerator.device)
    pipeline.unet.eval()
    folder = _folder(config)
    earlier = read_records(folder)
    evaluator.prepare()
    records = []
    for n, scale in itertools.product(steps, scales):
        values = evaluator(pipeline, n, own, guidance_scale=scale)
        guided = f", guidance scale {scale:g}" if config.guidance_scale else ""
        accelerator.print(f"{n} steps{guided}:\n{evaluator.describe(values)}", flush=True)
        records += evaluator.records(
            values, pipeline, n, scale, data=without_folders(config.data), split=config.dataset_split
        )
        # the held-out loss and the bound depend neither on the number of sampling steps nor on guidance
        without = (*HELD_OUT, *LIKELIHOOD)
        evaluator.metrics = [metric for metric in evaluator.metrics if metric not in without] or evaluator.metrics
    if accelerator.is_main_process:
        save(records, earlier, config, folder)
        if evaluator.likelihood is not None:
            picture = folder / "bits-per-dim.png"
            of_bound = {r["metric"]: r["value"] for r in records if r["metric"].startswith("bits_per_dim")}
            save_bound_plot(evaluator.likelihood.terms, of_bound, picture)
            print(f"picture: {picture}")
    accelerator.end_training()
    return records


def complete(config: EvaluateConfig, data: RealData, pipeline, own, accelerator) -> list[dict]:
    """Complete held-out items, and save and print the scores.

    Args:
        config: the options, with a task.
        data: the real data.
        pipeline: the pipeline.
        own: its own scheduler.
        accelerator: accelerate's `Accelerator`.

    Returns:
        The records of this evaluation, one for each score, method, number of steps and scale of guidance.

    Raises:
        ValueError: if options, pipeline or data do not fit.
    """
    settings = CompletionSettings(
        task=config.task, unknown_share=config.unknown_share, num_items=config.num_items, season=config.season,
        num_samples=config.num_samples, num_real=config.num_real, batch_size=config.batch_size, seed=config.seed,
        jump_length=config.jump_length, jump_n_sample=config.jump_n_sample, workers=config.dataloader_num_workers,
        guidance_interval=config.guidance_interval or (0.0, 1.0), on_bad_image=config.on_bad_image,
    )  # fmt: skip
    steps, scales = _numbers_of_steps(config, pipeline, own), config.guidance_scale or [1.0]
    asked = {name: getattr(config, name) for name in config.given()}
    check_jumps(pipeline, max(steps), asked, config.jump_length, config.jump_n_sample)
    completion = Completion(accelerator, data.dataset, data.held_out, data.shape, settings, data.classes)
    for scale in scales:
        completion.check(pipeline, scale)
    pipeline.to(accelerator.device)
    pipeline.unet.eval()
    folder = _folder(config)
    earlier = read_records(folder, "completion.json")
    completion.prepare()
    records, shown = [], []
    for n, scale in itertools.product(steps, scales):
        scores = completion(pipeline, n, scale)
        guided = f", guidance scale {scale:g}" if config.guidance_scale else ""
        accelerator.print(f"{config.task}, {n} steps{guided}:\n{describe(completion, scores)}", flush=True)
        place = {"data": without_folders(config.data), "split": config.dataset_split}
        new = make_records(completion, scores, pipeline, n, scale, **place)
        records += [record for record in new if record not in records]  # baselines have neither steps nor guidance
        shown = shown or completion.shown
    if accelerator.is_main_process:
        save_records(records, earlier, folder / "completion.json")
        picture = folder / f"completion-{config.task}.png"
        if len(data.shape) == 3:
            save_completed_images(shown, picture)
        else:
            save_fan_plot(shown, picture, getattr(underlying(data.dataset), "channel_names", None))
        print(f"picture: {picture}")
    accelerator.end_training()
    return records


def _folder(config: EvaluateConfig) -> Path:
    """Return the folder of the results."""
    return Path(config.output_dir or (config.pipeline if Path(config.pipeline).is_dir() else "evaluation"))


def _numbers_of_steps(config: EvaluateConfig, pipeline, own) -> list[int]:
    """Return the numbers of sampling steps to measure."""
    steps = config.num_inference_steps or [pipeline.config.num_inference_steps or own.config.num_train_timesteps]
    if not all(1 <= n <= own.config.num_train_timesteps for n in steps):
        raise ValueError(f"--num_inference_steps must lie in 1 to {own.config.num_train_timesteps}, got {steps}")
    return steps


def make_evaluator(config: EvaluateConfig, facts: dict, data: RealData, accelerator) -> Evaluator:
    """Return the evaluator that the options ask for.

    Args:
        config: the options.
        facts: the pipeline's record.
        data: the real data.
        accelerator: accelerate's `Accelerator`.
    """
    settings = EvalSettings(
        metrics=config.metrics, num_samples=config.num_samples, num_real=config.num_real,
        feature_network=config.feature_network, feature_resolution=config.feature_resolution,
        batch_size=config.batch_size, seed=config.seed, cache_dir=config.eval_cache_dir,
        workers=config.dataloader_num_workers, on_bad_image=config.on_bad_image,
        random_flip=trained_mirrored(config, facts), guidance_interval=config.guidance_interval or (0.0, 1.0),
        per_class=config.per_class, classifier=config.classifier, num_neighbours=config.num_neighbours,
        likelihood_items=config.likelihood_items, likelihood_timesteps=config.likelihood_timesteps,
    )  # fmt: skip
    return Evaluator(
        accelerator, data.dataset, data.shape, settings, data.held_out, data.classes, data.pairs, data.held_out_pairs
    )


def read_records(folder: Path, name: str = "evaluation.json") -> list[dict]:
    """Read the records that earlier evaluations left in the folder, which is made if it does not exist.

    Args:
        folder: the folder of the results.
        name: the name of the file.

    Raises:
        ValueError: if the file holds something else, or the folder cannot be made or written.
    """
    file = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"results cannot be written into {folder}: {error}. Another folder: --output_dir") from error
    try:
        earlier = json.loads(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, and is left as it is: {error}") from error
    if not (isinstance(earlier, list) and all(isinstance(record, dict) for record in earlier)):
        raise ValueError(f"{file} holds something else than records of evaluations, and is left as it is")
    return earlier


def save(records: list[dict], earlier: list[dict], config: EvaluateConfig, folder: Path) -> None:
    """Add records to evaluation.json, write the model card again, and draw curves if there are several settings.

    Args:
        records: the new records; they replace earlier ones with the same settings.
        earlier: the records in the file.
        config: the options.
        folder: the folder of the results.

    Raises:
        ValueError: if evaluation.json cannot be written.
    """
    save_records(records, earlier, folder / "evaluation.json")
    if (folder / "model_index.json").exists():
        write_card(folder)
    without = ("held_out", "bits_per_dim")
    shown = [
        r for r in records if not ("class" in r or r["metric"].startswith(without) or r["metric"].endswith("_real"))
    ]
    if len({(r["num_inference_steps"], r.get("guidance_scale")) for r in shown}) > 1:
        picture = folder / "steps-versus-metric.png"
        sampler = records[0]["scheduler"]
        title = f"{without_folders(config.pipeline)}, {sampler}, {config.num_samples:,} samples"
        save_steps_plot(shown, title, picture)
        print(f"picture: {picture}")


def save_records(records: list[dict], earlier: list[dict], file: Path) -> None:
    """Write records and the earlier ones to a file; new ones replace earlier ones with the same settings.

    Raises:
        ValueError: if the file cannot be written.
    """

    def settings(record: dict) -> dict:
        return {name: value for name, value in record.items() if name != "value"}

    new = [settings(record) for record in records]
    kept = [record for record in earlier if settings(record) not in new]
    try:
        write_text(file, json.dumps(kept + records, indent=1))
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}. The results are those printed above") from error
    print(f"results: {file}")
