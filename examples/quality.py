"""What is asked of a model, and what one way of running it gave: tasks, and rows of data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pbjax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A trained model and what is asked of it.

    Attributes:
      name: for tables.
      metric: "accuracy" (higher is better) or "perplexity" (lower is better).
      model: in float32.
      logits: logits(model, inputs) -> float[..., classes], of many inputs at once.
      inputs, labels: for testing.
      calibration: inputs of training, for `pbjax.allocate`.
      deployed: deployed(model, example): the model as it is used, on one example.
      example: one example.
      unit: what `deployed` is timed for; `units` of these are in the example.
    """

    name: str
    metric: str
    model: nnx.Module
    logits: Callable[[Any, jax.Array], jax.Array]
    inputs: np.ndarray
    labels: np.ndarray
    calibration: np.ndarray
    deployed: Callable[[Any, jax.Array], jax.Array]
    example: np.ndarray
    unit: str
    units: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way of running a model, and what it gave.

    Attributes:
      task: name of the task.
      method: "float32", another baseline, "uniform", "allocated", "equal bytes" (allocated within the bytes of a
        uniform number), or "original", the format of the paper.
      activation_bits: of fixed-point activations, "float", or "" for baselines, which choose themselves.
      bitlayers: per weight on average, or None for baselines; those stored, for the original's format.
      num_bytes: of all parameters, with the bitlayers in use only.
      metric: name of the quality.
      quality: on the test data.
      loss: part of the float32 quality that is lost; negative where it is better than float32.
      divergence: mean Kullback-Leibler divergence of its probabilities from those of float32 on the test data, in nats:
        it tells apart what no test example does.
      ms: median milliseconds for one unit of the example, or None where it was not timed.
      speedup: over float32 in the same turns.
      layers: of allocations, the bitlayers of each layer in the order of the tree.
      limit: of "equal bytes", the uniform number whose bytes it keeps to.
      calibration: of "equal bytes", the mean divergence from all bitlayers on the inputs that it was chosen from.
      tried: of "equal bytes", how many assignments keep to these bytes; all were measured on the same inputs.
      best: the least divergence of all of them.
    """

    task: str
    method: str
    activation_bits: str
    bitlayers: float | None
    num_bytes: int
    metric: str
    quality: float
    loss: float
    divergence: float
    ms: float | None = None
    speedup: float | None = None
    layers: str = ""
    limit: int | None = None
    calibration: float | None = None
    tried: int | None = None
    best: float | None = None


def quality_of(logits: jax.Array, labels: jax.Array, metric: str) -> jax.Array:
    if metric == "accuracy":
        return (logits.argmax(-1) == labels).mean()
    scores = jax.nn.log_softmax(logits)
    return jnp.exp(-jnp.take_along_axis(scores, labels[..., None], -1).mean())


def divergence_of(logits: jax.Array, probabilities: jax.Array, log_probabilities: jax.Array) -> jax.Array:
    """Mean KL divergence of softmax(logits) from given probabilities, in nats."""
    return (probabilities * (log_probabilities - jax.nn.log_softmax(logits))).sum(-1).mean()


def lost(quality: float, exact: float, metric: str) -> float:
    """Part of the float32 quality that is lost; minus infinity if float32 has none to lose."""
    if quality == exact:
        return 0.0
    if exact == 0:
        return -math.inf
    return (exact - quality) / exact if metric == "accuracy" else (quality - exact) / exact


def quality_text(row: Row) -> str:
    return f"{row.quality:.2%}" if row.metric == "accuracy" else f"{row.quality:.2f}"


def tree_bytes(tree: Any) -> int:
    """Bytes of all parameters; those of a BitTensor are its bitlayers and scales."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, pbjax.BitTensor)))


def weight_bytes(tree: Any) -> int:
    """Bytes of all BitTensors."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, pbjax.BitTensor))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, pbjax.BitTensor))
