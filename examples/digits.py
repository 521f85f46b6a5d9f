"""Handwritten digits at every precision from 1 to 8 bits, from one stored model.

Trains an MLP of the widths in the PrecisionBatching paper (input-4096-4096-10) in float32, quantizes it once to 8
bitlayers, and measures how well and how fast it runs on the first 1, 2, .., 8 of them: a table and a picture. The model
is plain Flax, and the number of bitlayers is a run-time value, so nothing is compiled or stored twice.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import rich.console
import rich.progress
from benchmarks.timing import interleaved
from digits_data import Data, load_digits, load_mnist
from digits_output import Row, draw, make_table
from flax import linen as nn

import pbjax

BITS = 8
BITLAYERS = range(1, BITS + 1)
TRAIN_BATCH = 128
TEST_BATCH = 512  # images at a time, each at every number of bitlayers


class MLP(nn.Module):
    """An ordinary Flax model, which knows nothing of bitlayers."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(10)(x)


def train(model: MLP, data: Data, *, steps: int, seed: int, progress: bool) -> Any:
    """Float parameters after `steps` steps of Adam."""
    params = model.init(jax.random.key(seed), data.train_images[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-4, steps))
    state = optimizer.init(params)

    def loss_of(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, images, labels):
        loss, gradients = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(seed)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("loss {task.fields[loss]:.4f}"))
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("train", total=steps, loss=math.nan)
        for _ in range(steps):
            batch = rng.integers(len(data.train_images), size=TRAIN_BATCH)
            params, state, loss = step(params, state, data.train_images[batch], data.train_labels[batch])
            bar.update(task, advance=1, loss=float(loss))
    return params


def predict(model: MLP, params: Any, qparams: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digits that the float model sees, int[images], and that each number of bitlayers sees, int[BITS, images]."""
    apply = pbjax.quantized(model.apply)

    def digit(qparams, bitlayers, image):
        return apply(pbjax.with_bitlayers(qparams, bitlayers), image).argmax(-1)

    @jax.jit
    def sweep(qparams, images):
        at_every_precision = jax.vmap(digit, in_axes=(None, 0, None))
        return jax.lax.map(
            lambda image: at_every_precision(qparams, jnp.array(BITLAYERS), image), images, batch_size=TEST_BATCH
        )

    return np.asarray(jax.jit(model.apply)(params, images).argmax(-1)), np.asarray(sweep(qparams, images)).T


def time_one_image(model: MLP, params: Any, qparams: Any, image: np.ndarray) -> list[float]:
    """Median milliseconds for one image: with the float model, then with 1, 2, .., BITS bitlayers."""
    image = jnp.asarray(image[None])
    float_model = jax.jit(model.apply)
    bit_model = jax.jit(pbjax.quantized(model.apply))  # compiled once for every number of bitlayers
    functions = {None: functools.partial(float_model, params, image)}
    for bitlayers in BITLAYERS:
        functions[bitlayers] = functools.partial(bit_model, pbjax.with_bitlayers(qparams, bitlayers), image)
    times = interleaved(functions, repeats=100, max_seconds=15, warm=True)
    return [times[key].median_us / 1000 for key in functions]


def measure(model: MLP, params: Any, qparams: Any, data: Data) -> list[Row]:
    """A row for the float model, then one for each number of bitlayers."""
    float_digits, bit_digits = predict(model, params, qparams, data.test_images)
    ms = time_one_image(model, params, qparams, data.test_images[0])
    trees = [params, *(pbjax.truncate(qparams, bitlayers) for bitlayers in BITLAYERS)]
    return [
        Row(
            bitlayers=bitlayers,
            num_bytes=num_bytes(trees[i]),
            accuracy=float((digits == data.test_labels).mean()),
            agreement=float((digits == float_digits).mean()),
            ms=ms[i],
        )
        for i, (bitlayers, digits) in enumerate(zip([None, *BITLAYERS], [float_digits, *bit_digits], strict=True))
    ]


def num_bytes(params: Any) -> int:
    """Bytes of all parameters; those of a BitTensor are its bitlayers and scales."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, pbjax.BitTensor)))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Data]:
    """The options, and the data that they name."""
    parser = options.parser_of(__doc__)
    add = parser.add_argument
    add(
        "--mnist",
        type=Path,
        metavar="DIR",
        help="read the four IDX files of MNIST (plain or .gz) in DIR instead of scikit-learn's 1,797 digits; "
        "1000 steps suit it, and take some minutes",
    )
    add(
        "--steps",
        type=options.steps,
        default=150,
        help=f"steps of {TRAIN_BATCH} images (default: %(default)s)",
    )
    add("--hidden", type=options.width, default=4096, help="width of both hidden layers (default: %(default)s)")
    add(
        "--activation-bits",
        type=options.activation_bits,
        default=16,
        metavar="A",
        help="width of the fixed-point activations, 2..24, or none for float ones (default: %(default)s)",
    )
    add(
        "--seed",
        type=options.seed,
        default=0,
        help="of weights, batches and the split (default: %(default)s)",
    )
    add("--output", type=options.picture, default="digits.png", help="where the picture goes (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    args = parser.parse_args(argv)
    try:
        return args, load_digits(args.seed) if args.mnist is None else load_mnist(args.mnist)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example with command line arguments, and returns the rows of its table."""
    args, data = parse(argv)
    model = MLP(args.hidden)
    start = time.perf_counter()
    params = train(model, data, steps=args.steps, seed=args.seed, progress=args.progress)
    trained = time.perf_counter()
    qparams = pbjax.quantize(
        params, BITS, fn=model.apply, args=(data.test_images,), activation_bits=args.activation_bits
    )
    jax.block_until_ready(qparams)
    print(f"trained in {trained - start:.1f} s, quantized to {BITS} bits in {time.perf_counter() - trained:.1f} s")
    rows = measure(model, params, qparams, data)
    title = f"MLP {data.test_images.shape[1]}-{args.hidden}-{args.hidden}-10 on {data.name}"
    rich.console.Console().print(make_table(rows, title))
    draw(rows, title, args.output)
    print(f"wrote {args.output}")
    return rows


if __name__ == "__main__":
    # Every image is waited for, so no other thread has to take the calls: that makes both models some 30 us faster.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the first array
    main()
