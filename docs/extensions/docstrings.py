"""Docstrings as they are written here, in plain text with formulas, as reStructuredText that autodoc can read.

The differences: a formula or listing is set off by indentation only, names stand in single backticks, and `*`, `|` and
`_` outside of them are mathematics, not markup.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|References|Cost|Note):")
_EXAMPLE = (">>>", "...")
_CODE = re.compile(r"(``.+?``|`[^`]+`)")  # `` `name` `` and `name` alike
_MARKUP = re.compile(r"([*|]|_\b)")


def to_rst(lines: list[str]) -> list[str]:
    """The same docstring, its listings marked as such and its mathematics escaped."""
    out: list[str] = []
    in_listing = in_section = in_item = False
    previous = ""
    for line in lines:
        text = line.lstrip()
        if text == line:
            in_listing = in_listing and not line
            in_section = bool(_SECTION.match(line)) or (in_section and not line)
            in_item = line.startswith("- ")
        elif not in_listing and not in_section and not in_item and not text.startswith(_EXAMPLE):
            in_listing = True  # what is indented outside of sections
            out += ["", "::", ""]
        elif text.startswith("- ") and previous and _indent(previous) < _indent(line):
            out.append("")  # before a list inside of a section
        elif previous == "Returns:":
            line = f"{line[: _indent(line)]}: {text}"  # napoleon would take words before a colon for a type
        out.append(line if in_listing or text.startswith(_EXAMPLE) else _escape(line))
        previous = line
    return out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _escape(line: str) -> str:
    """Escapes what reStructuredText would read as markup, outside of backticks."""
    text, *rest = _CODE.split(line)
    parts = [_MARKUP.sub(r"\\\1", text)]
    for code, text in zip(rest[::2], rest[1::2], strict=True):
        separator = "\\ " if text[:1].isalnum() else ""  # as in `Spec`s
        parts += [f"``{code.strip('`').strip()}``", separator, _MARKUP.sub(r"\\\1", text)]
    return "".join(parts)


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    del app, name, obj, options
    lines[:] = to_rst(textwrap.dedent("\n".join(lines)).split("\n"))
    if what == "property":
        lines[0] = f": {lines[0]}"  # as in "Returns:"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon, which reads the sections
    return {"parallel_read_safe": True}
