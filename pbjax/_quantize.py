"""Trees of weights to trees of BitTensors and back: `quantize`, `dequantize`, `with_bitlayers`, `truncate`."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.typing import ArrayLike

from pallas_kernels.bit_matmul import contract
from pbjax import _bit_tensor, _matmul, _paths, _uses
from pbjax._bit_tensor import BitTensor, is_bit_tensor

_PROGRESS_BYTES = 256 * 2**20  # a bar appears, on a terminal, from this size on


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
    group_size: int | Any | None = ...
    activation_bits: int | Any | None = ...
    clip_bits: int | Any | None = ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one weight is quantized: the static arguments of `pack_array`."""

    bits: int
    num_stack: int
    contract_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    group_size: int | None
    activation_bits: int | None
    clip_bits: int | None
    in_blocks: bool


def quantize(
    tree: Any,
    bits: int,
    *,
    fn: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    group_size: int | None = None,
    activation_bits: int | None = 16,
    clip_bits: int | None = None,
    select: Callable[[str, jax.Array], bool] | None = None,
    rules: Mapping[str, int | Spec | None] | None = None,
    progress: bool | None = None,
) -> Any:
    """Replaces weights of a tree by BitTensors, without data and without training.

    A weight w of a group with scale s = max|w| gets the code

        c = clip(floor((w / s + 1) * 2**(bits-1)), 0, 2**bits - 1),

    whose bits, most significant first, are its bitlayers. The first b of them are the b-bit quantization of w, with a
    scale of their own for b < 4 (least squares over the group) and s from 4 on.

    How a weight is used decides how it is packed. With `fn`, `fn(tree, *args)` is traced, without computing anything,
    and each weight is packed for the operation that consumes it. Without, a weight of rank 2 is taken as (in, out), and
    of all others the last axis is taken as the output. A wrong guess costs speed, never correctness.

    Args:
      tree: any pytree: Linen variables, an `nnx.State` or `nnx.Module`, dicts. BitTensors in it stay as they are.
      bits: bitlayers to store, 1..16.
      fn: a function whose first argument is `tree`.
      args: the other arguments of `fn`; `jax.ShapeDtypeStruct`s will do.
      group_size: consecutive k that share a scale, a multiple of 32; None for one scale per output channel.
      activation_bits: width of fixed-point activations in products, 2..24, or None for float ones.
      clip_bits: if given, each group is clipped to what gives the least error at this many bitlayers. Better below,
        worse above it.
      select: which leaves to quantize, from their path and value. The default is every `kernel` of rank 2 or more,
        and, with `fn`, every weight that a product consumes.
      rules: path patterns (regular expressions, searched for) to a number of bits, a `Spec`, or None for "leave as it
        is". The first that matches decides, also about leaves that `select` would not take.
      progress: whether to show a progress bar; None shows one on a terminal for large trees.

    Returns:
      The same tree with BitTensors in place of the weights chosen. Pure: may run under `jit`, `vmap` and `eval_shape`,
      and keeps the sharding of its inputs to XLA.

    Raises:
      TypeError: a chosen leaf is not a float array.
      ValueError: a width or group size out of range, axes that do not fit, nothing to quantize, or a weight with a NaN
        or an infinity (only where its value is known); the message names the path.

    Cost: one weight at a time. Beyond the result, intermediates stay below the size of the largest weight, or some
    32 MB where that is more; under `jit` or on several devices they are about seven times one weight (one layer of a
    stack).

    References:
      PrecisionBatching: Lam, Yedidia, Banbury, Reddi, arXiv 2003.00822.

    Example:
      >>> params = {"dense": {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}}
      >>> pbjax.quantize(params, bits=8)["dense"]["kernel"]
      BitTensor(float32[64, 64], bits=8, contract_axes=(0,), group_size=None, activation_bits=16)
    """
    defaults = Spec(bits=bits, group_size=group_size, activation_bits=activation_bits, clip_bits=clip_bits)
    _check_spec(defaults, "argument of quantize")
    patterns = _compile_rules(rules, defaults)
    names, leaves, treedef = _paths.named_leaves(tree)
    uses = [[]] * len(leaves) if fn is None else _uses.trace_uses(fn, tree, args)
    plans: dict[int, _Plan] = {}
    for i, (name, leaf, leaf_uses) in enumerate(zip(names, leaves, uses, strict=True)):
        spec = next((spec for pattern, spec in patterns if pattern.search(name)), ...)
        if is_bit_tensor(leaf) or spec is None:
            continue
        if spec is ... and not (select or functools.partial(_is_default, uses=leaf_uses))(name, leaf):
            continue
        plans[i] = _plan(name, leaf, leaf_uses, defaults if spec is ... else spec)
    if not plans and not any(map(is_bit_tensor, leaves)):
        raise ValueError(
            f"`tree` must hold a weight to quantize, but none of its {len(leaves)} leaves was chosen. By default these "
            "are arrays named `kernel` of rank 2 or more; name others with `rules` or `select`, or give `fn` and "
            "`args`."
        )
    for i in _track(plans, sum(leaves[i].nbytes for i in plans if hasattr(leaves[i], "nbytes")), progress):
        _check_finite(names[i], leaves[i])
        # One weight at a time, also where dispatch is asynchronous: their intermediates never add up.
        leaves[i] = jax.block_until_ready(_pack(leaves[i], plans[i]))
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnums=1)
def _pack(leaf: jax.Array, plan: _Plan) -> BitTensor:
    return _bit_tensor.pack_array(leaf, **dataclasses.asdict(plan))


