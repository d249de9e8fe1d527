"""Each network in a process of its own, forked with the libraries loaded: a crash or a hang costs one row.

Holds: processes and their limit. Elsewhere: what they do.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Row = dict[str, Any]


def rows(
    work: Callable[[str, str], Row], tasks: Sequence[tuple[str, str]], processes: int, limit: float
) -> Iterator[tuple[str, str, Row]]:
    """Yield (family, name, row) as they come; `error` is set where the process died or ran out of time.

    Args:
        work: makes one row in a forked process. tasks: (family, name). processes: that run at once. limit: processor
            seconds for one row; on a busy machine it may take ten times as long.
    """
    waiting = list(tasks)[::-1]
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[str, str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            family, name = waiting.pop()
            end, other = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, family, name, other, limit), daemon=True)
            process.start()
            other.close()
            running[end] = (family, name, process, time.monotonic() + 10.0 * limit)
        soonest = min(deadline for *_, deadline in running.values())
        ready = wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
        now = time.monotonic()
        for end in [e for e in running if e in ready or running[e][3] <= now]:
            family, name, process, _ = running.pop(end)
            yield family, name, _result(end, process, end in ready, limit)


def _run(work: Callable[[str, str], Row], family: str, name: str, end: Connection, limit: float) -> None:
    used = time.process_time()  # a forked process counts from its own start on, but for what the platform adds
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit) + 1, int(used + limit) + 2))
    silent = os.open(os.devnull, os.O_WRONLY)  # libraries warn at length of what is an error in the row, or none
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    end.send(work(family, name))
    end.close()


def _result(end: Connection, process: Any, ready: bool, limit: float) -> Row:
    row: Row = {"built": False, "captured": False}
    if ready:
        try:
            row = end.recv()
        except EOFError:
            process.join()
            late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            row["error"] = f"no result after {limit:.0f} s" if late else f"the process ended with {process.exitcode}"
    else:
        process.kill()
        row["error"] = f"no result after {limit:.0f} s"
    process.join()
    end.close()
    return row
