"""Checkpoints on disk: written aside and renamed when whole; the newest; rotation after the new one is whole."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

PATTERN = re.compile(r"step-(\d{6,})")
ASIDE = ".writing"
CHECKSUMS = "checksums.json"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first. A name is given only to what is whole."""
    if not folder.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := PATTERN.fullmatch(path.name))]
    return sorted(found)


def latest(folder: Path, skip_damaged: bool = False) -> Path | None:
    """The newest checkpoint, or None; with `skip_damaged` the newest whose files are as they were written.

    Raises:
        ValueError: the newest is damaged; it is named, and what is wrong with it.
    """
    for _, path in reversed(list_checkpoints(folder)):
        wrong = damage(path)
        if wrong is None:
            return path
        if not skip_damaged:
            raise ValueError(
                f"the checkpoint {path} is damaged: {wrong}. To go on from the newest whole one: "
                "--resume_from_checkpoint latest-valid"
            )
    return None


def begin(folder: Path, step: int) -> Path:
    """An empty folder aside, to write the checkpoint of `step` into; leftovers of an interrupted save are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(leftover)
    path = folder / f"step-{step:06d}{ASIDE}"
    path.mkdir()
    return path


def _seal(aside: Path) -> None:
    """Note the SHA-256 of every file, so that later damage is found."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    digests = {str(path.relative_to(aside)): _digest(path) for path in files}
    (aside / CHECKSUMS).write_text(json.dumps(digests, indent=1))


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        digests = json.loads((path / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    for name, expected in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != expected:
            return f"{name} is not what was written"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def finish(aside: Path, limit: int | None = None) -> Path:
    """Seal a whole checkpoint and give it its name, then delete the oldest beyond `limit`."""
    _seal(aside)
    final = aside.with_name(aside.name.removesuffix(ASIDE))
    if final.exists():  # the same step again, after resuming from an earlier one
        shutil.rmtree(final)
    os.replace(aside, final)
    if limit is not None:
        for _, old in list_checkpoints(final.parent)[:-limit]:
            shutil.rmtree(old)
    return final


def replace_folder(aside: Path, final: Path) -> None:
    """Put a whole folder in the place of an earlier one, which stays readable until then."""
    old = final.with_name(f"{final.name}.old{ASIDE}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ASIDE)
    aside.write_text(text)
    os.replace(aside, path)


class MetricsFile:
    """metrics.jsonl: one JSON object a line. It holds no clock times, so equal runs give equal files."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """The whole lines; one that an interrupted run left unfinished is dropped."""
        records = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return records

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: those steps are run again."""
        kept = [record for record in self.read() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
