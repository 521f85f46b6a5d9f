"""`pbjax.allocate`: limits are kept as measured, the outcome is the best where that is known, and every tree works."""

from __future__ import annotations

import collections
import itertools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pbjax
from pbjax import _front, _seconds
from pbjax._sensitivity import METRICS
from tests import models

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 48))
SHAPES = {"a": (48, 40), "b": (48, 8), "c": (48, 24)}
BITS = 6


def apart(params, x):
    """Outputs that are apart, so that errors of layers add up exactly."""
    return {name: x @ params[name] for name in params}


# Outputs differ in size by a factor of 4 each: layers of very different sensitivity.
PARAMS = {
    name: 4.0**i * jax.random.normal(jax.random.fold_in(KEY, i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
QPARAMS = pbjax.quantize(PARAMS, BITS, fn=apart, args=(X,))
APART = pbjax.quantized(apart)


def allocate(fn=APART, qparams=QPARAMS, batch=X, **kwargs):
    return pbjax.allocate(fn, qparams, batch, progress=False, **kwargs)


def all_allocations():
    """Each of the 216: bitlayers, bytes, bitlayers per weight, and the error, written out."""
    full = {name: np.asarray(pbjax.matmul(X, QPARAMS[name]), np.float64) for name in SHAPES}
    square = sum((y**2).sum() for y in full.values())
    errors, sizes = {}, {}
    for name, b in itertools.product(SHAPES, range(1, BITS + 1)):
        y = np.asarray(pbjax.matmul(X, QPARAMS[name], bitlayers=b), np.float64)
        errors[name, b] = ((y - full[name]) ** 2).sum() / square
        sizes[name, b] = pbjax.truncate(QPARAMS[name], b).nbytes
    weights = {name: shape[0] * shape[1] for name, shape in SHAPES.items()}
    for numbers in itertools.product(range(1, BITS + 1), repeat=3):
        chosen = list(zip(SHAPES, numbers, strict=True))
        average = sum(weights[name] * b for name, b in chosen) / sum(weights.values())
        yield numbers, sum(sizes[one] for one in chosen), average, sum(errors[one] for one in chosen)


EVERY = list(all_allocations())


def numbers_of(allocation):
    return tuple(row.bitlayers for row in allocation.rows)


class TestBestOfAll:
    """Where errors add up exactly, the outcome is that of trying all allocations."""

    @pytest.mark.parametrize("b", range(1, BITS + 1))
    def test_budget_of_a_uniform_number(self, b):
        (uniform,) = [one for one in EVERY if one[0] == (b,) * 3]
        allocation = allocate(budget=uniform[1])
        assert allocation.nbytes <= uniform[1]
        best = min(error for _, size, _, error in EVERY if size <= uniform[1])
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(allocation.predicted_error, best, rtol=1e-4, atol=1e-12)
        if 1 < b < BITS:
            assert allocation.measured_error < uniform[3] / 2
        (size,) = [size for numbers, size, _, _ in EVERY if numbers == numbers_of(allocation)]
        assert allocation.nbytes == size
        assert [(row.bitlayers, row.nbytes) for row in allocation.uniform] == [
            (numbers[0], size) for numbers, size, _, _ in EVERY if len(set(numbers)) == 1
        ]

    @pytest.mark.parametrize("average", [1, 2.7, 3.5, 6])
    def test_average(self, average):
        allocation = allocate(average=average)
        best = min(error for _, _, mean, error in EVERY if mean <= average + 1e-9)
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        assert allocation.average <= average + 1e-9

    @pytest.mark.parametrize("tolerance", [0.3, 0.02, 1e-3, 1e-12])
    def test_tolerance(self, tolerance):
        allocation = allocate(tolerance=tolerance)
        assert allocation.measured_error <= tolerance
        assert allocation.nbytes == min(size for _, size, _, error in EVERY if error <= tolerance)

    def test_numbers_to_choose_from(self):
        allocation = allocate(average=4, bitlayers=[5, 2, 6])
        within = [one for one in EVERY if set(one[0]) <= {2, 5, 6} and one[2] <= 4]
        np.testing.assert_allclose(allocation.measured_error, min(one[3] for one in within), rtol=1e-4)
        assert [row.bitlayers for row in allocation.uniform] == [2, 5, 6]
        assert set(allocation.rows[0].errors) == {2, 5, 6}

    def test_more_budget_is_never_worse(self):
        sizes = np.linspace(EVERY[0][1], EVERY[-1][1], 12)
        errors = [allocate(budget=size).predicted_error for size in sizes]
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


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
        best = min(error for numbers, _, _, error in EVERY if total_cost(numbers) <= budget)
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        assert allocation.cost == total_cost(numbers_of(allocation)) <= budget
        assert allocation.cost_unit == "cost"
        assert [row.cost for row in allocation.uniform] == [total_cost([b] * 3) for b in range(1, BITS + 1)]

    @pytest.mark.parametrize("tolerance", [0.3, 0.02, 1e-3, 1e-12])
    def test_tolerance(self, tolerance):
        allocation = allocate(tolerance=tolerance, cost=COSTS)
        assert allocation.measured_error <= tolerance
        assert allocation.cost == min(total_cost(numbers) for numbers, _, _, error in EVERY if error <= tolerance)

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
            "e": jax.random.normal(jax.random.key(0), (100, 64)),
            "w": jax.random.normal(jax.random.key(1), (64, 64)),
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
        monkeypatch.setattr(
            _seconds, "_measure", lambda product, tensor, repeats: measured.append(tensor.activation_bits) or np.ones(4)
        )
        w = jax.random.normal(jax.random.key(0), (64, 64))
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
        (calls,) = _seconds._calls(fn, w, X)
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


alternatives = st.lists(
    st.tuples(st.integers(0, 20), st.floats(-1, 1, allow_subnormal=False)), min_size=1, max_size=4
).map(lambda pairs: tuple(np.array(column, np.float64) for column in zip(*pairs, strict=True)))


class TestFront:
    @hypothesis.given(st.lists(alternatives, max_size=4))
    def test_is_what_trying_everything_finds(self, stages):
        costs, errors = [stage[0] for stage in stages], [stage[1] for stage in stages]
        front = _front.pareto_front(costs, errors)
        sums = [
            tuple(sum(table[i][j] for i, j in enumerate(choice)) for table in (costs, errors))
            for choice in itertools.product(*(range(len(cost)) for cost in costs))
        ]
        for budget in range(0, 81, 5):
            best = min((error for cost, error in sums if cost <= budget), default=None)
            point = front.last_within(budget)
            assert (point == -1) == (best is None)
            if best is not None:
                np.testing.assert_allclose(front.errors[point], best, atol=1e-12)
        for point, choice in enumerate(front.choices):
            assert sum(costs[i][j] for i, j in enumerate(choice)) == front.costs[point]
        assert (np.diff(front.costs) > 0).all()
        assert (np.diff(front.errors) < 0).all()

    def test_thinned_points_are_choices_and_nearly_as_good(self):
        rng = np.random.default_rng(0)
        costs = [np.cumsum(rng.uniform(1, 9, 8)) for _ in range(12)]
        errors = [np.sort(rng.exponential(size=8))[::-1] for _ in range(12)]
        exact = _front.pareto_front(costs, errors, max_points=10**6)
        thin = _front.pareto_front(costs, errors, max_points=100)
        assert len(thin.costs) <= 101 < len(exact.costs)
        for point in range(0, len(thin.costs), 10):
            assert thin.costs[point] == sum(costs[i][j] for i, j in enumerate(thin.choices[point]))
        for budget in np.linspace(exact.costs[0], exact.costs[-1], 20):
            wider = exact.last_within(budget - 12 * np.ptp(exact.costs) / 100)
            if wider >= 0:
                assert thin.errors[thin.last_within(budget)] <= exact.errors[wider] + 1e-9


MODELS = {model.name: model for model in models.models()}


@pytest.mark.parametrize("name", ["conv", "tied_embedding", "scanned_blocks", "nnx_mlp"])
def test_every_kind_of_tree(name):
    """And the error reported is that of the function with `with_bitlayers`, as a loop finds it, layer by layer."""
    model = MODELS[name]
    qparams = pbjax.quantize(model.params, 4, fn=model.fn, args=model.args)
    fn = pbjax.quantized(model.fn)
    allocation = allocate(fn, qparams, model.args[0], average=2.5, bitlayers=[1, 2, 4])
    assert 1 <= allocation.average <= 2.5
    tensors = tensors_of(qparams)
    assert len(allocation.bitlayers) == len(tensors)
    assert len(allocation.rows) == sum(max(1, int(np.prod(tensor.stack_shape))) for tensor in tensors)

    run = jax.jit(fn)
    reference = run(qparams, *model.args)

    def error(bitlayers):
        y = run(pbjax.with_bitlayers(qparams, bitlayers), *model.args)
        return float(jnp.sum((y - reference) ** 2) / jnp.sum(reference**2))

    np.testing.assert_allclose(error(allocation.bitlayers), allocation.measured_error, rtol=1e-4)
    full = {path: np.full_like(number, 4) for path, number in allocation.bitlayers.items()}
    for row in (allocation.rows[0], allocation.rows[-1]):
        (path,) = [path for path in full if path.removeprefix("^").removesuffix("$") == row.path]
        number = full[path].copy()
        number[row.index] = 1
        np.testing.assert_allclose(error({**full, path: number}), row.errors[1], rtol=1e-4)


def is_tensor(leaf):
    return isinstance(leaf, pbjax.BitTensor)


def tensors_of(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_tensor) if is_tensor(leaf)]


def run_module(model, x):
    return model(x)


def test_nnx_module():
    model = pbjax.nnx.quantize(models.NnxMLP(nnx.Rngs(0)), 6)
    allocation = allocate(run_module, model, jax.random.normal(KEY, (5, 32)), average=3)
    assert list(allocation.bitlayers) == ["^first/kernel$", "^second/kernel$"]
    pbjax.with_bitlayers(model, allocation.bitlayers)(jnp.ones((1, 32)))


def test_layers_of_other_bits():
    qparams = {**QPARAMS, "b": pbjax.truncate(QPARAMS["b"], 2)}
    allocation = allocate(qparams=qparams, average=6)
    assert numbers_of(allocation) == (6, 2, 6)
    assert [row.average for row in allocation.uniform][:2] == [1, 2]


@pytest.mark.parametrize("factor", [1e20, 1e-25])
def test_relative_error_is_one_of_any_unit(factor):
    """Whose square may be no float32."""
    y, r = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[1.0, 2.5], [3.0, 4.0]])
    error = METRICS["mse"](y * factor, r * factor)
    np.testing.assert_allclose(error, (0.25 + 1) / (1 + 6.25 + 9 + 16), rtol=1e-5)


