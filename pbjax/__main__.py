"""Files of packed weights from the command line: `python -m pbjax quantize | info | truncate | verify`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import rich.console
import rich.table
import rich.text

import pbjax
from pbjax import files
from pbjax.files import _layout

OK, DAMAGED, USAGE, SYSTEM = 0, 1, 2, 3  # exit codes

_EPILOG = (
    "exit codes: 0 done; 1 a file is damaged, or no file of pbjax; 2 arguments that do not fit; "
    "3 a file that is not there, or that the system does not let pbjax read or write"
)
_RULES = """path patterns (regular expressions) to bits, null for "leave as it is", or the fields of a pbjax.Spec, as
JSON or the name of a JSON file: {"attention": 8, "embed": null, "mlp": {"bits": 4, "group_size": 128}}"""
_RENAME = """name patterns (regular expressions) to replacements, to [replacement, order of axes], or to null, which
leaves the tensor out, as JSON or the name of a JSON file: {"^(.*)\\\\.fc\\\\.weight$": ["\\\\1.fc.kernel", [1, 0]]}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except SystemExit as stop:  # argparse has printed its help
        return int(stop.code or 0)
    except files.FileError as error:
        return _fail(as_json, error, DAMAGED)
    except OSError as error:
        return _fail(as_json, error, SYSTEM)
    except _UsageError as error:
        sys.stderr.write(error.usage)
        return _fail(as_json, error, USAGE)
    except (ValueError, TypeError) as error:
        return _fail(as_json, error, USAGE)


class _UsageError(Exception):
    """Arguments that do not parse, and how they should look."""

    def __init__(self, message: str, usage: str):
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit, so that all errors are told in one way."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message, self.format_usage())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pbjax", description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, name: str, text: str) -> argparse.ArgumentParser:
        # Abbreviations would change their meaning with every option added.
        sub = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return sub

    sub = command(_quantize, "quantize", "packs the float weights of a safetensors file, one tensor at a time")
    sub.add_argument("source", metavar="IN", help="a safetensors file, its index, or a folder with model.safetensors")
    _add_target(sub, "bitlayers to store, 1..16")
    sub.add_argument("--rules", type=_json, metavar="JSON", help=_RULES)
    sub.add_argument("--rename", type=_json, metavar="JSON", help=_RENAME)
    sub.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale, a multiple of 32")
    sub.add_argument("--activation-bits", type=_bits_or_float, default=16, metavar="A", help="2..24 or float; 16")
    sub.add_argument("--clip-bits", type=int, metavar="B", help="clip each group to what is best at B bitlayers")
    sub.add_argument("--no-errors", action="store_true", help="do not compare packed weights with the original ones")

    sub = command(_info, "info", "lists what a file holds, and what each weight loses with fewer bitlayers")
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--no-errors", action="store_true", help="read the header only")

    sub = command(_truncate, "truncate", "writes the first bitlayers of a file, and reads no others")
    sub.add_argument("source", metavar="IN")
    _add_target(sub, "bitlayers to keep, 1..16")

    sub = command(_verify, "verify", "reads a file and compares all of it with its checksums")
    sub.add_argument("file", metavar="FILE")
    return parser


def _add_target(sub: argparse.ArgumentParser, bits: str) -> None:
    sub.add_argument("target", metavar="OUT")
    sub.add_argument("--bits", type=int, required=True, help=bits)
    sub.add_argument("--max-shard-bytes", type=int, metavar="N", help="write files of at most N bytes, without headers")
    sub.add_argument("--force", action="store_true", help="replace OUT if it is there")


def _quantize(arguments: argparse.Namespace) -> int:
    _check_target(arguments)
    report = files.convert(
        arguments.source,
        arguments.target,
        arguments.bits,
        rules={pattern: _spec(rule) for pattern, rule in (arguments.rules or {}).items()},
        rename=arguments.rename,
        group_size=arguments.group_size,
        activation_bits=arguments.activation_bits,
        clip_bits=arguments.clip_bits,
        max_shard_bytes=arguments.max_shard_bytes,
        errors=not arguments.no_errors,
    )
    _print(arguments, {"file": arguments.target, "weights": report.to_dicts()}, report)
    return OK


