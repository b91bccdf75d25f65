"""Publishing on the Hub: access is checked first, each upload is one commit, and a failed upload is tried again.

A commit has all files or none, so a repo never holds half a pipeline.
"""

import contextlib
import fnmatch
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import yaml
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ddpm_hf.config import TrainConfig
from ddpm_hf.hub.card import card_text
from ddpm_hf.hub.contents import fault_of_place, pipeline_files
from ddpm_hf.pipeline import DDPMPipeline, DDPMPipeline1D, card_to_keep, is_own_card
from ddpm_hf.reading import is_whole, read_json, read_mapping
from ddpm_hf.run.checkpoint import ASIDE, CHECKSUMS, damage, list_checkpoints, write_text
from ddpm_hf.run.record import public_options

RETRY_AFTER = (2, 10, 60)  # seconds
# Files of an earlier upload that are removed if this one has none of that name, such as code of another version.
STALE = ("pipeline_ddpm_hf_*.py", "*/*_ddpm_hf_*.py", "*/*-?????-of-?????.safetensors", "*/*.safetensors.index.json",
         "training_state/*", "samples.png", "loss.png", "training.json", "evaluation.json", "completion.json",
         "completion-*.png", "steps-versus-metric.png", "bits-per-dim.png")  # fmt: skip

PAGE = ("page.py", "page_model.py", "page_input.py")  # the files of the page, which Spaces carry too
SPACE_APP = '''"""The page of {repo_id}, with the code that lies in that repo."""

from diffusers import DiffusionPipeline
from page import build_page, serve

if __name__ == "__main__":
    pipeline = DiffusionPipeline.from_pretrained("{repo_id}", revision={revision!r}, trust_remote_code=True)
    serve(build_page(pipeline, "{title}"))
'''


@dataclass(frozen=True)
class Target:
    """The place to publish to.

    Attributes:
        repo_id: "user/name", or "name" for a repo of the token's user.
        revision: a branch, which is made if it does not exist; None means the main branch.
        create_pr: open a pull request instead of writing to the branch.
        private: True to make a new repo private; None leaves that to the account's settings.
        licence: the licence of the weights, as the Hub's metadata names it.
    """

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None
    licence: str | None = None


def check_token(target: Target) -> Target:
    """Check that the Hub accepts the token, and return the target with its user.

    Raises:
        ValueError: if there is no token, it is wrong or may only read, no repo can have the name, or there is no
            connection.
    """
    validate_repo_id(target.repo_id)
    if target.create_pr and target.revision is not None:
        raise ValueError(f"create_pr opens a pull request to the main branch; got the branch {target.revision!r} too")
    if get_token() is None:
        raise ValueError("publishing needs a token of the Hub: run `hf auth login`, or set HF_TOKEN in the environment")
    try:
        user = HfApi().whoami()
    except Exception as error:  # the client's own kinds, and those of the HTTP library that it uses
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        what = "does not accept the token" if refused else "cannot check the token now"
        raise ValueError(f"the Hub {what}: {error}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"publishing needs a token that may write; this one of {user['name']} may only read")
    repo_id = target.repo_id if "/" in target.repo_id else f"{user['name']}/{target.repo_id}"
    return replace(target, repo_id=repo_id)


def open_repo(target: Target) -> Target:
    """Make the repo and the branch if they do not exist, and return the target with its user.

    Raises:
        ValueError: if `check_token` raises it, or the token may not write there.
    """
    target, api = check_token(target), HfApi()
    with _as_value_error(f"{target.repo_id} cannot be published to"):
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if not target.create_pr:
            if "write" in inspect.signature(api.auth_check).parameters:
                api.auth_check(target.repo_id, write=True)
            if target.revision:
                api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    return target


@contextlib.contextmanager
def _as_value_error(text: str):
    """Turn every error in the block into a ValueError whose message begins with `text`."""
    try:
        yield
    except Exception as error:  # the client's own kinds, and those of the HTTP library that it uses
        raise ValueError(f"{text}: {error}") from error


def publish(folder: Path, target: Target, message: str, run: Path | None = None) -> dict:
    """Upload the files of a saved pipeline in one commit, with a new card; a card that someone has edited is kept.

    With `create_pr`, if an open pull request holds these files already, it is taken for this upload.

    Args:
        folder: the folder of the pipeline.
        target: the target that `open_repo` returned.
        message: the message of the commit.
        run: the run folder whose training state (options, metrics, newest checkpoint) is uploaded too.

    Returns:
        A dictionary with repo_id, commit (its SHA), url, `pull_request` ("refs/pr/N", or None), and `left_out`, the
        names of files in the folder that do not belong to a pipeline; after a commit also `uploaded`, its size, and
        `card_kept`, True if someone has edited the card.

    Raises:
        ValueError: if the folder does not hold a saved pipeline, or is damaged.
    """
    folder, api = Path(folder), HfApi()
    if not (folder / "README.md").resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / 'README.md'} must be a file of the folder, but is a link out of it")
    card = card_text(folder, target.repo_id, target.licence)
    files: dict[str, Path | bytes]
    files, left_out = pipeline_files(folder, card)
    if run is not None:
        files |= _training_state(run)
    files["README.md"] = card.encode()
    card_kept = not is_own_card(card)
    if not card_kept and card_to_keep(target.repo_id, target.revision):
        card_kept = True
        del files["README.md"]
    if target.create_pr and (earlier := _open_pull_request(api, target.repo_id, message, files)):
        return {**earlier, "left_out": left_out}
    present = api.list_repo_files(target.repo_id, revision=target.revision)
    operations = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
    uploaded = f"{len(operations)} files, {sum(added.upload_info.size for added in operations) / 1e6:.1f} MB"
    operations += [
        CommitOperationDelete(name)
        for name in present
        if name not in files and any(fnmatch.fnmatch(name, pattern) for pattern in STALE)
    ]
    done = api.create_commit(
        target.repo_id, operations, commit_message=message, revision=target.revision, create_pr=target.create_pr
    )
    return {"repo_id": target.repo_id, "commit": done.oid, "url": done.pr_url or done.commit_url,
            "pull_request": done.pr_revision, "left_out": left_out, "uploaded": uploaded,
            "card_kept": card_kept}  # fmt: skip


