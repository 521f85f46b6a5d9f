"""Command line options that several examples have, and their types."""

from __future__ import annotations

import argparse
from pathlib import Path

from recurrent import CELLS


def positive(text: str) -> int:
    """The type of options that count something."""
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer, but got {text!r}")
    return int(text)


def activation_bits(text: str) -> int | None:
    """The type of `--activation-bits`."""
    if text == "none":
        return None
    if not (text.isdigit() and 2 <= int(text) <= 24):
        raise argparse.ArgumentTypeError(f"must lie in 2..24 or be none, but got {text!r}")
    return int(text)


def recurrent_parser(
    description: str | None, *, embedding: int, paper: str, steps: int, step: str, output: str
) -> argparse.ArgumentParser:
    """The options of examples that train a recurrent network and measure it.

    Args:
      description: of the example.
      embedding: default width of the embedding.
      paper: the widths that --paper stands for.
      steps: default number of training steps.
      step: what one step takes.
      output: default name of the picture.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--cell", choices=CELLS, default="lstm", help="kind of recurrent layer (default: %(default)s)")
    add("--hidden", type=positive, default=1536, help="width of the recurrent layer (default: %(default)s)")
    add("--embedding", type=positive, default=embedding, help="width of the embedding (default: %(default)s)")
    add("--paper", action="store_true", help=f"the paper's widths: {paper}; takes minutes more")
    add("--steps", type=positive, default=steps, help=f"training steps of {step} (default: %(default)s)")
    add("--activation-bits", type=activation_bits, default=16, metavar="A",
        help="width of the fixed-point activations, 2..24, or none for float ones (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the initial weights and of all data drawn (default: %(default)s)")
    add("--output", type=Path, default=Path(output), help="the picture (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    return parser
