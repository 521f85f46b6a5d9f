"""Tables with a row for each weight: what those of `pbjax.report` and `pbjax.allocate` have in common."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import rich.console
import rich.table
import rich.text

_SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)  # numbers of bitlayers that have a column, beside the largest


class Tabular:
    """What prints as its table, in a terminal, in a notebook and as text."""

    def to_table(self) -> rich.table.Table:
        raise NotImplementedError

    def __str__(self) -> str:
        text = io.StringIO()
        rich.console.Console(file=text, width=160, force_jupyter=False).print(self.to_table())
        return text.getvalue()

    def __rich__(self) -> rich.table.Table:
        return self.to_table()


def table_of(columns: Sequence[str], *, caption: str | None = None) -> rich.table.Table:
    """A table with a path in its first column, which folds, and numbers in the others."""
    table = rich.table.Table(caption=caption)
    table.add_column("path", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def shown_bitlayers(numbers: Iterable[int]) -> list[int]:
    """Those of several numbers of bitlayers that get a column."""
    numbers = sorted(numbers)
    return [b for b in numbers if b in _SHOWN or b == numbers[-1]]


def weight_cells(path: str, shape: Sequence[int]) -> tuple[rich.text.Text, str]:
    """The first two cells of a weight."""
    return rich.text.Text(path), "x".join(map(str, shape))  # a path as it is: it may look like markup


def kilobytes(num_bytes: int) -> str:
    return f"{num_bytes / 1000:,.1f}"
