"""Joins the files of a package into one file of code, which a saved pipeline carries.

diffusers fetches one file of code for a pipeline from the Hub, and no helper files. In the joined file the files of the
package stand in the order of their imports from each other, which fall away. The other imports come first.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path


def joined_source(package: Path) -> str:
    """Return the text of one file that defines everything that the files of a package define.

    Args:
        package: folder of the package. Its files import from each other by `from ddpm_hf.package.file import name`
            alone, and no two of them define the same name (tests/pipeline/test_joining.py checks both). The docstring
            of `__init__.py` opens the joined file; nothing else of it is taken.
    """
    sources = {file.stem: file.read_text(encoding="utf-8") for file in sorted(package.glob("*.py"))}
    opening = ast.get_docstring(ast.parse(sources.pop("__init__")))
    modules, names, needs, bodies = set(), {}, {}, {}
    for part, source in sources.items():
        lines, statements = source.splitlines(), ast.parse(source).body
        needs[part] = []
        for statement in statements:
            if isinstance(statement, ast.Import):
                modules.add(ast.unparse(statement))
            elif isinstance(statement, ast.ImportFrom) and statement.module.startswith(f"ddpm_hf.{package.name}."):
                needs[part].append(statement.module.split(".")[-1])
            elif isinstance(statement, ast.ImportFrom):
                names.setdefault(statement.module, set()).update(map(ast.unparse, statement.names))
            else:
                continue
            lines[statement.lineno - 1 : statement.end_lineno] = [None] * (statement.end_lineno - statement.lineno + 1)
        about = [f"# {line}".rstrip() for line in ["-" * 93, *ast.get_docstring(ast.parse(source)).splitlines()]]
        code = [line for line in lines[statements[0].end_lineno :] if line is not None]
        bodies[part] = "\n".join(about) + "\n\n\n" + "\n".join(code).strip("\n")
    imports = sorted(modules) + [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    order = TopologicalSorter(needs).static_order()
    head = f'"""{opening}\n"""\n\n' + "\n".join(imports)
    return "\n\n\n".join([head, *(bodies[part] for part in order)]) + "\n"
