"""What is common to the tables of cases: the shape of a product."""

from __future__ import annotations

import dataclasses

import pbjax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    m: int
    k: int
    n: int
    bits: int
    group_size: int | None = None
    activation_bits: int | None = None

    @property
    def problem(self) -> pbjax.Problem:
        return pbjax.Problem(
            m=self.m,
            k=self.k,
            n=self.n,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
        )
