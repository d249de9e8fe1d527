"""Print the structure of families: `python -m families.show NAME ...` with src and tests on the path."""

from __future__ import annotations

import sys

import torch

from families.oracle import build, inputs, structure_of
from families.registry import FAMILIES


def main() -> None:
    for name in sys.argv[1:] or FAMILIES:
        family = FAMILIES[name]
        structure = structure_of(family, build(family, torch.float32), inputs(family, torch.float32, 0, rows=4))
        sys.stdout.write(f"{name}\n")
        for group in structure.groups:
            told = f"pinned: {group.pin}" if group.pin else f"open, rows {group.rows}, sites {len(group.sites)}"
            mark = "listed " if group.name in family.groups else "       "
            sys.stdout.write(f"  {mark}{group.name:40} {group.num_channels:5} {told}\n")
        for note in structure.notes:
            sys.stdout.write(f"  note: {note}\n")


if __name__ == "__main__":
    main()
