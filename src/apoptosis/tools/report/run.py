"""From the log's records to the data of the page: curves, events, widths, times.

Holds: pure reading and sorting of records. Elsewhere: any drawing or markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apoptosis.decide.log import read_events
from apoptosis.errors import DataError

LOG = "events.jsonl"
STEPPED = ("epoch", "event", "attempt")  # kinds of which a resumed run writes some again
DENSE = "dense"
APOPTOSIS = "apoptosis"

Record = Mapping[str, Any]
#: Kind of a certificate -> why one of 1 or more says nothing.
NOTHING_SAID = {
    "accuracy": "too few probe rows to bound the share of changed predictions below 1",
    "empirical": "a relative change of 1 is as large as the output itself",
}
_LARGEST = 1e100  # beyond, axes overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The epochs of one method ("dense" or "apoptosis") with one seed, in order."""

    method: str
    seed: int
    epochs: tuple[Record, ...]

    def points(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two columns of the epoch records, rows with both present (a loss that was not finite is null)."""
        pairs = [(number(e.get(x)), number(e.get(y))) for e in self.epochs]
        kept = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in kept], [b for _, b in kept]

    def last(self, key: str) -> float | None:
        """Return the last known value of a column."""
        values = [number(e.get(key)) for e in self.epochs]
        return next((v for v in reversed(values) if v is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run, sorted. run: the last "run" record; ledgers, summary: as written, if written.

    events: seed -> events, rolled back ones included; attempts: seed -> attempts that removed nothing.
    """

    name: str
    run: Record
    curves: tuple[Curve, ...]
    events: Mapping[int, tuple[Record, ...]]
    ledgers: tuple[Record, ...]
    summary: Record | None
    num_records: int
    attempts: Mapping[int, tuple[Record, ...]] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds with an epoch or an event."""
        return tuple(sorted({c.seed for c in self.curves} | set(self.events) | set(self.attempts)))

    @property
    def metric_name(self) -> str:
        """What `metric` is, "accuracy" or "auc", as the epochs say."""
        names = [e["metric_name"] for c in self.curves for e in c.epochs if isinstance(e.get("metric_name"), str)]
        return names[-1] if names else "metric"

    def curve(self, method: str, seed: int | None = None) -> Curve | None:
        """Return the method's curve; the first seed's by default."""
        found = [c for c in self.curves if c.method == method and seed in (None, c.seed)]
        return found[0] if found else None

    def shared_seconds(self) -> tuple[float, float]:
        """Return training seconds without and with apoptosis, summed over seeds, up to the last epoch both have."""
        dense, apo = 0.0, 0.0
        for seed in self.seeds:
            pair = self.curve(DENSE, seed), self.curve(APOPTOSIS, seed)
            columns = [dict(zip(*c.points("epoch", "seconds"), strict=True)) for c in pair if c is not None]
            if len(columns) == 2 and (both := columns[0].keys() & columns[1].keys()):
                dense += columns[0][max(both)]
                apo += columns[1][max(both)]
        return dense, apo

    def committed(self, seed: int) -> tuple[Record, ...]:
        """Return the events that changed the network."""
        return tuple(e for e in self.events.get(seed, ()) if not e.get("rolled_back"))

    def width_steps(self, seed: int) -> dict[str, list[tuple[float, float]]]:
        """Per group, (step, width) from step 0 to the last known step; a width holds until the next point."""
        curve = self.curve(APOPTOSIS, seed)
        epochs = curve.epochs if curve else ()
        lines: dict[str, list[tuple[float, float]]] = {}
        for event in self.committed(seed):
            for group, (before, after) in event_groups(event).items():
                line = lines.setdefault(group, [(0.0, float(before))])
                line.append((step_of(event), float(after)))
        ends = [step_of(r) for r in (*epochs, *self.events.get(seed, ()))]
        for epoch in epochs:
            for group, width in _mapping(epoch.get("widths")).items():
                if number(width) is not None:
                    lines.setdefault(group, [(0.0, float(width))])
        for line in lines.values():
            line.append((max([*ends, line[-1][0]]), line[-1][1]))
        return lines

    def size_over_time(self, method: str, seed: int, key: str) -> tuple[list[float], list[float]]:
        """(training seconds, parameters or MACs): a staircase that falls at the events.

        Events are placed in time by their step, linearly between the two epoch ends around it.
        """
        curve = self.curve(method, seed)
        if curve is None:
            return [], []
        steps = [0.0, *curve.points("step", "seconds")[0]]
        seconds = [0.0, *curve.points("step", "seconds")[1]]
        points = list(zip(*curve.points("seconds", key), strict=True))
        if method == APOPTOSIS:
            unit = self._epoch_unit(curve, key)
            for event in self.committed(seed):
                at = float(np.interp(step_of(event), steps, seconds))
                points += [(at, unit * size) for size in before_after(event, key)]
        if points:  # the network begins as wide as it ever is
            points.append((0.0, max(size for _, size in points)))
        points.sort(key=lambda p: (p[0], -p[1]))
        return [x for x, _ in points], [y for _, y in points]

    def per_example(self, seed: int) -> float:
        """Return what MACs of the events of a seed have to be multiplied by to be per example (older logs differ)."""
        curve = self.curve(APOPTOSIS, seed)
        return 1.0 if curve is None else self._epoch_unit(curve, "macs")

    def _epoch_unit(self, curve: Curve, key: str) -> float:
        """Epochs count MACs per example, events per example input: how much one is of the other."""
        for event in reversed(self.committed(curve.seed)):
            sizes = before_after(event, key)
            steps, values = curve.points("step", key)
            later = [v for s, v in zip(steps, values, strict=True) if s >= step_of(event)]
            if sizes and sizes[-1] > 0 and later:  # nothing shrinks between the last event and the next epoch's end
                return later[0] / sizes[-1]
        return 1.0


def read_run(run_dir: Path) -> RunData:
    """Read a run folder's log.

    A resumed run writes another "run" record, with `resumed_at_step`; what the interrupted part had written after that
    step (without it: from the first resumed step on) is superseded and left out.

    Raises: DataError: not a folder, no log in it, or a damaged log.
    """
    if not run_dir.is_dir():
        raise DataError(
            f"'{run_dir}' is not a run folder: no such directory; give the folder that train or compare wrote"
        )
    if not (run_dir / LOG).exists():
        raise DataError(
            f"'{run_dir}' is not a run folder: it has no {LOG}; give the folder that train or compare wrote"
        )
    records = read_events(run_dir / LOG)
    curves: dict[tuple[int, str], list[Record]] = {}
    events: dict[int, list[Record]] = {}
    attempts: dict[int, list[Record]] = {}
    for record in _superseded_left_out(records):
        seed = seed_of(record)
        if record["kind"] == "epoch":
            method = record.get("method", record.get("contestant", APOPTOSIS))  # the latter in older logs
            curves.setdefault((seed, str(method)), []).append(record)
        else:
            (events if record["kind"] == "event" else attempts).setdefault(seed, []).append(record)
    of_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("run", "ledger", "summary")}
    ledgers = {seed_of(r): r for r in of_kind["ledger"]}
    return RunData(
        name=run_dir.resolve().name,
        run=of_kind["run"][-1] if of_kind["run"] else {},
        curves=tuple(Curve(method=c, seed=s, epochs=tuple(e)) for (s, c), e in sorted(curves.items())),
        events={seed: tuple(e) for seed, e in events.items()},
        ledgers=tuple(ledgers.values()),
        summary=of_kind["summary"][-1] if of_kind["summary"] else None,
        num_records=len(records),
        attempts={seed: tuple(a) for seed, a in attempts.items()},
    )


def number(value: object) -> float | None:
    """Return a finite number that a plot can hold, or None for everything else (null, text, booleans, 10**400)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def seed_of(record: Record) -> int:
    """Return the record's seed; 0 where a run has but one and does not say."""
    return int(number(record.get("seed")) or 0)


def step_of(record: Record) -> float:
    """Return the optimizer step of a record; 0 when unknown."""
    return number(record.get("step")) or 0.0


def event_groups(event: Record) -> dict[str, tuple[int, int]]:
    """Group -> (width before, width after)."""
    groups = _mapping(event.get("groups"))
    pairs = {k: [number(width) for width in v] for k, v in groups.items() if isinstance(v, list) and len(v) == 2}
    return {k: (int(v[0]), int(v[1])) for k, v in pairs.items() if v[0] is not None and v[1] is not None}


def before_after(event: Record, key: str) -> list[float]:
    """Return an event's size column: [before, after], or only [after] where the log has one number."""
    value = event.get(key)
    values = value if isinstance(value, list) else [value]
    return [v for v in map(number, values) if v is not None]


def certificates(event: Record) -> list[Record]:
    """Return the event's certificates that hold a value."""
    found = event.get("certificates")
    entries = found if isinstance(found, list) else []
    return [c for c in entries if isinstance(c, dict) and number(c.get("value")) is not None]


def says_nothing(certificate: Record) -> bool:
    """Whether a bound holds whatever happens: a share of 1 or more, a relative change as large as what changes."""
    return certificate.get("kind") in NOTHING_SAID and (number(certificate.get("value")) or 0.0) >= 1.0


def measured(event: Record, certificate: Record) -> float | None:
    """Return what was measured of the quantity that a certificate bounds, if anything was.

    Looked up in the event's `measured`: under the certificate's subject, or under its kind; a share of changed
    predictions also under "losses" and "flips".
    """
    values = _mapping(event.get("measured"))
    kind, subject = str(certificate.get("kind")), str(certificate.get("subject"))
    nested = values.get(kind)
    candidates = [nested.get(subject) if isinstance(nested, dict) else nested, values.get(subject)]
    if kind == "accuracy":
        candidates += [values.get("losses"), values.get("flips")]
    return next((v for v in map(number, candidates) if v is not None), None)


def measured_points(events: Iterable[Record], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of every event that measured `name`."""
    pairs = [(step_of(e), number(_mapping(e.get("measured")).get(name))) for e in events]
    return [(step, value) for step, value in pairs if value is not None]


def _superseded_left_out(records: Iterable[Record]) -> list[Record]:
    kept: list[tuple[int, Record]] = []
    part = 0
    resumed: set[tuple[int, int]] = set()
    for record in records:
        part += record["kind"] == "run"
        key = (part, seed_of(record))
        again = number(record.get("resumed_at_step")) if record["kind"] == "run" else None
        if again is not None:
            kept = [(p, r) for p, r in kept if step_of(r) <= again]
        if record["kind"] in STEPPED and key not in resumed:
            resumed.add(key)
            start, seed = step_of(record), key[1]
            kept = [(p, r) for p, r in kept if p == part or seed_of(r) != seed or step_of(r) < start]
        kept.append((part, record))
    return [record for _, record in kept if record["kind"] in STEPPED]


def summary_value(run: RunData, *path: str) -> float | None:
    """Return a number of the summary, by its path; None where the log does not have it."""
    found: Any = run.summary
    for key in path:
        found = _mapping(found).get(key)
    return number(found)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
