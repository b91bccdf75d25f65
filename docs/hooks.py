"""Hooks of the documentation site: the page of options is generated from the declarations of the options."""

import dataclasses

from ddpm_hf.config import HEADINGS, kinds
from ddpm_hf.rules import TYPE_RULES, declared


def options_tables() -> str:
    """Return Markdown with a heading, a sentence and a table of options for each class of options."""
    lines = []
    for heading in HEADINGS:
        lines += [f"## {heading._argument_group_name}", "", heading.__doc__, ""]
        lines += ["| option | default | values | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(heading):
            about, (kind, _) = declared(field), kinds()[field.name]
            values = about.rule or (None if kind is str else TYPE_RULES[kind])
            cells = (f"`{field.name}`", about.default, values.text if values else "", about.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_) -> str:
    """Put the tables where a page asks for them."""
    return markdown.replace("<!-- tables of options -->", options_tables())
