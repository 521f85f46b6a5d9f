"""Which outputs of an equation are operands of it, unchanged.

NNX transforms return every weight of a module that they take, because it could have been written to. Such an output is
the operand itself, and nothing has to be done to carry it around the call or the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from pbjax import _compat

Origins = list[int | None]


def forwarded(eqn: Any) -> Origins:
    """For each output of an equation the index of the operand that it is, or None."""
    rule = _RULES.get(eqn.primitive.name)
    return rule(eqn) if rule else [None] * len(eqn.outvars)


def _origins(jaxpr: core.Jaxpr) -> Origins:
    """For each output of a jaxpr the index of the input that it is, or None."""
    origins: dict[Any, int] = {var: i for i, var in enumerate(jaxpr.invars)}

    def origin(atom: Any) -> int | None:
        return None if isinstance(atom, core.Literal) else origins.get(atom)

    for eqn in jaxpr.eqns:
        if not any(origin(atom) is not None for atom in eqn.invars):
            continue
        for var, operand in zip(eqn.outvars, forwarded(eqn), strict=True):
            if operand is not None and (index := origin(eqn.invars[operand])) is not None:
                origins[var] = index
    return [origin(atom) for atom in jaxpr.outvars]


def _call(eqn: Any) -> Origins:
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return _origins(getattr(jaxpr, "jaxpr", jaxpr))


def _scan(eqn: Any) -> Origins:
    _, carry, xs = _compat.split_scan_operands(eqn.params, range(len(eqn.invars)))
    origins = _origins(eqn.params["jaxpr"].jaxpr)
    passed = _invariant(origins[: len(carry)], carry)
    scanned = [i if i in xs else None for i in origins[len(carry) :]]
    return [*passed, *scanned]


def _while(eqn: Any) -> Origins:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = range(num_cond + num_body, len(eqn.invars))
    origins = [None if i is None else i + num_cond for i in _origins(eqn.params["body_jaxpr"].jaxpr)]
    return _invariant(origins, carry)


def _invariant(origins: Origins, carry: Sequence[int]) -> Origins:
    """The parts of a loop's carry that its body returns as they are, at the same place."""
    return [i if i == place else None for i, place in zip(origins, carry, strict=True)]


def _cond(eqn: Any) -> Origins:
    branches = [_origins(branch.jaxpr) for branch in eqn.params["branches"]]
    return [i + 1 if i is not None and set(rest) <= {i} else None for i, *rest in zip(*branches, strict=True)]


_RULES = {
    "jit": _call,
    "closed_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "remat2": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
