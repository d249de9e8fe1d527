"""Several real processes of one gloo group, for the tests beside.

They are forked from a server process that has torch and apoptosis imported: starting Python anew for each takes longer
than most tests. Only processes that must begin under another command (`enter`) are started by spawn.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import resource_tracker, spawn
from pathlib import Path

import torch
import torch.distributed as dist

from distributed import warm


def _enter(work, rank, size, folder, arguments, timeout):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        found = work(rank, size, *arguments)
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()
    except BaseException:  # noqa: BLE001 - told by the parent, which has no other way to know
        (Path(folder) / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    dist.destroy_process_group()


def mark(path):
    """Tell the parent, or another process, that this point was reached."""
    Path(path).touch()


def wait_for(path, seconds=170):
    """Wait until some process has come to a point. Raises: TimeoutError."""
    end = time.monotonic() + seconds
    while not Path(path).exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.02)


def _start(process, words, own):
    """Start a process, inside what the words before its command line enter."""
    if words is None:
        return process.start()
    resource_tracker.ensure_running()  # else it would be started in there
    python = spawn.get_executable()
    own.write_text(f'#!/bin/sh\nexec {shlex.join(words)} {shlex.quote(os.fsdecode(python))} "$@"\n')
    own.chmod(0o755)
    spawn.set_executable(str(own))
    try:
        return process.start()
    finally:
        spawn.set_executable(python)


def together(work, *arguments, size=2, timeout=60, enter=None, meanwhile=None):
    """Run work(rank, size, *arguments) in `size` processes; return results and tracebacks by rank, None for none.

    enter: from a rank to the words that, before a command, run it somewhere else. meanwhile: called with the processes
    once they are started.
    """
    context = warm.context() if enter is None else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_enter, args=(work, rank, size, folder, arguments, timeout)) for rank in range(size)
        ]
        try:
            for rank, process in enumerate(started):
                _start(process, None if enter is None else enter(rank), Path(folder) / f"python{rank}")
            if meanwhile is not None:
                meanwhile(started)
            for process in started:
                process.join(3 * timeout)
        finally:
            for process in started:
                if process.is_alive():
                    process.kill()
                    process.join()
        results, faults = [], []
        for rank in range(size):
            done, told = Path(folder) / f"{rank}.pt", Path(folder) / f"{rank}.txt"
            faults.append(told.read_text() if told.exists() else None)
            results.append(torch.load(done, weights_only=False) if done.exists() and faults[-1] is None else None)
        return results, faults
