"""`pbjax.product_seconds`: how long the products of each weight take in one call of a function, measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from pbjax import _bit_tensor, _checks, _paths, _sweep
from pbjax._allocation.layers import check_known, check_paths, layers_of
from pbjax._bit_tensor import BitTensor, is_bit_tensor

_WHERE = "argument of product_seconds"
_WORDS = 1  # the operand of a product that is packed
_LEAST_SECONDS = 2e-3  # of one timing, so that what starts and ends it counts little


def product_seconds(
    fn: Callable[[Any, Any], Any], qparams: Any, batch: Any, *, repeats: int = 7
) -> dict[str, np.ndarray]:
    """Seconds that the products of each weight take in one call of `fn`, at each number of bitlayers.

    `fn` is traced to find its products: which weight each takes, how many rows, and how often it runs (a product in a
    `jax.lax.scan` as often as the scan is long). Then each is run by itself, on the devices that hold the weights, by
    the backend that `fn` has it on, with rows of random numbers, and

        seconds(l, b) = sum over the products p of layer l of calls(p) * median of the measured times of p at b.

    Where weights are stacked, each gets an equal part of the calls. Products alike in all shapes are measured once.
    A `jax.lax.while_loop`, whose number of turns is not known, counts as one turn: its condition once, its body once.
    All branches of a `jax.lax.cond` count. A weight whose products `fn` does not have on bitlayers has zeros.

    These are times on this machine, of a product after itself: its words are in the caches if they fit in there. What
    else `fn` does takes the same time at every number of bitlayers, and is not in them.

    Args:
      fn: fn(qparams, batch), as `pbjax.allocate` takes it.
      qparams: any pytree with BitTensors, with known values.
      batch: what `fn` takes, of the size that is to be fast: one request, say. `jax.ShapeDtypeStruct`s will do.
        One batch: a list is an argument of `fn` like any other.
      repeats: how many times each product is timed at each number of bitlayers, in turns over these.

    Returns:
      For each path of a BitTensor float64[*stack, bits], its seconds at 1..bits bitlayers.

    Raises:
      TypeError: called in a trace (of `jax.jit`, `jax.vmap`, ..), where nothing can be timed.
      ValueError: no BitTensor in `qparams`; a product inside `jax.shard_map`.

    Cost: runs each product for some 2 ms or once, whichever is longer, `repeats` times at each number of bitlayers.

    Example:
      >>> qparams = pbjax.quantize({"kernel": jnp.eye(64)}, bits=8)
      >>> def fn(qparams, x):
      ...     return pbjax.matmul(x, qparams["kernel"])
      >>> pbjax.product_seconds(fn, qparams, jnp.ones((1, 64)), repeats=1)["kernel"].shape
      (8,)
    """
    _checks.function("fn", fn, _WHERE)
    repeats = _checks.integer("repeats", repeats, 1, None, _WHERE)
    names, leaves, _ = _paths.named_leaves(qparams)
    _bit_tensor.check_any(leaves)
    check_known(leaves, batch, _WHERE)
    check_paths(layers_of(qparams))
    tensors = {name: leaf for name, leaf in zip(names, leaves, strict=True) if is_bit_tensor(leaf)}
    calls = _calls(fn, qparams, batch)
    measured: dict[Any, np.ndarray] = {}
    seconds = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        total = np.zeros(tensor.bits)
        for product, count in calls[i].items():
            key = (product.text, tensor.activation_bits, tensor.group_size)
            if key not in measured:
                measured[key] = _measure(product, tensor, repeats)
            total += measured[key] * (count / math.prod(tensor.stack_shape))
        seconds[name] = np.broadcast_to(total, (*tensor.stack_shape, tensor.bits)).copy()
    return seconds


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product in a program. With what its weight knows, its text says what decides the time: backend, shapes."""

    text: str
    eqn: Any = dataclasses.field(compare=False)


def _calls(fn: Callable[[Any, Any], Any], qparams: Any, batch: Any) -> list[Counter[_Product]]:
    """For each BitTensor its products in one call of `fn`, and how often each runs."""
    leaves, treedef = jax.tree.flatten(_sweep.freeze(qparams), is_leaf=is_bit_tensor)
    places = [i for i, leaf in enumerate(leaves) if is_bit_tensor(leaf)]
    batch_leaves, batch_treedef = jax.tree.flatten(_sweep.freeze(batch))

    def run(words, batch_leaves):
        full = list(leaves)
        for i, array in zip(places, words, strict=True):
            full[i] = leaves[i].replace(words=array)
        fn(
            _sweep.thaw(jax.tree.unflatten(treedef, full)),
            _sweep.thaw(jax.tree.unflatten(batch_treedef, batch_leaves)),
        )
        return ()

    closed = jax.make_jaxpr(run)([leaves[i].words for i in places], batch_leaves)
    calls: list[Counter[_Product]] = [Counter() for _ in places]
    sources = [*range(len(places)), *[None] * len(batch_leaves)]
    _count(closed.jaxpr, sources, 1, calls)
    return calls


