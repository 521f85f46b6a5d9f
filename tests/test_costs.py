"""What `pbjax.allocate` counts: costs of the caller's, seconds of products, and how these are measured."""

from __future__ import annotations

import fractions

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pbjax
from pbjax._allocation.seconds import _calls
from tests import models
from tests.allocations import (
    APART,
    BITS,
    PARAMS,
    QPARAMS,
    SHAPES,
    X,
    allocate,
    every_allocation,
    numbers_of,
    run_module,
    tensors_of,
)
from tests.cases import normal

MODELS = {model.name: model for model in models.models()}

# By path, the cost at 1, 2, .. bitlayers: dear in c, where errors are largest; in b fewer are not always cheaper.
COSTS = {"a": [1, 2, 3, 4, 5, 6], "b": [2.5, 2, 2, 3, 3, 4], "c": [10, 20, 30, 40, 50, 65]}


def total_cost(numbers):
    return sum(COSTS[name][b - 1] for name, b in zip(SHAPES, numbers, strict=True))


class TestCost:
    """With costs of the caller's, the outcome is that of trying all allocations."""

    @pytest.mark.parametrize("cost", [COSTS, COSTS.__getitem__], ids=["mapping", "function"])
    @pytest.mark.parametrize("budget", [13, 30, 39, 57, 75])
    def test_budget(self, budget, cost):
        allocation = allocate(budget=budget, cost=cost)
        best = min(error for numbers, _, _, error in every_allocation() if total_cost(numbers) <= budget)
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        assert allocation.cost == total_cost(numbers_of(allocation)) <= budget
        assert allocation.cost_unit == "cost"
        assert [row.cost for row in allocation.uniform] == [total_cost([b] * 3) for b in range(1, BITS + 1)]

    @pytest.mark.parametrize("tolerance", [0.3, 0.02, 1e-3, 1e-12])
    def test_tolerance(self, tolerance):
        allocation = allocate(tolerance=tolerance, cost=COSTS)
        assert allocation.measured_error <= tolerance
        assert allocation.cost == min(
            total_cost(numbers) for numbers, _, _, error in every_allocation() if error <= tolerance
        )

    @pytest.mark.parametrize(
        "same",
        [
            lambda costs: jnp.asarray(costs, jnp.bfloat16),
            lambda costs: [jnp.bfloat16(cost) for cost in costs],
            lambda costs: tuple(jnp.float32(cost) if i % 2 else cost for i, cost in enumerate(costs)),
            lambda costs: np.asarray(costs, np.float16),
            lambda costs: [fractions.Fraction(cost) for cost in costs],
        ],
    )
    def test_every_kind_of_number(self, same):
        """All of these costs are small multiples of a half, which bfloat16 has."""
        given = {path: same(costs) for path, costs in COSTS.items()}
        assert numbers_of(allocate(budget=jnp.float32(39), cost=given)) == numbers_of(allocate(budget=39, cost=COSTS))

    def test_very_large_costs(self):
        """Of which sums and multiples are near the largest float."""
        huge = {path: [cost * 1e306 for cost in costs] for path, costs in COSTS.items()}
        for budget in (13, 39, 57, 75):
            assert numbers_of(allocate(budget=budget * 1e306, cost=huge)) == numbers_of(
                allocate(budget=budget, cost=COSTS)
            )

    def test_is_no_other_than_bytes_by_default(self):
        sizes = {name: [pbjax.truncate(w, b).nbytes for b in range(1, BITS + 1)] for name, w in QPARAMS.items()}
        counted, given = allocate(budget=5000), allocate(budget=5000, cost=sizes)
        assert numbers_of(counted) == numbers_of(given)
        assert counted.cost == counted.nbytes == given.cost
        assert counted.cost_unit == "bytes"

    @pytest.mark.parametrize("by_layer", [False, True])
    def test_of_a_stack(self, by_layer):
        model = MODELS["scanned_blocks"]
        qparams = pbjax.quantize(model.params, 4, fn=model.fn, args=model.args)
        tensors = dict(zip((row.path for row in pbjax.report(qparams).rows), tensors_of(qparams), strict=True))
        costs = {path: np.arange(1, 5) for path in tensors}
        if by_layer:  # the first of each stack is free
            costs = {path: np.broadcast_to(costs[path], (*w.stack_shape, 4)).copy() for path, w in tensors.items()}
            for path, w in tensors.items():
                costs[path][(0,) * len(w.stack_shape)] = 0
        allocation = allocate(pbjax.quantized(model.fn), qparams, model.args[0], budget=40, cost=costs)
        assert allocation.cost == sum(row.cost for row in allocation.rows) <= 40
        for row in allocation.rows:
            assert row.cost == (0 if by_layer and not any(row.index) else row.bitlayers)

    def test_time(self):
        """Seconds of this machine, whatever they are, add up; and all bitlayers are chosen where there is time."""
        allocation = allocate(budget=3600, cost="time", metric="mse")
        assert allocation.cost_unit == "seconds"
        assert allocation.measured_error <= min(row.error for row in allocation.uniform)
        assert 0 < allocation.cost < 3600
        np.testing.assert_allclose(allocation.cost, sum(row.cost for row in allocation.rows), rtol=1e-9)
        assert " ms " in str(allocation)
        with pytest.raises(ValueError, match=r"`budget` must be at least \d.*, but got 0"):
            allocate(budget=0, cost="time")