def test_a_weight_alone():
    w = pbjax.quantize({"kernel": jnp.eye(64)}, 6)["kernel"]
    allocation = pbjax.allocate(lambda w, x: pbjax.matmul(x, w), w, jnp.ones((2, 64)), average=3, progress=False)
    assert pbjax.with_bitlayers(w, allocation.bitlayers).bitlayers == allocation.rows[0].bitlayers


def test_names_are_printed_as_they_are():
    qparams = pbjax.quantize({"[/b]:key:": {"kernel": jnp.eye(64)}}, 4)
    fn = lambda q, x: pbjax.matmul(x, q["[/b]:key:"]["kernel"])  # noqa: E731
    allocation = pbjax.allocate(fn, qparams, jnp.ones((2, 64)), average=3, progress=False)
    assert "[/b]:key:/kernel" in str(allocation)
    assert "[/b]:key:/kernel" in str(pbjax.report(qparams))


def test_what_is_chosen_can_be_stored_alone():
    """`truncate` keeps as many bytes as the allocation says, and the bits of the product."""
    allocation = allocate(average=3)
    small = pbjax.truncate(QPARAMS, allocation.bitlayers)
    assert {name: leaf.bits for name, leaf in small.items()} == {row.path: row.bitlayers for row in allocation.rows}
    assert sum(leaf.words.nbytes + leaf.scale.nbytes for leaf in small.values()) == allocation.nbytes


