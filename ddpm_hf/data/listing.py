"""One walk through a folder and its subfolders, from which images and tables are both found.

The system tells files, folders and links apart while it lists a folder, so only links are looked at one by one:
200,000 files take a fraction of a second.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Listing:
    """The content of a folder and its subfolders, each part in the order of the paths; hidden files are left out.

    Attributes:
        files: paths of files, links to files and links that lead nowhere.
        broken: the paths among them that are links that lead nowhere.
        special: paths of what is neither a file nor a folder, such as pipes.
        links: paths of links to folders, which are not followed.
        error: the error of the first folder that cannot be read, or None.
    """

    files: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    special: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    error: OSError | None = None


def list_folder(folder: str) -> Listing:
    """List a folder and its subfolders, hidden ones included.

    Paths begin with `folder`, and are sorted name by name, as `pathlib` compares them. A folder that does not exist
    or cannot be read leaves its error in the result.
    """
    found = Listing()
    top = str(Path(folder))
    dropped = os.path.join(".", "") if top == "." else ""  # `pathlib` writes no "./" before names
    waiting = [_entries(top, found)]  # the entries left in each open folder, the next one last
    while waiting:
        if not waiting[-1]:
            waiting.pop()
            continue
        entry = waiting[-1].pop()
        path = entry.path.removeprefix(dropped)
        if _is(entry.is_dir):
            if entry.is_symlink():
                found.links.append(path)
            else:
                waiting.append(_entries(entry.path, found))
        elif entry.name.startswith("."):
            pass  # hidden files are not the user's data (macOS leaves ._name.jpg)
        elif _is(entry.is_file):
            found.files.append(path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            found.files.append(path)
            found.broken.add(path)
        else:
            found.special.append(path)
    return found


def _entries(folder: str, found: Listing) -> list[os.DirEntry]:
    """Return the entries of a folder, the last by name first; if it cannot be read, `found` keeps the first error."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.path.normcase(entry.name), reverse=True)
    except OSError as error:
        found.error = found.error or error
        return []


def _is(kind) -> bool:
    """Return kind(), or False where a link cannot be resolved."""
    try:
        return kind()
    except OSError:
        return False
