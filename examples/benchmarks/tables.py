"""Tables of numbers in README.md, docs/performance.md and docs/gpu.md, made from the rows of data in `results/`.

    python examples/benchmarks/tables.py

rewrites what stands between `<!-- table NAME -->` and `<!-- end -->` in them, so that no number in a table is typed by
hand; the tests compare. `<!-- table NAME FILE -->` takes the rows of another machine. A file, a column or a row that is
missing is an error.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu.md")
BLOCK = re.compile(r"(<!-- table (\w+)(?: (\w+\.csv))? -->\n).*?(<!-- end -->)", re.DOTALL)

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]

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
    rule = ["---", *["--:"] * (len(head) - 1)]  # numbers to the right
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def activations(width: str) -> str:
    """How activations of a width are called."""
    return f"{width} bits" if width else "float"


def distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The values of some columns, each once, in the order in which they come."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def only(rows: Iterable[Row], **values: str) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def by_weight(rows: list[Row], make: Callable[[list[Row]], str]) -> str:
    """One table for each size of the weight, so that they are no wider than a phone."""
    return "\n".join(f"Weights of {k} x {n}:\n\n{make(only(rows, k=k, n=n))}" for k, n in distinct(rows, "k", "n"))


def speedups(rows: list[Row], product: str, sweep: str) -> str:
    """Speed over float32 by rows and activations, for each number of bitlayers and for a sweep."""
    ours = only(rows, method=product)
    counts = sorted({int(row["bitlayers"]) for row in ours})
    lines = []
    for m, width in distinct(ours, "m", "activation_bits"):
        here = only(rows, m=m, activation_bits=width)
        by_count = {int(row["bitlayers"]): row for row in only(here, method=product)}
        found = [by_count.get(count) for count in counts] + (only(here, method=sweep) or [None])
        lines.append([m, activations(width), *(number(row["speedup_over_f32"]) if row else "" for row in found)])
    return table(["rows", "activations", *map(str, counts), "sweep"], lines)


def machine(rows: list[Row], *columns: str) -> str:
    """Where and when rows were measured, in a sentence."""
    said = ", ".join(f"{column} {' / '.join(value for (value,) in distinct(rows, column))}" for column in columns)
    repeats = sorted({int(row["repeats"]) for row in rows})
    turns = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    return f"Medians of {turns} turns; {said}.\n"


def cpu_speedups(file: str = "cpu.csv") -> str:
    """Backend `cpu` over XLA's float32 product."""
    return by_weight(read(file), lambda rows: speedups(rows, "pbjax", "pbjax sweep"))


def cpu_few_rows(file: str = "cpu.csv") -> str:
    """The same for few rows, which bitlayers are for."""
    rows = [row for row in read(file) if row["m"] in ("1", "8")]
    return by_weight(rows, lambda rows: speedups(rows, "pbjax", "pbjax sweep"))


def cpu_machine(file: str = "cpu.csv") -> str:
    """Where the rows were measured."""
    rows = [row for row in read(file) if row["method"] != "read"]
    return machine(rows, "date", "cpu", "threads", "cache")


OURS = [(count, width) for width in ("8", "16") for count in ("4", "8")]  # beside other libraries


def cpu_others(file: str = "cpu.csv") -> str:
    """Other libraries in the same turns, and pbjax beside them."""
    return by_weight(_without_read(file), _others)


def _others(rows: list[Row]) -> str:
    counts = [m for (m,) in distinct(rows, "m")]

    def line(label: str, column: str = "speedup_over_f32", scale: float = 1, **values: str) -> list[str]:
        found = [only(rows, m=m, **values) for m in counts]
        return [label, *(number(float(cell[0][column]) * scale) if cell else "" for cell in found)]

    lines = [line("XLA f32, in ms", "median_us", 1e-3, method="XLA f32")]
    for count, width in OURS:
        label = f"pbjax, {count} bitlayers, activations of {width} bits"
        lines.append(line(label, method="pbjax", bitlayers=count, activation_bits=width))
    others = [method for (method,) in distinct(rows, "method") if method not in ("pbjax", "XLA f32")]
    lines += [line(method, method=method) for method in others]
    return table(["method", *(f"{m} {'row' if m == '1' else 'rows'}" for m in counts)], lines)


def cpu_fastest(file: str = "cpu.csv") -> str:
    """How pbjax compares with the fastest of the other methods, by 20th percentiles.

    Not by medians: where other programs take cores, those of libraries whose threads wait for each other suffer most.
    """
    return by_weight(_without_read(file), _fastest)


def _without_read(file: str) -> list[Row]:
    """The rows of products."""
    return [row for row in read(file) if row["method"] not in ("read", "pbjax sweep", "pbjax, repeated")]


def cpu_repeated(file: str = "cpu.csv") -> str:
    """Products of one row with nothing between their calls, and the rates at which they read their weights."""
    return by_weight(only(read(file), m="1"), _repeated)


