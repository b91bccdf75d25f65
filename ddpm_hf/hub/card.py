"""The model card of a saved pipeline is written from the files in its folder, and says only what was recorded there.

The trainer puts `training.json` (how the model was trained), `samples.png` and `loss.png` into the folder, and an
evaluation `evaluation.json`. The words of the card are in model_cards/template.md. Names of folders, runs, data and
licences come from outside, so the template escapes every value for Markdown unless it is marked `Verbatim`.
"""

import json
import math
import re
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from ddpm_hf.config import BUNDLED
from ddpm_hf.hub.contents import fault_of_place
from ddpm_hf.pipeline import CARRIED, is_own_card, sign_card
from ddpm_hf.reading import read_json
from ddpm_hf.run.lineage import hub_repo
from ddpm_hf.run.record import duration

# In a checkout the template lies beside the package, and in an installed package inside it.
TEMPLATES = [folder / "model_cards" / "template.md" for folder in Path(__file__).parents[1:3]]
LISTED = 20  # the number of classes that the card names
IMAGE_TASK, SEQUENCE_TASK = "unconditional-image-generation", "unconditional-sequence-generation"
PAPERS = {
    "DDPM": "@inproceedings{ho2020denoising,\n  title={Denoising Diffusion Probabilistic Models},\n"
    "  author={Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},\n"
    "  booktitle={Advances in Neural Information Processing Systems},\n  year={2020}\n}",
    "DDIM": "@inproceedings{song2021denoising,\n  title={Denoising Diffusion Implicit Models},\n"
    "  author={Song, Jiaming and Meng, Chenlin and Ermon, Stefano},\n"
    "  booktitle={International Conference on Learning Representations},\n  year={2021}\n}",
}


class Verbatim(str):
    """Markdown that the template prints as it is; it escapes everything else."""


def as_text(value) -> str:
    """Escape a value so that Markdown shows it as one line of text, without markup, links, HTML or table borders."""
    if isinstance(value, Verbatim):
        return value
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = re.sub(r"[\\`*\[\]<>|~&#$@]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", line)  # GitHub's Markdown turns bare addresses into links


def fence(code: str, language: str = "") -> Verbatim:
    """Return a block of code between fences that are longer than any fence in the code."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return Verbatim(f"{ticks}{language}\n{code}\n{ticks}")


class Parts:
    """The content of a saved pipeline's folder that its card needs.

    Args:
        folder: the folder of the pipeline.

    Attributes:
        index: model_index.json.
        unet, scheduler: the configurations of the model and of the scheduler.
        training: training.json, or {} if there is none.
        evaluation: the records in evaluation.json, or [] if there is none.
        kind: the name of the pipeline's class.
        is_image: True for images, False for sequences.
        parameters: the number of the model's parameters.

    Raises:
        ValueError: if the folder does not hold a saved pipeline, or a file of it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        fault = fault_of_place(self.folder) or (None if self.folder.is_dir() else "there is no such folder")
        if fault:
            raise ValueError(f"{folder} must be the folder of a saved pipeline: {fault}")
        self.index = self._json("model_index.json")
        self.unet = self._json("unet/config.json")
        self.scheduler = self._json("scheduler/scheduler_config.json")
        self.training = self._json("training.json", {})
        self.evaluation = self._json("evaluation.json", [])
        name = self.index.get("_class_name")
        if not (isinstance(name, str) or (isinstance(name, list) and name and isinstance(name[-1], str))):
            raise ValueError(
                f"{self.folder / 'model_index.json'}: _class_name must be the name of a class, got {name!r}"
            )
        self.kind = name[-1] if isinstance(name, list) else name.split(".")[-1]
        self.is_image = self.kind != "DDPMPipeline1D"
        self.parameters = self._count_parameters()

    def _json(self, name: str, default=None):
        """Read a JSON file of the folder; `default` replaces a missing file, and its type is the expected form."""
        file = self.folder / name
        if default is not None and not file.exists():
            return default
        return read_json(file, list if isinstance(default, list) else dict)

    def _count_parameters(self) -> int:
        """Count the parameters from the headers of the weights' files, which also shows a truncated file."""
        files = sorted((self.folder / "unet").glob("*.safetensors"))
        # other files are variants of the same weights, such as .fp16.safetensors
        files = [file for file in files if file.name.count(".") == 1] or files
        if not files:
            raise ValueError(f"{self.folder} must be the folder of a saved pipeline: it has no weights in unet/")
        total = 0
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} is damaged: {error}") from error
        return total

    def code_files(self) -> list[str]:
        """Return the names of the Python files that the folder carries."""
        return sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob("*.py") if CARRIED.fullmatch(f.stem))

    def data_name(self, record: dict | None = None) -> str:
        """Return the name of the data that an evaluation's record or, without one, training names."""
        name = (record or {}).get("data") or self.training.get("data", {}).get("name")
        # a folder may have the name of bundled data
        is_bundled = name == self.training.get("options", {}).get("dataset_name")
        return (BUNDLED.get(name) if is_bundled else None) or name or "data that was not recorded"

    def classes(self) -> dict[str, int | None]:
        """Return the model's classes by name, with the numbers of items that it was trained on, as far as known."""
        number = self.unet.get("num_class_embeds")
        if not number:
            return {}
        named = {name: int(key) for key, name in (self.index.get("id2label") or {}).items()}
        names = sorted(named, key=named.get) or [f"class {key}" for key in range(number)]
        counts = self.training.get("data", {}).get("classes", {})
        return {name: counts.get(name) for name in names}

    def condition(self) -> str | None:
        """Return what a call must be given beside each sample, for a model with paired conditions; else None."""
        if self.index.get("condition") != "paired":
            return None
        channels, size = self.unet.get("condition_channels"), " x ".join(map(str, self.index["condition_size"]))
        kind = "one image for all samples" if self.is_image else "one sequence for all samples"
        options = self.training.get("options", {})
        column = options.get("condition_column") or options.get("condition_dir")
        named = f", the data's {json.dumps(column)}" if column else ""
        own_units = not self.is_image or self.index.get("condition_scale") is not None
        units = "in its own units" if own_units else "with levels from 0 to 1, or PIL"
        return f"{kind} or one each, channels x size {channels} x {size}, {units}{named}"

    def steps(self) -> int:
        """Return the number of sampling steps that a call takes by default."""
        return self.index.get("num_inference_steps") or self.scheduler["num_train_timesteps"]


