"""Natural language inference at every precision from 1 to 8 bits, from one stored model.

Does one sentence follow from another, contradict it, or neither? An LSTM (or a GRU, or a plain recurrent network) reads
both, and an MLP compares what it made of them. It is trained in float32 on sentences of a small grammar with
quantifiers, negation and kinds of things, whose labels logic decides, and tested on combinations of words that it has
not seen. Then it is quantized once to 8 bitlayers and measured with 1, 2, .., 8 of them, beside float32, bfloat16, int8
and int4: a table and a picture. --snli reads the corpus of the PrecisionBatching paper, --paper takes its width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nli_data
import numpy as np
from evaluation import evaluate
from flax import nnx
from nli_data import Data
from options import parse_recurrent, recurrent_parser
from quality import Row, Task
from recurrent import CELLS, run_over, train

TRAIN_PAIRS, TEST_PAIRS = 20_000, 2_000  # of the grammar
TRAIN_BATCH = 128
WIDTHS = dict(hidden=(1536, 3072), embedding=(64, 300), width=(1024, 3072))  # and those of --paper


class PairClassifier(nnx.Module):
    """Entailment, neutral or contradiction; knows nothing of bitlayers."""

    def __init__(self, num_words: int, embedding: int, hidden: int, width: int, cell: str, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_words, embedding, rngs=rngs)
        self.cell = CELLS[cell](embedding, hidden, rngs=rngs)
        self.compare = nnx.Linear(4 * hidden, width, rngs=rngs)
        self.decide = nnx.Linear(width, len(nli_data.LABELS), rngs=rngs)

    def read(self, sentences: jax.Array) -> jax.Array:
        """What is left of each sentence after its last word: int[rows, length] -> float[rows, hidden]."""
        return run_over(self.cell, self.embed(sentences), sentences != nli_data.PADDING)[:, -1]

    def __call__(self, pairs: jax.Array) -> jax.Array:
        """Logits of the three labels: int[rows, 2, length] -> float[rows, 3]."""
        u, v = self.read(pairs[:, 0]), self.read(pairs[:, 1])
        both = jnp.concatenate([u, v, jnp.abs(u - v), u * v], axis=-1)
        return self.decide(nnx.relu(self.compare(both)))


def batches(data: Data, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random training pairs and their labels."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(len(data.train_labels), size=TRAIN_BATCH)
        yield data.train_sentences[rows], data.train_labels[rows]


def trained(model: PairClassifier, data: Data, *, steps: int, seed: int, progress: bool) -> PairClassifier:
    """The model after it has learned the training pairs."""
    return train(
        model,
        PairClassifier.__call__,
        batches(data, seed),
        steps=steps,
        learning_rate=1e-3,
        weight_decay=0.05,
        progress=progress,
    )


def task_of(model: PairClassifier, data: Data, name: str) -> Task:
    """What is measured of a trained model."""
    return Task(
        name=name,
        metric="accuracy",
        model=model,
        logits=PairClassifier.__call__,
        inputs=data.test_sentences,
        labels=data.test_labels,
        calibration=data.train_sentences[:128],
        deployed=PairClassifier.__call__,
        example=data.test_sentences[:1],
        unit="pair of sentences",
        units=1,
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Data]:
    parser = recurrent_parser(
        __doc__, widths=WIDTHS, steps_of=f"{TRAIN_BATCH} pairs", num_steps=220, output="inference_nli.png"
    )
    parser.add_argument(
        "--snli", type=Path, metavar="DIR", help="read snli_1.0_train.jsonl and snli_1.0_test.jsonl in DIR"
    )
    args = parse_recurrent(parser, argv, WIDTHS)
    try:
        if args.snli is not None:
            return args, nli_data.load_snli(args.snli)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args, nli_data.load_grammar(TRAIN_PAIRS, TEST_PAIRS, args.seed)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example with command line arguments, and returns the rows of its table."""
    args, data = parse(argv)
    start = time.perf_counter()
    rngs = nnx.Rngs(args.seed)
    model = PairClassifier(len(data.words), args.embedding, args.hidden, args.width, args.cell, rngs)
    model = trained(model, data, steps=args.steps, seed=args.seed, progress=args.progress)
    task = task_of(model, data, f"{args.cell.upper()}-{args.hidden} inference")
    print(f"trained on {len(data.train_labels):,} {data.name} in {time.perf_counter() - start:.0f} s")
    return evaluate(task, data.name, args)


if __name__ == "__main__":
    main()
