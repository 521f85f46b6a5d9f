"""`pbjax.allocate`: limits are kept as measured, the outcome is the best where that is known, and every tree works."""

from __future__ import annotations

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pbjax
from pbjax._allocation.front import pareto_front
from pbjax._allocation.sensitivity import METRICS
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


class TestBestOfAll:
    """Where errors add up exactly, the outcome is that of trying all allocations."""

    @pytest.mark.parametrize("b", range(1, BITS + 1))
    def test_budget_of_a_uniform_number(self, b):
        (uniform,) = [one for one in every_allocation() if one[0] == (b,) * 3]
        allocation = allocate(budget=uniform[1])
        assert allocation.nbytes <= uniform[1]
        best = min(error for _, size, _, error in every_allocation() if size <= uniform[1])
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(allocation.predicted_error, best, rtol=1e-4, atol=1e-12)
        if 1 < b < BITS:
            assert allocation.measured_error < uniform[3] / 2
        (size,) = [size for numbers, size, _, _ in every_allocation() if numbers == numbers_of(allocation)]
        assert allocation.nbytes == size
        assert [(row.bitlayers, row.nbytes) for row in allocation.uniform] == [
            (numbers[0], size) for numbers, size, _, _ in every_allocation() if len(set(numbers)) == 1
        ]

    @pytest.mark.parametrize("average", [1, 2.7, 3.5, 6])
    def test_average(self, average):
        allocation = allocate(average=average)
        best = min(error for _, _, mean, error in every_allocation() if mean <= average + 1e-9)
        np.testing.assert_allclose(allocation.measured_error, best, rtol=1e-4, atol=1e-12)
        assert allocation.average <= average + 1e-9

    @pytest.mark.parametrize("tolerance", [0.3, 0.02, 1e-3, 1e-12])
    def test_tolerance(self, tolerance):
        allocation = allocate(tolerance=tolerance)
        assert allocation.measured_error <= tolerance
        assert allocation.nbytes == min(size for _, size, _, error in every_allocation() if error <= tolerance)

    def test_numbers_to_choose_from(self):
        allocation = allocate(average=4, bitlayers=[5, 2, 6])
        within = [one for one in every_allocation() if set(one[0]) <= {2, 5, 6} and one[2] <= 4]
        np.testing.assert_allclose(allocation.measured_error, min(one[3] for one in within), rtol=1e-4)
        assert [row.bitlayers for row in allocation.uniform] == [2, 5, 6]
        assert set(allocation.rows[0].errors) == {2, 5, 6}

    def test_more_budget_is_never_worse(self):
        sizes = np.linspace(every_allocation()[0][1], every_allocation()[-1][1], 12)
        errors = [allocate(budget=size).predicted_error for size in sizes]
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


alternatives = st.lists(
    st.tuples(st.integers(0, 20), st.floats(-1, 1, allow_subnormal=False)), min_size=1, max_size=4
).map(lambda pairs: tuple(np.array(column, np.float64) for column in zip(*pairs, strict=True)))


class TestFront:
    @hypothesis.given(st.lists(alternatives, max_size=4))
    def test_is_what_trying_everything_finds(self, stages):
        costs, errors = [stage[0] for stage in stages], [stage[1] for stage in stages]
        front = pareto_front(costs, errors)
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
        exact = pareto_front(costs, errors, max_points=10**6)
        thin = pareto_front(costs, errors, max_points=100)
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


def test_nnx_module():
    model = pbjax.nnx.quantize(models.NnxMLP(nnx.Rngs(0)), 6)
    allocation = allocate(run_module, model, normal(5, 32), average=3)
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


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_all_bitlayers_have_no_error(batch_size):
    """Although the programs that measure them may round other than the one that they are measured against."""
    params = {str(i): normal(64, 64, seed=i) / 8 for i in range(3)}

    def fn(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return x

    x = normal(16, 64)
    qparams = pbjax.quantize(params, 8, fn=fn, args=(x,))
    chosen = allocate(pbjax.quantized(fn), qparams, x, tolerance=0.0, batch_size=batch_size)
    assert numbers_of(chosen) == (8, 8, 8)
    assert chosen.measured_error == 0


def test_refuses_a_trace():
    with pytest.raises(TypeError, match="`qparams` and `batch` must have known values, but got traced ones"):
        jax.jit(lambda x: allocate(batch=x, tolerance=0.1).nbytes)(X)


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match=r"`batch` must give outputs with elements, but got shape \(0, 40\)"):
        allocate(batch=X[:0], tolerance=0.1)


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
            return jnp.abs(APART(qparams, x)["c"]).max()  # no sum, which compilers round in other orders

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
