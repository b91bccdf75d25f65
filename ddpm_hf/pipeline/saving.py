"""Saved pipelines: a folder with weights, configurations and the code that they need; uploading and loading it."""

import hashlib
import importlib
import inspect
import json
import re
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

from ddpm_hf.pipeline.joining import joined_source

# Saved pipelines carry their code: unet_ddpm_hf_0_2_0.py is unet.py of version 0.2.0. diffusers keeps all such files of
# a process in one namespace by their names, so the version is part of the name.
CARRIED = re.compile(r"(unet|scheduler|pipeline)_ddpm_hf_[0-9]\w*")
IN_PACKAGE = __name__.startswith("ddpm_hf.")  # false in the file that a saved pipeline carries
OWN_CARD = re.compile(r"(.*)<!-- card of ddpm_hf ([0-9a-f]{16}): [^\n]*-->\s*", re.DOTALL)
FIRST_CARD = """---
library_name: diffusers
tags: [ddpm_hf]
---
# {name}

A pipeline of ddpm_hf. Where ddpm_hf is installed: `ddpm_hf.{name}.from_pretrained(this)`; where only diffusers is:
`diffusers.DiffusionPipeline.from_pretrained(this, trust_remote_code=True)`, which runs the Python files that lie beside
this card: read them first. How the model was trained was not recorded here.
"""


def _carried_name(cls: type) -> str | None:
    """Return the name of the module of code that a class is saved with; None for classes of other libraries."""
    package, *rest = cls.__module__.split(".")
    if rest and CARRIED.fullmatch(rest[-1]):
        return rest[-1]
    if package == "ddpm_hf" and CARRIED.fullmatch(f"{rest[0]}_ddpm_hf_0"):
        return f"{rest[0]}_ddpm_hf_" + re.sub(r"\W", "_", sys.modules[package].__version__)
    return None


def _source(cls: type) -> str:
    """Return the text of a file of code that defines a class."""
    file = Path(sys.modules[cls.__module__].__file__)
    if IN_PACKAGE and file.parent == Path(__file__).parent:
        return joined_source(file.parent)
    return file.read_text(encoding="utf-8")


