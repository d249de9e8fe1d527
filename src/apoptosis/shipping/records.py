"""What was shipped: a file each with its size and how far its outputs lie from the network's.

Holds: the records and their text. Elsewhere: writing and checking the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, WIDTHS, PROGRAM, ONNX = "weights.safetensors", "widths.json", "network.pt2", "network.onnx"
README, RECORD = "README.md", "shipment.json"
ONNX_DATA = f"{ONNX}.data"
OWN = frozenset((WEIGHTS, WIDTHS, PROGRAM, ONNX, ONNX_DATA, README, RECORD))
"""All files that a shipment can hold; a folder that holds another one is not written over."""
FORMAT, VERSION = "apoptosis-shipment", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFile:
    """One file of a shipment, or one that could not be written.

    bytes: its size; 0 where it was not written. largest: largest absolute difference of an output from the network's,
    over all inputs that were tried; None where nothing was compared. relative: the same over the largest output.
    sizes: which sizes of the inputs may differ from the example's: "rows", "length". checked: on what it was compared,
    or why it was not. missing: why it was not written, "" where it was.
    """

    name: str
    bytes: int = 0
    largest: float | None = None
    relative: float | None = None
    sizes: tuple[str, ...] = ()
    checked: str = ""
    missing: str = ""

    def __str__(self) -> str:
        if self.missing:
            return f"{self.name}: not written: {self.missing}"
        apart = ""
        if self.largest is not None:
            apart = f", largest difference {self.largest:.2g} ({self.relative:.1g} of the largest output)"
        return f"{self.name}: {self.bytes:,} bytes{apart}{', ' if self.checked else ''}{self.checked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """What `ship` wrote. folder: where; files: one entry each, those that could not be written included."""

    folder: Path
    files: tuple[ShippedFile, ...]

    def __getitem__(self, name: str) -> ShippedFile:
        return next(file for file in self.files if file.name == name)

    @property
    def missing(self) -> Mapping[str, str]:
        """Name of each file that could not be written -> why."""
        return {file.name: file.missing for file in self.files if file.missing}

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, as the folder's shipment.json holds it."""
        names = ShippedFile.__slots__
        files = [{name: getattr(file, name) for name in names} for file in self.files]
        return {"format": FORMAT, "version": VERSION, "files": files}

    def __str__(self) -> str:
        return "\n".join([f"shipped to {self.folder}", *(f"  {file}" for file in self.files)])
