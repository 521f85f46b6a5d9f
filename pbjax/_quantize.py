"""Trees of weights to trees of BitTensors and back: `quantize`, `dequantize`, `with_bitlayers`, `truncate`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.typing import ArrayLike

from pallas_kernels.bit_matmul import contract
from pbjax import _bit_tensor, _checks, _paths, _sharding, _specs, _uses
from pbjax._bit_tensor import BitTensor, is_bit_tensor
from pbjax._specs import Plan, Rule, Spec

_PROGRESS_BYTES = 256 * 2**20  # a bar appears, on a terminal, from this size on


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
    scale of their own for b < 4 (<w, w> / <w, v_b> over the group: without bias) and s from 4 on.

    How a weight is used decides how it is packed. With `fn`, `fn(tree, *args)` is traced, without computing anything,
    and each weight is packed for the operation that consumes it. Without, a weight of rank 2 is taken as (in, out), and
    of all others the last axis is taken as the output. Under `pbjax.quantized` a wrong guess costs speed, never
    correctness. A stack of weights that is sliced or mapped outside of it needs `fn`, or a rule that names its `stack`.
    For an NNX module that is to be called as it stands, see `pbjax.nnx.quantize`, whose layers know their weights.

    Args:
      tree: any pytree: Linen variables, an `nnx.State` or `nnx.Module`, dicts. BitTensors in it stay as they are.
      bits: bitlayers to store, 1..16.
      fn: a function whose first argument is `tree`.
      args: the other arguments of `fn`; `jax.ShapeDtypeStruct`s will do.
      group_size: consecutive k that share a scale, a multiple of 32; None for one scale per output channel. Where a
        weight has less k, its group is cut to the words that hold it.
      activation_bits: width of fixed-point activations in products, 2..24, or None for float ones.
      clip_bits: if given, each group is clipped to what gives the least error at this many bitlayers; of ranges as good
        to the widest (so 1, which stores only signs, clips nothing). Better below, worse above it.
      select: which leaves to quantize, from their path and value. The default is every `kernel` of rank 2 or more,
        and, with `fn`, every weight that a product consumes.
      rules: path patterns (regular expressions, searched for) to a number of bits, a `Spec`, or None for "leave as it
        is". The first that matches decides, also about leaves that `select` would not take.
      progress: whether to show a progress bar; None shows one on a terminal for large trees.

    Returns:
      The same tree with BitTensors in place of the weights chosen. Pure: may run under `jit`, `vmap` and `eval_shape`,
      and keeps weights where they are: a weight that is cut over output channels, over k in whole words of 32 and whole
      groups, or over stack axes is packed so.

    Raises:
      TypeError: a chosen leaf is not a float array, or an argument is of another type than it should be.
      ValueError: a width or group size out of range, axes that do not fit, a rule that matches no leaf, nothing to
        quantize, a weight with a NaN or an infinity (only where its value is known), or one that is cut inside a word
        or a group; the message names the path.

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
    widths = _specs.check_widths(bits, group_size, activation_bits, clip_bits, "argument of quantize")
    patterns = _specs.compile_rules(rules, widths)
    _check_functions(fn, args, select)
    names, leaves, treedef = _paths.named_leaves(tree)
    _paths.check_matches("rules", patterns, names, "leaves of the tree")
    uses = [[]] * len(leaves) if fn is None else _uses.trace_uses(fn, tree, args)
    plans = plan_leaves(names, leaves, uses, widths=widths, patterns=patterns, select=select, has_fn=fn is not None)
    for i in _track(plans, sum(leaves[i].nbytes for i in plans if hasattr(leaves[i], "nbytes")), progress):
        leaves[i] = pack_leaf(names[i], leaves[i], plans[i])
    return jax.tree.unflatten(treedef, leaves)


def plan_leaves(
    names: list[str],
    leaves: list[Any],
    uses: list[list[_uses.Use]],
    *,
    widths: _specs.Widths,
    patterns: _paths.Patterns[Rule | None],
    select: Callable[..., Any] | None,
    has_fn: bool,
) -> dict[int, Plan]:
    """Which leaves `quantize` packs, and how: plans by place. Of leaves it looks at shapes and dtypes only."""
    plans: dict[int, Plan] = {}
    for i, (name, leaf, leaf_uses) in enumerate(zip(names, leaves, uses, strict=True)):
        rule = _paths.first_match(patterns, name, ...)
        if is_bit_tensor(leaf):
            _check_stored(name, leaf, rule)
            continue
        if rule is None:
            continue
        if rule is ...:
            if not _is_selected(select, name, leaf, leaf_uses):
                continue
            rule = Rule(widths=widths)
        plans[i] = _specs.plan(name, leaf, leaf_uses, rule)
    if not plans and not any(map(is_bit_tensor, leaves)):
        default = "float arrays named `kernel` of rank 2 or more" + " and those that `fn` multiplies with" * has_fn
        advice = "name others with `rules` or `select`" + ", or give `fn` and `args`" * (not has_fn)
        raise ValueError(
            f"`tree` must hold a weight to quantize, but none of its {len(leaves)} leaves was chosen. By default these "
            f"are {default}; {advice}."
        )
    return plans


def pack_leaf(name: str, leaf: Any, plan: Plan) -> BitTensor:
    """One weight packed, and ready: one at a time, also where dispatch is asynchronous, intermediates never add up."""
    _check_finite(name, leaf)
    return jax.block_until_ready(_pack_sharded(leaf, plan, name))


def _check_functions(fn: Any, args: Any, select: Any) -> None:
    where = "argument of quantize"
    if fn is not None:
        _checks.function("fn", fn, where)
    if select is not None:
        _checks.function("select", select, where)
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"`args` must be a tuple, but got {type(args).__name__} ({where}). Write one as (x,).")
    if args and fn is None:
        raise ValueError(f"`args` must come with `fn`, the function that takes them, but got no `fn` ({where}).")


@functools.partial(jax.jit, static_argnums=1)
def _pack(leaf: jax.Array, plan: Plan) -> BitTensor:
    return _bit_tensor.pack_array(leaf, **dataclasses.asdict(plan))


def _pack_sharded(leaf: jax.Array, plan: Plan, name: str) -> BitTensor:
    """Packs a weight where it lies: every device has the bitlayers of the floats that it has."""
    shardings = _sharding.packed_shardings(
        leaf,
        name,
        num_stack=plan.num_stack,
        contract_axes=plan.contract_axes,
        output_axes=plan.output_axes,
        group_size=plan.group_size,
    )
    return _pack(leaf, plan) if shardings is None else _packer(plan, shardings, leaf.shape, leaf.dtype)(leaf)


@functools.lru_cache(maxsize=256)
def _packer(plan: Plan, shardings: _sharding.Packed, shape: tuple[int, ...], dtype: Any) -> Callable[..., BitTensor]:
    """`_pack` on a mesh, to given shardings; the axes of an explicit mesh are left to the compiler inside."""
    pack = lambda leaf: _bit_tensor.pack_array(leaf, **dataclasses.asdict(plan))  # noqa: E731
    packed = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, dtype)).replace(**vars(shardings))
    return jax.jit(jax.sharding.auto_axes(pack, out_sharding=packed), out_shardings=packed)


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
      ValueError: a number out of range, a pattern that matches nothing, a tree of another structure, or no BitTensor
        in `tree`.

    Example:
      >>> qparams = pbjax.quantize({"kernel": jnp.eye(64)}, bits=8)
      >>> pbjax.with_bitlayers(qparams, 4)["kernel"].bitlayers
      Array(4, dtype=int32)
    """
    names, leaves, treedef = _paths.named_leaves(tree)
    _bit_tensor.check_any(leaves)
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
    is_leaf = jax.tree_util.treedef_is_leaf(treedef)  # of which any dict is a tree of the same structure
    if isinstance(bitlayers, Mapping) and (is_leaf or not _same_structure(bitlayers, treedef)):
        patterns = _paths.compile_patterns("bitlayers", bitlayers)
        tensors = (name for name, leaf in zip(names, leaves, strict=True) if is_bit_tensor(leaf))
        _paths.check_matches("bitlayers", patterns, tensors, "BitTensors of the tree")
        return [_paths.first_match(patterns, name, None) for name in names]
    if not _same_structure(bitlayers, treedef):
        raise ValueError(
            "`bitlayers` must be a number, a dict from path patterns to numbers, or a tree with the structure of "
            f"`tree`, but got a tree of structure {jax.tree.structure(bitlayers)}."
        )
    return treedef.flatten_up_to(bitlayers)


