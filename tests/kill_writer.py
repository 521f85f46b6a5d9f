"""`python -m tests.kill_writer`: a writer killed at every line of its code leaves the old tree or the new one whole.

Each turn forks a process that saves a new tree over an old one and kills itself, with SIGKILL, at the n-th line that it
executes in the modules that write files; what is then on the disk must load, and be one of the two. Runs without JAX's
backends, which do not survive a fork, and so reads with `Checkpoint`, not `pbjax.load`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

import pbjax
from pbjax.files import _structure
from pbjax.files._checkpoint import Checkpoint

WRITERS = ("_save.py", "_layout.py")
COMBINATIONS = [(None, None), (None, 400), (400, None), (400, 300), (400, 400)]  # max_shard_bytes of old and new


def tree(value):
    words = np.full((2, 1, 40), value, np.uint32)
    scale = np.full((2, 1, 40), value, np.float32)
    weight = pbjax.BitTensor(words, scale, np.int32(2), (3, 40), (0,), (1,), np.dtype(np.float32), 2, None, 16)  # pyright: ignore
    return {"kernel": weight, "bias": np.full(60, value, np.float32)}


def save(path, value, max_shard_bytes):
    pbjax.save(path, tree(value), {"value": value}, max_shard_bytes=max_shard_bytes)


def value_of(path):
    """The number that all of a saved tree is made of; raises where anything is damaged or of two trees."""
    with Checkpoint(path) as file:
        arrays = [file.read(name) for leaf in file.leaves.values() for name in _structure.tensor_names(leaf)]
        values = {float(x) for array in arrays if array.ndim for x in array.reshape(-1)}
        (value,) = values
        assert file.metadata == {"value": value}
        return value


def saving_process(path, max_shard_bytes, kill_at):
    """Saves in a forked process; returns the number of lines it executed, or None where it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if not frame.f_code.co_filename.endswith(WRITERS):
                return None
            if event == "line":
                lines += 1
                if lines == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save(path, 2, max_shard_bytes)
        sys.settrace(None)
        os.write(write, str(lines).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return int(text) if text else None


def run(folder, old_bytes, new_bytes, stride):
    old = folder / "old"
    old.mkdir()
    save(old / "m.safetensors", 1, old_bytes)
    work = folder / "work"
    outcomes = {1: 0, 2: 0}
    shutil.copytree(old, work)
    total = saving_process(work / "m.safetensors", new_bytes, None)
    assert total is not None
    assert value_of(work / "m.safetensors") == 2
    assert not list(work.glob(".*"))
    first = 1 + total % stride  # so that the last line is among them
    for n in range(first, total + 1, stride):
        shutil.rmtree(work)
        shutil.copytree(old, work)
        assert saving_process(work / "m.safetensors", new_bytes, n) is None
        outcomes[value_of(work / "m.safetensors")] += 1
        save(work / "m.safetensors", 2, new_bytes)  # what the dead left behind is in nobody's way
        assert value_of(work / "m.safetensors") == 2
    return total, outcomes


if __name__ == "__main__":
    stride = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for old_bytes, new_bytes in COMBINATIONS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            total, outcomes = run(Path(folder), old_bytes, new_bytes, stride)
        print(f"{old_bytes} -> {new_bytes}: {total} lines, old whole {outcomes[1]}, new whole {outcomes[2]}")  # noqa: T201
        assert min(outcomes.values()) > 0
