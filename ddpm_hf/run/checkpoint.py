"""Checkpoints on disk: they are written aside, renamed when whole, and older ones are deleted after that.

Other files and folders beside the checkpoints are left alone.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ddpm_hf.reading import is_finite, is_number, is_whole, parse_json, read_json, require

ASIDE = ".writing"
PATTERN = re.compile(r"step-([0-9]{6,})")
WAYS_OUT = (
    " Put an undamaged copy of a checkpoint back into its place, or train anew into another output_dir; to start this "
    "run over, move its folder away first. Nothing was changed"
)
UNFINISHED = re.compile(PATTERN.pattern + re.escape(ASIDE))
REPLACED = ".old" + ASIDE  # at the end of the name of a checkpoint that is about to give way to one of the same step
CHECKSUMS = "checksums.json"
THREADS = 4  # files that are hashed at a time
# What may be due after a step beside the checkpoint, in the order in which the trainer makes it.
LOOKS = ("samples", "evaluation")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every whole checkpoint, oldest first. Only a whole one is named after its step.

    A checkpoint that was moved aside for another one of its step counts where a kill has kept that one from its name.
    """
    if not folder.is_dir():
        return []
    found = {}
    for path in sorted(folder.iterdir(), reverse=True):  # step-000002.old.writing comes before step-000002
        match = PATTERN.fullmatch(path.name.removesuffix(REPLACED))
        if match and path.is_dir():
            found[int(match[1])] = path
    return sorted(found.items())


def latest(folder: Path, skip_damaged: bool = False) -> Path | None:
    """Return the newest checkpoint, or None if there is none.

    Args:
        folder: the folder of the checkpoints.
        skip_damaged: pass over damaged checkpoints, to the newest one whose files are as they were written.

    Raises:
        ValueError: if the newest is damaged, or with `skip_damaged` all are; the message says what is wrong with each.
    """
    found = list_checkpoints(folder)
    wrongs = []
    for _, path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        wrongs.append(f"{path} is damaged: {wrong}")
        if not skip_damaged:
            hint = (
                " To go on from the newest whole one: --resume_from_checkpoint latest-valid" if len(found) > 1 else ""
            )
            raise ValueError(f"the checkpoint {wrongs[0]}.{hint or WAYS_OUT}")
    if wrongs:
        raise ValueError("no checkpoint of this run is whole:\n  " + "\n  ".join(wrongs) + "\n" + WAYS_OUT.strip())
    return None


def begin(folder: Path, step: int) -> Path:
    """Make an empty folder aside, to write the checkpoint of `step` into; remove the leftovers of a killed save."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [path for _, path in list_checkpoints(folder)]
    for path in folder.iterdir():
        unfinished = UNFINISHED.fullmatch(path.name) or PATTERN.fullmatch(path.name.removesuffix(REPLACED))
        if unfinished and path.is_dir() and path not in whole:
            _remove(path)
    path = folder / f"step-{step:06d}{ASIDE}"
    path.mkdir()
    return path


def _seal(aside: Path) -> None:
    """Write down the SHA-256 of every file, so that later damage is found."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves Python to other threads
        digests = dict(zip((str(path.relative_to(aside)) for path in files), pool.map(_digest, files)))
    (aside / CHECKSUMS).write_text(json.dumps(digests, indent=1))


def damage(path: Path) -> str | None:
    """Return a description of the damage to the files of a checkpoint, or None if there is none."""
    try:
        digests = read_json(path / CHECKSUMS)
    except ValueError as error:
        return str(error)
    if not digests:
        return f"{CHECKSUMS} names no files"
    for name, expected in digests.items():
        try:
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != expected:
                return f"{name} is not what was written"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            return f"{name!r} cannot be read ({error})"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def finish(aside: Path, limit: int | None = None) -> Path:
    """Seal a whole checkpoint and give it its name; then delete older ones, so that `limit` whole ones are left.

    The new checkpoint is always kept. Damaged ones do not count, and none of a later step is deleted.
    """
    _seal(aside)
    final = aside.with_name(aside.name.removesuffix(ASIDE))
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():  # the same step again
        os.replace(final, replaced)
    os.replace(aside, final)
    _try_to_remove(replaced)
    if limit is not None:
        _rotate(final, limit)
    return final


def _rotate(newest: Path, limit: int) -> None:
    if len(list_checkpoints(newest.parent)) <= limit:  # nothing to delete, so nothing to read again
        return
    whole = 1  # the newest
    newest_step = int(PATTERN.fullmatch(newest.name)[1])
    for step, path in reversed(list_checkpoints(newest.parent)):
        if path == newest:
            continue
        if whole < limit:
            whole += damage(path) is None
        elif step < newest_step:
            _try_to_remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, or a link to a folder, whose content stays then."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _try_to_remove(path: Path) -> None:
    """Remove a folder that has given way to a new one, which is saved whatever becomes of this one."""
    with contextlib.suppress(OSError):
        _remove(path)