def sign_card(text: str) -> str:
    """Return a model card with a mark that shows that a program wrote it and that nobody has edited it since."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"{text.strip()}\n\n<!-- card of ddpm_hf {digest}: one that is edited is kept -->\n"


def is_own_card(text: str) -> bool:
    """Return True if a model card has the mark of `sign_card` and has not been edited."""
    match = OWN_CARD.fullmatch(text)
    return match is not None and hashlib.sha256(match[1].strip().encode()).hexdigest()[:16] == match[2]


def card_to_keep(repo_id: str, revision: str | None = None, token: str | None = None) -> bool:
    """Return True if the repo has a model card that someone has written or edited."""
    try:
        # not from the cache: where there is no connection, that must be an error
        card = hf_hub_download(repo_id, "README.md", revision=revision, token=token, force_download=True)
    except LocalEntryNotFoundError:
        raise
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not is_own_card(Path(card).read_text(encoding="utf-8"))


def _carry_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Put the code of our classes beside a saved pipeline, name it in model_index.json, and remove local paths."""
    index_file = folder / pipeline.config_name
    index = json.loads(index_file.read_text())
    for name, component in pipeline.components.items():
        component = getattr(component, "_orig_mod", component)  # a compiled model holds the model
        if code := _carried_name(type(component)):
            (folder / name / f"{code}.py").write_text(_source(type(component)), encoding="utf-8")
            index[name] = [code, type(component).__name__]
    if code := _carried_name(type(pipeline)):
        (folder / f"{code}.py").write_text(_source(type(pipeline)), encoding="utf-8")
        index["_class_name"] = [code, type(pipeline).__name__]
    index.pop("_name_or_path", None)
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*/*config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if not (card := folder / "README.md").exists():
        card.write_text(sign_card(FIRST_CARD.format(name=type(pipeline).__name__)), encoding="utf-8")


def _saved_files(pipeline: DiffusionPipeline, folder: Path) -> list[str]:
    """Return the names of the files of a saved pipeline. Other files of its folder are not uploaded."""
    kinds = ("*config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    patterns = [pipeline.config_name, "README.md", "pipeline_ddpm_hf_*.py"]
    patterns += [f"{name}/{kind}" for name in pipeline.components for kind in (*kinds, "*_ddpm_hf_*.py")]
    files = [path for pattern in patterns for path in folder.glob(pattern) if not path.is_symlink()]
    return [path.relative_to(folder).as_posix() for path in files]


class SavedWithCode(DiffusionPipeline):
    """A pipeline whose saved folder carries the code that it needs, and which reads such folders."""

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save weights, configurations and the code that they need.

        The folder then loads where ddpm_hf is not installed (`trust_remote_code=True`), and can be saved again there.

        Args:
            save_directory: a folder, which is made if it does not exist. A README.md in it stays.
            push_to_hub: upload the folder too. `repo_id` (defaults to the folder's name), `token`, `private`,
                `commit_message` and `create_pr` are those of the method `push_to_hub`.
        """
        names = ("repo_id", "token", "private", "commit_message", "create_pr")
        upload = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        _carry_code(self, Path(save_directory))
        if push_to_hub:
            self._upload(save_directory, **{"repo_id": Path(save_directory).name, **upload})

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, token: str | None = None,
        create_pr: bool = False, safe_serialization: bool = True, variant: str | None = None,
    ) -> str:  # fmt: skip
        """Save into a repo on the Hub, as `save_pretrained` does. A model card that someone has written there stays.

        Returns:
            The commit's address, as huggingface_hub gives it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._upload(folder, repo_id, commit_message, private, token, create_pr)

    def _upload(self, folder, repo_id, commit_message=None, private=None, token=None, create_pr=False) -> str:
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        return upload_folder(
            repo_id=repo_id, folder_path=folder, token=token, create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            allow_patterns=_saved_files(self, Path(folder)),
            ignore_patterns=["README.md"] if card_to_keep(repo_id, token=token) else None,
        )  # fmt: skip

    # The package reads the names of carried code as its own classes, so it needs no trust in a folder's code. Two
    # methods do that: a download looks for the components' files by the names in the index, and must still find them.

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        index = super()._dict_from_json_file(json_file, **options)
        name = index.get("_class_name")
        if IN_PACKAGE and isinstance(name, list) and CARRIED.fullmatch(str(name[0])):
            index["_class_name"] = name[1]
        return index

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Read model_index.json, with the names of carried code replaced by those of the package's own classes."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if IN_PACKAGE:
            for name, value in index.items():
                if isinstance(value, list) and len(value) == 2 and CARRIED.fullmatch(str(value[0])):
                    module = f"ddpm_hf.{value[0].split('_ddpm_hf_')[0]}"
                    importlib.import_module(module)  # diffusers looks among the modules that are imported
                    index[name] = [module, value[1]]
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved pipeline, as diffusers does. A `scheduler` that is given is checked as one that is set later.

        Raises:
            ValueError: the scheduler cannot sample from the saved model.
        """
        scheduler = kwargs.pop("scheduler", None)
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if scheduler is not None:
            pipeline.scheduler = scheduler
        return pipeline

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Read the options from a configuration. diffusers only warns about keys that it does not know.

        Raises:
            ValueError: an unknown key is close to one of ours, so it is taken for a misspelling.
        """
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in config_dict:
            if name not in known and not name.startswith("_") and (close := get_close_matches(name, known, 1, 0.75)):
                raise ValueError(
                    f"{cls.__name__} does not know: {name} (did you mean {close[0]}?), in the configuration"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a new pipeline with the parts and settings of another one; `kwargs` replace some of them.

        The parts are passed on by name, because diffusers takes a model only if the constructor names its class, and
        this file knows no model.
        """
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler")}
        scheduler = kwargs.get("scheduler")
        if kwargs.get("unet") is None:  # the model stays, so another scheduler is checked as one that is set later
            kwargs.pop("scheduler", None)
        made = super().from_pipe(pipeline, **{**parts, **kwargs})
        if scheduler is not None:
            made.scheduler = scheduler  # again: the settings still belong to the other pipeline's scheduler
        return made
