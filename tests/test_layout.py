"""The layout: imports point downwards, nothing is too long, and the programs work from an installed wheel."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, run_program


def test_imports_point_downwards():
    """Each room imports from lower ones only, and every room has its place in the contract of pyproject.toml."""
    # in a process of its own, because import-linter disables the loggers that are there
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_programs_work_from_a_wheel(tmp_path):
    """Training runs from another folder with the installed wheel alone, without the repository."""
    source = tmp_path / "source"  # building writes beside the sources
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    for command in (
        [*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", source],
        [
            *pip,
            "install",
            "--no-deps",
            "--target",
            tmp_path / "site",
            "--no-index",
            "-f",
            tmp_path / "wheels",
            "ddpm_hf",
        ],
    ):
        subprocess.run([str(part) for part in command], check=True, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--dim=8", "--max_train_steps=3", "--num_samples=1", "--eval_steps=0", "--report_to=none",
               "--ddpm_num_inference_steps=2", "--output_dir=run"]  # fmt: skip
    program = """
import sys
from pathlib import Path
import ddpm_hf
from ddpm_hf.commands import convert, demo, evaluate, publish, train
print(ddpm_hf.__file__)
sys.exit(train.main(sys.argv[1:]))
"""
    done = run_program("-c", program, *options, cwd=elsewhere, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert (elsewhere / "run" / "pipeline" / "README.md").is_file()


def test_the_layout_page_names_every_file():
    """docs/layout.md, the tree that a newcomer reads, is complete."""
    page = (ROOT / "docs" / "layout.md").read_text()
    for file in (ROOT / "ddpm_hf").rglob("*.py"):
        if file.name not in ("__init__.py", "version.py") and file.parent.name != "commands":
            assert file.name in page, file


LIMITS = {"file": 600, "class": 250, "function": 60}  # lines
REASON = "longer than"  # in a comment directly above a class or function, or in the opening docstring of a file


def too_long(file: Path) -> list[str]:
    """Return a line for the file, and for each class and function in it, that is past its limit without a reason."""
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    found = []
    if len(lines) > LIMITS["file"] and REASON not in (ast.get_docstring(tree) or ""):
        found.append(f"{file.name} has {len(lines)} lines")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        length = node.end_lineno - node.lineno + 1
        above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        comment = []
        while above > 0 and lines[above - 1].lstrip().startswith("#"):
            above -= 1
            comment.append(lines[above])
        if length > LIMITS[kind] and REASON not in " ".join(reversed(comment)):
            found.append(f"{file.name}:{node.lineno} {kind} {node.name} has {length} lines")
    return found


def test_what_is_long_says_why():
    """Files, classes and functions keep to `LIMITS`, or say why they do not."""
    files = [file for room in ("ddpm_hf", "training", "tests") for file in sorted((ROOT / room).rglob("*.py"))]
    found = [line for file in files for line in too_long(file)]
    assert not found, "\n".join(found)


def test_the_lengths_are_counted(tmp_path):
    """A function of 61 lines is found, also a decorated one in a class, and is let be with a reason above it."""
    body = "    @staticmethod\n    def f():\n" + "        x = 1\n" * 60
    file = tmp_path / "long.py"
    for reason, found in (("", ["long.py:3 function f has 61 lines"]), ("    # longer than 60 lines: a test\n", [])):
        file.write_text(f"class C:\n{reason}{body}")
        assert too_long(file) == found
    file.write_text("x = 1\n" * 601)
    assert too_long(file) == ["long.py has 601 lines"]
    file.write_text('"""This file is longer than 600 lines: a test."""\n' + "x = 1\n" * 601)
    assert too_long(file) == []
