"""The frontier of one task: parameters against metric over tolerances, and baselines at the same multiply-adds.

Holds: which settings are run. Elsewhere: methods, the table of default settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Say, header, train
from benchmarks.paper.methods import Pruning, Shrinking, small
from benchmarks.paper.tasks import Task, TaskData
from benchmarks.paper.training import MethodRun

TASKS = ("fashion-mnist", "mnist", "higgs")
FIELDS = ("test", "seconds", "run_seconds", "parameters", "macs", "run_macs", "events", "ledger")
TOLERANCES = {
    "interpolative": (0.005, 0.01, 0.025, 0.05, 0.1),
    "reconstruction": (0.025, 0.05, 0.1),
    "magnitude": (0.1, 0.3),
}


def run_frontier(task: Task, data: TaskData, seed: int, say: Say) -> dict[str, Any]:
    """Train a task with one seed at every tolerance, Torch-Pruning and networks small from the start.

    Returns: plain values; `points`, one per run, each with its method and tolerance: for the baselines that of the run
    whose multiply-adds or widths they follow, for dense None.
    """
    dense = MethodRun("dense", task, data, seed)
    runs: list[tuple[str, float | None, MethodRun]] = [("dense", None, dense)]
    followed: list[tuple[float, Shrinking]] = []
    for criterion, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            name = f"{criterion} {tolerance:g}"
            own = Shrinking(name, task, data, seed, criterion=criterion, tolerance=tolerance)
            runs.append((criterion, tolerance, own))
            if criterion == "interpolative":
                followed.append((tolerance, own))
                baseline = Pruning(f"torch-pruning {tolerance:g}", task, data, seed, own.macs)
                runs.append(("torch-pruning", tolerance, baseline))
    train([run for _, _, run in runs], say)
    late = [("same widths", t, small(f"same widths {t:g}", own)) for t, own in followed]
    train([run for _, _, run in late], say)
    points = [_point(method, tolerance, run) for method, tolerance, run in [*runs, *late]]
    return header("paper-frontier", task, data, seed) | {"points": points}


def _point(method: str, tolerance: float | None, run: MethodRun) -> dict[str, Any]:
    """Tell one run, the validation metric after its last epoch included."""
    record = {key: value for key, value in run.record().items() if key in FIELDS}
    return {"method": method, "tolerance": tolerance, "validation": run.points[-1].validation} | record


def frontier_path(folder: Path, task: str) -> Path:
    """Return where a frontier's JSON lies."""
    return folder / f"frontier-{task}.json"