def test_several_batches_are_averaged():
    other = X[:3] * 2
    one, two = (allocate(batch=batch, average=3) for batch in (X, other))
    for batches in ([X, other], (batch for batch in (X, other))):
        both = allocate(batch=batches, average=3)
        expected = np.mean([[row.errors[2] for row in each.rows] for each in (one, two)], 0)
        np.testing.assert_allclose([row.errors[2] for row in both.rows], expected, rtol=1e-5)


class TestMetric:
    def test_kl(self):
        allocation = allocate(average=3, metric="kl")
        log_p, log_q = (
            {name: jax.nn.log_softmax(y) for name, y in APART(tree, X).items()}
            for tree in (QPARAMS, pbjax.with_bitlayers(QPARAMS, {"c": 2, "a|b": BITS}))
        )
        each = [jnp.sum(jnp.exp(log_p[name]) * (log_p[name] - log_q[name]), -1) for name in SHAPES]
        np.testing.assert_allclose(allocation.rows[2].errors[2], jnp.mean(jnp.concatenate(each)), rtol=1e-4)

    def test_function(self):
        def loss(qparams, x):
            return jnp.square(APART(qparams, x)["c"]).mean()

        def increase(y, reference):
            return y - reference

        allocation = allocate(loss, average=3, metric=increase)
        assert allocation.metric == "increase"
        assert numbers_of(allocation)[:2] == (1, 1) or allocation.measured_error <= 0  # only c matters
        tree = pbjax.with_bitlayers(QPARAMS, allocation.bitlayers)
        np.testing.assert_allclose(allocation.measured_error, loss(tree, X) - loss(QPARAMS, X), rtol=1e-3, atol=1e-3)


