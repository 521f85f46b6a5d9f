"""The pages of the documentation: their code runs as it stands, names and files in them exist, tables follow the data.

The site executes the same cells when it is built (see CONTRIBUTING.md). Here they run with warnings as errors, and also
where the tools that build it are not installed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import matplotlib as mpl
import pytest

import pbjax
from tests.cases import normal

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
CELL = re.compile(
    r"^```(?:\{code-cell\} )?python\n(?:---\n.*?^---\n|(?::\w+:[^\n]*\n)+)?(.*?)^```$", re.DOTALL | re.MULTILINE
)
WITH_CODE = [page for page in PAGES if CELL.search(page.read_text())]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def run(page: Path) -> None:
    """The code of a page in order, under JAX's own defaults, which it is read with."""
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        # Of qwix 0.1.8, where it asks Flax 0.12 for a name that is gone.
        warnings.filterwarnings("ignore", "'VariableState' was removed", DeprecationWarning)
        for cell in CELL.finditer(text):
            above = "\n" * text[: cell.start(1)].count("\n")  # a traceback shows the line of the page
            exec(compile(above + cell[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages may write files
    if "import qwix" in page.read_text():
        pytest.importorskip("qwix")
    if "jax_num_cpu_devices" not in page.read_text():
        mpl.use("Agg")
        run(page)
    else:  # only a process of its own can have several devices on the CPU
        code = f"from tests import conftest, test_docs; test_docs.run(test_docs.ROOT / 'docs' / {page.name!r})"
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300, cwd=ROOT)


def test_the_pages_have_code():
    assert len(WITH_CODE) >= 8
    assert {"index", "quickstart", "meshes"} <= {page.stem for page in WITH_CODE}
    assert [cell[1] for cell in CELL.finditer("```{code-cell} python\n:tags: [x]\n\na\n```\n```python\nb\n```\n")] == [
        "\na\n",
        "b\n",
    ]


@each_page
def test_names_exist(page):
    names = re.findall(r"`pbjax\.((?:linen\.|nnx\.)?\w+)(?:\(|`)", page.read_text())
    for name in names:
        value = pbjax
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)


@each_page
def test_files_exist(page):
    text = page.read_text()
    commands = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    files = [ROOT / name for command in commands for name in re.findall(r"[\w/]+\.py", command)]
    files += [page.parent / name for name in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    files += [page.parent / name for name in re.findall(r"\{download\}`.*?<(.+?)>`", text)]
    assert [file for file in files if not file.is_file()] == []


def test_every_page_is_in_the_contents():
    listed = re.findall(
        r"```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL
    )
    assert sorted(" ".join(listed).split()) == sorted(page.stem for page in PAGES if page.stem != "index")


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^\.\. auto\w+:: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    ours = ("pbjax", "pallas_kernels")
    public = {name for name, value in vars(pbjax).items() if getattr(value, "__module__", "").startswith(ours)}
    public = {name for name in public if not name.startswith("_")}
    assert {"quantize", "BitTensor", "Problem"} <= public
    assert sorted(public - listed) == []


def extension(name):
    """A module of docs/extensions; Sphinx, which it is written for, may be missing."""
    pytest.importorskip("sphinx")
    return load(ROOT / "docs" / "extensions" / f"{name}.py")


def load(path):
    """A module that no package has."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables():
    """The module that makes tables of the benchmarks' rows of data."""
    return load(ROOT / "examples" / "benchmarks" / "tables.py")


def test_tables_are_the_rows_of_the_benchmarks():
    module = tables()
    for page in module.PAGES:
        text = page.read_text()
        assert text.count("<!-- table ") == len(module.BLOCK.findall(text)) > 0
        assert module.fill(text) == text, f"python examples/benchmarks/tables.py brings {page.name} up to date"
        assert "nan" not in re.findall(r"\w+", text)


def test_tables_show_what_the_rows_say():
    module = tables()
    row = next(
        row
        for row in module.read("cpu.csv")
        if (row["m"], row["k"], row["method"], row["bitlayers"], row["activation_bits"])
        == ("1", "4096", "pbjax", "4", "16")
    )
    line = next(line for line in module.cpu_speedups().splitlines() if line.startswith("| 1 | 16 bits |"))
    assert line.split(" | ")[4] == module.number(row["speedup_over_f32"])
    with pytest.raises(ValueError, match="a page asks for 'none'"):
        module.fill("<!-- table none -->\n<!-- end -->\n")


@pytest.mark.parametrize(
    ("value", "text"), [("9.94", "9.9"), ("9.96", "10"), ("0.994", "0.99"), ("0.996", "1.0"), ("0.05", "0.05")]
)
def test_numbers_have_two_digits(value, text):
    assert tables().number(value) == text


def test_sections_of_the_readme_have_the_links_of_pages():
    text = "# x\n\n## a\n\n[p](docs/p.md#q), [c](C.md), [h](#b), [w](https://w.org)\n\n## b\n"
    assert extension("readme").section(text, "a") == "\n[p](p.md#q), c, h, [w](https://w.org)\n"
    with pytest.raises(ValueError, match="must have the section 'c'"):
        extension("readme").section(text, "c")


def test_docstrings_become_restructured_text():
    docstring = [
        "Returns `x` * |y| of `Spec`s.",
        "",
        "    f(x) = 2 * x",
        "",
        "- an item, which goes",
        "  on;",
        "",
        "Args:",
        "  x: one of",
        "    - `a`;",
        "    - b.",
        "",
        "Returns:",
        "  The result. Pure: may run under `jit`.",
    ]
    assert extension("docstrings").to_rst(docstring) == [
        r"Returns ``x`` \* \|y\| of ``Spec``\ s.",
        "",
        "",
        "::",
        "",
        "    f(x) = 2 * x",
        "",
        "- an item, which goes",
        "  on;",
        "",
        "Args:",
        "  x: one of",
        "",
        "    - ``a``;",
        "    - b.",
        "",
        "Returns:",
        "  : The result. Pure: may run under ``jit``.",
    ]


def test_the_drawn_bits_are_those_of_the_weight():
    figures = extension("figures")
    w = normal(40, 3)
    tensor = pbjax.quantize({"kernel": w}, bits=5)["kernel"]
    digits = 2 * figures.bits_of(tensor).astype(float) - 1  # [bits, k, n]
    value = sum(digit * 0.5 ** (i + 1) for i, digit in enumerate(digits))
    assert (value.astype("float32") * tensor.scale[-1] == pbjax.dequantize(tensor)).all()