def card_text(folder: str | Path, repo_id: str | None = None, licence: str | None = None) -> str:
    """Return the text of README.md for a saved pipeline. An edited card is returned as it is.

    Args:
        folder: the folder of the pipeline.
        repo_id: the repo that it will be published to, which the snippets of code then name.
        licence: the licence of the weights, as the Hub's metadata names it ("mit", "cc-by-4.0", ...); None means the
            one that training recorded.

    Raises:
        ValueError: if the folder does not hold a saved pipeline, or is damaged.
    """
    file, parts = Path(folder) / "README.md", Parts(Path(folder))
    if file.exists() and not is_own_card(text := file.read_text(encoding="utf-8")):
        return text
    try:
        licence = licence or parts.training.get("options", {}).get("hub_license")
        return sign_card(render(parts, repo_id, licence))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"no card can be made of {folder}: its training.json, evaluation.json or a configuration does not have the "
            f"form that ddpm_hf writes ({type(error).__name__}: {error})"
        ) from error


def write_card(folder: str | Path) -> None:
    """Write `card_text` into README.md of the pipeline's folder."""
    (Path(folder) / "README.md").write_text(card_text(folder), encoding="utf-8")


def render(parts: Parts, repo_id: str | None, licence: str | None) -> str:
    """Return the text of a new card; see `card_text`."""
    place = json.dumps(repo_id or "path/to/this/folder")
    name = repo_id.split("/")[-1] if repo_id else parts.training.get("name") or parts.kind
    title = " ".join(name.split())
    training = parts.training
    memorized = [r for r in parts.evaluation if r["metric"] in ("memorization", "memorization_real")]
    content = {
        "metadata": Verbatim(_metadata(parts, title, licence).to_yaml()),
        "title": title,
        "summary": _summary(parts),
        "samples": _samples(parts),
        "usage": {
            "package": _snippet(f"from ddpm_hf import {parts.kind}", f"{parts.kind}.from_pretrained({place})", parts),
            "diffusers": _snippet(
                "from diffusers import DiffusionPipeline",
                f"DiffusionPipeline.from_pretrained({place}, trust_remote_code=True)",
                parts,
            ),
            "code": Verbatim(" and ".join(f"`{name}`" for name in parts.code_files()) or "its code"),
            "steps": parts.steps(),
        },
        "model": _model_rows(parts),
        "schedule": _schedule_rows(parts),
        "training": _training_rows(parts),
        "command": training.get("command"),
        "options": yaml.safe_dump(training.get("options", {}), sort_keys=False).strip(),
        "fence": fence,
        "lineage": _lineage(training.get("lineage")),
        "changed": (training.get("lineage") or {}).get("changed"),
        "has_curve": (parts.folder / "loss.png").exists(),
        "metrics": [_metric_row(parts, record) for record in parts.evaluation],
        "metrics_note": _metrics_note(parts),
        "guided": any("guidance_scale" in record for record in parts.evaluation),
        "classes": len(parts.classes()),
        "paired": parts.condition() is not None,
        "knows": _knows(parts),
        "memorization": (
            "The share of samples that are nearer to a training item than that item's own neighbour is (memorization): "
            + ", ".join(f"{r['value']:.3g} ({r['metric']})" for r in memorized)
            + "."
            if memorized
            else "Whether it repeats training items was not measured."
        ),
        "licence": licence or "not stated by its publisher",
        "citation": "\n".join(PAPERS.values()),
    }
    template = next(file for file in TEMPLATES if file.exists())
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined, finalize=as_text)
    return environment.from_string(template.read_text(encoding="utf-8")).render(content)


