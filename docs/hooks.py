"""Hooks of the documentation site: the page of options is generated from `TrainConfig`."""

import dataclasses

from ddpm_hf.config import TrainConfig


def options_table() -> str:
    """Return a Markdown table with one row for each option of training: name, default and help."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in dataclasses.fields(TrainConfig):
        default = option.default_factory() if option.default is dataclasses.MISSING else option.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        cell = "" if shown is None else f"`{shown}`"
        rows.append(f"| `{option.name}` | {cell} | {option.metadata['help'].replace('|', '&#124;')} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_) -> str:
    """Put the table where a page asks for it."""
    return markdown.replace("<!-- table of options -->", options_table())
