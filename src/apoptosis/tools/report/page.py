"""The page: one HTML document with everything inside.

Holds: the order of the page and its sentences. Elsewhere: tables (`tables`), plots, CSS.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from apoptosis.tools.report.figures import Plot
from apoptosis.tools.report.run import APOPTOSIS, DENSE, RunData, number, summary_value
from apoptosis.tools.report.tables import epochs_table, events_table, ledger_table, pairs_table
from apoptosis.tools.report.theme import style_sheet
from apoptosis.tools.report.words import METRIC_WORDS, metric_value, short_number, times

HIDDEN = frozenset({"kind", "time", "config", "versions", "machine"})
TOLD = HIDDEN | {"epochs", "events", "ledger_text"}  # of the summary: what the page has in its own sections


def render(run: RunData, plots: Sequence[Plot]) -> str:
    """Return the whole page as HTML text."""
    sections = [_figure(plot) for plot in plots]
    sections += [_ledger(run), _events(run), _epochs(run), _config(run)]
    if run.summary is not None:
        sections.append(_section("summary", "Summary", _json(_without_told(run.summary))))
    title = html.escape(run.name)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: apoptosis report</title>\n<style>{style_sheet()}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{title}</h1>\n{_lead(run)}\n{_tiles(run)}\n</header>\n"
        f"<main>\n{''.join(sections)}</main>\n"
        "<footer>Made from this run's log, events.jsonl. One multiply-add counts as one MAC; seconds are wall time of "
        "training, without evaluation, unless said otherwise.</footer>\n</body>\n</html>\n"
    )


def _section(key: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="h-{key}">\n<h2 id="h-{key}">{html.escape(title)}</h2>\n{body}\n</section>\n'


def _missing(sentence: str) -> str:
    return f'<p class="missing">{html.escape(sentence)}</p>'


def _figure(plot: Plot) -> str:
    if plot.missing:
        return _section(plot.key, plot.title, _missing(plot.missing))
    alt, caption = html.escape(plot.alt, quote=True), html.escape(plot.caption)
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    scrolled = f'<div class="scroll">{svg}</div>'
    return _section(plot.key, plot.title, f"<figure>\n{scrolled}\n<figcaption>{caption}</figcaption>\n</figure>")


def _lead(run: RunData) -> str:
    """Say what happened, in sentences."""
    if not run.num_records:
        return '<p class="lead">The log is empty: the run has only begun, or ended before its first record.</p>'
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
        said += ["The run has no twin without apoptosis, so there is nothing to compare its time and metric with."]
    if run.summary is None and not run.ledgers:
        said += ["The log has no ledger and no summary: the run goes on, or it was interrupted."]
    return f'<p class="lead">{html.escape(" ".join(s for s in said if s))}</p>'


def _tiles(run: RunData) -> str:
    """Key figures; sums and means over the seeds."""
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
    for contestant, words in ((APOPTOSIS, "with apoptosis"), (DENSE, "without")):
        test = summary_value(run, "overall", f"test_metric_{contestant}")
        if test is None and [c.contestant for c in run.curves] == [contestant]:
            test = summary_value(run, "result", "test_metric")
        values = [c.last("metric") for c in run.curves if c.contestant == contestant]
        over = f"mean of {len(values)} seeds, " if len(values) > 1 else ""
        if test is not None:
            tiles.append(
                (f"test {metric}, {words}", metric_value(run.metric_name, test), f"{over}after the last epoch")
            )
        elif (mean := _mean(values)) is not None:
            tiles.append((f"validation {metric}, {words}", metric_value(run.metric_name, mean), f"{over}last epoch"))
    items = "".join(
        f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}<small>{html.escape(c)}</small></dd></div>\n"
        for a, b, c in tiles
    )
    return f'<dl class="tiles">\n{items}</dl>' if items else ""


def _ledger(run: RunData) -> str:
    if not run.ledgers:
        return _section("ledger", "Ledger", _missing("The log has no ledger: it is written when the run ends."))
    many = len(run.ledgers) > 1
    texts = [str(ledger["text"]) for ledger in run.ledgers if ledger.get("text")]
    said = "".join(f"<p>{'<br>'.join(html.escape(line) for line in text.splitlines())}</p>\n" for text in texts)
    body = said + "".join(ledger_table(ledger, f"Seed {int(number(ledger.get('seed')) or 0)}" if many else "")
                   for ledger in run.ledgers)  # fmt: skip
    return _section("ledger", "Ledger: what all removals together cost", body)


def _events(run: RunData) -> str:
    if not any(run.events.values()) and not any(run.attempts.values()):
        return _section("events", "Events", _missing("There has been no event."))
    return _section("events", "Events", events_table(run))


def _epochs(run: RunData) -> str:
    if not run.curves:
        return _section("epochs", "Epochs", _missing("There is no finished epoch in the log."))
    return _section("epochs", "Epochs", epochs_table(run))


def _config(run: RunData) -> str:
    if not run.run:
        return _section("config", "Configuration", _missing("The log does not say how the run was configured."))
    body = ""
    for key, title in (("versions", "Versions"), ("machine", "Machine")):
        if isinstance(run.run.get(key), dict):
            body += pairs_table(run.run[key], title)
    config = run.run.get("config", {k: v for k, v in run.run.items() if k not in HIDDEN})
    return _section("config", "Configuration", _json(config) + body)


def _json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f'<details><summary>as JSON</summary><pre tabindex="0">{html.escape(text)}</pre></details>\n'


def _without_told(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_told(v) for k, v in value.items() if k not in TOLD}
    return [_without_told(v) for v in value] if isinstance(value, list) else value


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