def _metadata(parts: Parts, title: str, licence: str | None) -> ModelCardData:
    """Return the metadata of the card, with the results of evaluations."""
    data = parts.training.get("data", {})
    task = IMAGE_TASK if parts.is_image else SEQUENCE_TASK
    if parts.is_image and parts.condition():
        task = "image-to-image"
    results = [
        EvalResult(
            task_type=task, task_name=task.replace("-", " "),
            dataset_type=_slug(record.get("data") or data.get("name")),
            dataset_name=parts.data_name(record), metric_type=record["metric"], metric_value=float(record["value"]),
            metric_name=_metric_name(record),
        )
        for record in parts.evaluation
        if math.isfinite(record["value"]) and not re.search("_t[0-9]|_real$|_standard_error$", record["metric"])
    ]  # fmt: skip
    more = {"pipeline_tag": task} if parts.is_image else {}
    return ModelCardData(
        library_name="diffusers", license=licence, model_name=title, eval_results=results or None,
        base_model=_base_model(parts), datasets=[data["hub_id"]] if data.get("hub_id") else None,
        metrics=list(dict.fromkeys(r.metric_type for r in results)) or None,
        tags=["ddpm_hf", "diffusion", task, "safetensors"], **more,
    )  # fmt: skip


def _base_model(parts: Parts) -> str | None:
    """Return the repo that the weights come from, if it is known and its name can be that of one."""
    name = (parts.training.get("lineage") or {}).get("base_model")
    return name if isinstance(name, str) and hub_repo(name) else None


def _lineage(lineage: dict | None) -> str | None:
    """Return the sentences about the origin of the weights; None for weights that began as random numbers."""
    if not lineage:
        return None
    source = lineage["source"]
    if lineage["option"] == "continue_from":
        text = f"This run continues the run {source} from its step {lineage['step']:,} on."
    elif lineage["option"] == "converted":
        text = f"The weights were converted from {source}, a checkpoint of denoising-diffusion-pytorch."
    else:
        text = f"Training began with the weights of {source}."
    if lineage["base_model"] and lineage["base_model"] != source:
        text += f" That is a descendant of {lineage['base_model']} on the Hub."
    if lineage["made_new"]:
        text += f" Not taken from there: {'; '.join(lineage['made_new'])}."
    return text


def _metric_name(record: dict) -> str:
    """Return the name of a record's metric with the settings that its value depends on."""
    if "held_out" in record["metric"] or record["metric"].startswith("bits_per_dim"):
        return f"{record['metric']} ({_counted(record)})"
    settings = [_counted(record), f"{record['num_inference_steps']} steps", record["scheduler"]]
    if "guidance_scale" in record:
        settings.append(f"guidance scale {record['guidance_scale']:g}")
    if "class" in record:
        settings.insert(0, f"class {record['class']}")
    if _has_features(record):
        settings.append(f"features {record['feature_network']}")
    if "num_neighbours" in record:
        settings.append(f"k = {record['num_neighbours']}")
    return f"{record['metric']} ({', '.join(settings)})"


