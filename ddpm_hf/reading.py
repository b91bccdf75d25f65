"""Reading small JSON and YAML files that may be damaged: the content has the expected form, or an error names the file.

YAML files of options are flat, so aliases and deep nesting are refused before they are expanded: a few hundred bytes of
either can fill the memory or exhaust the stack.
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

import yaml

FORMS = {dict: "object", list: "list"}
YAML_DEPTH = 4  # of collections; options need two: a mapping, and lists in it


def is_whole(value: Any) -> bool:
    """Return True for an integer that fits 64 bits (not for True and False, which Python counts as integers)."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> bool:
    """Return True for an integer or a float, also one that is not finite."""
    return is_whole(value) or isinstance(value, float)


def is_finite(value: Any) -> bool:
    """Return True for an integer or a float that is neither infinite nor NaN."""
    return is_number(value) and math.isfinite(value)


def parse_json(text: str | bytes, where: str, form: type = dict) -> Any:
    """Parse JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        where: the name of the text in error messages.
        form: the type of the outermost value, dict or list.

    Raises:
        ValueError: the text is not UTF-8, not JSON, nested too deeply, or its outermost value has another type.
    """
    try:
        content = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(content, form):
        raise ValueError(f"{where} must hold a JSON {FORMS[form]}, got {reprlib.repr(content)}")
    return content


def read_json(path: Path, form: type = dict) -> Any:
    """Read a JSON file whose outermost value has the type `form` (dict or list).

    Raises:
        ValueError: the file cannot be read, is not UTF-8, not JSON, nested too deeply, or its outermost value has
            another type.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return parse_json(data, str(path), form)


def read_mapping(path: str | Path, where: str | None = None) -> dict[str, Any]:
    """Read a YAML file of `name: value` lines, where a value is a scalar or a list of scalars.

    Args:
        path: the file.
        where: the name of the file in error messages; defaults to the path.

    Raises:
        ValueError: the file cannot be read, is not such YAML, uses aliases, or has a name twice.
    """
    where = where or str(path)
    try:
        text = Path(path).read_bytes().decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"line {event.start_mark.line + 1} uses the alias *{event.anchor}: write the value out"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH:
                raise ValueError(f"line {event.start_mark.line + 1} is nested more than {YAML_DEPTH} deep")
        _refuse_repeated_names(yaml.compose(text, Loader=yaml.SafeLoader))
        options = yaml.safe_load(text)
    except Exception as error:  # yaml's constructors raise KeyError, TypeError and others for tags with wrong values
        raise ValueError(f"{where}: cannot be read as YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{where}: must hold options as 'name: value' lines")
    for name, value in options.items():
        if isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, (list, dict, set, tuple)) for item in value)
        ):
            raise ValueError(f"{where}: {name} must be a value or a list of values, got {reprlib.repr(value)}")
    return options


def _refuse_repeated_names(node: yaml.Node | None) -> None:
    """Raise ValueError if a name stands twice in a mapping: PyYAML would take the last one without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if (first := lines.setdefault(str(key.value), line)) != line:
            raise ValueError(f"{key.value} must stand once, and stands in lines {first} and {line}")


def require(content: dict, name: str, holds: bool, rule: str, where: str | Path) -> None:
    """Raise ValueError with the file, the rule and the value of a field, unless `holds` is true."""
    if not holds:
        got = reprlib.repr(content[name]) if name in content else "nothing"
        raise ValueError(f"{where}: {name} must be {rule}, got {got}")
