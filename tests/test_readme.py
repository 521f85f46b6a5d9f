"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pbjax

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
BASH = re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) >= 3
    namespace: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["curve"].shape == (8, 32, 10)
    assert (namespace["curve"][3] == namespace["y4"]).all()
    assert "layers_0/kernel" in capsys.readouterr().out


@pytest.mark.parametrize("command", [command for block in BASH for command in re.findall(r"\S+\.py", block)])
def test_bash_blocks_name_files_that_exist(command):
    assert (Path(__file__).parent.parent / command).is_file()


def test_names_in_the_text_exist():
    names = set(re.findall(r"`pbjax\.(\w+)(?:\(|`)", README)) - {"linen", "nnx"}
    assert names
    assert [name for name in sorted(names) if not hasattr(pbjax, name)] == []
