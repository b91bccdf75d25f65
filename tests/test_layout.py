"""The house: imports point downwards, and the programs work from an installed wheel."""

import shutil
import subprocess
import sys

from conftest import ROOT, run_program
from importlinter.cli import lint_imports


def test_imports_point_downwards(capsys):
    """Each room imports from lower ones only, and every room has its place in the contract of pyproject.toml."""
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


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
