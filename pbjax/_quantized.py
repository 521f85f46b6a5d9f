"""`pbjax.quantized`: an unmodified JAX function on BitTensors."""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax

from pbjax import _bit_tensor, _checks, _interpret, _paths
from pbjax._bit_tensor import is_bit_tensor
from pbjax._packed import Dequantized, Log, Packed
from pbjax._views import View, is_weight

P = ParamSpec("P")
T = TypeVar("T")

_LIBRARIES = {"pbjax", "jax", "flax", "contextlib"}  # whose lines lie between a layer and the code that calls it


class DequantizedWarning(UserWarning):
    """A function made pbjax unpack a weight to floats, because an operation on it has no form on bitlayers."""


def quantized(fn: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of float weights run on BitTensors, wherever they stand in its arguments.

    The function is traced with the shapes and dtypes that the BitTensors stand for, and each product of a BitTensor
    becomes `pbjax.matmul`; so do convolutions, whose patches are the rows. Transposes, reshapes, casts, slices,
    concatenations and look-ups by row are followed without unpacking, through `jit`, `scan`, `while_loop`, `cond` and
    `remat`. Functions with custom derivatives that take a weight are entered, and differentiated as the code that they
    consist of. What cannot be followed gets the weight as floats, and a `DequantizedWarning` names the weight and the
    operation. What an NNX module among the arguments writes into itself is written into the caller's module, as under
    `nnx.jit`.

    Args:
      fn: any JAX function: `model.apply` of Linen, a function that merges and calls an NNX module, plain JAX.
        Arguments that are no arrays (flags, names) reach it unchanged. Weights have to be arguments: those that a
        function closes over are not seen.

    Returns:
      A function of the same signature, which can be jitted, mapped and differentiated with respect to the other
      arguments and the scales. Tracing takes place in each call, so wrap it in `jax.jit`.

    Example:
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["kernel"])
      >>> qparams = pbjax.quantize({"kernel": jnp.eye(64)}, bits=8)
      >>> jax.jit(pbjax.quantized(model))(qparams, jnp.ones((1, 64))).shape
      (1, 64)
    """
    _check_function(fn)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        result, dequantized = run(fn, args, kwargs)
        warn_of(getattr(fn, "__name__", "the function"), dequantized)
        return result

    return wrapper


def _check_function(fn: Any) -> None:
    """Raises TypeError unless `fn` is a function, which its weights are arguments of."""
    _checks.function("fn", fn, "argument of quantized")
    if not isinstance(fn, type) and any(is_bit_tensor(leaf) for leaf in _leaves_of_module(fn)):
        raise TypeError(
            "`fn` must be a function that takes its weights as arguments, but got a module that holds BitTensors. Give "
            "a function of the module, as `lambda module, x: module(x)`, or call what `pbjax.nnx.quantize` makes of it."
        )
    if hasattr(fn, "init") and hasattr(fn, "apply"):
        raise TypeError("`fn` must be a function, but got a Linen module. Give its `apply`.")


def _leaves_of_module(fn: Any) -> list[Any]:
    return jax.tree.leaves(fn, is_leaf=is_bit_tensor) if not jax.tree_util.all_leaves([fn]) else []


def warn_of(name: str, dequantized: Sequence[Dequantized]) -> None:
    """The `DequantizedWarning` of a function or layer, if there is anything to warn of, at the line that called it."""
    if not dequantized:
        return
    listing = ", ".join(f"{entry.path} ({entry.primitive})" for entry in dequantized)
    message = f"{name} runs these weights as floats, because the operation in brackets has no form on bitlayers"
    if any(entry.primitive in _interpret.DEPENDS_ON_PACKING for entry in dequantized):
        message += (
            f", at least not as the weight is packed: {listing}. "
            "`pbjax.quantize` with `fn` and `args` packs each weight for its use."
        )
    else:
        message += f": {listing}."
    warnings.warn(message, DequantizedWarning, stacklevel=_stacklevel_of_the_caller())


def _stacklevel_of_the_caller() -> int:
    """Counted from the function that asks: how far up the first line outside of pbjax, JAX and Flax is."""
    level = 0
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            break
    return level


def run(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[T, list[Dequantized]]:
    """fn(*args, **kwargs) on BitTensors, and what had to be dequantized."""
    if "flax.nnx" in sys.modules:  # without it there are no modules, and it is not imported for nothing
        from pbjax import _nnx_state

        if _nnx_state.holds_module((args, kwargs)):
            return _nnx_state.run(_run_pure, fn, args, kwargs)
    return _run_pure(fn, args, kwargs)


def _run_pure(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[T, list[Dequantized]]:
    """`run` for a function that writes into none of its arguments."""
    names, leaves, treedef = _paths.named_leaves((args, kwargs))
    log = Log()
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if _bit_tensor.is_bit_tensor(leaf):
            path = name.split("/", 2)[-1]  # without the position among the arguments
            leaf = _bit_tensor.checked(leaf, path)
            leaves[i] = View.of(Packed(leaf, path, log), leaf.dtype)
    call_args, call_kwargs = jax.tree.unflatten(treedef, leaves)
    result = _interpret.call(fn, call_args, call_kwargs)
    result = jax.tree.map(lambda leaf: leaf.source.tensor if is_weight(leaf) else leaf, result, is_leaf=is_weight)
    return result, sorted(set(log.entries))
