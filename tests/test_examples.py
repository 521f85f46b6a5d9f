"""The examples with small settings: they run, and what they write can be read."""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import importlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from cpu_kernels import bit_matmul as cpu_backend

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("digits")
    # optax.adam divides by 1 - b1**count, float**int: only the training of the float model may promote dtypes.
    train = module.train

    @functools.wraps(train)
    def relaxed_train(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return train(*args, **kwargs)

    monkeypatch.setattr(module, "train", relaxed_train)
    return module


@pytest.fixture
def benchmark_matmul(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    return importlib.import_module("matmul")


@pytest.fixture
def benchmark_cpu(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    module = importlib.import_module("cpu")
    shorter = {"READ_BYTES": 2**22, "FLUSH_BYTES": 2**20, "ONNX_SPIN_S": 0.001, "ALONE_S": 0.001}
    for name, value in shorter.items():  # the tests believe no time
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    return importlib.import_module("timing")


class TestDigits:
    def test_table_and_picture(self, digits, tmp_path, capsys):
        picture = tmp_path / "new" / "digits.png"
        rows = digits.main(["--hidden", "128", "--steps", "60", "--no-progress", "--output", str(picture)])

        assert [row.bitlayers for row in rows] == [None, *range(1, 9)]
        sizes = [row.num_bytes for row in rows]
        assert sizes[1:] == sorted(set(sizes[1:]))  # every bitlayer adds some
        assert sizes[-1] < sizes[0] / 3
        assert rows[0].accuracy > 0.8
        assert rows[0].agreement == 1
        assert all(0 <= row.accuracy <= 1 and 0 <= row.agreement <= 1 and row.ms > 0 for row in rows)
        assert rows[4].accuracy > rows[0].accuracy - 0.02
        assert rows[8].agreement > 0.98
        printed = capsys.readouterr().out
        assert "speed-up" in printed
        assert f"{rows[8].num_bytes:,}" in printed
        image = matplotlib.image.imread(picture)
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.05

    def test_seed_decides(self, digits):
        data = importlib.import_module("digits_data").load_digits(0)

        def weights(seed):
            params = digits.train(digits.MLP(16), data, steps=3, seed=seed, progress=False)
            return params["params"]["Dense_1"]["kernel"]

        np.testing.assert_array_equal(weights(1), weights(1))
        assert (weights(1) != weights(2)).any()

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--activation-bits", "1"], "must lie in 2..24 or be none, but got '1'"),
            (["--activation-bits", "x"], "must lie in 2..24 or be none, but got 'x'"),
            (["--steps", "0"], "must be an integer in 1..1000000, but got '0'"),
            (["--hidden", "-3"], "must be an integer in 1..32768, but got '-3'"),
        ],
    )
    def test_refuses_option(self, digits, args, message, capsys):
        with pytest.raises(SystemExit):
            digits.main(args)
        assert message in capsys.readouterr().err

    def test_help_names_every_option(self, digits, capsys):
        with pytest.raises(SystemExit, match="0"):
            digits.main(["--help"])
        printed = capsys.readouterr().out
        for option in ("--mnist", "--steps", "--hidden", "--activation-bits", "--seed", "--output", "--no-progress"):
            assert option in printed


class TestUnmodifiedModel:
    def test_table_and_picture(self, monkeypatch, tmp_path, capsys):
        monkeypatch.syspath_prepend(EXAMPLES)
        module = importlib.import_module("unmodified_model")
        assert len(Path(module.__file__).read_text().splitlines()) < 80
        picture = tmp_path / "new" / "unmodified_model.png"
        with jax.numpy_dtype_promotion("standard"):  # optax.adam, as above
            curves = module.main(["--steps", "40", "--output", str(picture)])
        assert list(curves) == ["all layers", "Conv_0", "Conv_1", "Dense_0", "Dense_1"]
        assert len({curve[-1] for curve in curves.values()}) == 1  # all at 8: the same model
        assert curves["all layers"][0] < curves["all layers"][-1]
        assert curves["all layers"][-1] > 0.7
        assert "float32: " in capsys.readouterr().out
        assert min(matplotlib.image.imread(picture).shape[:2]) > 300


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """A directory with the four files, two of them compressed: a bright pixel where the label says."""
    directory = tmp_path / "mnist"
    directory.mkdir()
    for part, rows, suffix in (("train", 200, ".gz"), ("t10k", 40, "")):
        labels = np.arange(rows) % 10
        images = np.zeros((rows, 4, 5))
        images.reshape(rows, -1)[np.arange(rows), labels] = 255
        write_idx(directory / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(directory / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return directory


class TestMnist:
    def test_reads_plain_and_compressed_files(self, digits, mnist, tmp_path, capsys):
        options = ["--hidden", "128", "--steps", "60", "--activation-bits", "none"]  # and with the progress bar
        rows = digits.main([*options, "--mnist", str(mnist), "--output", str(tmp_path / "digits.png")])
        assert rows[0].accuracy == 1
        assert rows[8].accuracy == 1
        captured = capsys.readouterr()
        assert "MLP 20-128-128-10 on MNIST" in captured.out
        assert "100%" in captured.err

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte.gz, but has neither"),
            ("t10k-labels-idx1-ubyte", b"", "does not begin with 0x00000801"),
            ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x0801, 40, 4, 5), "does not begin with 0x00000803"),
            ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x0803, 40, 4, 5) + bytes(799), "must hold 800 bytes"),
            ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x0803, 40, 4, 4) + bytes(640), "as many pixels"),
            ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x0803, 39, 4, 5) + bytes(780), "one label for each image"),
            (
                "t10k-labels-idx1-ubyte",
                struct.pack(">2I", 0x0801, 40) + bytes([10] * 40),
                "in 0..9, but got 10",
            ),
            ("train-images-idx3-ubyte.gz", b"plain", "must be a gzip file"),
            ("train-images-idx3-ubyte.gz", gzip.compress(bytes(1000), mtime=0)[:20], "must be a gzip file"),
        ],
    )
    def test_refuses_file(self, digits, mnist, name, content, message, capsys):
        if content is None:
            (mnist / name).unlink()
        else:
            (mnist / name).write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            digits.main(["--mnist", str(mnist)])
        assert message in " ".join(capsys.readouterr().err.split())


