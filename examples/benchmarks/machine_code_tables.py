"""Tables of docs/gpu.md: what the machine code of the GPU kernels allows, from results/gpu_machine_code.csv.

Nothing here was measured on a GPU. Ratios are those of `tests/gpu_compile/bounds.py`: how many times the memory's rate
instructions and units could keep up with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tables

SIZE = "8192x8192"
LARGE = (SIZE, "8192x28672")
NAMES = {"h200": "H200", "a100": "A100", "b200": "B200"}
# Dense bfloat16 operations and bytes per second of an H200's data sheet.
BF16_RATE, BANDWIDTH = 989e12, 4.8e12
FEW, MANY = ("1",), ("64", "256")
EXCLUDED, OPEN = "excluded", "not excluded"


def kernels() -> str:
    """Every kernel for a weight of 8192 x 8192 and some numbers of rows, by device."""
    return "\n".join(f"{name}:\n\n{_kernels_of(device)}" for device, name in NAMES.items())


def _kernels_of(device: str) -> str:
    head = ["kernel", "rows", "activations", "registers", "local bytes", "load bytes", "tensor core or POPC"]
    head += ["instructions per word", "warps", "kB in flight", "ns covered", "issue", "program", "unit", "launches"]
    lines = []
    for row in tables.only(_rows(), device=device):
        few = row["m"] == "1" or (row["sweep"] == "False" and row["m"] in ("8", *MANY))
        if SIZE not in row["sizes"].split() or not few:
            continue
        units = [name.upper() for name in ("bmma", "imma", "hmma", "popc") if row[name] != "0"]
        lines.append(
            [
                f"`{row['kernel']}`{', sweep' if row['sweep'] == 'True' else ''}",
                row["m"],
                tables.activations(row["activation_bits"]),
                row["registers"],
                row["local_bytes"],
                row["load_bytes"],
                " ".join(units) or "none",
                tables.number(_last(row, "instructions_per_word")),
                row["warps_per_sm"],
                tables.number(float(row["bytes_in_flight"]) / 1000),
                row["covered_ns"],
                *(tables.number(_last(row, name)) for name in ("issue", "program")),
                tables.number(_last(row, "unit")) if row["unit"] else "",
                row["launches"],
            ]
        )
    return tables.table(head, lines)


def targets() -> str:
    """What is asked of an H200, and what machine code says of it."""
    head = ["asked", "kernel", "bound of the loops", "of whole programs", "so it is"]
    return tables.table(head, [*_few_rows(), *_many_rows(), *_proportion(), *_sweeps()])


def _few_rows() -> Iterator[list[str]]:
    asked = [
        ("1 row: 75 % of the memory's rate, 1 to 8 bitlayers", "1", range(1, 9), 0, 75, "%"),
        ("1 row, 4 bitlayers: 3 times bfloat16", "1", (4,), 16, 3, ""),
        ("1 row, 2 bitlayers: 5 times bfloat16", "1", (2,), 16, 5, ""),
        ("1 row, 4 bitlayers: 6 times float32", "1", (4,), 32, 6, ""),
        ("8 rows, 4 bitlayers: 2.5 times bfloat16", "8", (4,), 16, 2.5, ""),
    ]
    for text, m, counts, bits, least, unit in asked:
        for kernel, width in tables.distinct(_of(m=m, sweep="False"), "kernel", "activation_bits"):
            if not width:
                continue
            rows = _of(m=m, sweep="False", kernel=kernel, activation_bits=width)

            def worst(name: str, rows=rows, counts=counts, bits=bits) -> float:
                return min(_fraction(row, name, b) * (bits / b if bits else 100) for row in rows for b in counts)

            bounds = worst("issue"), worst("program")
            shown = [f"at most {tables.number(value)}{' ' + unit if unit else ''}" for value in bounds[:1]]
            shown.append(f"{tables.number(bounds[1])}{' ' + unit if unit else ''}")
            yield [f"{text}, {width} bits", f"`{kernel}`", *shown, OPEN if bounds[0] >= least else EXCLUDED]


def _many_rows() -> Iterator[list[str]]:
    """Against a bfloat16 dot that reaches the memory's rate, or the tensor core's: with a slower one it is less."""
    for m in MANY:
        for width, most in (("", 1.1), ("8", 1.1), ("16", 1.5)):
            rows = _of(m=m, sweep="False", activation_bits=width)
            ratios = [max(_times_bf16(row, name) for row in rows) for name in ("issue", "program")]
            (kernel,) = {row["kernel"] for row in rows}
            yield [
                f"{m} rows, {tables.activations(width)}: no slower than {most} times bfloat16",
                f"`{kernel}`",
                f"at least {tables.number(ratios[0])}",
                tables.number(ratios[1]),
                OPEN if ratios[0] <= most else EXCLUDED,
            ]


def _times_bf16(row: tables.Row, name: str) -> float:
    """Least time over that of a bfloat16 dot; of 8 bitlayers, in units of the time in which their words arrive."""
    dot = max(16 / 8, 2 * float(row["m"]) * BANDWIDTH / BF16_RATE)
    if row["kernel"] == "unpack":  # writes 16 bits for 8 bitlayers, and then is that dot
        return (max(1 / _fraction(row, name, 8), 1 + 16 / 8) + dot) / dot
    return 1 / _fraction(row, name, 8) / dot


def _proportion() -> Iterator[list[str]]:
    for (kernel,) in tables.distinct([row for row in _of(m="1", sweep="False") if row["activation_bits"]], "kernel"):
        rows = [row for row in _of(m="1", sweep="False", kernel=kernel) if row["activation_bits"]]

        def worst(name: str, rows=rows) -> float:
            return max(_fraction(row, name, 8) / _fraction(row, name, b) - 1 for row in rows for b in range(1, 9))

        loops, whole = worst("issue"), worst("program")
        yield [
            "1 row: time of b of 8 bitlayers within 15 % of b / 8",
            f"`{kernel}`",
            f"{100 * loops:.0f} % off",
            f"{100 * whole:.0f} % off",
            OPEN if loops <= 0.15 else EXCLUDED,
        ]


def _sweeps() -> Iterator[list[str]]:
    for kernel, width in tables.distinct(_of(m="1", sweep="True"), "kernel", "activation_bits"):
        if not width:
            continue

        def worst(name: str, kernel=kernel, width=width) -> float:
            key = dict(m="1", kernel=kernel, activation_bits=width)
            pairs = zip(_of(sweep="False", **key), _of(sweep="True", **key), strict=True)
            return max(_fraction(one, name, 8) / _fraction(sweep, name, 8) for one, sweep in pairs)

        loops, whole = worst("issue"), worst("program")
        yield [
            f"1 row: a sweep of 8 in 1.3 passes, {width} bits",
            f"`{kernel}`",
            f"at least {tables.number(loops)}",
            tables.number(whole),
            OPEN if loops <= 1.3 else EXCLUDED,
        ]


def launches() -> str:
    """Launches of the digits network for one image, by flags."""
    rows = tables.read("gpu_launches.csv")
    flags = [flag for (flag,) in tables.distinct(rows, "flags")]
    lines = []
    for backend, method in tables.distinct(rows, "backend", "method"):
        name = f"XLA's dot, {method}" if backend == "dot" else f"bitlayers, `{backend}`"
        cells = [tables.only(rows, backend=backend, method=method, flags=flag)[0] for flag in flags]
        lines.append([name, *(f"{row['launches']}, {row['in_graphs']} in graphs" for row in cells)])
    return tables.table(["network", *(f"`{flag}`" if "=" in flag else flag for flag in flags)], lines)


def local_memory() -> str:
    """How many products keep anything in local memory, and how much."""
    rows = _rows()
    found = [row for row in rows if row["local_bytes"] != "0" or row["other_kernels_local_bytes"] != "0"]
    most = max([int(row["local_bytes"]) for row in found], default=0)
    kernels_of = ", ".join(
        f"`{name}` on {NAMES[device]}" for name, device in tables.distinct(found, "kernel", "device")
    )
    spills = (
        f"Of {len(rows)} rows, {len(found)} have registers in local memory: {kernels_of}, up to {most} bytes of a lane."
    )
    if not found:
        spills = f"None of {len(rows)} rows has registers in local memory."
    narrow = tables.distinct([row for row in rows if row["load_bytes"] != "16"], "kernel", "sweep")
    loads = ", ".join(f"`{kernel}`{' in sweeps' if sweep == 'True' else ''}" for kernel, sweep in narrow)
    return f"{spills} The innermost loops load 16 bytes at a time{f', but for {loads}' if loads else ''}.\n"


def _rows() -> list[tables.Row]:
    return tables.only(tables.read("gpu_machine_code.csv"), bits="8")


def _of(**values: str) -> list[tables.Row]:
    """Of the large weights on an H200."""
    rows = tables.only(_rows(), device="h200", **values)
    return [row for row in rows if set(LARGE) & set(row["sizes"].split())]


def _last(row: tables.Row, name: str) -> float:
    """At all bitlayers."""
    return float(row[name].split()[-1])


def _at(row: tables.Row, name: str, count: int) -> float:
    counts: Sequence[str] = row["bitlayers"].split()
    return float(row[name].split()[counts.index(str(count))])


def _fraction(row: tables.Row, name: str, count: int) -> float:
    """Of the memory's rate that instructions (`issue` or `program`) and the busiest unit allow."""
    unit = _at(row, "unit", count) if row["unit"] else 1.0
    return min(1.0, _at(row, name, count), unit)
