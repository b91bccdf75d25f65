"""The files that a saved pipeline consists of. They are published, and other files in its folder are not."""

import fnmatch
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

from ddpm_hf.pipeline import is_own_card
from ddpm_hf.reading import read_json

# The files beside model_index.json, and those in the folder of each component that it names.
ROOT_FILES = ("model_index.json", "README.md", "LICENSE*", "training.json", "evaluation.json", "samples.png",
              "loss.png", "steps-versus-metric.png", "bits-per-dim.png", "completion.json", "completion-*.png",
              "pipeline_ddpm_hf_*.py")  # fmt: skip
COMPONENT_FILES = ("config.json", "*_config.json", "*.safetensors", "*.safetensors.index.json", "*_ddpm_hf_*.py")
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # endings of files, with which no repo is named
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg")


def pipeline_files(folder: Path, card: str = "") -> tuple[dict[str, Path], list[str]]:
    """Return the files of a saved pipeline by their names in the folder, and the names of what else lies there.

    Args:
        folder: the folder of the pipeline.
        card: the text of the model card; pictures that it names belong to the pipeline too.

    Raises:
        ValueError: if model_index.json cannot be read, or a file of a component is a link out of the folder.
    """
    index = read_json(folder / "model_index.json")
    components = {name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    files, others = {}, []
    for path in sorted(folder.iterdir()):
        if path.name in components and path.is_dir():
            for inner in sorted(path.iterdir()):
                name = f"{path.name}/{inner.name}"
                if not (inner.is_file() and _fits(inner.name, COMPONENT_FILES)):
                    others.append(name)
                elif not _inside(inner, folder):
                    raise ValueError(
                        f"{folder / name} must be a file of the folder, but is a link to {inner.resolve()}"
                    )
                else:
                    files[name] = inner
        elif (
            path.is_file()
            and _inside(path, folder)
            and (_fits(path.name, ROOT_FILES) or (_fits(path.name, PICTURES) and _is_named(path.name, card)))
        ):
            files[path.name] = path
        else:
            others.append(path.name + ("/" if path.is_dir() else ""))
    return files, others


def fault_of_place(path: Path) -> str | None:
    """Return the reason why a path is not the folder of a saved pipeline, or None if it is, or may be a repo's name."""
    is_weights = path.suffix.lower() in WEIGHTS
    if path.is_dir():
        return None if (path / "model_index.json").is_file() else f"it has no model_index.json{nearby_hint(path)}"
    if not path.exists():
        return f"{path} is not a file" if is_weights else None
    if is_weights and path.suffix.lower() != ".safetensors":
        return (
            "it is a file, and a pipeline is a folder. A checkpoint of denoising-diffusion-pytorch is converted to one "
            f"by: python training/convert.py {path} --output_dir NEW_FOLDER"
        )
    return f"it is a file, and a pipeline is a folder{nearby_hint(path)}"


def nearby_hint(folder: Path) -> str:
    """Return "; did you mean ...?" with a saved pipeline in or around a folder that holds none, or an empty text."""
    near = (folder / "pipeline", folder / "best", folder.resolve().parent)
    found = next((path for path in near if (path / "model_index.json").is_file()), None)
    return f"; did you mean {found}?" if found else ""


def carry_over(old: Path, new: Path) -> None:
    """Copy what someone has put beside a saved pipeline into the folder that replaces it.

    That is other files, a licence, and an edited card with the pictures of evaluations that it names.

    Args:
        old: the folder that is replaced.
        new: the folder that replaces it.

    Raises:
        ValueError: if the old folder does not hold a pipeline.
        OSError: if a file cannot be copied.
    """
    files, others = pipeline_files(old)
    card = old / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    edited = "" if is_own_card(text) else text
    own = [name for name in files if _fits(name, ("LICENSE*",)) or _fits(name, PICTURES) and _is_named(name, edited)]
    for name in (*others, *own):
        source, target = old / name, new / name
        if target.exists() or not target.parent.is_dir():
            continue
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)
    if card.is_file() and not is_own_card(text):
        shutil.copy2(card, new / "README.md")


def _is_named(picture: str, card: str) -> bool:
    """Return True if a card names a picture, whose name may be escaped as in addresses; `x.png` is not in `box.png`."""
    return re.search(rf"(?<![\w.-]){re.escape(picture)}(?!\w)", unquote(card)) is not None


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Return True if a file's name fits one of the patterns and is not hidden."""
    return not name.startswith(".") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _inside(path: Path, folder: Path) -> bool:
    """Return True if a path, after following links, lies in the folder."""
    return path.resolve().is_relative_to(folder.resolve())