def _info(arguments: argparse.Namespace) -> int:
    info = files.info(arguments.file, errors=not arguments.no_errors)
    title = rich.text.Text(info.path)  # names are no markup
    table = rich.table.Table(title=title, caption=f"{info.num_bytes:,} bytes, format version {info.version}")
    table.add_column("path", overflow="fold")
    for name in ("shape", "dtype", "bits", "bytes"):
        table.add_column(name, justify="right")
    shown = sorted({b for leaf in info.leaves for b in range(1, len(leaf.errors)) if b in (1, 2, 3, 4, 6, 8, 12)})
    for b in shown:
        table.add_column(f"error {b}", justify="right")
    for leaf in info.leaves:
        table.add_row(
            rich.text.Text(leaf.path),
            "x".join(map(str, leaf.shape)),
            leaf.dtype or "",
            "" if leaf.bits is None else str(leaf.bits),
            f"{leaf.num_bytes:,}",
            *(f"{leaf.errors[b - 1]:.4f}" if b < len(leaf.errors) else "" for b in shown),
        )
    _print(arguments, dataclasses.asdict(info), table)
    return OK


def _truncate(arguments: argparse.Namespace) -> int:
    _check_target(arguments)
    files.truncate(arguments.source, arguments.target, arguments.bits, max_shard_bytes=arguments.max_shard_bytes)
    info = files.info(arguments.target)
    done = {"file": arguments.target, "bits": arguments.bits, "num_bytes": info.num_bytes}
    _print(arguments, done, f"{arguments.target}: {info.num_bytes:,} bytes")
    return OK


def _verify(arguments: argparse.Namespace) -> int:
    found = files.verify(arguments.file)
    damaged = [{"file": error.path, "tensor": error.tensor, "reason": error.reason} for error in found]
    text = "\n".join(map(str, found)) or f"{arguments.file}: whole"
    _print(arguments, {"file": arguments.file, "damaged": damaged}, text)
    return DAMAGED if found else OK


def _check_target(arguments: argparse.Namespace) -> None:
    there = [name for name in (arguments.target, arguments.target + _layout.INDEX_SUFFIX) if os.path.exists(name)]
    if there and not arguments.force:
        raise ValueError(f"OUT must be a new file, but {there[0]} is there. Replace it with --force.")


def _json(text: str) -> dict[str, Any]:
    """A JSON object, or that in the file of this name."""
    try:
        if not text.lstrip().startswith(("{", "[")):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"neither JSON nor a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _spec(rule: Any) -> Any:
    if not isinstance(rule, dict):
        return rule
    fields = {field.name for field in dataclasses.fields(pbjax.Spec)}
    if unknown := sorted(rule.keys() - fields):
        raise ValueError(f"rules must hold fields of pbjax.Spec, but got {', '.join(unknown)}.")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in rule.items()}
    return pbjax.Spec(**values)


def _bits_or_float(text: str) -> int | None:
    return None if text == "float" else int(text)


def _print(arguments: argparse.Namespace, data: Any, text: Any) -> None:
    if arguments.json:
        _write(json.dumps(data) + "\n")
    elif isinstance(text, str):
        _write(text + "\n")
    else:
        # A pipe has no width; paths are not to be cut there.
        console = rich.console.Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        with console.capture() as printed:
            console.print(text)
        _write(printed.get())


def _write(text: str) -> None:
    """Writes to standard output; what cannot be written is an error here, and not once more when Python ends."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _fail(as_json: bool, error: Exception, code: int) -> int:
    if as_json:
        with contextlib.suppress(OSError):
            _write(json.dumps({"error": str(error), "exit_code": code}) + "\n")
    sys.stderr.write(f"python -m pbjax: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
