"""Several real processes of one gloo group, for the tests beside.

They are forked from a server process that has torch and apoptosis imported: starting Python anew for each takes longer
than most tests.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distributed import warm


def _enter(work, rank, size, folder, arguments, timeout, holder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if holder is not None:
            warm.enter_spaces_of(holder)
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
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


def together(work, *arguments, size=2, timeout=60, inside=None, meanwhile=None):
    """Run work(rank, size, *arguments) in `size` processes; return results and tracebacks by rank, None for none.

    inside: from a rank to the process whose namespaces it enters. meanwhile: called with the processes once they are
    started.
    """
    context = warm.context()
    holders = [None if inside is None else inside(rank) for rank in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_enter, args=(work, rank, size, folder, arguments, timeout, holders[rank]))
            for rank in range(size)
        ]
        try:
            for process in started:
                process.start()
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
