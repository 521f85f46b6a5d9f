"""Random sequences of everything that makes a tree of BitTensors from another, against codes and scales in NumPy."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import stateful
from hypothesis import strategies as st

import pbjax
from tests import oracle

K, N, STACK = 40, 8, 2  # few shapes: each is a compilation
WEIGHTS = {name: np.random.default_rng(i).integers(-1023, 1024, (STACK, K, N)) / 1024 for i, name in enumerate("abc")}
for weight in WEIGHTS.values():
    weight[:, 0], weight[:, 39] = 1, -1  # the largest of each group: in float32 w / s is exact, and so are the codes
X = np.random.default_rng(9).standard_normal((2, K)).astype(np.float32)
WIDTHS = st.sampled_from((1, 3, 6, 12))


@dataclasses.dataclass
class Model:
    """What a BitTensor should be: float weights and codes of each layer of its stack, none or more, and numbers."""

    weight: np.ndarray  # float32[*stack, K, N]
    codes: np.ndarray  # int[*stack, K, N] of `bits` bits
    bits: int
    counts: np.ndarray  # int[*stack]
    group_size: int | None

    def scale(self, index, b):
        """float64[groups, N], times what `double` did to the weight."""
        return oracle.exact_scale(self.weight[index], self.codes[index], self.bits, b, self.group_size)

    def dense(self, index, b):
        spread = np.repeat(self.scale(index, b), self.group_size or K, axis=0)[:K]
        return spread * oracle.prefix_values(self.codes[index], self.bits, b)


@functools.cache
def exact_codes(name, bits, group_size):
    weight = WEIGHTS[name].astype(np.float32)
    return np.stack([oracle.exact_codes(layer, bits, group_size) for layer in weight]).astype(np.int64)


@functools.cache
def quantizer(bits, group_size, stacked):
    spec = pbjax.Spec(group_size=group_size, stack=(0,) if stacked else ())
    return jax.jit(lambda weight: pbjax.quantize({"w": weight}, bits, rules={"w": spec})["w"])


class Trees(stateful.RuleBasedStateMachine):
    """A tree of BitTensors, in step with a dict of models."""

    def __init__(self):
        super().__init__()
        self.tree, self.models = {"bias": jnp.ones(N)}, {}

    def tensors(self):
        return {name: leaf for name, leaf in self.tree.items() if isinstance(leaf, pbjax.BitTensor)}

    @stateful.initialize(bits=WIDTHS)
    def first(self, bits):
        self.quantize("a", bits, None, stacked=False)

    @stateful.rule(
        name=st.sampled_from("abc"), bits=WIDTHS, group_size=st.sampled_from((None, 32)), stacked=st.booleans()
    )
    def quantize(self, name, bits, group_size, stacked):
        at = slice(None) if stacked else 0
        weight = WEIGHTS[name].astype(np.float32)[at]
        self.tree = {**self.tree, name: quantizer(bits, group_size, stacked)(weight)}
        codes = exact_codes(name, bits, group_size)[at]
        self.models[name] = Model(weight, codes, bits, np.full(weight.shape[:-2], bits), group_size)

    @stateful.rule(number=st.integers(-2, 20))
    def set_all(self, number):
        self.tree = pbjax.with_bitlayers(self.tree, jnp.int32(number))
        for model in self.models.values():
            model.counts = np.full_like(model.counts, np.clip(number, 1, model.bits))

    @stateful.rule(data=st.data())
    def set_one(self, data):
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        number = data.draw(st.integers(1, model.bits))
        self.tree = pbjax.with_bitlayers(self.tree, {f"^{name}$": number})
        model.counts = np.full_like(model.counts, number)

    @stateful.rule(numbers=st.lists(st.integers(1, 16), min_size=STACK, max_size=STACK))
    def set_each_layer(self, numbers):
        """A tree of numbers: one for each layer of a stack, None elsewhere."""
        stacked = {name for name, model in self.models.items() if model.counts.ndim}
        given = {name: jnp.array(numbers, jnp.int32) if name in stacked else None for name in self.tree}
        self.tree = pbjax.with_bitlayers(self.tree, given)
        for name in stacked:
            self.models[name].counts = np.clip(numbers, 1, self.models[name].bits)

    @stateful.rule(bits=WIDTHS)
    def truncate(self, bits):
        self.tree = pbjax.truncate(self.tree, bits)
        self.drop(bits)

    @stateful.rule(bits=st.none() | WIDTHS, max_shard_bytes=st.sampled_from((None, 2000)))
    def save_and_load(self, bits, max_shard_bytes):
        """All bitlayers or the first, from one file or several."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "tree.safetensors")
            pbjax.save(path, self.tree, max_shard_bytes=max_shard_bytes)
            self.tree = pbjax.load(path, bits=bits)
        self.drop(bits or 16)

    def drop(self, bits):
        for model in self.models.values():
            if model.bits > bits:
                model.codes, model.bits = model.codes >> (model.bits - bits), bits
                model.counts = np.minimum(model.counts, bits)

    @stateful.rule()
    def unstack(self):
        """`tree.map` that takes the last layer of every stack, as `scan` does, and rebuilds the others."""
        for name, tensor in self.tensors().items():
            if tensor.stack_shape:
                self.tree = {**self.tree, name: jax.tree.map(lambda leaf: leaf[-1], tensor)}
                model = self.models[name]
                model.weight, model.codes, model.counts = model.weight[-1], model.codes[-1], model.counts[-1]

    @stateful.rule()
    def double(self):
        """`tree.map` over float leaves: scales are, and so is the weight."""
        self.tree = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, self.tree)
        for model in self.models.values():
            model.weight = model.weight * 2

    @stateful.rule()
    def through_vmap(self):
        """A function of a stack, mapped: its leaves come back stacked as they were."""
        for name, tensor in self.tensors().items():
            if tensor.stack_shape:
                self.tree = {**self.tree, name: jax.vmap(lambda w: w.replace(bitlayers=w.bitlayers))(tensor)}

    @stateful.rule()
    def shard(self):
        """Over output channels, on as many devices as there are: eight, where tests/test_mesh.py runs this."""
        mesh = jax.make_mesh((jax.device_count(),), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
        for name, tensor in self.tensors().items():
            last = jax.NamedSharding(mesh, jax.P(*[None] * (tensor.words.ndim - 1), "n"))
            words, scale = jax.device_put((tensor.words, tensor.scale), last)
            self.tree = {**self.tree, name: tensor.replace(words=words, scale=scale)}

    @stateful.invariant()
    def same_words_and_scales(self):
        assert set(self.tensors()) == set(self.models)
        for name, tensor in self.tensors().items():
            model = self.models[name]
            assert tensor.bits == model.bits
            assert tensor.shape == model.weight.shape
            np.testing.assert_array_equal(tensor.bitlayers, model.counts)
            words, scale = np.asarray(tensor.words), np.asarray(tensor.scale)
            for index in np.ndindex(model.counts.shape):
                np.testing.assert_array_equal(words[index], oracle.pack_at_once(model.codes[index], model.bits))
                for row in range(min(model.bits, 4)):
                    np.testing.assert_allclose(scale[index][row], model.scale(index, row + 1), rtol=1e-5)

    @stateful.rule(data=st.data())
    def product_of_one(self, data):
        """The weight as floats, and its product, at the numbers in use."""
        name = data.draw(st.sampled_from(sorted(self.models)))
        model, tensor = self.models[name], self.tree[name]
        dense = np.asarray(pbjax.dequantize(tensor))
        fn = pbjax.matmul
        for _ in model.counts.shape:
            fn = jax.vmap(fn, (None, 0))
        y = np.asarray(jax.jit(fn)(X, tensor))
        for index in np.ndindex(model.counts.shape):
            expected = model.dense(index, int(model.counts[index]))
            np.testing.assert_allclose(dense[index], expected, rtol=1e-5, atol=1e-30)
            step = np.abs(X).max(1, keepdims=True) / 2**15
            bound = step * np.abs(expected).sum(0) + 2e-5 * (np.abs(X) @ np.abs(expected))
            assert np.all(np.abs(y[index] - X.astype(np.float64) @ expected) <= bound)


TestTrees = Trees.TestCase
TestTrees.settings = hypothesis.settings(max_examples=30, stateful_step_count=20)


def run_on_mesh():
    """Fewer sequences, for a process with several devices."""
    settings = hypothesis.settings(
        max_examples=10, stateful_step_count=15, deadline=None, derandomize=True, database=None
    )
    stateful.run_state_machine_as_test(Trees, settings=settings)