def _repeated(rows: list[Row]) -> str:
    """Speed over float32 and rate by activations and bitlayers; the rate of plain reading last."""
    base = only(rows, method="XLA f32, repeated")[0]
    limit = only(rows, method="read")[0]
    timed = [(base, "XLA f32"), *((row, _label(row)) for row in only(rows, method="pbjax, repeated")), (limit, "read")]
    lines = []
    for row, label in timed:
        speed = "" if row is limit else number(float(base["median_us"]) / float(row["median_us"]))
        part = f"{float(row['read_gb_per_s']) / float(limit['read_gb_per_s']):.0%}"
        lines.append([label, number(float(row["median_us"]) / 1e3), speed, row["read_gb_per_s"], part])
    return table(["repeated", "ms", "speed", "GB/s", "of read"], lines)


def _label(row: Row) -> str:
    return f"pbjax, {row['bitlayers']} bitlayers, {activations(row['activation_bits'])}"


def _fastest(rows: list[Row]) -> str:
    lines = []
    for (m,) in distinct(rows, "m"):
        here = only(rows, m=m)
        others = [row for row in here if row["method"] != "pbjax"]
        best = min(others, key=lambda row: float(row["p20_us"]))
        ours = [only(here, method="pbjax", bitlayers=count, activation_bits=width)[0] for count, width in OURS]
        ratios = [float(best["p20_us"]) / float(row["p20_us"]) for row in ours]
        lines.append([m, best["method"], *map(number, ratios)])
    return table(["rows", "fastest other", *(f"{count} / {width}" for count, width in OURS)], lines)


def xla_speedups() -> str:
    """Backend `xla` over XLA's float32 product."""
    return by_weight(only(read("matmul_cpu.csv"), k="4096"), lambda rows: speedups(rows, "bitlayers", "sweep"))


def xla_machine() -> str:
    """Where matmul_cpu.csv was measured."""
    return machine(only(read("matmul_cpu.csv"), k="4096"), "date", "cpu", "jax")


def layer_speedups(kinds: str = "") -> str:
    """Flax layers on bitlayers over the same layers on float32 weights; those whose names match `kinds`."""
    rows = read("layers_cpu.csv")
    packed = [row for row in rows if row["bitlayers"]]
    counts = sorted({int(row["bitlayers"]) for row in packed})
    lines = []
    for (layer,) in distinct(rows, "layer"):
        if not re.match(kinds, layer):
            continue
        time = next(row["median_us"] for row in only(rows, layer=layer) if not row["bitlayers"])
        for (width,) in distinct(only(packed, layer=layer), "activation_bits"):
            here = {int(row["bitlayers"]): row for row in only(packed, layer=layer, activation_bits=width)}
            cells = [number(here[count]["speedup_over_float"]) for count in counts]
            lines.append([layer, f"{float(time) / 1000:.2f}", activations(width), *cells])
    return table(["layer", "float, ms", "activations", *map(str, counts)], lines)


def layer_dense() -> str:
    """The layers that are products with one row."""
    return layer_speedups("Dense|LSTM|GRU")


def layer_machine() -> str:
    """Where layers_cpu.csv was measured."""
    return machine(read("layers_cpu.csv"), "date", "cpu", "jax")


def paper_tasks() -> str:
    """Quality, bytes and speed on the paper's three tasks."""
    import paper  # with Flax and Matplotlib, which the other tables do without
    import paper_output

    return paper_output.markdown(paper.read_csv(RESULTS / "paper.csv"))


def paper_equal_bytes() -> str:
    """Allocations within the bytes of uniform numbers of bitlayers."""
    import equal_bytes
    import paper

    return equal_bytes.markdown(paper.read_csv(RESULTS / "paper.csv"))


def gpu_kernels() -> str:
    """What the GPU kernels are in machine code."""
    import machine_code_tables

    return machine_code_tables.kernels()


def gpu_targets() -> str:
    """What the machine code excludes of what is asked."""
    import machine_code_tables

    return machine_code_tables.targets()


def gpu_local_memory() -> str:
    """Registers in local memory, and narrow loads."""
    import machine_code_tables

    return machine_code_tables.local_memory()


def gpu_launches() -> str:
    """Launches of a network, and those in CUDA graphs."""
    import machine_code_tables

    return machine_code_tables.launches()


TABLES: tuple[Callable[..., str], ...] = (
    cpu_speedups,
    cpu_few_rows,
    cpu_machine,
    cpu_others,
    cpu_fastest,
    cpu_repeated,
    xla_speedups,
    xla_machine,
    layer_speedups,
    layer_dense,
    layer_machine,
    paper_tasks,
    paper_equal_bytes,
    gpu_kernels,
    gpu_targets,
    gpu_local_memory,
    gpu_launches,
)


def fill(page: str) -> str:
    """The page with each of its tables made anew."""
    tables = {make.__name__: make for make in TABLES}

    def block(match: re.Match[str]) -> str:
        begin, name, file, end = match.groups()
        if name not in tables:
            raise ValueError(f"tables are {', '.join(tables)}, but a page asks for {name!r}")
        return f"{begin}\n{tables[name](file) if file else tables[name]()}\n{end}"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text()))
