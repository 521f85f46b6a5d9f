"""A server that gives each request of a batch the precision that it pays for.

A model of handwritten digits is stored once with 8 bitlayers. Every image is asked for at 1, 2, 4 and 8 of them, and
one compiled program serves batches of mixed precision. Each answer has the bits that it would have alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax
import rich.console
import rich.table
from digits_data import load_digits
from flax import linen as nn

import pbjax

PRICES = np.array([1, 2, 4, 8], np.int32)  # bitlayers
BATCH = 32


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, steps: int) -> Any:
    """Float parameters after some steps of Adam on all images."""
    params = model.init(jax.random.key(0), images[:1])
    optimizer = optax.adam(3e-3)

    def step(carry, _):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, images), labels).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0][0])((params, optimizer.init(params)))


def main(argv: Sequence[str] | None = None) -> tuple[np.ndarray, bool]:
    """Returns the accuracy at each price, and whether mixed batches had the bits of requests served alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("precision_per_request.png"), help="the picture")
    output: Path = parser.parse_args(argv).output
    data, model = load_digits(0), nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
    qparams = pbjax.quantize(train(model, data.train_images, data.train_labels, steps=60), bits=8)

    def serve(image, bitlayers):
        return jax.nn.softmax(pbjax.quantized(model.apply)(pbjax.with_bitlayers(qparams, bitlayers), image))

    serve_batch, serve_one = jax.jit(jax.vmap(serve)), jax.jit(serve)
    num_batches = len(data.test_images) * len(PRICES) // BATCH
    requests = np.random.default_rng(0).permutation(len(data.test_images) * len(PRICES))[: num_batches * BATCH]
    image, price = np.divmod(requests, len(PRICES))
    batches = zip(data.test_images[image].reshape(-1, BATCH, 64), PRICES[price].reshape(-1, BATCH), strict=True)
    answers = np.concatenate([serve_batch(*batch) for batch in batches])
    alone = np.stack([serve_one(data.test_images[image[i]], PRICES[price[i]]) for i in range(BATCH)])
    right, sure = answers.argmax(-1) == data.test_labels[image], answers.max(-1)

    table = rich.table.Table("bitlayers", "requests", "right", "mean probability", title="mixed batches")
    for i, bitlayers in enumerate(PRICES):
        of = price == i
        table.add_row(str(bitlayers), str(of.sum()), f"{right[of].mean():.1%}", f"{sure[of].mean():.2f}")
    rich.console.Console().print(table)
    figure = matplotlib.figure.Figure(figsize=(9, 3), layout="constrained")
    for i, (axes, bitlayers) in enumerate(zip(figure.subplots(1, 4, sharey=True), PRICES, strict=True)):
        axes.hist([sure[(price == i) & each] for each in (right, ~right)], np.linspace(0, 1, 11))  # side by side
        axes.set(title=f"bitlayers: {bitlayers}", yscale="log", ylim=(0.5, 1000), ylabel="" if i else "requests")
    figure.supxlabel("probability of the answer")
    figure.legend(["right", "wrong"], loc="outside right upper")
    figure.savefig(output, dpi=150)
    print(f"mixed batch equals requests alone: {(answers[:BATCH] == alone).all()}; wrote {output}")
    return np.array([right[price == i].mean() for i in range(len(PRICES))]), bool((answers[:BATCH] == alone).all())


if __name__ == "__main__":
    main()
