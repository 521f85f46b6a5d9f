"""Command line options that several examples have, and their types: what cannot work is refused before work begins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from recurrent import CELLS

PICTURES = (".png", ".svg", ".pdf", ".jpg")


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of options that take an integer in low..high."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be an integer in {low}..{high}, but got {text!r}")
        return int(text)

    return parse


width = integer(1, 2**15)  # of a layer
steps = integer(1, 10**6)  # of training
seed = integer(0, 2**32 - 1)  # what NumPy, scikit-learn and JAX all take


def seconds(text: str) -> float:
    """The type of options that limit a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, but got {text!r}")
    return value


def activation_bits(text: str) -> int | None:
    """The type of `--activation-bits`."""
    if text == "none":
        return None
    try:
        return integer(2, 24)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must lie in 2..24 or be none, but got {text!r}") from None


def writable(text: str) -> Path:
    """The type of options that name a file to write, tried out here: what is measured must not be lost in the end."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written, but got: {error}") from None
    return path


def picture(text: str) -> Path:
    """The type of `--output`."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PICTURES)}, but got {text!r}")
    return writable(text)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def recurrent_parser(
    description: str | None, *, widths: Mapping[str, tuple[int, int]], steps_of: str, num_steps: int, output: str
) -> argparse.ArgumentParser:
    """The options of examples that train a recurrent network and measure it.

    Args:
      description: of the example.
      widths: by the name of an option a default, and the one with --paper.
      steps_of: what one training step takes.
      num_steps: default number of training steps.
      output: default name of the picture.
    """
    parser = parser_of(description)
    add = parser.add_argument
    add("--cell", choices=CELLS, default="lstm", help="kind of recurrent layer (default: %(default)s)")
    for name, (default, paper) in widths.items():
        what = {"hidden": "the recurrent layer", "width": "the hidden layer of the MLP"}.get(name, f"the {name}")
        text = f"width of {what} (default: {default}, with --paper {paper})"
        add(f"--{name}", type=width, default=default, metavar="N", help=text)
    add("--paper", action="store_true", help="the paper's widths, where none is given; takes minutes more")
    add("--steps", type=steps, default=num_steps, metavar="N",
        help=f"training steps of {steps_of} (default: %(default)s)")  # fmt: skip
    add("--activation-bits", type=activation_bits, default=16, metavar="A",
        help="width of the fixed-point activations, 2..24, or none for float ones (default: %(default)s)")  # fmt: skip
    add("--seed", type=seed, default=0, metavar="N",
        help="of the initial weights and of all data drawn (default: %(default)s)")  # fmt: skip
    add("--output", type=picture, default=output, metavar="FILE", help="the picture (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    return parser


def parse_recurrent(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, widths: Mapping[str, tuple[int, int]]
) -> argparse.Namespace:
    """The options; --paper stands for other defaults, so that widths that are given stay."""
    args = parser.parse_args(argv)
    if not args.paper:
        return args
    parser.set_defaults(**{name: paper for name, (_, paper) in widths.items()})
    return parser.parse_args(argv)
