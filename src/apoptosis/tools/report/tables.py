"""The page's tables: ledger, events, epochs, and plain pairs.

Holds: rows and cells, as text. Elsewhere: the order of the page, markup (templates/report.html).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apoptosis.tools.report.run import (
    APOPTOSIS,
    NOTHING_SAID,
    Record,
    RunData,
    before_after,
    certificates,
    event_groups,
    number,
    says_nothing,
    step_of,
)
from apoptosis.tools.report.words import metric_value, rounded

LEDGER_WORDS = {
    "events": "events",
    "attempts": "attempts",
    "rolled_back": "rolled back",
    "parameters": "parameters, before and after",
    "macs": "multiply-adds per example, before and after",
    "accuracy_cost": "upper limit on the cost in accuracy, before further training (a share)",
    "confidence": "confidence of that limit",
    "population": "holds for the population (not only for the rows measured)",
    "probe_rows": "probe rows",
    "budget": "budget (a share)",
    "site_cost": "relative error summed over events, per site",
    "site_limit": "limit of that sum",
    "goal": "size asked for",
    "seconds": "seconds in apoptosis",
    "hook_seconds": "of these, in hooks",
    "classes": "labels or logits= say that outputs are classes",
    "idle": "why nothing was removed",
    "refused": "refused",
}
CERTIFICATE_ORDER = {"accuracy": 0, "empirical": 1, "worst_case": 2}


class Table(NamedTuple):
    r"""Cells are plain text, "\n" between their lines; the first of a row is its heading, `numeric` align right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


def pairs_table(values: Mapping[str, Any], caption: str) -> Table:
    """Return names and values."""
    return Table(caption, ("name", "value"), [(str(k), cell(v)) for k, v in values.items()])


def ledger_table(ledger: Record, caption: str) -> Table:
    """Return the ledger's entries, known ones in words, unknown ones under their own name."""
    inner = ledger.get("ledger")
    entries = (
        inner
        if isinstance(inner, dict)
        else {k: v for k, v in ledger.items() if k not in ("kind", "time", "seed", "text")}
    )
    entries = {
        k: v for k, v in entries.items() if k != "history" and v not in (None, "", [])
    }  # the events table has it
    unbounded = (number(entries.get("accuracy_cost")) or 0.0) >= 1.0
    if unbounded:  # nothing holds of a limit that there is not
        entries = {k: v for k, v in entries.items() if k not in ("confidence", "population")}
    if isinstance(sites := entries.get("site_cost"), dict):
        modules = Counter(str(key).partition(":")[0] for key in sites)  # one may have several sites
        short = {key: str(key).partition(":")[0] for key in sites}
        entries["site_cost"] = {name if modules[name] == 1 else str(key): sites[key] for key, name in short.items()}
    order = [k for k in LEDGER_WORDS if k in entries] + [k for k in entries if k not in LEDGER_WORDS]
    shown = {k: cell(entries[k]) for k in order}
    if unbounded:
        shown["accuracy_cost"] = f"none can be given: {NOTHING_SAID['accuracy']}"
    rows = [(LEDGER_WORDS.get(k, k.replace("_", " ")), shown[k]) for k in order]
    return Table(caption or "All events of the run", ("entry", "value"), rows)


def events_table(run: RunData) -> Table:
    """Return one row per attempt, with what was certified and measured."""
    head = ("step", "widths", "parameters", "multiply-adds per example", "certified", "measured", "seconds", "outcome")
    rows = []
    for seed in run.seeds:
        for event in sorted((*run.events.get(seed, ()), *run.attempts.get(seed, ())), key=step_of):
            widths = [f"{g}\u00a0{a}→{b}" for g, (a, b) in event_groups(event).items() if a != b]
            outcome = "nothing removed" if event["kind"] == "attempt" else "committed"
            outcome = "rolled back" if event.get("rolled_back") else outcome
            reason = f": {event['reason']}" if event.get("reason") else ""
            row = [cell(event.get("step")), "\n".join(widths) or "none", _sizes(event, "parameters")]
            row += [
                _sizes(event, "macs", run.per_example(seed)),
                _certified(event),
                _measured(event),
                cell(event.get("seconds")),
            ]
            rows.append((seed, [*row, outcome + reason]))
    return _by_seed(run, "Every attempt, in order", head, rows, {0, 2, 3, 6}, at=0)


