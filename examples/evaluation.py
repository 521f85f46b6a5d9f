"""What `language_model.py` and `inference_nli.py` do with a trained model: a table of what it gives, and a picture."""

from __future__ import annotations

import argparse

import comparison
import rich.console
from picture import draw
from quality import Row, Task


def evaluate(task: Task, data_name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of the table, float32 first.

    Args:
      task: the trained model, and what is asked of it.
      data_name: for the titles.
      args: the options of `options.recurrent_parser`.
    """
    variants, _ = comparison.variants(task, (args.activation_bits,), log=print if args.progress else lambda _: None)
    rows = comparison.timed(task, variants)
    title = f"{task.name}, {data_name}"
    rich.console.Console().print(comparison.make_table(rows, title, task.unit))
    draw(rows, title, args.output)
    print(f"wrote {args.output}")
    return rows
