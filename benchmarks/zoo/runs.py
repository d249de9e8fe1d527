"""Where rows come from: code, versions, machine, and the rows of a run that is not finished yet.

Holds: the record of a run and its log. Elsewhere: any measurement, the page.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import apoptosis
from apoptosis.tools.recipes.machine import machine, versions

SEED = 0
_LIBRARIES = ("timm", "torchvision", "transformers")
_OF_RUN = ("code", "seed", "versions", "limit")  # what rows of one run have in common, wherever it is resumed

Record = dict[str, Any]
Row = dict[str, Any]


def record(processes: int, limit: float) -> Record:
    """Describe a run that begins now. code: of the sources of apoptosis, so that rows of others are recognised."""
    digest = hashlib.sha256()
    root = Path(apoptosis.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    found = versions()
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "code": digest.hexdigest()[:12],
        "seed": SEED,
        "versions": found,
        "machine": machine(torch.device("cpu")),
        "processes": processes,
        "limit": limit,
        "seconds": 0.0,
    }


class Log:
    """The rows of a run, a line each, so that it can be resumed; seconds: of all its parts together."""

    def __init__(self, path: Path, run: Record, *, resume: bool) -> None:
        self._path, self.run = path, run
        self.rows: list[tuple[str, str, Row]] = []
        self._before = 0.0
        if resume and path.exists():
            self._read()
        else:
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time, without what lay between an interrupt and going on."""
        return self._before + time.perf_counter() - self._start

    def add(self, family: str, name: str, row: Row) -> None:
        """Note one row."""
        self.rows.append((family, name, row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([family, name, row, self.seconds]) + "\n")

    def close(self) -> None:
        """Remove the log of a run whose rows are elsewhere now."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        """Raises: SystemExit: the log is of other sources or versions."""
        first, *lines = self._path.read_text(encoding="utf-8").splitlines()
        old = json.loads(first)
        other = [name for name in _OF_RUN if old.get(name) != self.run[name]]
        if other:
            raise SystemExit(
                f"--resume: {self._path.name} has another {', '.join(other)}. Start again without --resume."
            )
        for line in lines:
            try:
                family, name, row, self._before = json.loads(line)
            except ValueError:  # the last one, which an interrupt cut off
                break
            self.rows.append((family, name, row))
        if old["processes"] != self.run["processes"]:
            self.run["processes"] = None


def merged(known: Mapping[str, Any], run: Record, rows: list[tuple[str, str, Row]]) -> dict[str, Any]:
    """Add rows to those that are known, every one with the number of its run; runs without rows go.

    Args: known: families and runs, as in the JSON.
    """
    runs = [*known.get("runs", ()), run]
    families = {family: dict(found) for family, found in known.get("families", {}).items()}
    for family, name, row in rows:
        families.setdefault(family, {})[name] = {**row, "run": len(runs) - 1}
    used = sorted({row["run"] for found in families.values() for row in found.values()})
    place = {old: new for new, old in enumerate(used)}
    return {
        "kind": "zoo",
        "runs": [runs[i] for i in used],
        "families": {
            family: {name: {**row, "run": place[row["run"]]} for name, row in sorted(found.items())}
            for family, found in sorted(families.items())
        },
    }
