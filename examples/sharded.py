"""One model on a mesh of eight devices: what each device holds, what travels, and the bits of one device.

The first kernel is cut over output channels ("tensor"), the second over its inputs, and the rows of the batch are cut
too ("data"). `pbjax.quantize` packs every weight where it lies, and `pbjax.quantized` runs the unmodified model.
"""

from __future__ import annotations

import os

if "XLA_FLAGS" not in os.environ:  # eight devices out of one CPU; on a machine with eight of them, leave this out
    os.environ.update(XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")

import collections
import re

import flax.linen as nn
import jax
import numpy as np
import rich.console
import rich.table
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pbjax

SPECS = {
    "up": {"kernel": P(None, "tensor"), "bias": P("tensor")},
    "down": {"kernel": P("tensor"), "bias": P()},
}
LAYOUTS = {"data": (8, 1), "tensor": (1, 8), "data and tensor": (2, 4)}


class MLP(nn.Module):
    """Knows neither of bitlayers nor of devices."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(256, name="down")(nn.relu(nn.Dense(1024, name="up")(x)))


def main() -> list[tuple[str, int, dict[str, int], bool]]:
    """Prints a table; returns (layout, bytes of weights on one device, collectives, whether the bits are equal)."""
    x = jax.random.normal(jax.random.key(1), (16, 256))
    params = jax.device_get(MLP().init(jax.random.key(0), x)["params"])
    apply = jax.jit(pbjax.quantized(MLP().apply))
    expected = np.asarray(apply({"params": pbjax.quantize(params, bits=4)}, x))  # on one device
    rows = []
    for layout, shape in LAYOUTS.items():
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        shardings = jax.tree.map(lambda spec, mesh=mesh: NamedSharding(mesh, spec), SPECS)
        sharded = jax.device_put(params, shardings)
        args = {"params": pbjax.quantize(sharded, bits=4)}, jax.device_put(x, NamedSharding(mesh, P("data")))
        compiled = apply.lower(*args).compile()
        found = re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text())
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(args[0]))
        rows.append((layout, held, dict(collections.Counter(found)), bool(np.array_equal(compiled(*args), expected))))
    table = rich.table.Table("mesh", "kB of weights a device", "collectives", "bits of one device", title="4 bitlayers")
    for layout, held, found, equal in rows:
        traffic = ", ".join(f"{number} {name}" for name, number in found.items()) or "none"
        table.add_row(f"{layout} {LAYOUTS[layout]}", f"{held / 1000:.1f}", traffic, "yes" if equal else "no")
    rich.console.Console().print(table)
    return rows


if __name__ == "__main__":
    main()
