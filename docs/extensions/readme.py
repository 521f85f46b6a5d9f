"""Sections of README.md as parts of pages, so that neither has to repeat the other, into docs/_generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FOLDER = Path(__file__).parent.parent / "_generated"
README = Path(__file__).parent.parent.parent / "README.md"

SECTIONS = {"Limits": "readme_limits.md"}


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level, its links as the pages have them."""
    _, begin, rest = text.partition(f"\n## {heading}\n")
    if not begin:
        raise ValueError(f"README.md must have the section {heading!r}, which a page is made of.")
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", _link, rest.partition("\n## ")[0])


def _link(match: re.Match[str]) -> str:
    text, target = match.groups()
    if target.startswith(("http://", "https://")):
        return match[0]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    return text  # of files and headings that the pages do not have


def write(app: Sphinx, config: Any) -> None:
    """Each section as a file to include."""
    del app, config
    FOLDER.mkdir(exist_ok=True)
    for heading, name in SECTIONS.items():
        (FOLDER / name).write_text(section(README.read_text(), heading))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}
