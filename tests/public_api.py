"""The names and signatures that users may rely on, one a line: `python -m tests.public_api` writes public_api.txt."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pbjax

FILE = Path(__file__).parent / "public_api.txt"

HEAD = """\
# What users of pbjax may rely on. `python -m tests.public_api` writes this file, and a test keeps it current.
# A line that changes or goes belongs into the changelog, and a deprecation comes before: see CONTRIBUTING.md.
"""


def text() -> str:
    modules = (pbjax, pbjax.files, pbjax.linen, pbjax.nnx, pbjax.plot)
    lines = [line for module in modules for line in sorted(_module(module))]
    return HEAD + "".join(f"{line}\n" for line in lines)


def _module(module: ModuleType) -> Iterator[str]:
    for name in getattr(module, "__all__", None) or [name for name, value in vars(module).items() if _is_own(value)]:
        value = getattr(module, name)
        full = f"{module.__name__}.{name}"
        flax = inspect.isclass(value) and next((b for b in value.__mro__ if b.__module__.startswith("flax.")), None)
        if flax:
            package = ".".join(flax.__module__.split(".")[:2])
            yield f"{full}: {package}.{flax.__name__}"  # its parameters are Flax's, and change with its version
            continue
        yield f"{full}{_signature(value)}"
        if inspect.isclass(value):
            yield from _members(full, value)


def _is_own(value: Any) -> bool:
    """Whether `pbjax` exports a value; helpers of its `__init__` come from the standard library."""
    home = getattr(value, "__module__", None) or ""
    return home.startswith(("pbjax", "pallas_kernels")) and not value.__name__.startswith("_")


def _members(full: str, cls: type) -> Iterator[str]:
    """Methods and properties that pbjax gives it; fields are in the signature of a dataclass."""
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    own = {
        name: value
        for base in reversed(cls.__mro__)
        if base.__module__.startswith(("pbjax", "pallas_kernels"))
        for name, value in vars(base).items()
    }
    for name, value in own.items():
        if name.startswith("_") or name in fields:
            continue
        if isinstance(value, property):
            yield f"{full}.{name}"
        elif inspect.isfunction(value):
            yield f"{full}.{name}{_signature(value)}"


def _signature(value: Any) -> str:
    if not inspect.isfunction(value) and not dataclasses.is_dataclass(value):
        return ""
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


if __name__ == "__main__":
    FILE.write_text(text())
