"""Several real processes of one gloo group, for the tests beside."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


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


def together(work, *arguments, size=2, timeout=60):
    """Run work(rank, size, *arguments) in `size` processes; return results and tracebacks by rank, None for none."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_enter, args=(work, rank, size, folder, arguments, timeout)) for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(3 * timeout)
            if process.is_alive():
                process.kill()
        results, faults = [], []
        for rank in range(size):
            done, told = Path(folder) / f"{rank}.pt", Path(folder) / f"{rank}.txt"
            faults.append(told.read_text() if told.exists() else None)
            results.append(torch.load(done, weights_only=False) if done.exists() and faults[-1] is None else None)
        return results, faults
