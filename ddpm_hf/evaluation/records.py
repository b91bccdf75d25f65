"""The records of an evaluation for evaluation.json, and its values as lines to print."""

from ddpm_hf.evaluation.classes import RULE, has_classes
from ddpm_hf.evaluation.settings import AGREEMENT, BIASED, FEATURE_FRECHET, FEW, FIDELITY, neighbours_of
from ddpm_hf.run.record import without_folders


def make_records(
    evaluator, values: dict[str, float], pipeline, num_inference_steps: int, guidance_scale: float, **more
) -> list[dict]:
    """Return a record for each value, with everything that it depends on, as in `evaluation.json`.

    Args:
        evaluator: the `Evaluator` that measured.
        values: the values that it returned.
        pipeline: the pipeline that was measured.
        num_inference_steps, guidance_scale: as in that call.
        more: further entries of every record.
    """
    scheduler = type(pipeline.scheduler).__name__
    if pipeline.is_spaced_by_log_snr():
        scheduler += " at log_snr_timesteps"
    settings = {
        "num_samples": evaluator.settings.num_samples, "num_real": evaluator.num_real, "shape": list(evaluator.shape),
        "num_inference_steps": num_inference_steps, "scheduler": scheduler,
        "seed": evaluator.settings.seed,
    }  # fmt: skip
    if evaluator.pictures is not None:
        network = evaluator.pictures.network
        settings |= {"feature_network": without_folders(network.name), "feature_digest": network.digest}
    if evaluator.num_real < len(evaluator.real):
        settings["num_left_out"] = len(evaluator.real) - evaluator.num_real
    conditional = has_classes(pipeline)
    if conditional:
        settings |= {"class_labels": RULE, "num_classes": len(evaluator.sampling.classes.names)}
    records = []
    for name, value in values.items():
        metric, _, label = name.partition("/")
        own = dict(settings)
        if metric.startswith("held_out"):
            own["num_held_out"] = evaluator.held_out.count
        elif evaluator.likelihood is not None and name.startswith("bits_per_dim"):
            own |= likelihood_settings(evaluator)
        elif conditional:
            interval = list(evaluator.settings.guidance_interval)
            own |= {"guidance_scale": guidance_scale, "guidance_interval": interval}
        if metric.startswith("memorization") and evaluator.mirrored:
            own["mirrored"] = True
        if evaluator.network is not None and metric in (FEATURE_FRECHET, *FIDELITY):
            network = evaluator.network
            own |= {"feature_network": without_folders(network.name), "feature_digest": network.digest}
        if metric in FIDELITY:
            own["num_neighbours"] = neighbours_of(metric, evaluator.settings.num_neighbours)
        if metric == AGREEMENT:
            own["classifier"] = without_folders(evaluator.settings.classifier)
        if name.startswith("pair_"):
            kind = "held-out" if evaluator.sampling.held_out_pairs else "training"
            own["compared_with"] = f"the true items of the {kind} pairs"
        if label:
            own |= {"class": label, **evaluator.by_class.sizes(label)}
        records.append({"metric": metric, "value": value, **more, **own})
    return records


def likelihood_settings(evaluator) -> dict:
    """Return the settings that bits per dimension depend on, for their records."""
    bound = evaluator.likelihood
    units = "density in the units of the data"
    if bound.levels is not None:
        units = "8-bit levels" if bound.levels == (256,) else f"{max(bound.levels):,} levels"
    settings = {"num_timesteps": len(bound.terms), "decoder": units}
    return settings | {"num_seen" if bound.seen else "num_held_out": bound.count}


def describe(evaluator, values: dict[str, float]) -> str:
    """Return the values as aligned lines, each with the number of samples or items that it comes from.

    Args:
        evaluator: the `Evaluator` that measured.
        values: the values that it returned.
    """
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        metric, _, label = name.partition("/")
        count = evaluator.by_class.sizes(label)["num_samples"] if label else evaluator.settings.num_samples
        source = (
            f"{evaluator.held_out.count:,} held-out items" if metric.startswith("held_out") else f"{count:,} samples"
        )
        source = f"{evaluator.memorization.num_drawn:,} real items" if name == "memorization_real" else source
        if evaluator.likelihood is not None and name.startswith("bits_per_dim"):
            kind = "items that training sees" if evaluator.likelihood.seen else "held-out items"
            source = f"{evaluator.likelihood.count:,} {kind}"
        warning = f" (biased: below {FEW:,})" if count < FEW and metric in BIASED else ""
        lines.append(f"  {name:<{width}}  {value:<12.6g} from {source}{warning}")
    return "\n".join(lines)
