"""The table of Flax layers in docs/layers.md: made by running each of them. `python -m tests.layer_table` writes it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import pbjax
from tests import flax_layers

FILE = Path(__file__).parent.parent / "docs" / "layers.md"
KEY = jax.random.key(0)

HEAD = """# Flax layers on bitlayers

Made by `python -m tests.layer_table`, which runs every layer; a test keeps it current. For each layer:

- **weights**: how many weights `pbjax.quantize(.., fn=..)` packs, and the axes of each that are contracted into k
  (axes of one layer, without leading ones that are mapped over);
- **`quantized`**: whether Flax's own layer, unmodified, runs on all of them without one being unpacked, or which
  operation needs floats;
- **pbjax**: the layer of the same name, constructor and parameters that needs no `quantized`.

`RNN` and `Bidirectional` are Flax's own, around either kind of cell. Layers without kernels (normalization, pooling,
dropout) run as they are. What is not in the table runs too: an operation that has no form on bitlayers gets its weight
as floats, and `DequantizedWarning` names both.

Convolutions are products of patches with the kernel as a (kernel size x input features, output features) matrix, so
with fixed-point activations each patch has a step of its own. Feature groups, and depthwise convolutions with them, are
one small product after the other: exact, and slow where groups are many. Embeddings unpack the rows that are looked up
and no others; with `fn` a table is packed only if `attend` or another product uses it too, or a rule names it.
"""


def rows() -> list[tuple[str, str, str, str]]:
    lines = []
    for library, ours, cases in (("linen", pbjax.linen, flax_layers.LINEN), ("nnx", pbjax.nnx, flax_layers.NNX)):
        named = [(name, name, arguments, args) for name, arguments, args in cases]
        if library == "linen":
            named += [
                ("RNN", "RNN of LSTMCell", dict(cell=nn.LSTMCell(32)), (flax_layers.X,)),
                (
                    "Conv",
                    "Conv with mask",
                    dict(flax_layers.LINEN[5][1], mask=jnp.ones((3, 3, 3, 6))),
                    (flax_layers.IMAGE,),
                ),
            ]
        seen = set()
        for name, label, arguments, args in named:
            if label not in seen:
                seen.add(label)
                lines.append(_row(library, ours, name, label, arguments, args))
    return lines


def _row(
    library: str, ours: ModuleType, name: str, label: str, arguments: dict[str, Any], args: tuple[Any, ...]
) -> tuple[str, str, str, str]:
    if library == "linen":
        layer = getattr(nn, name)(**arguments)
        fn, tree = layer.apply, jax.eval_shape(layer.init, KEY, *args)
    else:
        fn, tree = flax_layers.call, nnx.eval_shape(lambda: getattr(nnx, name)(**arguments, rngs=nnx.Rngs(0)))
    # Abstract, so nothing is compiled.
    rules = flax_layers.rules_of(name)
    packed = jax.eval_shape(lambda tree: pbjax.quantize(tree, 8, fn=fn, args=args, rules=rules), tree)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(lambda packed, args: pbjax.quantized(fn)(packed, *args), packed, args)
    messages = [str(each.message) for each in caught if each.category is pbjax.DequantizedWarning]
    needs = [primitive for message in messages for primitive in re.findall(r"\w+/kernel \((.+?)\)", message)]
    axes = [str(tensor.contract_axes).replace(",)", ")") for tensor in flax_layers.tensors_of(packed)]
    counterpart = f"`pbjax.{library}.{name}`" if hasattr(ours, name) and "mask" not in label else ""
    weights = ", ".join(f"{axes.count(each)} x {each}" for each in dict.fromkeys(axes))
    return f"`{library}` {label}", weights, "as floats: " + ", ".join(needs) if needs else "yes", counterpart


def table() -> str:
    """The whole file."""
    lines = [("layer", "weights", "`quantized`", "pbjax"), ("---",) * 4, *rows()]
    return HEAD + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(table())
