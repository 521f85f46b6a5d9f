"""The language model, the inference and the evaluation examples with small settings, and what they are made of."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

import pbjax

# qwix, where it is installed, uses what Flax has replaced.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(qwix|flax).*")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    # optax and qwix promote dtypes, and the examples broadcast as NumPy does.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def module(name):
    return importlib.import_module(name)


def test_language_model(tmp_path, capsys):
    text, picture = tmp_path / "text.txt", tmp_path / "new" / "picture.png"
    text.write_text("".join(f"{i % 7} green bottles hanging on the wall, and so on.\n" for i in range(400)))
    options = ["--text", str(text), "--hidden", "32", "--embedding", "32", "--vocabulary", "64"]
    rows = module("language_model").main([*options, "--steps", "60", "--no-progress", "--output", str(picture)])
    check_rows(rows)
    assert rows[0].quality < 20  # of 64
    assert rows[-1].quality < 1.02 * rows[0].quality
    captured = capsys.readouterr().out
    assert "LSTM-32 language model, text.txt" in captured
    assert "tokens of text.txt" in captured
    assert matplotlib.image.imread(picture).std() > 0.05


def test_inference(tmp_path, monkeypatch, capsys):
    example = module("inference_nli")
    monkeypatch.setattr(example, "TRAIN_PAIRS", 1500)
    monkeypatch.setattr(example, "TEST_PAIRS", 300)
    picture = tmp_path / "picture.png"
    options = ["--hidden", "64", "--width", "32", "--steps", "200", "--activation-bits", "8", "--cell", "gru"]
    rows = example.main([*options, "--output", str(picture)])
    check_rows(rows)
    assert rows[0].quality > 0.45  # of three labels
    captured = capsys.readouterr()
    assert "1,500 pairs of a small grammar" in captured.out
    assert "100%" in captured.err
    assert matplotlib.image.imread(picture).std() > 0.05


def check_rows(rows):
    """A row for each method, float32 first, then bitlayers whose bytes grow."""
    assert [row.method for row in rows][:3] == ["float32", "bfloat16", "int8 (XLA)"]
    uniform = [row for row in rows if row.method == "uniform"]
    assert [row.bitlayers for row in uniform] == list(range(1, 9))
    sizes = [row.num_bytes for row in uniform]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < rows[0].num_bytes
    assert rows[0].loss == 0
    assert rows[0].speedup == 1
    assert all(np.isfinite(row.quality) and row.ms > 0 for row in rows)


class TestSnli:
    def write(self, directory, part, lines):
        (directory / f"snli_1.0_{part}.jsonl").write_text("\n".join(lines) + "\n", errors="surrogateescape")

    def entries(self):
        for i in range(30):
            label = ("entailment", "neutral", "contradiction", "-")[i % 4]
            sentences = dict(sentence1=f"A man plays {i % 5} games.", sentence2=f"Someone sleeps {label}!")
            yield json.dumps(dict(gold_label=label, **sentences))

    def test_reads(self, tmp_path):
        self.write(tmp_path, "train", self.entries())
        self.write(tmp_path, "test", [*self.entries(), self.line("Unseen words everywhere , " + "so " * 40, "A man.")])
        data = module("nli_data").load_snli(tmp_path)
        assert data.train_sentences.shape == (
            23,
            2,
            32,
        )  # 7 have no gold label, and one sentence for testing has 44 words
        assert data.test_sentences.shape[0] == 24
        assert sorted(set(data.train_labels)) == [0, 1, 2]
        words = [[data.words[i] for i in sentence if i] for sentence in data.train_sentences[1]]
        assert words == [["a", "man", "plays", "1", "games", "."], ["someone", "sleeps", "neutral", "!"]]
        assert [data.words[i] for i in data.test_sentences[-1, 0]] == ["?"] * 32

    def line(self, *sentences):
        return json.dumps(dict(gold_label="neutral", sentence1=sentences[0], sentence2=sentences[1]))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (None, "No such file"),
            (["{"], "line 1 gave JSONDecodeError"),
            (["[" * 10**5], "line 1 gave RecursionError"),
            (["\udcff"], "line 1 gave UnicodeDecodeError"),
            (['{"gold_label": "neutral"}'], "line 1 gave KeyError"),
            (['{"gold_label": "neutral", "sentence1": 1, "sentence2": ""}'], "line 1 gave AttributeError"),
            (['{"gold_label": "-", "sentence1": "", "sentence2": ""}'], "must hold labelled pairs, but has none"),
        ],
    )
    def test_refuses_file(self, tmp_path, lines, message, capsys):
        if lines is not None:
            self.write(tmp_path, "train", lines)
        with pytest.raises(SystemExit, match="2"):
            module("inference_nli").main(["--snli", str(tmp_path)])
        assert message in " ".join(capsys.readouterr().err.split())


class TestText:
    def test_topics(self):
        text = module("language_data").load_topics(512)
        assert len(text.tokens) == len(set(text.tokens)) == 512
        assert len(text.train) > 100_000 > len(text.test) > 10_000
        assert "statement" in text.decode(text.test)
        assert max(text.train.max(), text.test.max()) < 512

    def test_decodes_what_it_encodes(self):
        data = module("language_data")
        train, test = "one two  three\n\tone, two: one two", "two one! six"
        text = data.encode("", train, test, 18)
        assert text.decode(text.train) == train
        assert text.decode(text.test) == f"two one{data.UNKNOWN} {data.UNKNOWN * 3}"
        assert " two" in text.tokens

    def test_rows_are_shifted(self):
        inputs, labels = module("language_data").rows(np.arange(21), 4)
        np.testing.assert_array_equal(inputs, np.arange(20).reshape(4, 5))
        np.testing.assert_array_equal(labels, inputs + 1)

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ("short", [], "must have 1,000 characters or more"),
            ("abc " * 300, ["--vocabulary", "4"], "must have room for the 5 characters"),
            ("a" * 1000, [], "must have 34 tokens to learn and 33 to test, but text.txt has 1 and 100"),
            ("\udcff" * 1000, [], "must be in UTF-8, but"),
            (None, [], "No such file"),
        ],
    )
    def test_refuses_text(self, tmp_path, content, options, message, capsys):
        path = tmp_path / "text.txt"
        if content:
            path.write_text(content, errors="surrogateescape")
        with pytest.raises(SystemExit, match="2"):
            module("language_model").main(["--text", str(path), *options])
        assert message in " ".join(capsys.readouterr().err.split())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "0"], "--steps: must be an integer in 1..1000000, but got '0'"),
            (["--steps", "9" * 5000], "--steps: must be an integer in 1..1000000"),
            (["--hidden", "100000000"], "--hidden: must be an integer in 1..32768, but got '100000000'"),
            (["--seed", "-1"], "--seed: must be an integer in 0..4294967295, but got '-1'"),
            (["--activation-bits", "25"], "--activation-bits: must lie in 2..24 or be none, but got '25'"),
            (["--output", "picture"], "--output: must end in one of .png, .svg, .pdf, .jpg, but got 'picture'"),
            (["--output", f"{__file__}/picture.png"], "--output: must be a file that can be written, but got:"),
        ],
    )
    @pytest.mark.parametrize("name", ["digits", "language_model", "inference_nli"])
    def test_refuses(self, name, options, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            module(name).main(options)
        assert message in " ".join(capsys.readouterr().err.split())

    def test_paper_stands_for_other_defaults(self):
        args, _ = module("language_model").parse(["--hidden", "32", "--paper"])
        assert (args.hidden, args.embedding) == (32, 2048)
        args, _ = module("inference_nli").parse(["--paper"])
        assert (args.hidden, args.width, args.embedding) == (3072, 3072, 300)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--max-seconds", "nan"], "must be a number of seconds, 0 or more, but got 'nan'"),
            (["--max-seconds", "-1"], "must be a number of seconds, 0 or more, but got '-1'"),
            (["--csv", "DIR"], "--csv: must be a file that can be written, but got:"),
            (["--weights", __file__], "--weights: must be a file that can be written, but got:"),
            (["--weights", "DIR"], "--weights: "),
            (["--draw", "DIR/nothing.csv"], "--draw: must be a file that can be read, but got:"),
            (["--draw", "DIR/empty.csv"], "--draw: must hold rows of --csv"),
            (["--draw", __file__], "must be a whole file of --csv, but"),
            (["--draw", "DIR/digits.safetensors"], "must be a whole file of --csv, but"),
            (["--draw", str(EXAMPLES / "benchmarks/results/paper.csv"), "--train", "--weights", "DIR/w"], "nothing"),
            (["--train"], "--train needs --weights"),
        ],
    )
    def test_paper_refuses(self, tmp_path, options, message, capsys):
        (tmp_path / "empty.csv").write_text("")
        (tmp_path / "digits.safetensors").write_bytes(b"\xff" * 100)
        with pytest.raises(SystemExit, match="2"):
            module("paper").main([option.replace("DIR", str(tmp_path)) for option in options])
        assert message in " ".join(capsys.readouterr().err.split())

    def test_one_step_of_anything(self, tmp_path, capsys):
        """SNLI's files with sentences without a word, one pair to test, one step: nothing divides by zero."""
        entry = dict(gold_label="neutral", sentence1="", sentence2="")
        for part in ("train", "test"):
            (tmp_path / f"snli_1.0_{part}.jsonl").write_text(json.dumps(entry))
        options = ["--snli", str(tmp_path), "--hidden", "1", "--width", "1", "--embedding", "1", "--steps", "1"]
        rows = module("inference_nli").main(
            [*options, "--cell", "rnn", "--no-progress", "--output", str(tmp_path / "picture.png")]
        )
        assert "RNN-1 inference, SNLI" in capsys.readouterr().out
        assert all(np.isfinite(row.quality) and row.ms > 0 for row in rows)
        assert module("quality").lost(0.0, 0.0, "accuracy") == 0
        assert module("quality").lost(0.5, 0.0, "accuracy") == -np.inf


