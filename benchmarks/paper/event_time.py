"""Where the time of an event goes: the parts of every event of one run, by profile.

    python -m benchmarks.paper --event-time --data-dir DIR

Holds: which functions make up a part. Elsewhere: the share of whole runs (cells have it).
"""

from __future__ import annotations

import cProfile
import json
import pstats
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Say, header
from benchmarks.paper.methods import Shrinking
from benchmarks.paper.tasks import Task, TaskData

# Part -> functions (file, name), none of them inside another; the rest of an event is "rest".
PARTS = {
    "moments": (("window.py", "observations"),),
    "plan": (("plan.py", "make_plan"),),
    "surgery": (("build.py", "build_edits"), ("transaction.py", "apply")),
    "capture": (("analysis.py", "analyse"),),
    "probe": (("evaluate.py", "outputs"), ("evaluate.py", "compare")),
}
EVENT_TIME = "event-time.json"
EPOCHS = 4  # of the run's schedule: later events are small


class _Profiled(Shrinking):
    """A run whose steps of apoptosis are profiled one by one."""

    _hooks = 0.0

    def after_step(self) -> None:
        profile = cProfile.Profile()
        before = len(self.events)
        profile.enable()
        super().after_step()
        profile.disable()
        if len(self.events) > before:
            hooks, self._hooks = self.apo.hook_seconds - self._hooks, self.apo.hook_seconds
            self.events[-1]["parts"] = _parts(profile) | {"hooks before it": hooks}


def _parts(profile: cProfile.Profile) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    whole = 0.0
    stats: Any = pstats.Stats(profile)
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():
        for part, functions in PARTS.items():
            if (Path(file).name, name) in functions:
                found[part] += cumulative
        if (*Path(file).parts[-2:], name) == ("engine", "__init__.py", "step"):
            whole = cumulative
    if sum(found.values()) > whole:
        raise RuntimeError(f"parts of an event lie in one another: {found} of {whole} s")
    return found | {"rest": whole - sum(found.values())}


def run_event_time(task: Task, data: TaskData, say: Say) -> dict[str, Any]:
    """Profile the events of one run. Returns: plain values; `events`, each with the seconds of its parts."""
    run = _Profiled("apoptosis", task, data, 0)
    for _ in range(min(EPOCHS, task.epochs)):
        run.run_epoch()
        say(f"  epoch {run.epoch}: {len(run.events)} events")
    return header("paper-event-time", task, data, 0) | {"events": run.events}


def read_event_time(path: Path) -> list[dict[str, Any]]:
    """Return what was measured, in a list; empty where nothing was yet."""
    return [json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