class TestBenchmark:
    def test_rows_and_summary(self, benchmark_matmul, tmp_path, capsys):
        output = tmp_path / "times.csv"
        options = ["--m", "1", "3", "--size", "32x64", "--bitlayers", "1", "4", "--activation-bits", "8", "none"]
        rows = benchmark_matmul.main([*options, "--repeats", "3", "--output", str(output)])

        with open(output, newline="") as file:
            lines = list(csv.DictReader(file))
        # 3 baselines and, for each width, 2 numbers of bitlayers and the sweep
        assert len(lines) == len(rows) == 2 * (3 + 2 * 3)
        assert list(lines[0]) == [field.name for field in dataclasses.fields(benchmark_matmul.Row)]
        assert {(line["m"], line["k"], line["n"]) for line in lines} == {("1", "32", "64"), ("3", "32", "64")}
        assert {line["method"] for line in lines} == {"f32", "bf16", "int8", "bitlayers", "sweep"}
        for line in lines:
            assert 0 < float(line["p20_us"]) <= float(line["median_us"]) <= float(line["p80_us"])
            assert float(line["speedup_over_f32"]) > 0
            assert line["repeats"] == "3"
            assert all(line[name] for name in ("date", "device", "cpu", "jax", "backend"))
            if line["method"] == "f32":
                assert line["speedup_over_f32"] == "1.0"
            if line["method"] == "bitlayers":
                assert (line["bits"], line["bitlayers"]) in (("8", "1"), ("8", "4"))
                assert line["activation_bits"] in ("8", "")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "32 x 64" in captured.err

    def test_writes_to_stdout(self, benchmark_matmul, capsys):
        options = ["--m", "1", "--size", "32", "--bitlayers", "2", "--activation-bits", "16", "--backend", "reference"]
        benchmark_matmul.main([*options, "--repeats", "1", "--calls", "2"])
        lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert [line["backend"] for line in lines] == ["dot"] * 3 + ["reference"] * 2

    def test_all_sizes(self, benchmark_matmul):
        assert len(benchmark_matmul.parse([]).size) == 4
        assert len(set(benchmark_matmul.parse(["--all"]).size)) == 16

    @pytest.mark.parametrize(
        "args", [["--bitlayers", "9"], ["--size", "0"], ["--size", "4x"], ["--activation-bits", "x"]]
    )
    def test_refuses_option(self, benchmark_matmul, args):
        with pytest.raises(SystemExit, match="2"):
            benchmark_matmul.main(args)

    def test_layers(self, benchmark_matmul, monkeypatch, tmp_path):
        layers = importlib.import_module("layers")
        output = tmp_path / "layers.csv"
        options = ["--hidden", "32", "--image", "56", "--bitlayers", "1", "4", "--activation-bits", "8"]
        rows = layers.main([*options, "--repeats", "1", "--max-seconds", "0", "--output", str(output)])
        with open(output, newline="") as file:
            lines = list(csv.DictReader(file))
        assert list(lines[0]) == [field.name for field in dataclasses.fields(layers.Row)]
        assert len(lines) == len(rows) == 6 * (1 + 2)  # each layer on floats and at two numbers of bitlayers
        assert {line["layer"].split()[0] for line in lines} == {
            "Dense",
            "LSTMCell",
            "OptimizedLSTMCell",
            "GRUCell",
            "Conv",
        }
        assert all(float(line["median_us"]) > 0 for line in lines)
        assert {line["speedup_over_float"] for line in lines if not line["bitlayers"]} == {"1.0"}

    def test_functions_take_turns(self, timing):
        order = []
        times = timing.interleaved(
            {name: lambda name=name: order.append(name) for name in "ab"}, repeats=5, max_seconds=0, calls=2
        )
        assert "".join(order) == "abab" + 3 * "aabb"  # warming up, then no more than the three rounds that always run
        assert times["a"].repeats == 3
        assert times["a"].p20_us <= times["a"].median_us <= times["a"].p80_us

    def test_warm_calls_are_not_counted(self, timing):
        order = []
        times = timing.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3, warm=True)
        assert "".join(order) == "abab" + 3 * "aabb"
        assert times["b"].repeats == 3