def dequantize(tree: Any) -> Any:
    """Replaces every BitTensor of a tree by the float weight that its bitlayers in use stand for.

    Args:
      tree: any pytree.

    Returns:
      The tree with arrays of the original shapes and dtypes.
    """
    return _map_tensors(lambda tensor, name: _dequantize(tensor), tree)


_dequantize = jax.jit(_bit_tensor.unpack_array)


def with_bitlayers(tree: Any, bitlayers: ArrayLike | Mapping[str, ArrayLike] | Any) -> Any:
    """The same weights with another number of bitlayers in use; nothing is copied and nothing recompiled.

    Args:
      tree: any pytree with BitTensors.
      bitlayers: one of
        - an int, or an int array (possibly traced) that broadcasts to the stack axes of every BitTensor;
        - a dict from path patterns (regular expressions, searched for; the first match decides) to such numbers,
          where BitTensors that no pattern matches keep theirs;
        - a tree of such numbers with the structure of `tree`, where None keeps a BitTensor's own and any value may
          stand for leaves that are no BitTensors.

        Python and NumPy integers must lie in 1..bits; JAX arrays, whose values may not be known, are clipped to it.

    Returns:
      The tree with new `bitlayers` leaves.

    Raises:
      TypeError: a number that is no integer.
      ValueError: a number out of range, a pattern that matches nothing, or a tree of another structure.

    Example:
      >>> qparams = pbjax.quantize({"kernel": jnp.eye(64)}, bits=8)
      >>> pbjax.with_bitlayers(qparams, 4)["kernel"].bitlayers
      Array(4, dtype=int32)
    """
    names, leaves, treedef = _paths.named_leaves(tree)
    numbers = _numbers_per_leaf(bitlayers, names, leaves, treedef)
    for i, (name, leaf, number) in enumerate(zip(names, leaves, numbers, strict=True)):
        if is_bit_tensor(leaf) and number is not None:
            leaves[i] = _set_bitlayers(leaf, number, name)
    return jax.tree.unflatten(treedef, leaves)


