"""Names of pytree leaves, as users write them in rules and read them in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey, KeyPath

from pbjax._bit_tensor import is_bit_tensor

T = TypeVar("T")
D = TypeVar("D")
Patterns = list[tuple[re.Pattern[str], T]]

# The attribute under which an nnx.Variable keeps its array: not part of the name that users know.
_VARIABLE_ATTRIBUTES = ("value", "raw_value")

_NUM_NAMES = 20  # that a message lists


def path_name(path: KeyPath) -> str:
    """A key path as `params/Dense_0/kernel`; the array inside an nnx.Variable has the Variable's name."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name in _VARIABLE_ATTRIBUTES:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and structure of a tree whose BitTensors are leaves."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_bit_tensor)
    return [path_name(path) for path, _ in paths], [leaf for _, leaf in paths], treedef


def compile_patterns(argument: str, patterns: Any) -> Patterns[Any]:
    """An argument that maps path patterns (regular expressions) to values.

    Raises:
      TypeError: not a dict, or a key that is no string.
      ValueError: a key that is no regular expression.
    """
    if not isinstance(patterns, Mapping):
        raise TypeError(f"`{argument}` must be a dict from path patterns, but got {patterns!r}.")
    compiled = []
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(f"path patterns in `{argument}` must be strings, but got {pattern!r}.")
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(
                f"path patterns in `{argument}` must be regular expressions, but got {pattern!r}: {error}."
            ) from None
    return compiled


def check_matches(argument: str, patterns: Patterns[Any], names: Iterable[str], what: str) -> None:
    """Raises ValueError for a pattern that is found in none of the names, which are of `what`."""
    names = list(names)
    for pattern, _ in patterns:
        if not any(pattern.search(name) for name in names):
            some = ", ".join(names[:_NUM_NAMES]) + (f", and {len(names) - _NUM_NAMES} more" * (len(names) > _NUM_NAMES))
            raise ValueError(
                f"`{argument}` must name {what}, but pattern {pattern.pattern!r} matches none of {some or 'none'}."
            )


def first_match(patterns: Patterns[T], name: str, default: D) -> T | D:
    """The value of the first pattern found in a name."""
    return next((value for pattern, value in patterns if pattern.search(name)), default)