def _has_features(record: dict) -> bool:
    """Return True if the record's value compares features of a network."""
    return record["metric"] in ("fid", "kid", "feature_frechet") or (
        "num_neighbours" in record and "feature_network" in record
    )


def _slug(name: str | None) -> str:
    """Return the name of data as the Hub's metadata allows it."""
    return re.sub(r"[^A-Za-z0-9_./-]+", "-", name) if name else "not-recorded"


def _counted(record: dict) -> str:
    """Return the number of samples or items that a record's value comes from."""
    if "held_out" in record["metric"] and "num_held_out" in record:
        return f"{record['num_held_out']:,} held-out items"
    if record["metric"].startswith("bits_per_dim"):
        if "num_held_out" in record:
            return f"{record['num_held_out']:,} held-out items, {record['decoder']}"
        return f"{record['num_seen']:,} items, {record['decoder']}"
    return f"{record['num_samples']:,} samples"


def sampling_code(parts: Parts, arguments: str) -> str:
    """Return the code that draws samples from `pipe`: the condition if the model needs one, then the call.

    Args:
        parts: the saved pipeline.
        arguments: the arguments of the call. Where a call needs more, a condition or the output as an array because
            Pillow has no images of so many channels, they are added.
    """
    field, before = "images" if parts.is_image else "sequences", ""
    if parts.condition():
        before, arguments = f"condition = ...  # {parts.condition()}\n", f"condition=condition, {arguments}"
    if parts.is_image and (parts.unet.get("in_channels") or 0) > 4:
        arguments = f'{arguments}, output_type="np"'
    return f"{before}{field} = pipe({arguments}).{field}"


def _snippet(first: str, load: str, parts: Parts) -> str:
    """Return code that loads the pipeline and draws four samples, or one of each of the first four classes."""
    asked = f"class_labels={list(range(min(4, len(parts.classes()))))}" if parts.classes() else "batch_size=4"
    code = sampling_code(parts, f"{asked}, generator=torch.Generator().manual_seed(0)")
    return f"import torch\n{first}\n\npipe = {load}\n{code}"


def _shape(parts: Parts) -> str:
    """Return the shape of a sample, "channels x height x width" or "channels x length"."""
    size, channels = parts.unet.get("sample_size"), parts.unet.get("in_channels")
    if not parts.is_image:
        return f"{channels} x {size}"
    height, width = (size, size) if isinstance(size, int) or size is None else size
    return f"{channels} x {height} x {width}"


def _summary(parts: Parts) -> str:
    what = "images" if parts.is_image else "sequences"
    trained = f", trained on {parts.data_name()}" if "data" in parts.training else ""
    return (
        f"A denoising diffusion model of {what} (channels x size: {_shape(parts)}) with {parts.parameters:,} "
        f"parameters{trained}. Made with ddpm_hf, for diffusers."
    )


def _samples(parts: Parts) -> dict | None:
    """Return the caption of samples.png, or None if there is no such picture, or no record of how it was made."""
    step, facts = parts.training.get("samples_step"), parts.training
    if not (parts.folder / "samples.png").exists() or step is None:
        return None
    what = "Samples" if parts.is_image else "Generated sequences (left) beside real ones (right)"
    if parts.condition():
        what = "Side by side: the condition, the sample, the true item"
    # a resumed run may have another number of sampling steps than the one that drew an earlier picture
    steps = f", {facts['options']['ddpm_num_inference_steps']} sampling steps" if step == facts["steps"] else ""
    scale = ", guidance scale 1" if parts.classes() else ""
    return {"caption": f"{what}{steps}{scale}, not selected; after {step:,} training steps."}


def _model_rows(parts: Parts) -> list[tuple]:
    """Return the rows of the table of the model, (name, value)."""
    hidden = {"sample_size", "in_channels", "out_channels"}
    rows = [("class", parts.unet["_class_name"]), ("parameters", f"{parts.parameters:,}"),
            ("channels x size", _shape(parts))]  # fmt: skip
    if levels := parts.index.get("data_levels"):
        rows.append(("levels of each channel", " or ".join(f"{number:,}" for number in sorted(set(levels)))))
    if classes := parts.classes():
        rows.append(("classes", _class_list(classes)))
        hidden.add("num_class_embeds")
    if condition := parts.condition():
        rows.append(("condition", condition))
        hidden.add("condition_channels")
    settings = {k: v for k, v in parts.unet.items() if not k.startswith("_") and k not in hidden and v is not None}
    return rows + [(name, _cell(value)) for name, value in sorted(settings.items())]


