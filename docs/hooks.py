"""Hooks of the documentation site: some pages are generated, so that nothing is written twice.

The page of options comes from the declarations of the options. The first page is README.md, and the page for
contributors is CONTRIBUTING.md.
"""

import dataclasses
import re
from pathlib import Path

from ddpm_hf.config import HEADINGS, kinds
from ddpm_hf.rules import TYPE_RULES, declared

ROOT = Path(__file__).parents[1]


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


def page_of(file: str) -> str:
    """Return the text of a Markdown file in the root of the repository, with links as on the site."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")


def on_page_markdown(markdown: str, **_) -> str:
    """Replace the comments that ask for generated text by that text."""
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda found: page_of(found[1]), markdown)
    return markdown.replace("<!-- tables of options -->", options_tables())