def test_compiles_once():
    traces = []

    def fn(qparams, x):
        traces.append(None)
        return APART(qparams, x)

    allocate(fn, average=3)
    num = len(traces)
    allocate(fn, tolerance=1e-3, rounds=4)
    allocate(fn, budget=3000, bitlayers=[2, 3, 5], batch=X + 1)
    assert len(traces) == num


def test_table_and_data(capsys):
    allocation = pbjax.allocate(APART, QPARAMS, X, average=3, progress=True)
    assert "allocate" in capsys.readouterr().err
    text = str(allocation)
    assert "uniform" in text
    assert f"{allocation.measured_error:.2e}" in text
    assert [row["path"] for row in allocation.to_dicts()] == ["a", "b", "c"]


def with_nan(qparams, x):
    """Not finite where c has one bitlayer."""
    y = APART(qparams, x)
    return {**y, "c": jnp.where(qparams["c"].bitlayers == 1, jnp.nan, y["c"])}


ERRORS = {
    "no limit": (
        lambda: allocate(),
        ValueError,
        r"exactly one of `tolerance`, `budget` and `average` must be given, but got none",
    ),
    "two limits": (lambda: allocate(budget=1, average=2), ValueError, r"but got \['budget', 'average'\]"),
    "limit that is no number": (lambda: allocate(budget="1"), TypeError, r"`budget` must be a number, but got '1'"),
    "negative limit": (
        lambda: allocate(tolerance=-1),
        ValueError,
        r"`tolerance` must be finite and not negative, but got -1 \(argument of allocate\)",
    ),
    "small budget": (
        lambda: allocate(budget=100),
        ValueError,
        r"`budget` must be at least 864, which the fewest bitlayers of each weight take, but got 100",
    ),
    "small average": (lambda: allocate(average=0.5), ValueError, r"`average` must be at least 1, which the fewest"),
    "unreachable tolerance": (
        lambda: allocate(tolerance=1e-6, bitlayers=[1, 2]),
        ValueError,
        r"`tolerance` must be at least 0\.\d+, the least error measured with the bitlayers allowed, but got 1e-06",
    ),
    "unknown metric": (
        lambda: allocate(average=3, metric="l1"),
        ValueError,
        r"`metric` must be one of \['mse', 'kl'\] or a function, but got 'l1'",
    ),
    "metric that is none": (lambda: allocate(average=3, metric=3), TypeError, r"`metric` must be a function"),
    "metric of many numbers": (
        lambda: allocate(average=3, metric=lambda y, r: y["a"]),
        ValueError,
        r"`metric` must return one real number, but got \(6, 40\)",
    ),
    "fn that is none": (lambda: allocate(None, average=3), TypeError, r"`fn` must be a function, but got None"),
    "no BitTensor": (
        lambda: allocate(qparams=PARAMS, average=3),
        ValueError,
        r"`tree` must hold BitTensors, but it has none",
    ),
    "fn of no BitTensor": (
        lambda: allocate(lambda qparams, x: x, average=3),
        ValueError,
        r"`fn` must use the BitTensors of `qparams`, but its outputs are the same at every number of bitlayers",
    ),
    "outputs not finite": (
        lambda: allocate(batch=X.at[0, 0].set(jnp.inf), average=3),
        ValueError,
        r"`fn` must return finite numbers at all bitlayers, but got a NaN or an infinity \(a, batch 0\)",
    ),
    "error not finite": (
        lambda: allocate(with_nan, average=3),
        ValueError,
        r"errors of `fn` must be finite, but got nan with these numbers of bitlayers: .*1 at c",
    ),
    "outputs all zero": (
        lambda: allocate(batch=0 * X, average=3),
        ValueError,
        r"`fn` must return outputs that are not all zero, but got zeros for batch 0",
    ),
    "outputs that are integers": (
        lambda: allocate(lambda qparams, x: APART(qparams, x)["a"].argmax(-1), average=3),
        TypeError,
        r"`fn` must return arrays of floats, but got int32 \(output, batch 0\)",
    ),
    "scalar logits": (
        lambda: allocate(lambda qparams, x: APART(qparams, x)["a"].sum(), average=3, metric="kl"),
        ValueError,
        r"`fn` must return logits along a last axis for metric 'kl', but got a scalar",
    ),
    "no batch": (
        lambda: allocate(batch=[], average=3),
        ValueError,
        r"`batch` must hold a batch, but got an empty list",
    ),
    "choices beyond the bits": (
        lambda: allocate(average=3, bitlayers=[4, 17]),
        ValueError,
        r"`bitlayers` must lie in 1\.\.16, but got 17 \(argument of allocate\)",
    ),
    "no choice for a layer": (
        lambda: allocate(qparams={**QPARAMS, "b": pbjax.truncate(QPARAMS["b"], 2)}, average=5, bitlayers=[4, 5]),
        ValueError,
        r"`bitlayers` must hold a number in 1\.\.2, the bitlayers stored, but got \[4, 5\] \(b\)",
    ),
    "a batch that is no pytree": (
        lambda: allocate(batch=collections.UserDict(x=1), average=3),
        TypeError,
        r"`batch` must be a pytree, but got UserDict",
    ),
    "choices that are none": (
        lambda: allocate(average=3, bitlayers=4),
        TypeError,
        r"`bitlayers` must be the numbers to choose from, but got 4",
    ),
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
        r"`cost` must be numbers of shape \(6,\), one for each number of bitlayers, but got int64\[2\] \(b\)",
    ),
    "negative cost": (
        lambda: allocate(budget=3, cost={**COSTS, "b": [1, 2, 3, 4, 5, -6]}),
        ValueError,
        r"`cost` must be finite and not negative, but got \[1, 2, 3, 4, 5, -6\] \(b\)",
    ),
    "rounds": (lambda: allocate(average=3, rounds=0), ValueError, r"`rounds` must be at least 1, but got 0"),
    "paths alike": (
        lambda: allocate(qparams={"x/y": QPARAMS["a"], "x": {"y": QPARAMS["b"]}}, average=3),
        ValueError,
        r"paths of BitTensors must differ, but `qparams` has two of x/y",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