def _class_list(classes: dict[str, int | None]) -> str:
    """Return the number of classes and the names of the first ones, with the numbers of their items."""
    shown = [name if count is None else f"{name} ({count:,} items)" for name, count in list(classes.items())[:LISTED]]
    more = f" and {len(classes) - LISTED:,} more" if len(classes) > LISTED else ""
    return f"{len(classes):,}: {', '.join(shown)}{more}"


def _schedule_rows(parts: Parts) -> list[tuple]:
    """Return the rows of the table of the schedule, (name, value)."""
    config, hidden = parts.scheduler, {"trained_betas"}
    if config.get("beta_schedule") == "trained":
        hidden = set()
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in hidden and v is not None}
    rows = [("class", config["_class_name"]), ("sampling steps of a call", parts.steps())]
    return rows + [
        (name, f"{len(value):,} values" if name == "trained_betas" else _cell(value))
        for name, value in sorted(settings.items())
    ]


def _cell(value) -> str:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)


def _training_rows(parts: Parts) -> list[tuple]:
    """Return the rows of the table of training, (name, value); none if nothing was recorded of it."""
    facts = parts.training
    if "data" not in facts:
        return []
    data, options = facts["data"], facts["options"]
    items = "streamed" if data["items"] is None else f"{data['items']:,} items"
    processes = f"{facts['processes']} process" + ("es" if facts["processes"] > 1 else "")
    rows = [
        ("data", f"{parts.data_name()}, {items} of {' x '.join(map(str, data['shape']))}"),
        ("optimizer steps", f"{facts['steps']:,} of {options['max_train_steps']:,}"),
        ("samples in a step", f"{facts['global_batch']:,}"),
        ("hardware", f"{facts['machine']}, {processes}"),
        ("time", f"{duration(facts['seconds'])} of training, with its samples, evaluations and saves"),
        ("mixed precision", facts["mixed_precision"]),
        ("weights", "exponential moving average" if options["use_ema"] else "of the last step"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]
    return rows


def _metric_row(parts: Parts, record: dict) -> list[str]:
    """Return the cells of a metric's row."""
    features = record.get("feature_network", "") if _has_features(record) else ""
    compared = f"{record['num_real']:,} items of {parts.data_name(record)}"
    if "held_out" in record["metric"] or record["metric"].startswith("bits_per_dim"):
        compared = "items that training did not see" if "num_held_out" in record else parts.data_name(record)
    compared = record.get("compared_with", compared)
    if record["metric"] == "class_agreement":
        compared = f"the class that the classifier {record['classifier']} sees"
    name = f"{record['metric']}, class {record['class']}" if "class" in record else record["metric"]
    guidance = []
    if any("guidance_scale" in other for other in parts.evaluation):
        guidance.append(f"{record['guidance_scale']:g}" if "guidance_scale" in record else "")
    return [
        name, f"{record['value']:.6g}", _counted(record), compared, str(record["num_inference_steps"]),
        record["scheduler"], *guidance, features, str(record["seed"]),
    ]  # fmt: skip


def _metrics_note(parts: Parts) -> str:
    """Return the sentences that the values of the metrics need."""
    few = [
        r
        for r in parts.evaluation
        if r["metric"] in ("fid", "frechet", "feature_frechet") and r["num_samples"] < 10_000
    ]
    pixels = [r for r in parts.evaluation if r["metric"] in ("fid", "kid") and r.get("feature_network") == "pixels"]
    notes = ["Fréchet distances of fewer than 10,000 samples are biased upwards."] if few else []
    if pixels:
        notes.append("A FID of the features `pixels` only compares runs with each other, and is not that of papers.")
    if any("class_labels" in r for r in parts.evaluation):
        notes.append("Samples have the frequencies of the data's classes.")
    if parts.condition():
        notes.append("Each sample was given the condition of an item of the data.")
    return Verbatim(" ".join(notes))


def _knows(parts: Parts) -> str:
    named = f" ({parts.data_name()})" if "data" in parts.training else ""
    return f"what is in its training data{named}"
