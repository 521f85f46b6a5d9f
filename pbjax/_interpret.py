"""Runs a traced function again with weights in place of some of its arrays.

`call` traces a function with the shapes that the weights stand for and evaluates the result equation by equation.
Equations without a weight run as they are. Those with one go to a rule below; what no rule can do gets the weight as
an array. Control flow is rebuilt around the weights, which pass through it as pytrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from pallas_kernels._compat import varying_like
from pbjax import _compat, _conv, _forward
from pbjax._views import Concatenation, Flipped, View, Weight, is_weight

Values = list[Any]
Rule = Callable[[Any, Values], Values | None]


def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """fn(*args, **kwargs), where some leaves of the arguments are weights.

    Leaves that are neither weights nor arrays (flags, names) are passed through unseen; so are results that are no
    arrays. A weight that the function returns as it came is returned as the weight.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
    dynamic = [i for i, leaf in enumerate(leaves) if is_weight(leaf) or _is_array(leaf)]
    results: dict[str, Any] = {}

    def flat(*arrays):
        full = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            full[i] = varying_like(array, jax.tree.leaves(leaves[i])[0]) if is_weight(leaves[i]) else array
        call_args, call_kwargs = jax.tree.unflatten(treedef, full)
        out_leaves, results["treedef"] = jax.tree.flatten(fn(*call_args, **call_kwargs))
        results["leaves"] = [None if _is_array(leaf) else leaf for leaf in out_leaves]
        return [leaf for leaf in out_leaves if _is_array(leaf)]

    values = [leaves[i] for i in dynamic]
    closed = jax.make_jaxpr(flat)(
        *(jax.ShapeDtypeStruct(value.shape, value.dtype) if is_weight(value) else value for value in values)
    )
    given = {id(value) for value in values}
    outputs = iter(
        value if id(value) in given else _to_array(value, "output of the function")
        for value in _evaluate(closed, values)
    )
    out_leaves = [next(outputs) if leaf is None else leaf for leaf in results["leaves"]]
    return jax.tree.unflatten(results["treedef"], out_leaves)


def trace(fn: Callable[..., Any], *args: Any) -> None:
    """Runs fn(*args) on abstract values. Arrays and `jax.ShapeDtypeStruct`s do alike; other leaves go as they are."""
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def run(arrays):
        full = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            full[i] = array
        fn(*jax.tree.unflatten(treedef, full))
        return ()

    jax.eval_shape(run, [leaves[i] for i in dynamic])


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _to_array(value: Any, primitive: str) -> Any:
    return value.to_array(primitive) if is_weight(value) else value


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any]) -> Values:
    """The outputs of a closed jaxpr; any of them may be a weight."""
    return _evaluate_open(closed.jaxpr, closed.consts, args)