def _open_pull_request(api: HfApi, repo_id: str, message: str, files: dict[str, Path | bytes]) -> dict | None:
    """Return the open pull request that holds these files already, or None.

    There is one if an earlier commit arrived but the Hub's answer did not. The newest 50 pull requests with that title
    are compared, file by file, by the digests that the Hub has of them.
    """
    try:
        requests = api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
        candidates = list(islice((request for request in requests if request.title == message), 50))
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (403, 404):  # the repo has no discussions
            return None
        raise
    for request in candidates:
        tree = api.list_repo_tree(repo_id, recursive=True, revision=request.git_reference)
        present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        if all(name in present and _same_file(present[name], file) for name, file in files.items()):
            info = api.model_info(repo_id, revision=request.git_reference)
            return {"repo_id": repo_id, "commit": info.sha, "url": request.url, "pull_request": request.git_reference}
    return None


def _same_file(entry: RepoFile, file: Path | bytes) -> bool:
    """Return True if a file in a repo has the content of `file`, by its size and digest."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if entry.size != size:
        return False
    data = file if isinstance(file, bytes) else file.read_bytes()
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % size + data).hexdigest()  # the name that Git gives to it


def _training_state(run: Path) -> dict[str, Path | bytes]:
    """Return the files that a run resumes from, by their names in the repo's training_state/, which is a run folder."""
    checkpoints = [path for _, path in list_checkpoints(run / "checkpoints")]
    if not checkpoints or not (run / "config.yaml").exists():
        raise ValueError(f"the training state must be that of a run folder with a checkpoint, and {run} is not one")
    options = public_options(read_mapping(run / "config.yaml"))
    files: dict[str, Path | bytes] = {"training_state/config.yaml": yaml.safe_dump(options, sort_keys=False).encode()}
    for name in ("metrics.jsonl", "lineage.json"):
        if (run / name).exists():
            files[f"training_state/{name}"] = run / name
    if wrong := damage(checkpoints[-1]):
        raise ValueError(f"the checkpoint {checkpoints[-1]} is damaged, so it is not published: {wrong}")
    for name in (*read_json(checkpoints[-1] / CHECKSUMS), CHECKSUMS):
        file = checkpoints[-1] / name
        if not file.resolve().is_relative_to(checkpoints[-1].resolve()):
            raise ValueError(f"{file} must be a file of the checkpoint, but lies outside its folder")
        files[f"training_state/checkpoints/{file.relative_to(checkpoints[-1].parent).as_posix()}"] = file
    return files