def _set_bitlayers(tensor: BitTensor, bitlayers: ArrayLike, name: str) -> BitTensor:
    _bit_tensor.check_bitlayers(bitlayers, tensor.bits, name)
    bitlayers = jnp.asarray(bitlayers)
    shape = tensor.stack_shape
    if bitlayers.ndim > len(shape) or any(
        a not in (1, b) for a, b in zip(bitlayers.shape, shape[len(shape) - bitlayers.ndim :], strict=True)
    ):
        raise ValueError(
            f"`bitlayers` must broadcast to the stack axes {shape} of the weight, but got shape {bitlayers.shape} "
            f"({name}). Map over several numbers with `jax.vmap`."
        )
    bitlayers = bitlayers.reshape((1,) * (len(shape) - bitlayers.ndim) + bitlayers.shape)
    return tensor.replace(bitlayers=jnp.broadcast_to(_bit_tensor.clip_bitlayers(bitlayers, tensor.bits), shape))


def _numbers_per_leaf(bitlayers: Any, names: list[str], leaves: list[Any], treedef: Any) -> list[Any]:
    """One number, or None for "keep", for each leaf."""
    if jax.tree_util.all_leaves([bitlayers]) and bitlayers is not None:
        return [bitlayers] * len(leaves)
    if isinstance(bitlayers, Mapping) and not _same_structure(bitlayers, treedef):
        patterns = [(re.compile(pattern), number) for pattern, number in bitlayers.items() if _is_pattern(pattern)]
        tensors = [name for name, leaf in zip(names, leaves, strict=True) if is_bit_tensor(leaf)]
        for pattern, _ in patterns:
            if not any(pattern.search(name) for name in tensors):
                raise ValueError(
                    f"`bitlayers` must name BitTensors of the tree, but pattern {pattern.pattern!r} matches none of "
                    f"{', '.join(tensors) or 'none'}."
                )
        return [next((number for pattern, number in patterns if pattern.search(name)), None) for name in names]
    if not _same_structure(bitlayers, treedef):
        raise ValueError(
            "`bitlayers` must be a number, a dict from path patterns to numbers, or a tree with the structure of "
            f"`tree`, but got a tree of structure {jax.tree.structure(bitlayers)}."
        )
    return treedef.flatten_up_to(bitlayers)


def _is_pattern(pattern: Any) -> bool:
    if not isinstance(pattern, str):
        raise TypeError(f"path patterns must be strings, but got {pattern!r}.")
    return True


def _same_structure(numbers: Any, treedef: Any) -> bool:
    try:
        treedef.flatten_up_to(numbers)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def truncate(tree: Any, bitlayers: int) -> Any:
    """Drops all but the first bitlayers: the tree that quantizing to that many bits would have given.

    Args:
      tree: any pytree with BitTensors.
      bitlayers: how many to keep; BitTensors that store no more are left as they are.

    Returns:
      The tree with smaller BitTensors. Numbers in use that are larger come down to `bitlayers`.

    Raises:
      TypeError: `bitlayers` is no int (shapes depend on it, so it cannot be traced).
      ValueError: `bitlayers` is less than 1 or more than 16.
    """
    _check_width("bitlayers", bitlayers, 1, contract.MAX_BITS, "argument of truncate")

    def cut(tensor: BitTensor, name: str) -> BitTensor:
        if tensor.bits <= bitlayers:
            return tensor
        return tensor.replace(
            words=tensor.words[..., :bitlayers, :, :],
            scale=tensor.scale[..., : min(bitlayers, contract.NUM_SCALES), :, :],
            bitlayers=_bit_tensor.clip_bitlayers(tensor.bitlayers, bitlayers),
            bits=bitlayers,
        )

    return _map_tensors(cut, tree)


def _map_tensors(fn: Callable[[BitTensor, str], Any], tree: Any) -> Any:
    names, leaves, treedef = _paths.named_leaves(tree)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if is_bit_tensor(leaf):
            _bit_tensor.check_bit_tensor(leaf, name)
            leaves[i] = fn(leaf, name)
    return jax.tree.unflatten(treedef, leaves)


def _is_default(name: str, leaf: Any, uses: list[_uses.Use]) -> bool:
    is_weight = getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_weight and (name.split("/")[-1] == "kernel" or _uses.has_product(uses))