def epochs_table(run: RunData) -> Table:
    """Return one row per epoch, of the runs with and without apoptosis."""
    columns = ("epoch", "step", "seconds", "loss", "metric", "parameters", "macs")
    head = (
        "method",
        "epoch",
        "step",
        "training seconds",
        "training loss",
        run.metric_name,
        "parameters",
        "multiply-adds per example",
    )
    rows = []
    for curve in run.curves:
        name = "with apoptosis" if curve.method == APOPTOSIS else "without"
        for epoch in curve.epochs:
            cells = {c: cell(epoch.get(c)) for c in columns}
            metric = number(epoch.get("metric"))
            cells["metric"] = "–" if metric is None else metric_value(run.metric_name, metric)
            rows.append((curve.seed, [name, *cells.values()]))
    return _by_seed(run, "After every epoch", head, rows, set(range(1, len(head))), at=1)


def _by_seed(
    run: RunData,
    caption: str,
    head: Sequence[str],
    rows: Sequence[tuple[int, Sequence[str]]],
    numeric: set[int],
    *,
    at: int,
) -> Table:
    """Return a table with a column for the seed at position `at`, where there are several."""
    if len(run.seeds) < 2:
        return Table(caption, head, [row for _, row in rows], frozenset(numeric))
    wider = [(*row[:at], str(seed), *row[at:]) for seed, row in rows]
    shifted = frozenset({at, *(i + (i >= at) for i in numeric)})
    return Table(caption, (*head[:at], "seed", *head[at:]), wider, shifted)


def cell(value: Any) -> str:
    r"""Return a JSON value as text; null is a dash.

    Example:
        >>> cell(1234567), cell(None), cell(True), cell([3, 2]), cell(["a", "b"])
        ('1,234,567', '–', 'yes', '3 → 2', 'a\nb')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = number(value)
    if plain is not None:
        return rounded(plain)
    if isinstance(value, list):
        pair = len(value) == 2 and all(number(v) is not None for v in value)
        return (" → " if pair else "\n").join(cell(v) for v in value) or "none"
    if isinstance(value, dict):
        return "\n".join(f"{k}: {cell(v)}" for k, v in value.items()) or "none"
    return " ".join(str(value).split("\n"))


def _sizes(event: Record, key: str, unit: float = 1.0) -> str:
    return " → ".join(rounded(unit * v) for v in before_after(event, key)) or "–"


def _certified(event: Record) -> str:
    """Accuracy limits in full; of the per-site kinds the largest, with its site."""
    lines = []
    found = certificates(event)
    for kind in sorted({str(c.get("kind")) for c in found}, key=lambda k: CERTIFICATE_ORDER.get(k, 9)):
        largest = max((c for c in found if str(c.get("kind")) == kind), key=lambda c: float(c["value"]))
        about = f" at {str(largest.get('subject')).partition(':')[0]}" if kind != "accuracy" else ""
        confidence = number(largest.get("confidence"))
        sure = f", {100 * confidence:.4g} %" if confidence is not None and confidence < 1 else ""
        where = "" if kind != "accuracy" or largest.get("population") else ", on these rows only"
        if says_nothing(largest):
            lines.append(f"{kind.replace('_', ' ')}: no bound{about}, {NOTHING_SAID[kind]}")
            continue
        lines.append(f"{kind.replace('_', ' ')} ≤ {rounded(float(largest['value']))}{about}{sure}{where}")
    return "\n".join(lines) or "–"


def _measured(event: Record) -> str:
    values = event.get("measured")
    said = (
        cell({str(k).replace("_", " "): v for k, v in values.items()}) if isinstance(values, dict) and values else "–"
    )
    where = event.get("measured_on")
    return f"{said}\n{where}" if where and said != "–" else said