def read_progress(path: Path) -> dict:
    """Read the progress of the run from a checkpoint, with the seconds of training.

    Raises:
        ValueError: if a file cannot be read, or a field does not hold what it should; the message names the file.
    """
    file = path / "progress.json"
    defaults = {"evaluation": [], "best": None, "feed": {}, "global_batch": None, "pending": []}
    defaults["draws"] = "torch.Generator"  # of ddpm_hf 0.3.0 and earlier
    progress = {**defaults, **read_json(file)}

    def rule(name: str, holds: bool, text: str) -> None:
        require(progress, name, holds, text, file)

    for name in ("step", "skipped_images"):
        value = progress.get(name)
        rule(name, is_whole(value) and value >= 0, "a whole number of at least 0")
    pairs = progress.get("interval")
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs
    )
    rule("interval", good, "a list of pairs of numbers")
    rule("data", isinstance(progress.get("data"), dict), "an object that describes the data")
    rule("feed", isinstance(progress["feed"], dict), "an object")
    rule("draws", isinstance(progress["draws"], str), "the name of a random number generator")
    rule("global_batch", progress["global_batch"] is None or is_whole(progress["global_batch"]), "a whole number")
    marks = progress.get("files", [])  # of files that are read while training, see `mapped`
    good = isinstance(marks, list) and all(
        mark is None or (isinstance(mark, list) and len(mark) == 2 and all(map(is_whole, mark))) for mark in marks
    )
    rule("files", good, "a list of pairs of whole numbers")
    records = progress["evaluation"]
    good = isinstance(records, list) and all(
        isinstance(r, dict) and isinstance(r.get("metric"), str) and is_number(r.get("value")) for r in records
    )
    rule("evaluation", good, "a list of objects with a metric and its value")
    best = progress["best"]
    good = best is None or (
        isinstance(best, dict) and isinstance(best.get("metric"), str) and is_number(best.get("value"))
    )
    rule("best", good, "null, or an object with a metric and its value")
    pending = progress["pending"]
    good = isinstance(pending, list) and all(isinstance(name, str) for name in pending)
    rule("pending", good and set(pending) <= set(LOOKS), f"a list of some of {', '.join(LOOKS)}")
    clock = read_json(path / "clock.json") if (path / "clock.json").exists() else {"seconds": 0.0}
    require(clock, "seconds", is_finite(clock.get("seconds")), "a finite number", path / "clock.json")
    return {**progress, "seconds": clock["seconds"]}


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.old{ASIDE}")


def restore_folder(final: Path) -> None:
    """Give an earlier folder its name back where a kill within `replace_folder` has left none of that name."""
    if not final.exists() and _replaced(final).exists():
        os.replace(_replaced(final), final)


def replace_folder(aside: Path, final: Path) -> None:
    """Replace a folder by a whole new one; the earlier one stays readable until then."""
    old = _replaced(final)
    _try_to_remove(old)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    _try_to_remove(old)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ASIDE)
    aside.write_text(text)
    os.replace(aside, path)


class MetricsFile:
    """The file metrics.jsonl, one JSON object a line. It holds no clock times, so equal runs give equal files."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """Return the records. A last line that an interrupted run left unfinished is dropped.

        Raises:
            ValueError: if another line is not a record; the message names the file, the line and the rule.
        """
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        if lines and not lines[-1]:
            lines.pop()
        return [record for i, line in enumerate(lines) if (record := self._parse(line, i + 1, len(lines))) is not None]

    def _parse(self, line: bytes, number: int, count: int) -> dict | None:
        where = f"{self.path}, line {number}"
        try:
            json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number == count and not isinstance(error, UnicodeDecodeError):
                return None
            raise ValueError(
                f"{where} must be a JSON object in UTF-8 ({error}). A run resumes with the lines that its earlier part "
                "wrote: mend that line, or put back a copy of the file"
            ) from error
        record = parse_json(line, where)
        require(record, "step", is_whole(record.get("step")), "a whole number", where)
        require(record, "loss", is_number(record.get("loss", 0)), "a number", where)
        return record

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drop the records of what is run again: the steps after `step`, and the evaluation of `step` if `evaluated`
        is False."""
        kept = [r for r in self.read() if r["step"] < step or r["step"] == step and (evaluated or "loss" in r)]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> None:
        """Write a record as the last line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
