"""Tables of the performance page, from the rows of data that the benchmarks wrote, into docs/_generated.

Nothing on that page is typed by hand, so it says what the files say. A file or column that is missing is an error.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FOLDER = Path(__file__).parent.parent / "_generated"
RESULTS = Path(__file__).parent.parent.parent / "examples" / "benchmarks" / "results"

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of a file of results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def number(value: str | float) -> str:
    """Two digits that count, as many as such a measurement has."""
    value = float(value)
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def activations(row: Row) -> str:
    """How a row's activations are represented."""
    return f"{row['activation_bits']} bits" if row["activation_bits"] else "float"


def distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The values of some columns, each once, in the order in which they come."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def only(rows: Iterable[Row], **values: str) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def speedups(rows: list[Row], product: str, sweep: str, speedup: str) -> str:
    """Speed over float32 by weight, rows and activations, for each number of bitlayers and for a sweep."""
    ours = only(rows, method=product)
    counts = sorted({int(row["bitlayers"]) for row in ours})
    lines = []
    for k, n, m in distinct(ours, "k", "n", "m"):
        for (width,) in distinct(only(ours, k=k, n=n, m=m), "activation_bits"):
            here = only(rows, k=k, n=n, m=m, activation_bits=width)
            by_count = {int(row["bitlayers"]): row for row in only(here, method=product)}
            swept = only(here, method=sweep)
            cells = [number(by_count[count][speedup]) if count in by_count else "" for count in counts]
            last = number(swept[0][speedup]) if swept else ""
            lines.append([f"{k} x {n}", m, activations({"activation_bits": width}), *cells, last])
    return table(["weight", "rows", "activations", *(f"{count} bl" for count in counts), "sweep"], lines)


def machine(rows: list[Row], *columns: str) -> str:
    """Where and when rows were measured, in a sentence."""
    said = ", ".join(f"{column} {' / '.join(value for (value,) in distinct(rows, column))}" for column in columns)
    repeats = sorted({int(row["repeats"]) for row in rows})
    turns = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    return f"Medians of {turns} turns; {said}.\n"


def cpu_speedups() -> str:
    """Backend `cpu` over XLA's float32 product."""
    return speedups(read("cpu.csv"), "pbjax", "pbjax sweep", "speedup_over_f32")


def cpu_machine() -> str:
    """Where cpu.csv was measured."""
    return machine(read("cpu.csv"), "date", "cpu", "threads", "cache")


def cpu_others() -> str:
    """What others reach in the same turns, and pbjax with 4 bitlayers of 8-bit activations beside them."""
    rows = [row for row in read("cpu.csv") if row["method"] not in ("read", "pbjax sweep")]
    others = [method for (method,) in distinct(rows, "method") if method not in ("pbjax", "XLA f32")]
    lines = []
    shapes = distinct(rows, "k", "n", "m")
    head = ["method", *(f"{k}, {m} {'row' if m == '1' else 'rows'}" for k, _, m in shapes)]

    def line(label: str, column: str, scale: float = 1, **values: str) -> list[str]:
        cells = []
        for k, n, m in shapes:
            found = only(rows, k=k, n=n, m=m, **values)
            cells.append(number(float(found[0][column]) * scale) if found else "")
        return [label, *cells]

    lines.append(line("XLA f32, ms", "median_us", 1e-3, method="XLA f32"))
    for width in ("8", "16"):
        for count in ("4", "8"):
            label = f"pbjax, {count} bitlayers, {width}-bit activations"
            lines.append(line(label, "speedup_over_f32", method="pbjax", bitlayers=count, activation_bits=width))
    lines += [line(method, "speedup_over_f32", method=method) for method in others]
    return table(head, lines)


def cpu_fastest() -> str:
    """Which method was the fastest for each shape, of those with weights of 8 bits and of those with fewer."""
    rows = read("cpu.csv")
    lines = []
    for k, n, m in distinct(rows, "k", "n", "m"):
        here = [row for row in only(rows, k=k, n=n, m=m) if row["method"] not in ("read", "pbjax sweep")]
        best = max(
            (row for row in here if not row["method"].startswith("pbjax")), key=lambda row: float(row["speedup_over_f32"])
        )
        ratios = [
            float(row["speedup_over_f32"]) / float(best["speedup_over_f32"])
            for count, width in (("4", "8"), ("8", "8"), ("4", "16"), ("8", "16"))
            for row in only(here, method="pbjax", bitlayers=count, activation_bits=width)
        ]
        lines.append([f"{k} x {n}", m, best["method"], *map(number, ratios)])
    head = ["weight", "rows", "fastest of the others", "4 bl, 8-bit", "8 bl, 8-bit", "4 bl, 16-bit", "8 bl, 16-bit"]
    return table(head, lines)


def xla_speedups() -> str:
    """Backend `xla` over XLA's float32 product."""
    return speedups(only(read("matmul_cpu.csv"), k="4096"), "bitlayers", "sweep", "speedup_over_f32")


def xla_machine() -> str:
    """Where matmul_cpu.csv was measured."""
    return machine(only(read("matmul_cpu.csv"), k="4096"), "date", "cpu", "jax")


def layer_speedups() -> str:
    """Flax layers on bitlayers over the same layers on float32 weights."""
    rows = read("layers_cpu.csv")
    packed = [row for row in rows if row["bitlayers"]]
    counts = sorted({int(row["bitlayers"]) for row in packed})
    lines = []
    for (layer,) in distinct(rows, "layer"):
        time = next(row["median_us"] for row in only(rows, layer=layer) if not row["bitlayers"])
        for (width,) in distinct(only(packed, layer=layer), "activation_bits"):
            here = {int(row["bitlayers"]): row for row in only(packed, layer=layer, activation_bits=width)}
            cells = [number(here[count]["speedup_over_float"]) for count in counts]
            lines.append([layer, f"{float(time) / 1000:.2f}", activations({"activation_bits": width}), *cells])
    return table(["layer", "float, ms", "activations", *(f"{count} bl" for count in counts)], lines)


def layer_machine() -> str:
    """Where layers_cpu.csv was measured."""
    return machine(read("layers_cpu.csv"), "date", "cpu", "jax")


TABLES: tuple[Callable[[], str], ...] = (
    cpu_speedups,
    cpu_machine,
    cpu_others,
    cpu_fastest,
    xla_speedups,
    xla_machine,
    layer_speedups,
    layer_machine,
)


def write(app: Sphinx, config: Any) -> None:
    """Each table as a file to include."""
    del app, config
    FOLDER.mkdir(exist_ok=True)
    for make in TABLES:
        (FOLDER / f"{make.__name__}.md").write_text(make())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}
