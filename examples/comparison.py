"""A trained model on bitlayers beside its baselines: quality, bytes and time, as rows of data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equal_bytes
import jax
import jax.numpy as jnp
import rich.box
import rich.table
from baselines import OriginalLinear, baselines, model_bytes, original_bytes, replace_linears
from benchmarks.timing import interleaved
from flax import nnx
from quality import Row, Task, divergence_of, lost, quality_of, quality_text, tree_bytes, weight_bytes

import pbjax

BITS = 8
BITLAYERS = range(1, BITS + 1)
SWEEP_BATCH = 4  # numbers of bitlayers evaluated together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row to be, and the function that is timed for it."""

    row: Row
    call: Callable[[], jax.Array] | None


def activation_name(activation_bits: int | None) -> str:
    return "float" if activation_bits is None else str(activation_bits)


def variants(
    task: Task,
    activation_bits: Sequence[int | None] = (16,),
    *,
    averages: Sequence[float] = (),
    limits: Sequence[int] = (),
    original: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> tuple[list[Variant], list[pbjax.Allocation]]:
    """All ways of running the model of a task with their qualities, float32 first, and what was allocated.

    Args:
      task: the trained model.
      activation_bits: widths of activations of bitlayers.
      averages: bitlayers per weight to allocate.
      limits: uniform numbers of bitlayers within whose bytes to allocate, for the first width of activations.
      original: whether to add the format of the paper.
      log: told what is skipped, and what goes on.
    """
    inputs, labels = jnp.asarray(task.inputs), jnp.asarray(task.labels)
    logits_of = jax.jit(lambda graph, params, x: task.logits(nnx.merge(graph, params), x), static_argnums=0)
    exact_logits = logits_of(*nnx.split(task.model), inputs)
    # Both computed here: in a jitted function they would be constants, which XLA folds with patience.
    probabilities, log_probabilities = jax.nn.softmax(exact_logits), jax.nn.log_softmax(exact_logits)

    @jax.jit
    def score(logits):
        return quality_of(logits, labels, task.metric), divergence_of(logits, probabilities, log_probabilities)

    exact = float(score(exact_logits)[0])
    deployed = jax.jit(lambda graph, params, x: task.deployed(nnx.merge(graph, params), x), static_argnums=0)
    example = jnp.asarray(task.example)
    result = []

    def add(method, scores, num_bytes, call, *, bitlayers=None, activations="", **more):
        value, divergence = map(float, scores)
        row = Row(
            task=task.name, method=method, activation_bits=activations, bitlayers=bitlayers, num_bytes=num_bytes,
            metric=task.metric, quality=value, loss=lost(value, exact, task.metric), divergence=divergence,
            **more,
        )  # fmt: skip
        result.append(Variant(row=row, call=call))
        log(f"{task.name}: {method} {activations} {bitlayers or ''} {task.metric} {value:.4g}")

    for name, model in baselines(task.model).items():
        if isinstance(model, str):
            log(f"{name} is left out: {model}")
            continue
        call = functools.partial(deployed, *nnx.split(model), example)
        add(name, score(logits_of(*nnx.split(model), inputs)), model_bytes(model), call)

    allocations = {}
    graph, params = nnx.split(task.model)
    for width in activation_bits:
        qparams = quantize(task, graph, params, width)
        logits = pbjax.quantized(lambda params, x: task.logits(nnx.merge(graph, params), x))
        run = jax.jit(pbjax.quantized(lambda params, x: task.deployed(nnx.merge(graph, params), x)))

        def measure(qparams, logits=logits):
            return score(logits(qparams, inputs))

        measure_one = jax.jit(measure)
        curve = zip(*pbjax.sweep(measure, qparams, BITLAYERS, batch_size=SWEEP_BATCH), strict=True)
        for bitlayers, scores in zip(BITLAYERS, curve, strict=True):
            call = functools.partial(run, pbjax.with_bitlayers(qparams, bitlayers), example)
            num_bytes = tree_bytes(pbjax.truncate(qparams, bitlayers))
            activations = activation_name(width)
            add("uniform", scores, num_bytes, call, bitlayers=float(bitlayers), activations=activations)
        chosen: list[tuple[pbjax.Allocation, dict[str, Any]]] = []
        for average in averages:
            if average not in allocations:
                allocations[average] = pbjax.allocate(
                    logits, qparams, jnp.asarray(task.calibration), average=average, metric="kl", progress=False
                )
            chosen.append((allocations[average], {}))
        if limits and width == activation_bits[0]:
            for limit, found in equal_bytes.search(logits, qparams, task.calibration, limits).items():
                facts = dict(limit=limit, calibration=found.calibration, tried=found.tried, best=found.best)
                chosen.append((found.allocation, facts))
        for allocation, facts in chosen:
            allocated = pbjax.with_bitlayers(qparams, allocation.bitlayers)
            add(
                equal_bytes.METHOD if facts else "allocated",
                measure_one(allocated),
                tree_bytes(qparams) - weight_bytes(qparams) + allocation.nbytes,
                None if facts else functools.partial(run, allocated, example),
                bitlayers=allocation.average,
                activations=activation_name(width),
                layers="-".join(str(row.bitlayers) for row in allocation.rows),
                **facts,
            )

    for bits in range(1, BITS) if original else ():
        for width in (8, None):
            model = replace_linears(task.model, functools.partial(OriginalLinear, bits=bits, activation_bits=width))
            num_bytes = original_bytes(task.model, bits)
            scores = score(logits_of(*nnx.split(model), inputs))
            add("original", scores, num_bytes, None, bitlayers=bits + 1.0, activations=activation_name(width))
    return result, list(allocations.values())


def quantize(task: Task, graph: Any, params: Any, activation_bits: int | None) -> Any:
    """The parameters of a model with 8 bitlayers; tables that are only looked up stay as they are."""
    return pbjax.quantize(
        params,
        BITS,
        fn=lambda params, x: task.logits(nnx.merge(graph, params), x),
        args=(task.inputs,),
        activation_bits=activation_bits,
    )


def timed(task: Task, variants: Sequence[Variant], *, repeats: int = 30, max_seconds: float = 30) -> list[Row]:
    """The rows of variants with their times, all in turn; those that have no function keep none."""
    functions = {i: variant.call for i, variant in enumerate(variants) if variant.call is not None}
    times = interleaved(functions, repeats=repeats, max_seconds=max_seconds, warm=True)
    rows = []
    for i, variant in enumerate(variants):
        if i not in times:
            rows.append(variant.row)
            continue
        median = times[i].median_us
        speedup = times[0].median_us / median
        rows.append(dataclasses.replace(variant.row, ms=median / 1000 / task.units, speedup=speedup))
    return rows


def _group(row: Row) -> tuple[str, ...]:
    """Of rows that stand together in a table: uniform numbers by activations, baselines all."""
    if row.bitlayers is None:
        return ()
    return (row.method, row.activation_bits) if row.method == "uniform" else (row.method,)


def make_table(rows: Sequence[Row], title: str, unit: str) -> rich.table.Table:
    """The rows as a table for the terminal."""
    caption = f"A: bits of activations; quality on the test data, median time for one {unit}"
    table = rich.table.Table(title=title, caption=caption, box=rich.box.SIMPLE_HEAD)  # 80 columns hold it
    for name in ("", "A", "bitlayers", "MB", rows[0].metric, "lost", "ms", "speed-up"):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        if i and _group(row) != _group(rows[i - 1]):
            table.add_section()
        table.add_row(
            row.method,
            row.activation_bits,
            "" if row.bitlayers is None else f"{row.bitlayers:.3g}",
            f"{row.num_bytes / 1e6:.3g}",
            quality_text(row),
            f"{row.loss:.2%}",
            "" if row.ms is None else f"{row.ms:.3f}",
            "" if row.speedup is None else f"{row.speedup:.1f}x",
        )
    return table
