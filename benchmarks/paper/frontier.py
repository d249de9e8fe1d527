"""The frontier of one ground: parameters against metric over tolerances, and rivals at the same multiply-adds.

Lives here: which settings are run. Does not live here: methods, the table of default settings.
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
    "reconstruction": (0.0125, 0.025, 0.05, 0.1),
    "magnitude": (0.05, 0.1, 0.2, 0.4),
}


def run_frontier(ground: Ground, task: Task, seed: int, say: Say) -> dict[str, Any]:
    """Train a ground with one seed at every tolerance, Torch-Pruning and networks small from the start beside it.

    Returns: plain values; `points`, one per run, each with its method and tolerance (None where there is none).
    """
    dense = Contestant("dense", ground, task, seed)
    runs: list[tuple[str, float | None, Contestant]] = [("dense", None, dense)]
    for criterion, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            name = f"{criterion} {tolerance:g}"
            own = Shrinking(name, ground, task, seed, criterion=criterion, tolerance=tolerance)
            runs.append((criterion, tolerance, own))
            if criterion == "interpolative":
                runs.append(
                    ("torch-pruning", None, Pruning(f"torch-pruning {tolerance:g}", ground, task, seed, own.macs))
                )
    train([run for _, _, run in runs], say)
    late = [("same widths", None, small(f"same widths {t:g}", own)) for c, t, own in runs
            if c == "interpolative" and t is not None and isinstance(own, Shrinking)]  # fmt: skip
    train([run for _, _, run in late], say)
    points = [
        {"method": method, "tolerance": tolerance}
        | {
            k: v
            for k, v in run.record().items()
            if k in ("test", "seconds", "run_seconds", "parameters", "macs", "spent_macs", "events", "ledger")
        }
        for method, tolerance, run in [*runs, *late]
    ]
    return header("paper-frontier", ground, task, seed) | {"points": points}


def frontier_path(folder: Path, ground: str) -> Path:
    """Return where a frontier's JSON lies."""
    return folder / f"frontier-{ground}.json"
