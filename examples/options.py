"""Types of command line options that several examples have."""

from __future__ import annotations

import argparse


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
