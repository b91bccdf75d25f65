"""The one file of code that a saved pipeline carries defines what the package of the pipelines defines."""

import ast
from collections import Counter
from pathlib import Path

import ddpm_hf.pipeline
from ddpm_hf.pipeline.joining import joined_source

PACKAGE = Path(ddpm_hf.pipeline.__file__).parent
PARTS = {file.stem: ast.parse(file.read_text()) for file in PACKAGE.glob("*.py") if file.stem != "__init__"}


def defined_names(tree: ast.Module) -> list[str]:
    """Return the names that a file defines at its top level, without those that it imports."""
    names = []
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.append(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names


def test_no_two_parts_define_the_same_name():
    counts = Counter(name for tree in PARTS.values() for name in defined_names(tree))
    assert [name for name, count in counts.items() if count > 1] == []


def test_parts_import_each_other_by_name_and_nothing_else_of_ddpm_hf():
    for part, tree in PARTS.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("ddpm_hf") for alias in node.names), part
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{part} has a relative import"
                if node.module.startswith("ddpm_hf"):
                    assert node in tree.body and node.module.removeprefix("ddpm_hf.pipeline.") in PARTS, part
                    assert all(alias.asname is None for alias in node.names), part


def test_the_joined_file_defines_every_name_after_those_that_it_needs():
    joined = joined_source(PACKAGE)
    assert sorted(defined_names(ast.parse(joined))) == sorted(n for tree in PARTS.values() for n in defined_names(tree))
    imported = [node.module for node in ast.walk(ast.parse(joined)) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("ddpm_hf") for module in imported)
    module = {"__name__": "pipeline_ddpm_hf_0_0_0"}  # bases, decorators and defaults must exist when they are read
    exec(compile(joined, "pipeline_ddpm_hf_0_0_0.py", "exec"), module)
    assert module["DDPMPipeline1D"].__mro__[1].__name__ == "InterpolatingPipeline"
    assert module["IN_PACKAGE"] is False
