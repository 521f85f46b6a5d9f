"""How one weight is to be quantized: what users say (`Spec`, rules by path) and the plan that it comes to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bit_matmul import contract
from pbjax import _checks, _format, _paths, _sharding, _uses

_DTYPES = tuple(map(np.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))  # of the floats that JAX holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How the weights that a rule matches are quantized; a field left out is `quantize`'s own argument.

    Attributes:
      bits: bitlayers to store, 1..16.
      contract: axes of the whole weight that a product sums over.
      stack: leading axes that are scanned, mapped or indexed over: (), (0,), (0, 1), ...
      group_size: consecutive k that share a scale, a multiple of 32; None for all of k.
      activation_bits: 2..24, or None for float activations.
      clip_bits: number of bitlayers to choose the clipping for; None for no clipping.
    """

    bits: int | None = None
    contract: tuple[int, ...] | None = None
    stack: tuple[int, ...] | None = None
    group_size: int | EllipsisType | None = ...
    activation_bits: int | EllipsisType | None = ...
    clip_bits: int | EllipsisType | None = ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one weight is quantized: the static arguments of `pack_array`."""

    bits: int
    num_stack: int
    contract_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    group_size: int | None
    activation_bits: int | None
    clip_bits: int | None
    in_blocks: bool
    layer_by_layer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """The numbers of a `Spec`, all given, checked and of type int."""

    bits: int
    group_size: int | None
    activation_bits: int | None
    clip_bits: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A `Spec` with nothing left out but the axes that the use of a weight may decide."""

    widths: Widths
    contract: tuple[int, ...] | None = None
    stack: tuple[int, ...] | None = None


def check_widths(bits: Any, group_size: Any, activation_bits: Any, clip_bits: Any, where: str) -> Widths:
    """Raises TypeError or ValueError unless the numbers of a `Spec` are in range."""
    bits = _checks.integer("bits", bits, 1, contract.MAX_BITS, where)
    return Widths(
        bits=bits,
        group_size=_checks.group_size(group_size, where),
        activation_bits=_checks.activation_bits(activation_bits, where),
        clip_bits=None if clip_bits is None else _checks.integer("clip_bits", clip_bits, 1, bits, where),
    )


def compile_rules(rules: Mapping[str, int | Spec | None] | None, defaults: Widths) -> _paths.Patterns[Rule | None]:
    """The `rules` of `quantize`: path patterns to what they say, None for "leave as it is"."""
    patterns = _paths.compile_patterns("rules", rules or {})
    return [(pattern, None if rule is None else _rule(pattern.pattern, rule, defaults)) for pattern, rule in patterns]


def _rule(pattern: str, rule: int | Spec, defaults: Widths) -> Rule:
    where = f"rule {pattern!r}"
    spec = rule if isinstance(rule, Spec) else Spec(bits=rule)

    def given(name: str) -> Any:
        value = getattr(spec, name)
        return getattr(defaults, name) if value is ... else value

    return Rule(
        widths=check_widths(
            defaults.bits if spec.bits is None else spec.bits,
            given("group_size"),
            given("activation_bits"),
            given("clip_bits"),
            where,
        ),
        contract=_axes("contract", spec.contract, where),
        stack=_axes("stack", spec.stack, where),
    )


def _axes(name: str, axes: Any, where: str) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, (tuple, list)) or not all(isinstance(a, (int, np.integer)) for a in axes):
        raise TypeError(f"`{name}` must be a tuple of axes, but got {axes!r} ({where}). Write one axis as (0,).")
    return tuple(int(a) for a in axes)


def plan(name: str, leaf: Any, uses: list[_uses.Use], rule: Rule) -> Plan:
    """What a rule and the uses of a weight come to; raises with the weight's name where they do not fit."""
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize >= 2):
        raise TypeError(
            f"a weight to quantize must be a float array of 16 bits or more, but {name} is {_describe(leaf)}."
        )
    if leaf.dtype not in _DTYPES:  # another byte order, or a long double
        raise TypeError(
            f"a weight to quantize must be float16, bfloat16, float32 or float64 of this machine, but {name} is "
            f"{_describe(leaf)}. Cast it first."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"a weight to quantize must have values, but {name} has a shape only. Use `jax.eval_shape`.")
    rank = leaf.ndim
    layout = _uses.layout_of(leaf.shape, uses)
    if layout is None:  # Flax's convention: the last axis is the output
        layout = _uses.Layout(0, tuple(range(rank - 1)))
    num_stack, contract_axes = layout.num_stack, layout.contract
    if rule.stack is not None:
        num_stack = len(rule.stack)
        if rule.stack != tuple(range(num_stack)):
            raise ValueError(f"`stack` must name leading axes (0, 1, ..), but got {rule.stack} ({name}).")
        if rule.contract is None:
            contract_axes = tuple(range(num_stack, rank - 1))
    if rule.contract is not None:
        contract_axes = tuple(a + rank if a < 0 else a for a in rule.contract)
    if (
        not contract_axes
        or len(set(contract_axes)) < len(contract_axes)
        or not all(num_stack <= a < rank for a in contract_axes)
    ):
        raise ValueError(
            f"`contract` must name axes of the weight behind its stack axes, but got {contract_axes} for shape "
            f"{leaf.shape} with {num_stack} stack axes ({name}). Leave the weight out with a rule of None, or name its "
            "axes with a `Spec`."
        )
    if 0 in leaf.shape:
        raise ValueError(f"a weight to quantize must not be empty, but {name} is {_describe(leaf)}.")
    k = math.prod(leaf.shape[a] for a in contract_axes)
    widths = rule.widths
    if widths.group_size is not None:  # what lies beyond k is nothing, and must not become padding
        widths = dataclasses.replace(
            widths, group_size=min(widths.group_size, contract.num_words(k) * contract.WORD_BITS)
        )
    if (widths.group_size or k) > _format.MAX_GROUP:
        raise ValueError(
            f"a weight to quantize must have at most {_format.MAX_GROUP} inputs to a scale, but {name} of shape "
            f"{leaf.shape} has {widths.group_size or k}. Give it a smaller `group_size`."
        )
    packed_contract = tuple(a - num_stack for a in contract_axes)
    return Plan(
        num_stack=num_stack,
        contract_axes=packed_contract,
        output_axes=tuple(a for a in range(rank - num_stack) if a not in packed_contract),
        in_blocks=isinstance(leaf, np.ndarray) or (is_concrete(leaf) and len(leaf.sharding.device_set) == 1),
        layer_by_layer=not _sharding.cuts_stack(leaf, num_stack),
        **dataclasses.asdict(widths),
    )


def is_concrete(leaf: Any) -> bool:
    """Whether a leaf is a JAX array whose values are known."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
