"""The page: one HTML document with everything inside.

Holds: its sentences and key figures. Elsewhere: its order and markup (templates/report.html), tables, plots.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from apoptosis.display.text import short_number
from apoptosis.tools.report.figures import Plot
from apoptosis.tools.report.run import APOPTOSIS, DENSE, RunData, number, summary_value
from apoptosis.tools.report.tables import epochs_table, events_table, ledger_table, pairs_table
from apoptosis.tools.report.theme import VARIABLES
from apoptosis.tools.report.words import METRIC_WORDS, metric_value, times

HIDDEN = frozenset({"kind", "time", "config", "versions", "machine"})
OWN_SECTIONS = HIDDEN | {"epochs", "events", "ledger_text"}  # of the summary: what the page has in its own sections


def render(run: RunData, plots: Sequence[Plot]) -> str:
    """Return the whole page as HTML text."""
    many = len(run.ledgers) > 1
    about = [(run.run[key], key.capitalize()) for key in ("versions", "machine") if isinstance(run.run.get(key), dict)]
    environment = Environment(
        loader=PackageLoader("apoptosis.tools.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["split"] = str.splitlines
    environment.filters["as_json"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return environment.get_template("report.html").render(
        run=run,
        plots=plots,
        colours=VARIABLES.values(),
        lead=_lead(run),
        tiles=_tiles(run),
        ledger_texts=[str(ledger["text"]) for ledger in run.ledgers if ledger.get("text")],
        ledgers=[
            ledger_table(ledger, f"Seed {int(number(ledger.get('seed')) or 0)}" if many else "")
            for ledger in run.ledgers
        ],
        events=events_table(run),
        epochs=epochs_table(run),
        config=run.run.get("config", {k: v for k, v in run.run.items() if k not in HIDDEN}),
        about=[pairs_table(values, title) for values, title in about],
        summary=None if run.summary is None else _without_own_sections(run.summary),
    )


def _lead(run: RunData) -> str:
    """Say what happened, in sentences."""
    if not run.num_records:
        return "The log is empty: the run has only started, or ended before its first record."
    config = run.run.get("config")
    said = []
    if isinstance(config, dict):
        data, network = config.get("data"), config.get("network")
        said += [f"{network} on {data}." if isinstance(data, str) and isinstance(network, str) else ""]
    num_events = sum(len(run.committed(s)) for s in run.seeds)
    num_back = sum(len(e) for e in run.events.values()) - num_events
    seeds = f", over {len(run.seeds)} seeds" if len(run.seeds) > 1 else ""
    back = f" {num_back} {'attempts were' if num_back > 1 else 'attempt was'} rolled back." if num_back else ""
    if run.curve(APOPTOSIS) is None and run.curves and not run.events and not run.attempts:
        said += ["This run trained without apoptosis."]
    else:
        said += [
            f"{num_events} event{'s' * (num_events != 1)} removed channels while the network trained{seeds}.{back}"
        ]
    if run.curve(DENSE) is None and run.curves:
        said += [
            "The run has no paired run without apoptosis, so there is nothing to compare its time and metric with."
        ]
    said.append(_disagreement(run))
    if run.summary is None and not run.ledgers:
        said += ["The log has no ledger and no summary: the run has not ended yet, or it was interrupted."]
    return " ".join(s for s in said if s)


def _disagreement(run: RunData) -> str:
    """Say so where validation and test differ on which of the two methods is better."""
    test = [summary_value(run, "overall", f"test_metric_{method}") for method in (APOPTOSIS, DENSE)]
    validated = [_mean([c.last("metric") for c in run.curves if c.method == m]) for m in (APOPTOSIS, DENSE)]
    if None in test or None in validated:
        return ""
    gains = [(with_ or 0.0) - (without or 0.0) for with_, without in (test, validated)]
    if gains[0] * gains[1] >= 0:
        return ""
    words = [f"{'better' if gain > 0 else 'worse'} with apoptosis" for gain in gains]
    pairs = [" against ".join(metric_value(run.metric_name, v or 0.0) for v in pair) for pair in (test, validated)]
    return (
        f"Test and validation disagree: {METRIC_WORDS.get(run.metric_name, run.metric_name)} is {words[0]} on the test "
        f"part ({pairs[0]}) and {words[1]} on the validation part ({pairs[1]}), so the difference may be chance."
    )


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """Key figures as (name, value, note); sums and means over the seeds."""
    metric = METRIC_WORDS.get(run.metric_name, run.metric_name)
    tiles: list[tuple[str, str, str]] = []
    dense, apo = run.shared_seconds()
    over = f", {len(run.seeds)} seeds" if len(run.seeds) > 1 else ""
    if dense and apo:
        speed = f"{times(dense / apo)} faster" if dense >= apo else f"{times(apo / dense)} slower"
        tiles.append(("training time", speed, f"{short_number(dense)} s without, {short_number(apo)} s with{over}"))
    whole = summary_value(run, "overall", "speedup_run")
    if whole is not None:
        tiles.append(
            (
                "whole run",
                f"{times(whole)} faster" if whole >= 1 else f"{times(1 / whole)} slower",
                "evaluation included",
            )
        )
    for column, label in (("parameters", "parameters"), ("macs", "multiply-adds")):
        sizes = [run.size_over_time(APOPTOSIS, s, column)[1] for s in run.seeds]
        shrunk = _mean([_ratio(y[0], y[-1]) for y in sizes if y])
        if shrunk is not None:
            first, last = (_mean([y[i] for y in sizes if y]) or 0.0 for i in (0, -1))
            fewer = "unchanged" if shrunk == 1 else f"{times(shrunk)} fewer"
            tiles.append((label, fewer, f"{short_number(first)} to {short_number(last)}"))
    for method, words in ((APOPTOSIS, "with apoptosis"), (DENSE, "without")):
        test = summary_value(run, "overall", f"test_metric_{method}")
        if test is None and [c.method for c in run.curves] == [method]:
            test = summary_value(run, "result", "test_metric")
        values = [c.last("metric") for c in run.curves if c.method == method]
        validated = _mean(values)
        over = f"mean of {len(values)} seeds, " if len(values) > 1 else ""
        beside = "" if validated is None else f"validation {metric_value(run.metric_name, validated)}, "
        if test is not None:
            tiles.append(
                (f"test {metric}, {words}", metric_value(run.metric_name, test), f"{over}{beside}after the last epoch")
            )
        elif validated is not None:
            value = metric_value(run.metric_name, validated)
            tiles.append((f"validation {metric}, {words}", value, f"{over}last epoch"))
    return tiles


def _without_own_sections(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_own_sections(v) for k, v in value.items() if k not in OWN_SECTIONS}
    return [_without_own_sections(v) for v in value] if isinstance(value, list) else value


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