def test_original_format_by_hand():
    """The paper's code of each weight, from its definition in integers."""
    baselines = module("baselines")
    layer = nnx.Linear(5, 1, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.array([[0.7], [-0.3], [0.02], [0.0], [-1.5]])
    # The largest magnitude lies below 2, so that n bits have steps of 4 / 2**n; the smallest code is one step.
    for bits, codes in {
        1: [1, -1, 1, 0, -1],
        2: [1, -1, 1, 0, -2],
        3: [1, -1, 1, 0, -3],
        5: [6, -2, 1, 0, -12],
    }.items():
        made = baselines.OriginalLinear(layer, bits, None).kernel[...]
        np.testing.assert_array_equal(made[:, 0], np.array(codes) * 4 / 2**bits)
    wrapping = baselines.OriginalLinear(layer, 5, 8)
    x = np.array([[1.99, 2.01, -2.1, 0.5, -0.009]])
    codes = np.trunc(x * 64).astype(np.int64).astype(np.int8)  # as C does it
    np.testing.assert_allclose(wrapping(jnp.asarray(x)), codes / 64 @ np.asarray(wrapping.kernel[...]), rtol=1e-6)
    assert codes[0, 1] < 0 < codes[0, 2]


def test_padding_changes_nothing():
    """Words that are not there leave the state of every kind of cell as it was."""
    recurrent = module("recurrent")
    for kind in recurrent.CELLS.values():
        cell = kind(3, 4, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (2, 5, 3))
        mask = jnp.arange(5) < jnp.array([[3], [5]])
        outputs = recurrent.run_over(cell, x, mask)
        np.testing.assert_allclose(outputs[0, -1], recurrent.run_over(cell, x[:1, :3])[0, -1], rtol=1e-6)
        np.testing.assert_array_equal(outputs[1], recurrent.run_over(cell, x)[1])


def check_equal_bytes(found, rows):
    """Each within the bytes of its uniform number, and as good as it and as the best of all where that was measured."""
    assert [row.limit for row in found] == [3]
    for row in found:
        (uniform,) = [
            one for one in rows if (one.method, one.activation_bits, one.bitlayers) == ("uniform", "16", row.limit)
        ]
        assert row.num_bytes <= uniform.num_bytes
        assert row.tried > 1
        assert 0 < row.best <= row.calibration * (1 + 1e-6)


def test_paper(tmp_path, monkeypatch, capsys):
    """One run over all tasks; then its figure again from its rows, and one task from its weights."""
    paper, nli = module("paper"), module("inference_nli")
    monkeypatch.setattr(nli, "TRAIN_PAIRS", 300)
    monkeypatch.setattr(nli, "TEST_PAIRS", 60)
    monkeypatch.setattr(paper, "AVERAGES", (3.5,))
    monkeypatch.setattr(paper, "ACTIVATION_BITS", (16, 8))
    monkeypatch.setattr(paper, "LIMITS", (3,))
    monkeypatch.setattr(paper.comparison, "BITS", 4)  # of the 4096 assignments to four layers 256 are left
    monkeypatch.setattr(paper.comparison, "BITLAYERS", range(1, 5))
    load = paper.language_data.load_topics

    def short(vocabulary):
        text = load(vocabulary)
        return module("dataclasses").replace(text, test=text.test[:500])

    monkeypatch.setattr(paper.language_data, "load_topics", short)
    files = dict(csv=tmp_path / "new" / "paper.csv", markdown=tmp_path / "paper.md", output=tmp_path / "paper.png")
    options = ["--hidden", "32", "--steps", "8", "--max-seconds", "0", "--no-progress"]
    options += ["--weights", str(tmp_path / "weights")]
    rows = paper.main([*options, *(f"--{name}={path}" for name, path in files.items())])
    with open(files["csv"], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert {line["task"] for line in lines} == {"digits, MLP-32", "language, LSTM-32", "inference, LSTM-32"}
    for task in {row.task for row in rows}:
        here = [row for row in rows if row.task == task]
        assert sum(row.method == "uniform" for row in here) == 2 * 4
        assert sum(row.method == "original" for row in here) == 2 * 3
        allocated = [row for row in here if row.method == "allocated"]
        assert len(allocated) == 2
        assert all(row.bitlayers <= 3.5 for row in allocated)
        assert all((row.ms is None) == (row.method in ("original", "equal bytes")) for row in here)
        check_equal_bytes([row for row in here if row.method == "equal bytes"], here)
    for table, least in zip(files["markdown"].read_text().split("\n\n"), (10, 2 + 3), strict=True):
        assert table.strip().count("\n") >= least - 1
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert matplotlib.image.imread(files["output"]).std() > 0.05

    again = paper.main(["--draw", str(files["csv"]), "--output", str(tmp_path / "again.png")])
    assert [row.method for row in again] == [row.method for row in rows]
    np.testing.assert_allclose([row.quality for row in again], [row.quality for row in rows], rtol=1e-4)
    assert (tmp_path / "again.png").stat().st_size > 0

    train = paper.digits.train
    monkeypatch.setattr(paper.digits, "train", None)  # not called: the weights are there
    monkeypatch.setattr(paper, "ACTIVATION_BITS", (16,))  # enough to see them
    digits = paper.main([*options, "--tasks", "digits", "--output", str(tmp_path / "digits.png")])
    assert digits[0].quality == rows[0].quality

    monkeypatch.setattr(paper.digits, "train", train)  # for weights of other options
    assert paper.main([*options, "--steps", "9", "--tasks", "digits", "--train"]) == []
    assert pbjax.files.info(tmp_path / "weights" / "digits.safetensors").metadata == {"hidden": 32, "steps": 9}
    with pytest.raises(SystemExit, match="2"):
        paper.main(["--train"])
