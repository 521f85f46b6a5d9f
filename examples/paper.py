"""The evaluation of the PrecisionBatching paper, rebuilt: three tasks, one table, one figure.

Trains the models of `digits.py`, `language_model.py` and `inference_nli.py`, and measures of each how good it is, how
many bytes it takes and how fast it answers one request: with 1, 2, .., 8 bitlayers in all layers, with numbers that
`pbjax.allocate` chose, with 8-bit, 16-bit and float activations, beside float32, bfloat16, int8 and int4, and beside
the number format of the paper (its numbers are computed, its speed is not). What `allocate` finds within the bytes of
1, 2, .., 6 bitlayers in all layers is compared with all other assignments within them. On two cores that took nine
minutes, and training comes before.

    .venv/bin/python examples/paper.py --output paper.png --csv paper.csv --markdown paper.md

With `--weights DIR` the trained weights are kept, and a later run with the same options trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comparison
import digits
import equal_bytes
import inference_nli
import jax
import language_data
import language_model
import nli_data
import options
import rich.console
from benchmarks.timing import cpu_model
from digits_data import load_digits
from flax import nnx
from inference_nli import PairClassifier
from language_model import LanguageModel
from paper_output import draw, markdown
from quality import Row, Task

import pbjax.files

SEED = 0
ACTIVATION_BITS = (16, 8, None)
AVERAGES = (2.5, 3.0, 3.5)  # bitlayers per weight that are allocated
LIMITS = (1, 2, 3, 4, 5, 6)  # uniform numbers of bitlayers, within whose bytes others are allocated


def digits_task(args: argparse.Namespace) -> Task:
    """The MLP of `digits.py`, as the NNX module that the other two are."""
    data, hidden, steps = load_digits(SEED), args.hidden or 4096, args.steps or 150

    def trained(model):
        mlp = digits.MLP(hidden)
        params = digits.train(mlp, data, steps=steps, seed=SEED, progress=args.progress)["params"]
        for i, layer in enumerate(model.layers[::2]):
            layer.kernel[...], layer.bias[...] = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
        return model

    rngs = nnx.Rngs(SEED)
    first, second = nnx.Linear(data.test_images.shape[1], hidden, rngs=rngs), nnx.Linear(hidden, hidden, rngs=rngs)
    model = nnx.Sequential(first, nnx.relu, second, nnx.relu, nnx.Linear(hidden, 10, rngs=rngs))
    return Task(
        name=f"digits, MLP-{hidden}",
        metric="accuracy",
        model=restored(args.weights, "digits", model, trained, hidden=hidden, steps=steps),
        logits=nnx.Sequential.__call__,
        inputs=data.test_images,
        labels=data.test_labels,
        calibration=data.train_images[:256],
        deployed=nnx.Sequential.__call__,
        example=data.test_images[:1],
        unit="image",
        units=1,
    )


def language_task(args: argparse.Namespace) -> Task:
    text, hidden, steps = language_data.load_topics(1024), args.hidden or 1536, args.steps or 200
    model = LanguageModel(len(text.tokens), 128, hidden, "lstm", nnx.Rngs(SEED))

    def trained(model):
        return language_model.trained(model, text, steps=steps, seed=SEED, progress=args.progress)

    model = restored(args.weights, "language", model, trained, hidden=hidden, steps=steps)
    return language_model.task_of(model, text, f"language, LSTM-{hidden}")


def inference_task(args: argparse.Namespace) -> Task:
    data = nli_data.load_grammar(inference_nli.TRAIN_PAIRS, inference_nli.TEST_PAIRS, SEED)
    hidden, width, steps = args.hidden or 1536, args.hidden or 1024, args.steps or 300
    model = PairClassifier(len(data.words), 64, hidden, width, "lstm", nnx.Rngs(SEED))

    def trained(model):
        return inference_nli.trained(model, data, steps=steps, seed=SEED, progress=args.progress)

    model = restored(args.weights, "inference", model, trained, hidden=hidden, steps=steps)
    return inference_nli.task_of(model, data, f"inference, LSTM-{hidden}")


TASKS = {"digits": digits_task, "language": language_task, "inference": inference_task}


def restored(
    directory: Path | None, name: str, model: nnx.Module, trained: Callable[[nnx.Module], nnx.Module], **options: int
) -> nnx.Module:
    """A model with the weights of an earlier run of the same options, or trained, and its weights written down."""
    path = None if directory is None else directory / f"{name}.safetensors"
    graph, state = nnx.split(model)
    if path is not None and path.exists() and pbjax.files.info(path).metadata == options:
        return nnx.merge(graph, pbjax.load(path, like=state))
    model = trained(model)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pbjax.save(path, nnx.state(model), metadata=options)
    return model


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Rows as data, with what they were measured on."""
    where = dict(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cpu=cpu_model(),
        threads=os.cpu_count(),
        jax=jax.__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*where, *(field.name for field in dataclasses.fields(Row))])
        writer.writeheader()
        for row in rows:
            values = {
                name: f"{value:.5g}" if isinstance(value, float) else value
                for name, value in dataclasses.asdict(row).items()
            }
            writer.writerow(where | values)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` made."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    kinds: dict[str, Callable[[str], Any]] = {"num_bytes": int, "quality": float, "loss": float, "divergence": float}
    for name in ("bitlayers", "ms", "speedup", "calibration", "best"):
        kinds[name] = lambda text: float(text) if text else None
    for name in ("limit", "tried"):
        kinds[name] = lambda text: int(text) if text else None
    names = [field.name for field in dataclasses.fields(Row)]
    return [Row(**{name: kinds.get(name, str)(line[name]) for name in names}) for line in lines]


def measured(text: str) -> list[Row]:
    """The type of `--draw`: the rows of a file that `write_csv` made."""
    try:
        rows = read_csv(Path(text))
        for task in dict.fromkeys(row.task for row in rows):
            here = [row for row in rows if row.task == task]
            next(row for row in here if row.method == "float32" and row.speedup is not None)
            equal_bytes.make_table(here, task)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be read, but got: {error}") from None
    except (ValueError, LookupError, TypeError, StopIteration, csv.Error) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise argparse.ArgumentTypeError(f"must be a whole file of --csv, but {text} gave: {reason}") from None
    if not rows:
        raise argparse.ArgumentTypeError(f"must hold rows of --csv, but {text} has none")
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which of them (default: all)")
    add("--output", type=options.picture, default="paper.png", metavar="FILE", help="the figure (default: %(default)s)")
    add("--csv", type=options.writable, metavar="FILE", help="where all rows go as data, if anywhere")
    add("--markdown", type=options.writable, metavar="FILE", help="where the two tables of the README go, if anywhere")
    add("--weights", type=Path, metavar="DIR", help="keep trained weights here, for later runs")
    add("--train", action="store_true", help="train only, and write to --weights")
    add("--draw", type=measured, metavar="CSV", help="measure nothing: draw the rows of such a file")
    add("--hidden", type=options.width, metavar="N", help="width of all hidden layers, not 4096, 1536 and 1536")
    add("--steps", type=options.steps, metavar="N", help="training steps of each task, not 150, 200 and 300")
    add("--max-seconds", type=options.seconds, default=60, metavar="S",
        help="of timing for each task (default: %(default)s)")  # fmt: skip
    add("--no-progress", dest="progress", action="store_false", help="show no progress")
    args = parser.parse_args(argv)
    args.tasks = list(dict.fromkeys(args.tasks))
    if args.train and args.weights is None:
        parser.error("--train needs --weights, where the trained weights go")
    if args.draw and (args.train or args.csv):
        parser.error("--draw measures nothing, so there is nothing for --train and --csv")
    if args.weights is not None:
        try:
            options.writable(str(args.weights / "digits.safetensors"))
            for path in (args.weights / f"{name}.safetensors" for name in args.tasks):
                if path.exists():
                    pbjax.files.verify(path)
        except (argparse.ArgumentTypeError, pbjax.files.FileError) as error:
            parser.error(f"--weights: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the evaluation with command line arguments, and returns its rows."""
    args = parse(argv)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 130)
    rows = args.draw or []
    for name in () if args.draw else args.tasks:
        task = TASKS[name](args)
        if args.train:
            continue
        variants, allocations = comparison.variants(
            task,
            ACTIVATION_BITS,
            averages=AVERAGES,
            limits=LIMITS,
            original=True,
            log=print if args.progress else lambda _: None,
        )
        for allocation in allocations:
            print(allocation)
        found = comparison.timed(task, variants, max_seconds=args.max_seconds)
        console.print(comparison.make_table(found, task.name, task.unit))
        console.print(equal_bytes.make_table(found, task.name))
        rows += found
    if args.train:
        return []
    if args.csv:
        write_csv(rows, args.csv)
    if args.markdown:
        args.markdown.write_text(f"{markdown(rows)}\n{equal_bytes.markdown(rows)}")
    draw(rows, args.output)
    print(f"wrote {args.output}")
    return rows


if __name__ == "__main__":
    main()
