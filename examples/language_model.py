"""A language model at every precision from 1 to 8 bits, from one stored model.

Trains an LSTM (or a GRU, or a plain recurrent network) in float32 on English that every Python carries, quantizes it
once to 8 bitlayers, and measures its perplexity on text that it has not seen, its size and how fast it writes: with 1,
2, .., 8 bitlayers, and as float32, bfloat16, int8 and int4 beside them. Prints a table and what the model writes, and
draws a picture. The task and the widths of --paper are those of the PrecisionBatching paper.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import language_data
import numpy as np
from evaluation import evaluate
from flax import nnx
from language_data import Text
from options import integer, parse_recurrent, recurrent_parser
from quality import Row, Task
from recurrent import CELLS, run_over, train, zero_carry

TEST_ROWS, TEST_TOKENS = 32, 8192  # pieces that the test text is cut into, and how much of it is read
TRAIN_ROWS, TRAIN_LENGTH = 64, 32
WIDTHS = dict(hidden=(1536, 2048), embedding=(128, 2048))  # and those of --paper
WRITTEN = 32  # tokens that are written for a time


class LanguageModel(nnx.Module):
    """Which token comes next; knows nothing of bitlayers."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, cell: str, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, embedding, rngs=rngs)
        self.cell = CELLS[cell](embedding, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of what follows each token: int[rows, length] -> float[rows, length, vocabulary]."""
        return self.head(run_over(self.cell, self.embed(tokens)))

    def write(self, first: jax.Array, length: int) -> jax.Array:
        """The likeliest continuation, token by token: int[1] -> int[length]."""

        def step(state, _):
            carry, token = state
            carry, output = self.cell(carry, self.embed(token))
            token = self.head(output).argmax(-1)
            return (carry, token), token[0]

        return jax.lax.scan(step, (zero_carry(self.cell, 1), first), length=length)[1]


def batches(text: Text, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random pieces of the training text, and the same one token later."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(text.train) - TRAIN_LENGTH - 1, size=TRAIN_ROWS)
        pieces = text.train[starts[:, None] + np.arange(TRAIN_LENGTH + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


def trained(model: LanguageModel, text: Text, *, steps: int, seed: int, progress: bool) -> LanguageModel:
    """The model after it has learned the training text."""
    return train(
        model,
        LanguageModel.__call__,
        batches(text, seed),
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.1,
        progress=progress,
    )


def task_of(model: LanguageModel, text: Text, name: str) -> Task:
    """What is measured of a trained model."""
    inputs, labels = language_data.rows(text.test[: TEST_TOKENS + 1], TEST_ROWS)
    return Task(
        name=name,
        metric="perplexity",
        model=model,
        logits=LanguageModel.__call__,
        inputs=inputs,
        labels=labels,
        calibration=next(batches(text, seed=1))[0][:16],
        deployed=lambda model, first: model.write(first, WRITTEN),
        example=text.test[:1],
        unit="token written",
        units=WRITTEN,
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    parser = recurrent_parser(
        __doc__, widths=WIDTHS, steps_of=f"{TRAIN_ROWS} pieces", num_steps=200, output="language_model.png"
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="text to learn (UTF-8), instead of Python's documentation")
    add(
        "--vocabulary",
        type=integer(1, 2**16),
        default=1024,
        metavar="N",
        help="tokens (default: %(default)s)",
    )
    args = parse_recurrent(parser, argv, WIDTHS)
    try:
        if args.text is None:
            text = language_data.load_topics(args.vocabulary)
        else:
            text = language_data.load_file(args.text, args.vocabulary)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    least = TRAIN_LENGTH + 2, TEST_ROWS + 1
    if len(text.train) < least[0] or len(text.test) < least[1]:
        parser.error(
            f"a text must have {least[0]} tokens to learn and {least[1]} to test, but {text.name} has "
            f"{len(text.train)} and {len(text.test)}. Give a longer or more varied one."
        )
    return args, text


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example with command line arguments, and returns the rows of its table."""
    args, text = parse(argv)
    start = time.perf_counter()
    model = LanguageModel(len(text.tokens), args.embedding, args.hidden, args.cell, nnx.Rngs(args.seed))
    model = trained(model, text, steps=args.steps, seed=args.seed, progress=args.progress)
    task = task_of(model, text, f"{args.cell.upper()}-{args.hidden} language model")
    print(f"trained on {len(text.train):,} tokens of {text.name} in {time.perf_counter() - start:.0f} s")
    print("it writes:", repr(text.decode(np.asarray(task.model.write(jnp.asarray(task.example), WRITTEN)))))
    return evaluate(task, text.name, args)


if __name__ == "__main__":
    main()
