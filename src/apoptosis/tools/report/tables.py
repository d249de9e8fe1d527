"""The page's tables: ledger, events, epochs, and plain pairs.

Holds: rows and cells. Elsewhere: the order of the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apoptosis.tools.report.run import (
    APOPTOSIS,
    Record,
    RunData,
    before_after,
    certificates,
    event_groups,
    number,
    step_of,
)
from apoptosis.tools.report.words import exact_number

LEDGER_WORDS = {
    "events": "events",
    "attempts": "attempts",
    "rolled_back": "rolled back",
    "parameters": "parameters, before and after",
    "macs": "multiply-adds per example, before and after",
    "accuracy_cost": "upper limit on the cost in accuracy, before training went on (a share; 1: none can be given)",
    "confidence": "confidence of that limit",
    "population": "speaks of the population (not only of the rows measured)",
    "probe_rows": "probe rows",
    "budget": "budget (a share)",
    "site_cost": "relative error summed over events, per site",
    "site_limit": "limit of that sum",
    "seconds": "seconds spent on apoptosis",
    "hook_seconds": "of these, in hooks",
    "idle": "why nothing was removed",
    "refused": "refused",
}
CERTIFICATE_ORDER = {"accuracy": 0, "empirical": 1, "worst_case": 2}


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], numeric: frozenset[int]) -> str:
    """Return a table; cells are HTML already, the first cell of a row is its heading, `numeric` columns align right."""
    mark = [' class="num"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{m}>{html.escape(h)}</th>' for h, m in zip(head, mark, strict=True))
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{m}>{c}</td>" for c, m in zip(rest, mark[1:], strict=True))
        body.append(f'<tr><th scope="row"{mark[0]}>{first}</th>{cells}</tr>\n')
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    label = html.escape(caption or ", ".join(head), quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{said}'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def pairs_table(values: Mapping[str, Any], caption: str) -> str:
    """Return names and values."""
    rows = [(html.escape(str(k)), cell(v)) for k, v in values.items()]
    return table(caption, ("name", "value"), rows, frozenset())


def ledger_table(ledger: Record, caption: str) -> str:
    """Return the ledger's entries, known ones in words, unknown ones under their own name."""
    inner = ledger.get("ledger")
    entries = (
        inner
        if isinstance(inner, dict)
        else {k: v for k, v in ledger.items() if k not in ("kind", "time", "seed", "text")}
    )
    entries = {k: v for k, v in entries.items() if k != "history" and (k, v) != ("idle", "")}  # the events table has it
    order = [k for k in LEDGER_WORDS if k in entries] + [k for k in entries if k not in LEDGER_WORDS]
    rows = [(html.escape(LEDGER_WORDS.get(k, k.replace("_", " "))), cell(entries[k])) for k in order]
    return table(caption or "All events of the run", ("entry", "value"), rows, frozenset())


def events_table(run: RunData) -> str:
    """Return one row per attempt, with what was certified and measured."""
    many = len(run.seeds) > 1
    head = [
        *(["seed"] if many else []),
        "step",
        "widths",
        "parameters",
        "MACs (example input)",
        "certified",
        "measured",
        "seconds",
        "outcome",
    ]
    rows = []
    for seed in run.seeds:
        tried = sorted((*run.events.get(seed, ()), *run.attempts.get(seed, ())), key=step_of)
        for event in tried:
            widths = [f"{html.escape(g)}&nbsp;{a}→{b}" for g, (a, b) in event_groups(event).items() if a != b]
            reason = f": {html.escape(str(event['reason']))}" if event.get("reason") else ""
            outcome = f"rolled back{reason}" if event.get("rolled_back") else f"committed{reason}"
            if event["kind"] == "attempt":
                outcome = f"nothing removed{reason}"
            row = [cell(event.get("step")), "<br>".join(widths) or "none", _sizes(event, "parameters")]
            row += [_sizes(event, "macs"), _certified(event), _measured(event), cell(event.get("seconds")), outcome]
            rows.append([*([str(seed)] if many else []), *row])
    shift = int(many)
    numeric = frozenset({0, 2 + shift, 3 + shift, 6 + shift} | ({1} if many else set()))
    return table("Every attempt, in order", head, rows, numeric)


def epochs_table(run: RunData) -> str:
    """Return one row per epoch and contestant."""
    many = len(run.seeds) > 1
    columns = ("epoch", "step", "seconds", "loss", "metric", "parameters", "macs")
    rows = []
    for curve in run.curves:
        name = "with apoptosis" if curve.contestant == APOPTOSIS else "without"
        for epoch in curve.epochs:
            rows.append([name, *([str(curve.seed)] if many else []), *(cell(epoch.get(c)) for c in columns)])
    words = ("epoch", "step", "training seconds", "training loss", run.metric_name, "parameters", "MACs")
    head = ["contestant", *(["seed"] if many else []), *words]
    inner = table("After every epoch", head, rows, frozenset(range(1, len(head))))
    return f"<details><summary>{len(rows)} rows</summary>\n{inner}</details>\n"


def cell(value: Any) -> str:
    """Return a JSON value as HTML text; null is a dash.

    Example:
        >>> cell(1234567), cell(None), cell(True), cell([3, 2]), cell("<b>")
        ('1,234,567', '–', 'yes', '3 → 2', '&lt;b&gt;')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = number(value)
    if plain is not None:
        return exact_number(plain)
    if isinstance(value, list):
        pair = len(value) == 2 and all(number(v) is not None for v in value)
        return (" → " if pair else "<br>").join(cell(v) for v in value) or "none"
    if isinstance(value, dict):
        return "<br>".join(f"{html.escape(str(k))}: {cell(v)}" for k, v in value.items()) or "none"
    return html.escape(str(value))


def _sizes(event: Record, key: str) -> str:
    return " → ".join(exact_number(v) for v in before_after(event, key)) or "–"


def _certified(event: Record) -> str:
    """Accuracy limits in full; of the per-site kinds the largest, with its site."""
    lines = []
    found = certificates(event)
    for kind in sorted({str(c.get("kind")) for c in found}, key=lambda k: CERTIFICATE_ORDER.get(k, 9)):
        largest = max((c for c in found if str(c.get("kind")) == kind), key=lambda c: float(c["value"]))
        about = f" at {largest.get('subject')}" if kind != "accuracy" else ""
        confidence = number(largest.get("confidence"))
        sure = f", {100 * confidence:.4g} %" if confidence is not None and confidence < 1 else ""
        where = "" if kind != "accuracy" or largest.get("population") else ", on these rows only"
        text = f"{kind.replace('_', ' ')} ≤ {exact_number(float(largest['value']))}{about}{sure}{where}"
        lines.append(html.escape(text))
    return "<br>".join(lines) or "–"


def _measured(event: Record) -> str:
    values = event.get("measured")
    said = (
        cell({str(k).replace("_", " "): v for k, v in values.items()}) if isinstance(values, dict) and values else "–"
    )
    where = event.get("measured_on")
    return f"{said}<br>{html.escape(str(where))}" if where and said != "–" else said