class TestCpuBenchmark:
    @pytest.mark.skipif(not cpu_backend.instructions(), reason=str(cpu_backend.missing("cpu")))
    def test_rows_table_and_plot(self, benchmark_cpu, tmp_path, capsys):
        output, picture = tmp_path / "cpu.csv", tmp_path / "cpu.png"
        options = ["--m", "1", "2", "--size", "64", "--repeats", "2", "--max-seconds", "0"]
        with jax.numpy_dtype_promotion("standard"):  # of qwix
            rows = benchmark_cpu.main([*options, "--output", str(output), "--plot", str(picture)])
        with open(output, newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(rows)
        ours = [line for line in lines if line["method"] in ("pbjax", "pbjax sweep")]
        assert len(ours) == 2 * 3 * (4 + 1)  # for each number of rows and width: 4 numbers of bitlayers and the sweep
        repeated = {
            (line["m"], line["activation_bits"], line["bitlayers"])
            for line in lines
            if line["method"] == "pbjax, repeated"
        }
        assert repeated == {(m, width, count) for m in "12" for width in ("8", "16") for count in "248"}
        assert {"XLA f32", "XLA bf16", "XLA int8", "XLA f32, repeated", "read"} <= {line["method"] for line in lines}
        for line in lines:
            assert 0 < float(line["p20_us"]) <= float(line["median_us"]) <= float(line["p80_us"])
        assert picture.stat().st_size > 0
        assert "64 x 64" in capsys.readouterr().err


class TestPrecisionPerRequest:
    def test_accuracy_and_picture(self, monkeypatch, tmp_path, capsys):
        monkeypatch.syspath_prepend(EXAMPLES)
        example = importlib.import_module("precision_per_request")
        with jax.numpy_dtype_promotion("standard"):  # optax
            accuracy, equal = example.main(["--output", str(tmp_path / "picture.png")])
        assert equal
        assert accuracy[0] < accuracy[2]
        assert accuracy[3] > 0.95
        assert "mixed batch equals requests alone: True" in capsys.readouterr().out
        assert matplotlib.image.imread(tmp_path / "picture.png").std() > 0.05


def test_sharded():
    """On eight devices, which only a process of its own can have."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, EXAMPLES / "sharded.py"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("yes") == 3
    assert result.stdout.count("2 all-reduce") == 2


@pytest.mark.parametrize("name", ["precision_per_request.py", "sharded.py"])
def test_short_examples_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 80