def _count(jaxpr: core.Jaxpr, sources: Sequence[int | None], turns: int, calls: list[Counter[_Product]]) -> list:
    """Adds the products of a program to `calls`.

    Args:
      jaxpr: the program.
      sources: for each of its inputs the number of the BitTensor whose words, or a part of them, it is.
      turns: how often it runs.
      calls: by BitTensor.

    Returns:
      The same as `sources`, for its outputs.
    """
    source_of = dict(zip(jaxpr.invars, sources, strict=True))

    def read(atom):
        return None if isinstance(atom, core.Literal) else source_of.get(atom)

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "custom_vmap_call":
            if (weight := inputs[_WORDS]) is not None:
                calls[weight][_Product(str(eqn.params["call"]), eqn)] += turns
            continue
        source = next((one for one in inputs if one is not None), None)
        if source is None:
            continue
        if eqn.primitive.name == "shard_map":
            raise ValueError(
                f"`fn` must have its products outside of `jax.shard_map`, where one cannot run alone ({_WHERE}). "
                "Measure them there, and give `allocate` the seconds as `cost`."
            )
        inner_turns = turns * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        programs = list(_programs(eqn))
        outputs: list[int | None] = [None if programs else source] * len(eqn.outvars)  # a slice of words is one, too
        for program, operands in programs:
            outputs = _count(program, [inputs[i] for i in operands], inner_turns, calls)
        source_of.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _programs(eqn: Any) -> Iterator[tuple[core.Jaxpr, Sequence[int]]]:
    """The programs that an equation runs, and which of its operands each takes; outputs are those of the last."""
    num_operands = len(eqn.invars)
    if eqn.primitive.name == "while":  # operands: constants of the condition, constants of the body, what is carried
        cond_consts, consts = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        yield eqn.params["cond_jaxpr"].jaxpr, [*range(cond_consts), *range(consts, num_operands)]
        yield eqn.params["body_jaxpr"].jaxpr, range(cond_consts, num_operands)
        return
    for value in (eqn.params[name] for name in ("jaxpr", "call_jaxpr", "branches") if name in eqn.params):
        for program in value if isinstance(value, (tuple, list)) else [value]:
            program = getattr(program, "jaxpr", program)
            # The last ones: a `cond` has the number of the branch before them.
            yield program, range(num_operands - len(program.invars), num_operands)


def _measure(product: _Product, tensor: BitTensor, repeats: int) -> np.ndarray:
    """float64[bits], seconds of one product at 1..bits bitlayers."""
    primitive, params = product.eqn.primitive, product.eqn.params
    rows, packed, scales, counts = (atom.aval for atom in product.eqn.invars)
    x = jax.random.normal(jax.random.key(0), rows.shape, rows.dtype)
    # A product may have a part of the weight, as those of convolutions in groups: words of its shape take as long.
    words = jax.random.bits(jax.random.key(1), packed.shape, packed.dtype)
    scale = jnp.full(scales.shape, jnp.ravel(tensor.scale)[0], scales.dtype)

    @jax.jit
    def run(num_calls, x, words, scale, bitlayers):
        def once(_, x):
            each = jnp.full(counts.shape, bitlayers, counts.dtype)
            (y,) = primitive.bind(x, words, scale, each, **primitive.get_bind_params(params))
            return x + (jnp.max(y, initial=0) * 1e-9).astype(x.dtype)  # the next waits for it, and is no copy of it

        return lax.fori_loop(0, num_calls, once, x)

    def timed(num_calls, bitlayers):
        start = time.perf_counter()
        jax.block_until_ready(run(num_calls, x, words, scale, bitlayers))
        return (time.perf_counter() - start) / num_calls

    numbers = range(1, tensor.bits + 1)
    timed(1, tensor.bits)  # compiles
    num_calls = {b: max(1, math.ceil(_LEAST_SECONDS / timed(1, b))) for b in numbers}
    rounds = [[timed(num_calls[b], b) for b in numbers] for _ in range(repeats)]
    return np.median(np.array(rounds), axis=0)
