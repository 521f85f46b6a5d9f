"""What an NNX module writes into itself while it runs under `pbjax.quantized`, written into the caller's module.

`quantized` traces its function on a copy of the arguments. For modules among them this does what `nnx.jit` does:
batch statistics, counts of random numbers, caches and sown values of the copy become those of the caller's module.
Variables that the function leaves alone are left alone here too, so that a module from outside of a `jax.jit` can be
called inside of it, as ever in NNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Objects = dict[tuple[Any, ...], Any]  # by path


def holds_module(tree: Any) -> bool:
    """Whether an NNX module, or another object that NNX treats alike, stands in a tree of arguments."""
    return any(map(_is_module, jax.tree.leaves(tree, is_leaf=_is_module)))


def run(
    run_pure: Callable[..., tuple[Any, Any]], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """run_pure(fn, args, kwargs), where writes to modules among the arguments reach the modules themselves.

    Args:
      run_pure: takes a function of pytrees, its arguments and its keyword arguments; returns the function's result and
        anything else.
      fn: the function.
      args: arguments of `fn`.
      kwargs: keyword arguments of `fn`.

    Returns:
      The result of `fn`, in which modules are the caller's own objects, and what else `run_pure` returned.

    Raises:
      ValueError: `fn` gave a module new modules.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_module)
    places = [i for i, leaf in enumerate(leaves) if _is_module(leaf)]
    modules = [leaves[i] for i in places]
    originals = _objects(modules)
    graphdef, state = nnx.split(modules, graph=True)
    static: dict[str, Any] = {}  # what a trace finds out besides arrays

    def pure(*args, **kwargs):
        full = treedef.flatten_up_to((args, kwargs))
        copies = nnx.merge(graphdef, nnx.State({j: full[i] for j, i in enumerate(places)}))
        for i, copy in zip(places, copies, strict=True):
            full[i] = copy
        before = _objects(copies)
        values = {id(node): node.get_raw_value() for node in before.values() if _is_variable(node)}
        call_args, call_kwargs = jax.tree.unflatten(treedef, full)
        result = fn(*call_args, **call_kwargs)
        original = {id(node): originals[path] for path, node in before.items() if _is_module(node)}
        out_leaves, static["treedef"] = jax.tree.flatten(result, is_leaf=lambda leaf: id(leaf) in original)
        static["returned"] = [original.get(id(leaf)) for leaf in out_leaves]
        written = {path: node for path, node in _objects(copies).items() if _is_written(node, before.get(path), values)}
        _check_no_new_modules(written)
        static["written"] = written
        contents = [node.get_raw_value() if _is_variable(node) else node for node in written.values()]
        return contents, [None if id(leaf) in original else leaf for leaf in out_leaves]

    for j, i in enumerate(places):  # the state stands where the module stood: paths of weights stay what they are
        leaves[i] = state.get(j, nnx.State({}))
    (contents, out_leaves), rest = run_pure(pure, *jax.tree.unflatten(treedef, leaves))
    for (path, node), content in zip(static["written"].items(), contents, strict=True):
        _write(originals, path, node, content)
    out_leaves = [
        leaf if module is None else module for leaf, module in zip(out_leaves, static["returned"], strict=True)
    ]
    return jax.tree.unflatten(static["treedef"], out_leaves), rest


def _objects(modules: list[Any]) -> Objects:
    """Modules, Variables and attributes by path; each object once."""
    return {
        path: value
        for path, value in nnx.iter_graph(modules, graph=True)
        if not (path and str(path[-1]).startswith("_pytree__"))
    }


def _is_written(node: Any, before: Any, values: dict[int, Any]) -> bool:
    if _is_variable(node):
        return id(node) not in values or values[id(node)] is not node.get_raw_value()
    return node is not before


def _check_no_new_modules(written: Objects) -> None:
    for path, value in written.items():
        if _is_module(value):
            raise ValueError(
                "a function under `pbjax.quantized` must not give a module new modules, but got "
                f"{type(value).__name__} at {'/'.join(map(str, path[1:]))}. Call the module once before."
            )


def _write(originals: Objects, path: tuple[Any, ...], node: Any, content: Any) -> None:
    if _is_variable(node) and path in originals:
        originals[path].set_raw_value(content)
        return
    owner: Any = originals[path[:-1]]
    name = path[-1]
    content = node.replace(content) if _is_variable(node) else content  # a new Variable, as `sow` makes them
    if isinstance(name, str) and _is_module(owner):
        setattr(owner, name, content)
    else:
        owner[name] = content


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Pytree)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)