class TestProductSeconds:
    def test_counts_calls(self):
        """Weights alike take what one of them takes, as often as they are used."""
        params = dict.fromkeys(("once", "looped", "branch", "unused"), PARAMS["a"][:40])
        params["stack"] = jnp.stack([PARAMS["a"][:40]] * 3)

        def fn(params, x):
            def step(h, _):
                h, _ = jax.lax.scan(lambda h, w: (h @ w, None), h @ params["looped"], params["stack"])
                return h, None

            h = jax.jit(lambda params, x: x @ params["once"])(params, x)
            h, _ = jax.lax.scan(step, h, length=7)
            return jax.lax.cond(h[0, 0] > 0, lambda h: h @ params["branch"], lambda h: h, h)

        x = jax.ShapeDtypeStruct((2, 40), jnp.float32)
        qparams = pbjax.quantize(params, 5, fn=fn, args=(x,), rules={"unused": 5, ".*": 5})
        seconds = pbjax.product_seconds(pbjax.quantized(fn), qparams, x, repeats=2)
        assert set(seconds) == set(params)
        assert seconds["stack"].shape == (3, 5)
        assert (seconds["once"] > 0).all()
        assert (seconds["once"] < 1).all()
        np.testing.assert_array_equal(seconds["unused"], 0)
        np.testing.assert_array_equal(seconds["branch"], seconds["once"])
        np.testing.assert_allclose(seconds["looped"], 7 * seconds["once"], rtol=1e-12)
        np.testing.assert_allclose(seconds["stack"], np.tile(7 * seconds["once"], (3, 1)), rtol=1e-12)

    def test_condition_of_a_loop(self):
        """Counts as one turn, like the body, whether the loop carries its words or closes over them."""
        w = pbjax.quantize({"kernel": PARAMS["a"][:40]}, 4)["kernel"]

        def fn(qparams, x):
            def is_small(state):
                h, carried = state
                return (pbjax.matmul(h, carried) + pbjax.matmul(h, qparams["cond"])).max() < 1

            def body(state):
                h, carried = state
                return pbjax.matmul(pbjax.matmul(h, qparams["body"]), carried), carried

            h, carried = jax.lax.while_loop(is_small, body, (x, qparams["carried"]))
            return pbjax.matmul(h, carried)

        calls = _calls(fn, dict.fromkeys(("body", "carried", "cond"), w), jnp.ones((2, 40)))
        assert [sum(counts.values()) for counts in calls] == [1, 3, 1]

    def test_module(self):
        model = pbjax.nnx.quantize(models.NnxMLP(nnx.Rngs(0)), 6)
        seconds = pbjax.product_seconds(run_module, model, jnp.ones((1, 32)), repeats=1)
        assert list(seconds) == ["first/kernel", "second/kernel"]
        assert all((times > 0).all() for times in seconds.values())

    def test_weights_that_are_read_otherwise_too(self):
        """A table that is looked up and multiplied by, as tied embeddings are: each product goes to its own weight."""

        def fn(p, tokens):
            return jnp.tanh(p["e"][tokens] @ p["w"]) @ p["e"].T

        params = {
            "e": normal(100, 64),
            "w": normal(64, 64, seed=1),
        }
        tokens = jnp.arange(3)
        qparams = pbjax.quantize(params, 3, fn=fn, args=(tokens,))
        seconds = pbjax.product_seconds(pbjax.quantized(fn), qparams, tokens, repeats=1)
        assert all((times > 0).all() for times in seconds.values())

    def test_convolution_in_groups(self):
        model = nn.Conv(8, (3, 3), feature_group_count=2)
        x = jnp.ones((1, 5, 5, 4))
        qparams = pbjax.quantize(model.init(jax.random.key(0), x), 3, fn=model.apply, args=(x,))
        (seconds,) = pbjax.product_seconds(pbjax.quantized(model.apply), qparams, x, repeats=1).values()
        assert (seconds > 0).all()

    def test_activations_are_told_apart(self, monkeypatch):
        measured = []

        def measure(product, tensor, repeats):
            measured.append(tensor.activation_bits)
            return np.ones(4)

        monkeypatch.setattr("pbjax._allocation.seconds._measure", measure)
        w = normal(64, 64)
        rules = {
            name: pbjax.Spec(bits=4, activation_bits=a) for name, a in {"a": 16, "b": None, "c": 8, "d": 8}.items()
        }
        qparams = pbjax.quantize(dict.fromkeys(rules, w), 4, rules=rules)
        pbjax.product_seconds(lambda q, x: sum(pbjax.matmul(x, q[name]) for name in rules), qparams, jnp.ones((1, 64)))
        assert measured == [16, None, 8]

    def test_refuses_two_weights_of_one_path(self):
        with pytest.raises(ValueError, match=r"paths of BitTensors must differ, but `qparams` has two of a/b"):
            pbjax.product_seconds(APART, {"a/b": QPARAMS["a"], "a": {"b": QPARAMS["a"]}}, X)

    def test_refuses_a_trace(self):
        with pytest.raises(TypeError, match="`qparams` and `batch` must have known values, but got traced ones"):
            jax.jit(lambda x: jnp.asarray(pbjax.product_seconds(APART, QPARAMS, x)["a"]))(X)

    def test_follows_words_out_of_a_call(self):
        """And through indices into a stack, whose layers get equal parts."""

        def fn(w, x):
            pick = jax.jit(lambda w, i: jax.tree.map(lambda leaf: leaf[i], w))
            return sum(pbjax.matmul(x, pick(w, i)) for i in (0, 1, 1, 0))

        w = pbjax.quantize(
            {"kernel": jnp.stack([PARAMS["a"]] * 2)}, 4, rules={"": pbjax.Spec(bits=4, contract=(1,), stack=(0,))}
        )["kernel"]
        (calls,) = _calls(fn, w, X)
        assert list(calls.values()) == [4]

    def test_refuses_products_on_a_mesh(self):
        mesh = jax.make_mesh((1,), ("k",))
        spec = jax.sharding.PartitionSpec()
        fn = jax.shard_map(lambda w, x: pbjax.matmul(x, w), mesh=mesh, in_specs=spec, out_specs=spec)
        with pytest.raises(ValueError, match=r"`fn` must have its products outside of `jax\.shard_map`"):
            pbjax.product_seconds(fn, QPARAMS["a"], X)

    def test_refuses_what_is_no_tree_of_weights(self):
        with pytest.raises(ValueError, match="must hold BitTensors, but it has none"):
            pbjax.product_seconds(APART, PARAMS, X)


