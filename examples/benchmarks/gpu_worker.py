"""A program of its own for what may crash or hang: it says how far it has come, and is ended when its time is over.

After a fault in a kernel a process can use its GPU no more, and a kernel that does not end cannot be interrupted. So
what runs on the GPU is in a process that may be lost. It tells events, lines of JSON behind a mark, on its standard
output; its parent, which leaves the GPU alone, goes on with another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARK = "@gpu "
Event = dict[str, Any]


class Died(Exception):
    """The program ended before its work was done; the message says how."""


def tell(event: Mapping[str, Any]) -> None:
    """From inside of the program."""
    sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
    sys.stdout.flush()


def run(
    command: Sequence[str], job: Mapping[str, Any], *, deadline: float, patience: float, env: Mapping[str, str]
) -> Iterator[Event]:
    """Runs a program with a job, JSON on its standard input, and returns what it tells, as it does.

    Args:
      command: the program and its arguments.
      job: what to do.
      deadline: of `time.monotonic`, when it is ended.
      patience: seconds without an event after which it is ended.
      env: its environment.

    Raises:
      Died: it was ended, or ended with an error.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(env), text=True, start_new_session=True
    )
    assert process.stdin is not None, "it was asked for"
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # where it has ended already, how shows below
            process.stdin.write(json.dumps(job))
        last = time.monotonic()
        while True:
            end = min(deadline, last + patience)
            try:
                line = lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                late = end == deadline
                raise Died("the time is over" if late else f"it told nothing for {patience:.0f} s") from None
            if line is None:
                break
            if line.startswith(MARK):
                last = time.monotonic()
                yield json.loads(line.removeprefix(MARK))
            else:
                sys.stderr.write(line)
        status = process.wait()
        if status:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise Died(f"it ended with {how}")
    finally:
        _end(process)
        reader.join()
        if process.stdout is not None:
            process.stdout.close()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None, "it was asked for"
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """The program, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
