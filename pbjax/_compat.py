"""What differs between JAX versions. Everything that depends on one stands here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def split_scan_operands(params: dict[str, Any], values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of a `scan` equation as (constants, carry, scanned)."""
    if "ft_in" in params:  # JAX 0.12: a flat tree of the three
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    return (
        list(values[:num_consts]),
        list(values[num_consts : num_consts + num_carry]),
        list(values[num_consts + num_carry :]),
    )