def _evaluate_open(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Values:
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else environment[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        environment.update(zip(eqn.outvars, _evaluate_equation(eqn, values), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(eqn: Any, values: Values) -> Values:
    if any(is_weight(value) for value in values):
        rule = _RULES.get(eqn.primitive.name)
        results = rule(eqn, values) if rule else None
        if results is not None:
            return results
        values = [_to_array(value, eqn.primitive.name) for value in values]
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _maybe(weight: Weight | jax.Array | None) -> Values | None:
    return None if weight is None else [weight]


# Axes and dtypes.


def _transpose(eqn: Any, values: Values) -> Values | None:
    return _maybe(values[0].transpose(eqn.params["permutation"]))


def _reshape(eqn: Any, values: Values) -> Values | None:
    if not isinstance(values[0], View):
        return None
    return _maybe(values[0].reshape(eqn.outvars[0].aval.shape))


def _broadcast_in_dim(eqn: Any, values: Values) -> Values | None:
    """Only where it adds axes of size 1."""
    kept = eqn.params["broadcast_dimensions"]
    shape = eqn.outvars[0].aval.shape
    if tuple(shape[i] for i in kept) != values[0].shape or any(
        size != 1 for i, size in enumerate(shape) if i not in kept
    ):
        return None
    return _reshape(eqn, values)


def _rev(eqn: Any, values: Values) -> Values | None:
    view, dims = values[0], frozenset(eqn.params["dimensions"])
    if isinstance(view, Flipped):
        view, dims = view.view, dims ^ view.dims
    return [Flipped(view, dims)] if isinstance(view, View) else None


def _convert_element_type(eqn: Any, values: Values) -> Values | None:
    return _maybe(values[0].astype(eqn.params["new_dtype"]))


def _identity(eqn: Any, values: Values) -> Values | None:
    del eqn
    return list(values)


def _concatenate(eqn: Any, values: Values) -> Values | None:
    if not all(isinstance(value, View) for value in values):
        return None
    return [Concatenation(tuple(values), eqn.params["dimension"])]


# Parts of weights.


def _slice_view(view: Weight, starts: Sequence[Any], sizes: Sequence[int], strides: Sequence[int]) -> Weight | None:
    if not isinstance(view, View):
        return None
    result: View | None = view
    for dim, (start, size, stride) in enumerate(zip(starts, sizes, strides, strict=True)):
        if result is not None and size != result.shape[dim]:
            result = result.slice_axis(dim, start, size, stride)
    return result


def _slice(eqn: Any, values: Values) -> Values | None:
    starts = eqn.params["start_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    sizes = eqn.outvars[0].aval.shape
    return _maybe(_slice_view(values[0], starts, sizes, strides))


def _dynamic_slice(eqn: Any, values: Values) -> Values | None:
    view, *starts = values
    sizes = eqn.params["slice_sizes"]
    if not is_weight(view) or len(starts) != len(sizes):
        return None
    return _maybe(_slice_view(view, [jnp.asarray(start) for start in starts], sizes, (1,) * len(sizes)))


def _split(eqn: Any, values: Values) -> Values | None:
    view, dim = values[0], eqn.params["axis"]
    if not isinstance(view, View):
        return None
    offsets = itertools.accumulate(eqn.params["sizes"], initial=0)
    parts = [view.slice_axis(dim, start, size) for start, size in zip(offsets, eqn.params["sizes"], strict=False)]
    return None if any(part is None for part in parts) else parts


def _gather(eqn: Any, values: Values) -> Values | None:
    """Rows along one axis, as `jnp.take` and indexing with an integer array make them."""
    view, indices = values
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(view, View) or numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (dim,) = numbers.start_index_map
    batch_rank = indices.ndim - 1
    sizes = tuple(1 if i == dim else size for i, size in enumerate(view.shape))
    if (
        tuple(numbers.collapsed_slice_dims) != (dim,)
        or tuple(numbers.offset_dims) != tuple(range(batch_rank, batch_rank + len(view.shape) - 1))
        or tuple(eqn.params["slice_sizes"]) != sizes
    ):
        return None
    indices = indices[..., 0]
    limit = view.shape[dim]
    inside = (indices >= 0) & (indices < limit)
    rows = view.take(dim, jnp.clip(indices, 0, limit - 1))
    if rows is None:
        return None
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill
        inside = inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim))
        rows = jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))
    return [rows]


# Products.


def _dot_general(eqn: Any, values: Values) -> Values | None:
    lhs, rhs = values
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    out_dtype = eqn.outvars[0].aval.dtype
    if is_weight(lhs) and is_weight(rhs):  # one of them has to be the activations
        lhs = lhs.to_array("dot_general of two weights")
    if isinstance(lhs, Flipped) or isinstance(rhs, Flipped):
        return None
    if is_weight(rhs):
        return _maybe(rhs.dot(lhs, (lhs_contract, lhs_batch), (rhs_contract, rhs_batch), out_dtype))
    y = lhs.dot(rhs, (rhs_contract, rhs_batch), (lhs_contract, lhs_batch), out_dtype)
    if y is None:
        return None
    # [batch, rows of rhs, free of lhs] -> [batch, free of lhs, rows of rhs]
    num_batch, num_free = len(lhs_batch), len(lhs.shape) - len(lhs_batch) - len(lhs_contract)
    rows = range(num_batch, y.ndim - num_free)
    return [y.transpose((*range(num_batch), *range(y.ndim - num_free, y.ndim), *rows))]


def _conv_general_dilated(eqn: Any, values: Values) -> Values | None:
    x, kernel = values
    if is_weight(x) or not isinstance(kernel, (View, Flipped)):
        return None
    return _maybe(_conv.convolve(x, kernel, eqn.params, eqn.outvars[0].aval.dtype))


# Calls and control flow.


def _call(eqn: Any, values: Values) -> Values | None:
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return _evaluate(jaxpr, values)


def _kept(eqn: Any, values: Values) -> Values:
    """For each output of an equation the weight among its operands that it is, or None."""
    operands = (None if i is None else values[i] for i in _forward.forwarded(eqn))
    return [value if is_weight(value) else None for value in operands]


def _arrays(outputs: Values, kept: Values, primitive: str) -> Values:
    """What a function inside a transform may return: arrays, and nothing in place of weights that are kept outside."""
    return [
        _to_array(value, primitive) if weight is None else None for value, weight in zip(outputs, kept, strict=True)
    ]


def _merge(outputs: Sequence[Any], kept: Values) -> Values:
    return [value if weight is None else weight for value, weight in zip(outputs, kept, strict=True)]


def _remat(eqn: Any, values: Values) -> Values | None:
    params, kept = eqn.params, _kept(eqn, values)

    def run(*values):
        return _arrays(_evaluate_open(params["jaxpr"], (), values), kept, "output of remat")

    run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return _merge(run(*values), kept)


_SCAN_NOT_STACKED = "scan over an axis that is not stacked"


def _scan(eqn: Any, values: Values) -> Values | None:
    params, kept = eqn.params, _kept(eqn, values)
    consts, carry, xs = _compat.split_scan_operands(params, values)
    carried = kept[: len(carry)]
    carry = _arrays(carry, carried, "carry of scan")
    xs = [_to_array(x, _SCAN_NOT_STACKED) if is_weight(x) and not x.is_stacked else x for x in xs]

    def body(carry, xs):
        layer = [x.next_layer() if is_weight(x) else x for x in xs]
        out = _evaluate(params["jaxpr"], [*consts, *_merge(carry, carried), *layer])
        out = _arrays(out, kept, "output of scan")
        return out[: len(carry)], out[len(carry) :]

    carry, ys = lax.scan(body, carry, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"])
    return _merge([*carry, *ys], kept)


def _while(eqn: Any, values: Values) -> Values | None:
    params, kept = eqn.params, _kept(eqn, values)
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:num_cond], values[num_cond : num_cond + num_body]
    carry = _arrays(values[num_cond + num_body :], kept, "carry of while")

    def cond(carry):
        return _evaluate(params["cond_jaxpr"], [*cond_consts, *_merge(carry, kept)])[0]

    def body(carry):
        out = _evaluate(params["body_jaxpr"], [*body_consts, *_merge(carry, kept)])
        return _arrays(out, kept, "output of while")

    return _merge(lax.while_loop(cond, body, carry), kept)


def _cond(eqn: Any, values: Values) -> Values | None:
    index, *operands = values
    kept = _kept(eqn, values)

    def branch(jaxpr):
        return lambda *operands: _arrays(_evaluate(jaxpr, operands), kept, "output of cond")

    return _merge(lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], *operands), kept)


_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "rev": _rev,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _convert_element_type,
    "copy": _identity,
    "stop_gradient": _identity,
    "optimization_barrier": _identity,
    "name": _identity,
    "pvary": _identity,  # inside `jax.shard_map`: a product makes its operands vary alike by itself
    "pcast": _identity,
    "concatenate": _concatenate,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "gather": _gather,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "jit": _call,
    "closed_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

# Which axes are packed into k, and which are stacked, decides whether the rules of these apply.
DEPENDS_ON_PACKING = {
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "slice",
    "dynamic_slice",
    "split",
    "gather",
    "dot_general",
    "conv_general_dilated",
    _SCAN_NOT_STACKED,
}