ERRORS = {
    "unknown cost": (
        lambda: allocate(budget=3, cost="energy"),
        ValueError,
        r"`cost` must be one of \['bytes', 'time'\], a mapping or a function, but got 'energy'",
    ),
    "cost that is none": (lambda: allocate(budget=3, cost=3), TypeError, r"a mapping or a function, but got int"),
    "cost of an average": (
        lambda: allocate(average=3, cost=COSTS),
        ValueError,
        r"`cost` must be left out with `average`, which counts bitlayers",
    ),
    "cost without a path": (
        lambda: allocate(budget=3, cost={"a": COSTS["a"]}),
        ValueError,
        r"`cost` must have all paths of BitTensors, but lacks \['b', 'c'\]",
    ),
    "too few costs": (
        lambda: allocate(budget=3, cost={**COSTS, "b": [1, 2]}),
        ValueError,
        r"`cost` must be numbers of shape \(6,\), one for each number of bitlayers, but got float64\[2\] \(b\)",
    ),
    "costs that are no numbers": (
        lambda: allocate(budget=3, cost={**COSTS, "b": ["1"] * 6}),
        ValueError,
        r"`cost` must be numbers of shape \(6,\), one for each number of bitlayers, but got \['1', .*\] \(b\)",
    ),
    "costs of different lengths": (
        lambda: allocate(budget=3, cost={**COSTS, "b": [[1, 2], [3]]}),
        ValueError,
        r"`cost` must be numbers of shape \(6,\), .* but got \[\[1, 2\], \[3\]\] \(b\)",
    ),
    "costs that overflow": (
        lambda: allocate(budget=3, cost=dict.fromkeys(SHAPES, [1e308] * 6)),
        ValueError,
        r"`cost` must add up to a finite number over all layers, but got costs of up to 1e\+308",
    ),
    "negative cost": (
        lambda: allocate(budget=3, cost={**COSTS, "b": [1, 2, 3, 4, 5, -6]}),
        ValueError,
        r"`cost` must be finite and not negative, but got \[1.0, 2.0, 3.0, 4.0, 5.0, -6.0\] \(b\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
