"""Meshes: each case runs in a process of its own, see tests/on_mesh.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import pbjax
from tests.on_mesh import K, N, normal, packed

CASES = [
    "auto",
    "explicit",
    "transforms",
    "long_k",
    "kernels",
    "shard_map",
    "shard_map_gradients",
    "quantize",
    "model",
    "errors",
    "files",
    "orbax",
    "random_sequences",
]


def start(*args: str, devices: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.on_mesh", *args]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def check(process: subprocess.Popen[str]) -> None:
    try:
        _, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]


@pytest.mark.parametrize("case", CASES)
def test_on_eight_devices(case):
    check(start(case, devices=8))


def test_in_two_processes(tmp_path):
    path = tmp_path / "model.safetensors"
    floats = {"flat": normal(K, N), "stack": normal(4, 256, 32, seed=1), "bias": normal(N, seed=2)}
    pbjax.save(path, packed(floats), max_shard_bytes=20000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for process in [start("processes", port, str(i), str(path), devices=4) for i in range(2)]:
        check(process)
