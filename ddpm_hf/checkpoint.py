"""Checkpoints on disk: written aside and renamed when whole; the newest; rotation after the new one is whole."""

import json
import os
import re
import shutil
from pathlib import Path

PATTERN = re.compile(r"step-(\d{6,})")
ASIDE = ".writing"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return folder / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first. A name is given only to what is whole."""
    if not folder.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := PATTERN.fullmatch(path.name))]
    return sorted(found)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = list_checkpoints(folder)
    return found[-1][1] if found else None


def begin(folder: Path, step: int) -> Path:
    """An empty folder aside, to write the checkpoint of `step` into; leftovers of an interrupted save are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{ASIDE}"):
        shutil.rmtree(leftover)
    path = folder / f"step-{step:06d}{ASIDE}"
    path.mkdir()
    return path


def finish(aside: Path, limit: int | None = None) -> Path:
    """Give a whole checkpoint its name, then delete the oldest beyond `limit`."""
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
    old = final.with_name(final.name + ".old")
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
