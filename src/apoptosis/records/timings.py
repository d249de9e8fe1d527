"""What a training step takes on one machine, by what it is made of: measured once, never changed.

Holds: the table and its form in JSON. Elsewhere: measuring it (decide/timing.py), what a step takes at other widths
(planner/costs.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

VERSION = 1


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a contraction, forward and backward, at some widths.

    macs: multiply-adds of a forward pass on the example input at the widths at which the table was measured. shares:
    of these, ascending. seconds: at each share, for a whole training step.
    """

    macs: float
    shares: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """What a training step takes, in seconds, measured once: decisions are a function of it, and not of a clock.

    device: in words. threads: of torch on the CPU. rows: examples of the step. curves: of the contractions measured.
    weights: by the name of a weight, which curve is that of all its contractions. per_mac: seconds per multiply-add of
    a forward pass on the example input, for the contractions that were not measured. per_element: likewise per number
    that other operators compute (Structure.elements). per_parameter: of the optimizer. fixed: what does not depend on
    the widths. step: the sum of all, at the widths at which the table was measured.
    """

    device: str
    threads: int
    rows: int
    curves: tuple[Curve, ...]
    weights: Mapping[str, int]
    per_mac: float
    per_element: float
    per_parameter: float
    fixed: float
    step: float
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self) | {"weights": dict(self.weights)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the table of plain values. Raises: ValueError: it is none, or of a later version."""
        if values.get("version") != VERSION:
            raise ValueError(f"timings of version {values.get('version')!r}; this library reads version {VERSION}")
        try:
            curves = tuple(Curve(float(c["macs"]), tuple(map(float, c["shares"])), tuple(map(float, c["seconds"])))
                           for c in values["curves"])  # fmt: skip
            found = cls(
                device=str(values["device"]),
                threads=int(values["threads"]),
                rows=int(values["rows"]),
                curves=curves,
                weights={str(name): int(number) for name, number in values["weights"].items()},
                per_mac=float(values["per_mac"]),
                per_element=float(values["per_element"]),
                per_parameter=float(values["per_parameter"]),
                fixed=float(values["fixed"]),
                step=float(values["step"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"timings lack what their version holds: {error!r}") from error
        found._check()
        return found

    def _check(self) -> None:
        """Refuse numbers that make no sense (ValueError)."""
        plain = (self.per_mac, self.per_element, self.per_parameter, self.fixed, self.step)
        if not all(math.isfinite(x) and x >= 0 for x in plain):
            raise ValueError(f"timings must be finite numbers >= 0, not {plain}")
        for curve in self.curves:
            numbers = (curve.macs, *curve.shares, *curve.seconds)
            ascends = list(curve.shares) == sorted(set(curve.shares)) and curve.shares[-1:] == (1.0,)
            if not all(math.isfinite(x) and x > 0 for x in numbers) or not ascends:
                raise ValueError("timings hold a curve whose shares do not ascend to 1, or whose numbers are not > 0")
            if len(curve.shares) != len(curve.seconds):
                raise ValueError("timings hold a curve with more shares than seconds, or fewer")
        if not all(0 <= number < len(self.curves) for number in self.weights.values()):
            raise ValueError("timings name a curve that is not there")
