"""What holds of the code itself: imports point one way, importing touches no device, and docstrings' examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import flax
import jax
import jax.numpy as jnp
import pytest

import cpu_kernels
import pallas_kernels
import pbjax
from tests import public_api

PACKAGES = {package.__name__: pathlib.Path(package.__file__).parent for package in (pbjax, pallas_kernels, cpu_kernels)}
FILES = [(name, file) for name, folder in PACKAGES.items() for file in sorted(folder.rglob("*.py"))]

# What a package may import besides the standard library. jaxlib comes with JAX and holds MLIR, which Mosaic needs.
ALLOWED = {
    "pallas_kernels": {"jax", "jaxlib", "numpy", "pallas_kernels"},
    "cpu_kernels": {"jax", "numpy", "pallas_kernels", "cpu_kernels"},
    "pbjax": {"jax", "numpy", "rich", "pallas_kernels", "cpu_kernels", "pbjax"},
}
MATPLOTLIB_FILES = {"plot.py"}
FLAX_FILES = {"linen.py", "nnx.py", "_nnx_nodes.py", "_nnx_state.py"}  # the only ones that know a module library

each_file = pytest.mark.parametrize(
    ("package", "file"), FILES, ids=[str(f.relative_to(PACKAGES[p].parent)) for p, f in FILES]
)


def imported_modules(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@each_file
def test_imports_point_one_way(package, file):
    allowed = ALLOWED[package] | ({"flax"} if file.name in FLAX_FILES else set())
    allowed |= {"matplotlib"} if file.name in MATPLOTLIB_FILES else set()
    modules = set(imported_modules(file.read_text()))
    assert {name.split(".")[0] for name in modules} - sys.stdlib_module_names <= allowed
    if file.name != "_compat.py":
        assert not any(name.startswith("jax._src") for name in modules)
        assert "jax._src" not in file.read_text()


@each_file
def test_versions_are_read_in_one_place(package, file):
    if file.name != "_compat.py":
        assert "__version" not in file.read_text()


def test_the_walk_finds_imports():
    source = "import jax._src.core\nfrom flax import linen\ndef f():\n    import os.path as p"
    assert set(imported_modules(source)) == {"jax._src.core", "flax", "flax.linen", "os.path"}
    assert len(FILES) > 10


def test_import_touches_no_device():
    """Neither a backend nor a device exists after `import pbjax`; asking for one then shows that the check can fail."""
    code = """
import pbjax, pallas_kernels, cpu_kernels
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
import sys
assert not {"flax", "matplotlib"} & set(sys.modules)
assert pbjax.linen.Dense and pbjax.nnx.Linear
assert "flax" in sys.modules
assert not xla_bridge.backends_are_initialized()
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def modules():
    """Python files only: the C++ library lies among them in an installation, and is no module."""
    for package, file in FILES:
        parts = file.relative_to(PACKAGES[package].parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, globs={"flax": flax, "jax": jax, "jnp": jnp, "pbjax": pbjax}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_public_functions_have_examples():
    for function in (
        pbjax.quantize,
        pbjax.with_bitlayers,
        pbjax.matmul,
        pbjax.quantized,
        pbjax.select_backend,
        pbjax.sweep,
        pbjax.allocate,
    ):
        assert doctest.DocTestFinder().find(function, globs={})[0].examples, function.__name__


def test_public_names_are_documented_and_typed():
    public = {name: value for name, value in vars(pbjax).items() if not name.startswith("_")}
    for name, value in public.items():
        if callable(value):
            assert value.__doc__, name
            assert not (value.__doc__.startswith(f"{name}(")), f"{name} has only the signature that dataclass writes"
    for folder in PACKAGES.values():
        assert (folder / "py.typed").is_file()


def test_lowest_versions_are_those_that_are_tested():
    """tests/floors.txt has what pyproject.toml accepts at least, of all that the tests need."""
    root = pathlib.Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    accepted = " ".join([*project["dependencies"], *extras["plot"], *extras["examples"], *extras["test"]])
    floors = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (root / "tests" / "floors.txt").read_text(), re.MULTILINE))

    def numbers(version):
        return tuple(map(int, (version + ".0.0").split(".")[:3]))

    lowest = {name: numbers(version) for name, version in re.findall(r"([\w-]+)>=([\d.]+)", accepted)}
    assert {"jax", "flax", "pytest", "optax"} <= set(lowest)
    assert {**lowest, "jaxlib": lowest["jax"]} == {name: numbers(version) for name, version in floors.items()}


def test_public_api_is_the_one_written_down():
    """Nothing changes by accident what users may rely on."""
    assert public_api.FILE.read_text() == public_api.text(), "run `python -m tests.public_api`, and tell the changelog"
    assert "pbjax.quantize(tree, bits, *, fn=None" in public_api.text()
    assert "pbjax.linen.Dense: flax.linen.Dense\n" in public_api.text()