def _compile_rules(rules: Mapping[str, int | Spec | None] | None, defaults: Spec) -> list[tuple[re.Pattern, Any]]:
    compiled = []
    for pattern, rule in (rules or {}).items():
        if rule is not None:
            if not isinstance(rule, Spec):
                rule = Spec(bits=rule)
            rule = Spec(
                bits=defaults.bits if rule.bits is None else rule.bits,
                contract=rule.contract,
                stack=rule.stack,
                **{
                    field: getattr(defaults if getattr(rule, field) is ... else rule, field)
                    for field in ("group_size", "activation_bits", "clip_bits")
                },
            )
            _check_spec(rule, f"rule {pattern!r}")
        compiled.append((re.compile(pattern), rule))
    return compiled


def _check_spec(spec: Spec, where: str) -> None:
    _check_width("bits", spec.bits, 1, contract.MAX_BITS, where)
    if spec.group_size is not None:
        _check_width("group_size", spec.group_size, 1, None, where)
        if spec.group_size % contract.WORD_BITS:
            raise ValueError(
                f"`group_size` must be a multiple of {contract.WORD_BITS}, but got {spec.group_size} ({where})."
            )
    if spec.clip_bits is not None:
        _check_width("clip_bits", spec.clip_bits, 1, spec.bits, where)
    _matmul.check_activation_bits(spec.activation_bits, where)


def _check_width(name: str, value: Any, low: int, high: int | None, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int, but got {value!r} ({where}).")
    if value < low or (high is not None and value > high):
        limits = f"lie in {low}..{high}" if high is not None else f"be at least {low}"
        raise ValueError(f"`{name}` must {limits}, but got {value} ({where}).")


def _plan(name: str, leaf: Any, uses: list[_uses.Use], spec: Spec) -> _Plan:
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise TypeError(f"a weight to quantize must be a float array, but {name} is {_describe(leaf)}.")
    rank = leaf.ndim
    layout = _uses.layout_of(leaf.shape, uses)
    if layout is None:  # Flax's convention: the last axis is the output
        layout = _uses.Layout(0, tuple(range(rank - 1)))
    num_stack, contract_axes = layout.num_stack, layout.contract
    if spec.stack is not None:
        num_stack = len(spec.stack)
        if spec.stack != tuple(range(num_stack)):
            raise ValueError(f"`stack` must name leading axes (0, 1, ..), but got {spec.stack} ({name}).")
        if spec.contract is None:
            contract_axes = tuple(range(num_stack, rank - 1))
    if spec.contract is not None:
        contract_axes = tuple(a + rank if a < 0 else a for a in spec.contract)
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
    packed_contract = tuple(a - num_stack for a in contract_axes)
    assert spec.bits is not None, "rules take the default"
    return _Plan(
        bits=int(spec.bits),
        num_stack=num_stack,
        contract_axes=packed_contract,
        output_axes=tuple(a for a in range(rank - num_stack) if a not in packed_contract),
        group_size=spec.group_size,
        activation_bits=spec.activation_bits,
        clip_bits=spec.clip_bits,
        in_blocks=isinstance(leaf, np.ndarray) or (_is_concrete(leaf) and len(leaf.sharding.device_set) == 1),
    )


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)


def _check_finite(name: str, leaf: Any) -> None:
    """Raises ValueError for a weight with a NaN or an infinity; a traced value cannot be looked at."""
    if not isinstance(leaf, np.ndarray) and not _is_concrete(leaf):
        return
    with jax.ensure_compile_time_eval():  # a known value can be looked at inside a trace too
        if not _all_finite(leaf):
            kind = "a NaN" if jnp.isnan(jnp.asarray(leaf)).any() else "an infinity"
            raise ValueError(f"a weight to quantize must be finite, but {name} holds {kind}.")


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _track(plans: Mapping[int, _Plan], num_bytes: int, progress: bool | None) -> Iterable[int]:
    if progress is None:
        progress = num_bytes >= _PROGRESS_BYTES and sys.stderr.isatty()
    if not progress:
        return plans
    return rich.progress.track(plans, "quantize", console=rich.console.Console(stderr=True))
