"""The frontier of one ground: parameters against metric over tolerances, and rivals at the same multiply-adds.

Holds: which settings are run. Elsewhere: methods, the table of default settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Say, header, train
from benchmarks.paper.contestants import Pruning, Shrinking, small
from benchmarks.paper.grounds import Ground, Task
from benchmarks.paper.training import Contestant

GROUNDS = ("fashion-mnist", "mnist", "higgs")
TOLD = ("test", "seconds", "run_seconds", "parameters", "macs", "spent_macs", "events", "ledger")
TOLERANCES = {
    "interpolative": (0.005, 0.01, 0.025, 0.05, 0.1),
    "reconstruction": (0.025, 0.05, 0.1),
    "magnitude": (0.1, 0.3),
}


def run_frontier(ground: Ground, task: Task, seed: int, say: Say) -> dict[str, Any]:
    """Train a ground with one seed at every tolerance, Torch-Pruning and networks small from the start beside it.

    Returns: plain values; `points`, one per run, each with its method and tolerance: for the rivals that of the run
    whose multiply-adds or widths they follow, for dense None.
    """
    dense = Contestant("dense", ground, task, seed)
    runs: list[tuple[str, float | None, Contestant]] = [("dense", None, dense)]
    followed: list[tuple[float, Shrinking]] = []
    for criterion, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            name = f"{criterion} {tolerance:g}"
            own = Shrinking(name, ground, task, seed, criterion=criterion, tolerance=tolerance)
            runs.append((criterion, tolerance, own))
            if criterion == "interpolative":
                followed.append((tolerance, own))
                rival = Pruning(f"torch-pruning {tolerance:g}", ground, task, seed, own.macs)
                runs.append(("torch-pruning", tolerance, rival))
    train([run for _, _, run in runs], say)
    late = [("same widths", t, small(f"same widths {t:g}", own)) for t, own in followed]
    train([run for _, _, run in late], say)
    points = [_point(method, tolerance, run) for method, tolerance, run in [*runs, *late]]
    return header("paper-frontier", ground, task, seed) | {"points": points}


def _point(method: str, tolerance: float | None, run: Contestant) -> dict[str, Any]:
    """Tell one run, the validation metric after its last epoch included."""
    told = {key: value for key, value in run.record().items() if key in TOLD}
    return {"method": method, "tolerance": tolerance, "validation": run.points[-1].validation} | told


def frontier_path(folder: Path, ground: str) -> Path:
    """Return where a frontier's JSON lies."""
    return folder / f"frontier-{ground}.json"
