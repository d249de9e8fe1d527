"""What the scripts share: what a result says of where it was made, processes of their own, paired runs in turn.

Holds: small helpers. Elsewhere: any measuring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from apoptosis.tools.recipes.folder import write_json
from apoptosis.tools.recipes.machine import machine, versions

RESULTS = Path(__file__).resolve().parent / "results"
T = TypeVar("T")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's own text."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def result(kind: str, device: torch.device | None = None, **fields: Any) -> dict[str, Any]:
    """Return a result with its kind, versions and machine. fields: seed, runs and all else that is of this kind."""
    where = torch.device("cpu") if device is None else device
    return {"kind": kind, "versions": versions(), "machine": machine(where), **fields}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all, and say where, and what the pages need where it is a committed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"wrote {path}")
    if RESULTS in path.resolve().parents:
        print("its tables in README.md and docs: python -m benchmarks.table --write")


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """Return what `python -m module arguments` prints last, as JSON; its figures are those of a fresh process.

    Raises: SystemExit: it failed; what it said is shown.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python -m {module} {' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turn(pair: Sequence[T], steps: int, turn: int, seed: int = 0) -> Iterator[tuple[T, int, int]]:
    """Yield (run, first step, number of steps) of paired runs: what else the machine does meets both alike.

    Which of them goes first alternates from turn to turn, and from seed to seed.
    """
    for first in range(0, steps, turn):
        for one in pair if (first // turn + seed) % 2 == 0 else pair[::-1]:
            yield one, first, min(turn, steps - first)