def _same_structure(numbers: Any, treedef: Any) -> bool:
    try:
        treedef.flatten_up_to(numbers)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def truncate(tree: Any, bitlayers: int | Mapping[str, int | np.ndarray]) -> Any:
    """Drops all but the first bitlayers: the tree that quantizing to that many bits would have given.

    Args:
      tree: any pytree with BitTensors.
      bitlayers: how many to keep; BitTensors that store no more are left as they are. Or a dict from path patterns to
        such numbers, as `with_bitlayers` and `Allocation.bitlayers` have it: BitTensors that no pattern matches stay as
        they are, and of int[*stack] a stack of weights keeps the most.

    Returns:
      The tree with smaller BitTensors. Numbers in use that are larger come down to `bitlayers`.

    Raises:
      TypeError: `bitlayers` is no int (shapes depend on it, so it cannot be traced).
      ValueError: `bitlayers` is less than 1 or more than 16, a pattern that matches nothing, or no BitTensor in `tree`.

    Example:
      >>> qparams = pbjax.quantize({"a": jnp.eye(64), "b": jnp.eye(64)}, bits=8, rules={"[ab]": 8})
      >>> [leaf.bits for leaf in pbjax.truncate(qparams, {"a": 3}).values()]
      [3, 8]
    """
    names, leaves, treedef = _paths.named_leaves(tree)
    _bit_tensor.check_any(leaves)
    if not isinstance(bitlayers, Mapping):
        bitlayers = _checks.integer("bitlayers", bitlayers, 1, contract.MAX_BITS, "argument of truncate")
    numbers = _numbers_per_leaf(bitlayers, names, leaves, treedef)
    for i, (name, leaf, number) in enumerate(zip(names, leaves, numbers, strict=True)):
        if is_bit_tensor(leaf) and number is not None:
            leaves[i] = _cut(_bit_tensor.checked(leaf, name), number, name)
    return jax.tree.unflatten(treedef, leaves)