def publish_with_patience(
    folder: Path, target: Target, *arguments, say: Callable[[str], None] = print, **options
) -> dict:
    """Call `publish`, and try again after RETRY_AFTER seconds if the connection or the server failed."""
    for wait in (*RETRY_AFTER, None):
        try:
            done = publish(folder, target, *arguments, **options)
            if uploaded := done.pop("uploaded", None):
                say(f"uploaded: {uploaded}")
            if others := done.pop("left_out"):
                more = f" and {len(others) - 10} more" if len(others) > 10 else ""
                say(f"not uploaded, because they are no part of a pipeline: {', '.join(map(repr, others[:10]))}{more}")
            if done.pop("card_kept", False) and target.licence:
                say(
                    f"note: the licence {target.licence!r} is not in the card, which someone has edited and which is "
                    "kept: write it there"
                )
            return done
        except Exception as error:
            if wait is None or not _may_pass(error):
                raise
            say(f"the upload failed ({_short(error)}) and is tried again in {wait} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: Exception) -> bool:
    """Return True if trying again can help, which it cannot if the Hub refused or the folder is wrong."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return status >= 500 or status in (408, 409, 412, 429)
    return not isinstance(error, ValueError)


def _short(error: Exception) -> str:
    """Return the class and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def load_pipeline(place: str) -> DDPMPipeline | DDPMPipeline1D:
    """Load a pipeline from a folder, or from a repo of the Hub, by the class that it names.

    Raises:
        ValueError: if no pipeline can be loaded from there; the message names a nearby folder that holds one.
    """
    fault = fault_of_place(Path(place))
    if fault is None and not Path(place).is_dir():
        try:
            validate_repo_id(place)
        except HFValidationError:
            fault = f"there is no folder {place}, and a repo on the Hub cannot have this name"
    if fault:
        raise ValueError(f"the pipeline {place!r} cannot be loaded: {fault}")
    try:
        kind = DiffusionPipeline.load_config(place)["_class_name"]
        kind = (kind[1] if isinstance(kind, list) else kind).split(".")[-1]
        return {"DDPMPipeline1D": DDPMPipeline1D}.get(kind, DDPMPipeline).from_pretrained(place)
    except Exception as error:  # for files of another form, libraries raise TypeError, AttributeError and others
        unreached = None if Path(place).exists() else _unreached(error)
        fault = f"no folder of this name exists, and the Hub could not be asked: {unreached}" if unreached else error
        raise ValueError(f"the pipeline {place!r} cannot be loaded: {fault}") from error


def _unreached(error: BaseException) -> BaseException | None:
    """Return the error for which the Hub could not be asked, if it is in the chain of errors that led to this one."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, LocalEntryNotFoundError):
        chain = chain.__cause__ or chain.__context__
    return chain and (chain.__cause__ or chain)


def write_space(folder: Path, repo_id: str, title: str, revision: str | None = None) -> None:
    """Write a Space that serves the page of a published pipeline: app.py, `PAGE`, requirements.txt and README.md.

    Args:
        folder: a folder that is empty or does not exist.
        repo_id: the repo of the pipeline.
        title: the title of the page.
        revision: the branch of the pipeline; None means the main branch.

    Raises:
        ValueError: if the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"a Space is written into a new or empty folder, and {folder} is not one")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "app.py").write_text(SPACE_APP.format(repo_id=repo_id, title=title, revision=revision), "utf-8")
    for name in PAGE:
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        # the files lie side by side there, without ddpm_hf
        (folder / name).write_text(text.replace("from ddpm_hf.hub.page_", "from page_"), "utf-8")
    needed = ("torch", "diffusers", "accelerate", "safetensors", "matplotlib", "numpy", "pillow")
    lines = [f"{name}>={metadata.version(name).split('+')[0]}" for name in needed]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    head = {"title": title, "sdk": "gradio", "app_file": "app.py", "models": [repo_id]}
    with contextlib.suppress(metadata.PackageNotFoundError):
        head["sdk_version"] = metadata.version("gradio")
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\nA page to try [{repo_id}](https://huggingface.co/{repo_id}).\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def publish_space(space_id: str, target: Target) -> str:
    """Write the Space of a published pipeline into a Space repo, in one commit.

    Args:
        space_id: the repo of the Space, "user/name" or "name".
        target: the published pipeline.

    Returns:
        The address of the Space.

    Raises:
        ValueError: if `check_token` raises it, the token may not write there, or the Space has files of another one.
    """
    space, api = check_token(Target(space_id, private=target.private)), HfApi()
    with _as_value_error(f"{space.repo_id} cannot be published to"):
        api.create_repo(space.repo_id, repo_type="space", space_sdk="gradio", private=space.private, exist_ok=True)
    present = set(api.list_repo_files(space.repo_id, repo_type="space"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "space"
        write_space(place, target.repo_id, target.repo_id.split("/")[-1], target.revision)
        files = sorted(place.iterdir())
        others = present - {f.name for f in files} - {".gitattributes"}
        if others:
            raise ValueError(
                f"{space.repo_id} holds another Space ({', '.join(sorted(others)[:3])}): choose a new name"
            )
        operations = [CommitOperationAdd(f.name, str(f)) for f in files]
        message = f"The page of {target.repo_id}"
        api.create_commit(space.repo_id, operations, commit_message=message, repo_type="space")
    return f"{api.endpoint}/spaces/{space.repo_id}"


def target_of(config: TrainConfig) -> Target:
    """Return the target that a run's options name; its repo defaults to the name of the run folder."""
    return Target(
        config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_revision, config.create_pr,
        config.hub_private_repo, config.hub_license,
    )  # fmt: skip


class Publisher:
    """Uploads saves in a thread beside training; a failure is reported and never raised.

    If saves come faster than uploads, only the newest is uploaded.

    Args:
        run: the run folder. It keeps links to the files that are being uploaded, and published.json, which says what
            was uploaded.
        target: the target that `open_repo` returned.
        with_state: upload the training state too.
        say: the function that prints a line.
    """

    def __init__(self, run: Path, target: Target, with_state: bool, say: Callable[[str], None] = print):
        self.run, self.target, self.with_state, self.say = run, target, with_state, say
        self.note = run / "published.json"
        self.aside = run / f"upload{ASIDE}"
        shutil.rmtree(self.aside, ignore_errors=True)
        disable_progress_bars()  # they would break up the bar of training
        self._lock = threading.Lock()
        self._waiting: tuple[int, Path] | None = None
        self._thread: threading.Thread | None = None

    def published_step(self) -> int | None:
        """Return the newest step that this run has published at this target, or None."""
        noted = self._noted()
        return noted["step"] if noted else None

    def _noted(self) -> dict | None:
        """Return the content of published.json, or None if there is none for this target."""
        try:
            noted = read_json(self.note)
        except ValueError:
            return None
        request = noted.get("pull_request")
        whole = is_whole(noted.get("step")) and (request is None or isinstance(request, str))
        return {**noted, "pull_request": request} if whole and noted.get("target") == self._identity() else None

    def _identity(self) -> list:
        return [self.target.repo_id, self.target.revision, self.target.create_pr]

    def submit(self, step: int) -> None:
        """Upload what the run folder holds now, once the upload before is done. Training may go on meanwhile."""
        place = self.aside / f"step-{step}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            self._snapshot(place)
        except OSError as error:
            self.say(f"step {step} is not published: {error}")
            return
        with self._lock:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[1], ignore_errors=True)
            self._waiting = (step, place)
            if self._thread is None:
                # a daemon, because an upload must not keep a stopped run alive
                self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
                self._thread.start()

    def _snapshot(self, place: Path) -> None:
        """Keep hard links to the pipeline, and to the state if it is uploaded; saves replace files."""

        def link(source: str, target: str) -> None:
            try:
                os.link(source, target)
            except OSError:  # the file system has no hard links
                shutil.copy2(source, target)

        # symbolic links stay links, so their targets are not published
        shutil.copytree(self.run / "pipeline", place / "pipeline", symlinks=True, copy_function=link)
        if self.with_state:
            newest = list_checkpoints(self.run / "checkpoints")[-1][1]
            shutil.copytree(newest, place / "checkpoints" / newest.name, symlinks=True, copy_function=link)
            for name in ("config.yaml", "metrics.jsonl", "lineage.json"):  # copies, because metrics.jsonl grows
                if name != "lineage.json" or (self.run / name).exists():
                    shutil.copy2(self.run / name, place / name)

    def _work(self) -> None:
        """Upload what waits until nothing waits; this is the thread's function."""
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                (step, place), self._waiting = self._waiting, None
            self._upload(step, place)
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.aside.rmdir()  # succeeds when the folder is empty

    def _upload(self, step: int, place: Path) -> None:
        """Upload a snapshot and note it in published.json; report a failure."""
        target, noted = self.target, self._noted()
        if noted and noted["pull_request"]:  # a run has one pull request
            target = replace(target, revision=noted["pull_request"], create_pr=False)
        try:
            done = publish_with_patience(
                place / "pipeline",
                target,
                f"Training step {step}",
                run=place if self.with_state else None,
                say=self.say,
            )
            done["pull_request"] = done["pull_request"] or (noted and noted["pull_request"])
            write_text(self.note, json.dumps({"step": step, "target": self._identity(), **done}, indent=1))
        except Exception as error:
            self.say(
                f"step {step} could not be published on {target.repo_id}: {_short(error)}. {self.run / 'pipeline'} "
                "is whole; the same command, or training/publish.py, uploads it"
            )
            return
        self.say(f"published step {step}: {done['url']}")

    def finish(self) -> None:
        """Wait until everything that was submitted is uploaded or has failed."""
        while (thread := self._thread) is not None:
            thread.join()


def make_publisher(config: TrainConfig, accelerator, say: Callable[[str], None]) -> Publisher | None:
    """Return the publisher of a run on the main process, and None elsewhere or if the run does not publish.

    Raises:
        ValueError: on every process, if `open_repo` raises it.
    """
    if not config.push_to_hub:
        return None
    found: list = [None]
    if accelerator.is_main_process:
        try:
            found = [open_repo(target_of(config))]
        except ValueError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    if not accelerator.is_main_process:
        return None
    return Publisher(Path(config.output_dir), found[0], config.hub_upload_state, say)
