"""The lineage of a run: the run or the pipeline that its weights come from, kept in lineage.json of the run folder."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ddpm_hf.reading import is_whole, read_json, require
from ddpm_hf.run.checkpoint import write_text

NAME = "lineage.json"


@dataclass
class Lineage:
    """The origin of a run's weights.

    Attributes:
        option: the option that named it, "continue_from" or "init_from"; or "converted" for the pipeline that
            convert.py makes of a checkpoint of denoising-diffusion-pytorch.
        source: its name, without the folders of the machine.
        step: the step of the source at which the run begins; 0 with init_from.
        order_from: the step at which the order of the data began.
        base_model: the repo of the source on the Hub, or None if it is not known to be there.
        changed: a line "option: earlier -> now" for each option that differs from the source's.
        made_new: a line for each part that was not taken from the source.
        model: options of the model that no option of a run can express.
        betas: the noise schedule, if no option of a run can express it, else None.
    """

    option: str
    source: str
    step: int = 0
    order_from: int = 0
    base_model: str | None = None
    changed: list[str] = field(default_factory=list)
    made_new: list[str] = field(default_factory=list)
    model: dict = field(default_factory=dict)
    betas: list[float] | None = None

    def public(self) -> dict:
        """Return what the card of the pipeline tells of it."""
        names = ("option", "source", "step", "base_model", "changed", "made_new")
        return {name: getattr(self, name) for name in names}

    def write(self, folder: Path) -> None:
        """Write lineage.json into a run folder."""
        write_text(folder / NAME, json.dumps(dataclasses.asdict(self), indent=1))


def read_lineage(folder: Path) -> Lineage | None:
    """Read lineage.json of a run folder; return None if there is none.

    Raises:
        ValueError: the file cannot be read, or does not have its form; the message names it.
    """
    file = folder / NAME
    if not file.exists():
        return None
    content = read_json(file)
    for name in ("step", "order_from"):
        value = content.get(name)
        require(content, name, is_whole(value) and value >= 0, "a whole number of at least 0", file)
    try:
        return Lineage(**content)
    except TypeError as error:
        raise ValueError(f"{file} must have the form that ddpm_hf writes: {error}") from error


def hub_repo(name: str) -> str | None:
    """Return the name if it can be that of a repo on the Hub and is no folder or file here, or else None."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() or name.count("/") != 1 else name


def published_repo(run: Path) -> str | None:
    """Return the repo in which a run was published, as its published.json says, or None."""
    try:
        repo = read_json(run / "published.json").get("repo_id")
    except ValueError:
        return None
    return repo if isinstance(repo, str) and "/" in repo and hub_repo(repo) else None