def _cut(tensor: BitTensor, number: int | np.ndarray, name: str) -> BitTensor:
    """The first bitlayers of one weight, or of the weights of a stack the most that one of them keeps."""
    if not isinstance(number, np.ndarray):
        number = _checks.integer("bitlayers", number, 1, contract.MAX_BITS, name)
    counts = np.asarray(number)
    if not counts.size:
        return tensor
    _bit_tensor.check_bitlayers(counts, contract.MAX_BITS, name)
    if counts.min() >= tensor.bits:
        return tensor
    used = _set_bitlayers(tensor, np.minimum(counts, tensor.bits), name).bitlayers
    bits = min(int(counts.max()), tensor.bits)
    return tensor.replace(
        words=tensor.words[..., :bits, :, :],
        scale=tensor.scale[..., : min(bits, contract.NUM_SCALES), :, :],
        bitlayers=jnp.minimum(tensor.bitlayers, used),
        bits=bits,
    )


def _map_tensors(fn: Callable[[BitTensor, str], Any], tree: Any) -> Any:
    names, leaves, treedef = _paths.named_leaves(tree)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if is_bit_tensor(leaf):
            leaves[i] = fn(_bit_tensor.checked(leaf, name), name)
    return jax.tree.unflatten(treedef, leaves)


def _check_stored(name: str, tensor: BitTensor, rule: Any) -> None:
    """Raises ValueError where a rule asks for a number of bits that a weight packed before does not have."""
    if isinstance(rule, Rule) and rule.widths.bits != tensor.bits:
        raise ValueError(
            f"a rule must leave packed weights as they are, but asks for {rule.widths.bits} bits of {name}, which "
            f"stores {tensor.bits}. Quantize the float weight, or take fewer with `pbjax.truncate`."
        )


def _is_selected(select: Callable[..., Any] | None, name: str, leaf: Any, uses: list[_uses.Use]) -> bool:
    if select is None:
        return _is_default(name, leaf, uses)
    selected = select(name, leaf)
    if not isinstance(selected, (bool, np.bool_)):
        raise TypeError(f"`select` must return a bool, but got {type(selected).__name__} for {name}.")
    return bool(selected)


def _is_default(name: str, leaf: Any, uses: list[_uses.Use]) -> bool:
    is_weight = getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_weight and (name.split("/")[-1] == "kernel" or _uses.has_product(uses))


def _check_finite(name: str, leaf: Any) -> None:
    """Raises ValueError for a weight with a NaN or an infinity; a traced value cannot be looked at."""
    if not isinstance(leaf, np.ndarray) and not _specs.is_concrete(leaf):
        return
    with jax.ensure_compile_time_eval():  # a known value can be looked at inside a trace too
        if _all_finite(leaf):
            return
        values = np.asarray(leaf).astype(np.float64)
        kind = "a NaN" if np.isnan(values).any() else "an infinity" if np.isinf(values).any() else ""
        kind = kind or f"{np.abs(values).max():g}, which float32 cannot hold"
        raise ValueError(f"a weight to quantize must be finite, but {name} holds {kind}.")


def _all_finite(leaf: np.ndarray | jax.Array) -> bool:
    if isinstance(leaf, np.ndarray):
        with np.errstate(over="ignore"):  # too large for float32, which is what is asked
            return bool(np.isfinite(leaf.astype(np.float32)).all())
    return bool(_all_finite_on_device(leaf))


@jax.jit
def _all_finite_on_device(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf.astype(jnp.float32)).all()


def _track(plans: Mapping[int, Plan], num_bytes: int, progress: bool | None) -> Iterable[int]:
    if progress is None:
        progress = num_bytes >= _PROGRESS_BYTES and sys.stderr.isatty()
    if not progress:
        return plans
    return rich.progress.track(plans, "quantize", console=rich.console.Console(stderr=True))
