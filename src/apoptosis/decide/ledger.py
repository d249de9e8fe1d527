"""What an attempt came to, what an event did, and what all together cost at most: the records that a user prints.

Holds: Attempt, Event, Ledger and their wording. Elsewhere: how a number in them was measured (model.evaluate,
numerics), what a plan says of a group (planner/reasons.py).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from apoptosis.records import Certificate

if TYPE_CHECKING:
    from apoptosis.display.html import Html

Outcome = Literal["event", "nothing", "rolled back", "skipped"]
_LINE = 120  # characters of a line of an event's text
_SHOWN = 3  # groups in it
_NAME = 12  # characters of a name at least, before fewer groups are shown


def _nothing(step: int, notes: Sequence[str]) -> str:
    """Say why nothing was removed, in two lines."""
    most, text, said = 2 * _LINE - 44, f"step {step}: nothing removed", 0
    for note in notes:
        if said and len(text) + len(note) + 2 > most:
            break
        text, said = f"{text}; {_shortened(note, max(_LINE // 2, most - len(text) - 2))}", said + 1
    if said < len(notes):
        text += f" (and {len(notes) - said} more in event.notes)"
    return "\n  ".join(textwrap.wrap(text, _LINE - 2, break_on_hyphens=False))


def _count(number: int) -> str:
    """Return a number in full below a hundred million, else in four digits with its unit."""
    if number < 10**8:
        return f"{number:,}"
    unit = next(unit for unit in (10**12, 10**9, 10**6) if number >= unit or unit == 10**6)
    return f"{number / unit:.4g}{'MBT'[(len(str(unit)) - 7) // 3]}"


def _shortened(text: str, most: int, *, end: bool = False) -> str:
    """Return the text in at most so many characters; end: of its end, by which names differ."""
    if len(text) <= most:
        return text
    return "…" + text[len(text) - most + 1 :] if end else text[: most - 1] + "…"


def _sizes_table(parameters: tuple[int, int], macs: tuple[float, float]) -> Html:
    """Return parameters and multiply-adds before and after, as a table for notebooks."""
    from apoptosis.display import html
    from apoptosis.display.text import share

    rows = []
    for name, (before, after) in (("parameters", parameters), ("multiply-adds per example", macs)):
        numbers = _count(round(before)), _count(round(after))
        rows.append((name, *numbers, html.bar(after, before), share(after, before)))
    return html.table(("", "before", "after", "kept", ""), rows, numeric=(1, 2, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One window and what came of it.

    step: optimizer step at which it was decided. opened: at which the window was opened. outcome: "event": shapes
    changed; "nothing": nothing to remove, or not enough to pay; "rolled back": removed and put back; "skipped": nothing
    could be tried. considered: groups that were open. cause: of an outcome other than "event", for code ("tolerance",
    "rows", "gain", ...; `planner.Cause`). reason: the same as one line, "" for an event.
    """

    step: int
    opened: int
    outcome: Outcome
    considered: int = 0
    cause: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"step {self.step}: {_words(self)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return asdict(self)


def lines_of(attempts: Sequence[Attempt]) -> list[str]:
    """Return a line for every attempt without an event; of several in a row with one cause, the last one's reason."""
    found = []
    for (outcome, _), together in groupby(attempts, key=lambda a: (a.outcome, a.cause)):
        if outcome == "event":
            continue
        first, *others = together
        last = others[-1] if others else first
        steps = f"steps {first.step} to {last.step}, {1 + len(others)} attempts" if others else f"step {first.step}"
        found.append(f"{steps}: {_words(last)}")
    return found


def _words(attempt: Attempt) -> str:
    what = {"nothing": "nothing removed", "event": "shapes changed"}.get(attempt.outcome, attempt.outcome)
    return what + (f": {attempt.reason}" if attempt.reason else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Shapes changed in place.

    groups: name -> (channels before, after). parameters, macs: (before, after); macs are multiply-adds per example
    (a forward pass on the example input, over its rows along dimension 0). bytes_freed: parameters and optimizer state.
    measured: what the transaction measured on the probe ("output_rms": relative rms change of the outputs, "flips":
    share of changed predictions,
    "integers_changed": share of the integers and truth values that the network returns ...). outputs: what output_rms
    is of, "evaluation mode", or "training mode" where evaluation returns nothing that can be compared; "not compared"
    where that holds of both.
    seconds: wall time of the event, window hooks excluded.
    """

    step: int
    tolerance: float
    criterion: str
    groups: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    macs: tuple[float, float]
    bytes_freed: int
    certificates: tuple[Certificate, ...]
    measured: Mapping[str, float]
    measured_on: str
    seconds: float
    notes: tuple[str, ...] = ()
    outputs: str = "evaluation mode"

    def __bool__(self) -> bool:
        return any(before != after for before, after in self.groups.values())

    def __repr__(self) -> str:
        """Return one line; `vars` of a frozen record are its fields, and `as_dict` has them as plain values."""
        first = str(self).partition("\n")[0]
        return f"<Event at {first.partition('; parameters')[0]}>"

    def _repr_html_(self) -> str:
        from apoptosis.display import html

        widths = [(name, *pair) for name, pair in self.groups.items() if pair[0] != pair[1]]
        parts = [html.widths_table(widths)] if widths else []
        parts.append(_sizes_table(self.parameters, self.macs))
        parts.append(html.line(self._changes(), muted=True))
        if self.notes:
            parts.append(html.folded(f"{len(self.notes):,} notes", html.line("\n".join(self.notes))))
        freed = f"{self.bytes_freed / 1e6:,.3g} MB freed in {self.seconds:.2g} s"
        return html.card(f"Event at step {self.step:,}: {freed if self else 'nothing removed'}", *parts)

    def __str__(self) -> str:
        """Return at most two lines of 120 characters; `as_dict` and the log have all groups and notes."""
        if not self:
            return _nothing(self.step, self.notes)
        freed = f"{self.bytes_freed / 1e6:,.3g} MB freed in {self.seconds:.2g} s"
        rest = f"; parameters {_count(self.parameters[0])}->{_count(self.parameters[1])}; {freed}"
        start = f"step {self.step}: "
        return f"{start}{self._widths(_LINE - len(start) - len(rest))}{rest}\n  {self._changes()}"

    def _widths(self, most: int) -> str:
        """Say the widths of the groups that lost most, in at most so many characters."""
        changed = sorted(((name, *pair) for name, pair in self.groups.items()), key=lambda g: g[2] - g[1])
        changed = [group for group in changed if group[1] != group[2]]
        for count in range(len(changed) if len(changed) <= _SHOWN + 1 else _SHOWN, 0, -1):
            more = f" and {len(changed) - count} more" if len(changed) > count else ""
            numbers = [f" {before:,}->{after:,}" for _, before, after in changed[:count]]
            left = (most - len(more) - sum(len(number) + 2 for number in numbers) + 2) // count
            if left >= min(_NAME, max(len(name) for name, *_ in changed[:count])) or count == 1:
                break
        names = [_shortened(name, max(left, 2), end=True) for name, *_ in changed[:count]]
        return ", ".join(name + number for name, number in zip(names, numbers, strict=True)) + more

    def _changes(self) -> str:
        """Say how far sites and outputs moved, and on what that was measured."""
        empirical = [c for c in self.certificates if c.kind == "empirical"]
        said = []
        if empirical:
            error, rows = max(c.value for c in empirical), min(c.rows for c in empirical)
            said.append(f"site error <= {error:.3g} ({rows:,} rows)")
        found = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.measured.items()]
        if self.outputs == "not compared":
            found.insert(0, "outputs not compared")
        mode = " in training mode" if self.outputs == "training mode" else ""
        said.append(f"{', '.join(found) or 'nothing measured'} {self.measured_on}{mode}")
        return _shortened("; ".join(said), _LINE - 2)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        found = asdict(self)
        found["groups"] = {name: list(pair) for name, pair in self.groups.items()}
        found["certificates"] = [asdict(c) for c in self.certificates]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The sum over all events of a run.

    accuracy_cost: upper limit on what all removals together cost in accuracy (a share, at most 1: the limits of all
    events added up may say nothing), before training went on;
    None where nothing could be read off the outputs. classes: whether labels or logits= said that the outputs are
    classes; else accuracy_cost is the share of predictions (largest output) that changed, and no accuracy.
    confidence: of that limit; population: whether it holds for the population that the probe was drawn from, or for the
    training inputs alone that it was measured on.
    site_cost: per site, the sum over events of the relative rms error, each relative to the site's output at its own
    event; site_limit: what that sum may reach at most, None where widths were chosen by trials.
    goal: what was asked for with target=, and how much of it is reached; "" without.
    history: every attempt, those that removed nothing included. idle: why nothing was removed at all, and what to do;
    "" after an event.
    """

    events: int
    attempts: int
    rolled_back: int
    parameters: tuple[int, int]
    macs: tuple[float, float]
    accuracy_cost: float | None
    confidence: float
    population: bool
    probe_rows: int
    budget: float | None
    site_cost: Mapping[str, float]
    site_limit: float | None
    seconds: float
    hook_seconds: float
    notes: tuple[str, ...] = field(default=())
    classes: bool = True
    history: tuple[Attempt, ...] = ()
    idle: str = ""
    goal: str = ""

    def __str__(self) -> str:
        shrunk = self.parameters[0] / max(self.parameters[1], 1)
        lines = [
            f"{self.events} events of {self.attempts} attempts ({self.rolled_back} rolled back): "
            f"{self.parameters[0]:,} -> {self.parameters[1]:,} parameters ({shrunk:.1f}x fewer), "
            f"{self.macs[0] / max(self.macs[1], 1.0):.1f}x fewer multiply-adds"
        ]
        lines.extend([self.goal] if self.goal else [])
        lines.extend(lines_of(self.history))
        if self.idle:
            lines.append(f"nothing was removed: {self.idle}")
        if self.accuracy_cost is not None and self.events:
            lines.append(self._accuracy(self.accuracy_cost))
        if self.site_cost:
            site = max(self.site_cost, key=lambda name: self.site_cost[name])
            limit = f" (limit {self.site_limit:.3g})" if self.site_limit is not None else ""
            total = f"{self.site_cost[site]:.3g} at '{site.split(':')[0]}'"
            lines.append(f"relative error summed over events: {total}{limit}")
        lines.append(f"{self.seconds:.2f} s spent on apoptosis, {self.hook_seconds:.2f} s of it in hooks")
        lines.extend(self.notes)
        return "\n".join(lines)

    def __repr__(self) -> str:
        first = str(self).partition("\n")[0]
        return f"<Ledger: {first}>"

    def _repr_html_(self) -> str:
        from apoptosis.display import html

        parts = [_sizes_table(self.parameters, self.macs)]
        lines = str(self).split("\n")
        parts += [html.line(line) for line in lines[1:] if line not in self.notes]
        parts += [html.line(note, muted=True) for note in self.notes]
        if self.history:
            rows = [(f"{one.step:,}", one.outcome, one.reason or "-") for one in self.history]
            found = html.table(("step", "outcome", "reason"), rows, numeric=(0,))
            parts.append(html.folded(f"{len(self.history):,} attempts", found))
        return html.card(lines[0].partition(":")[0], *parts)

    def _accuracy(self, cost: float) -> str:
        """Say what all removals together cost in accuracy, or how many predictions they changed."""
        points, rows = f"{100 * cost:.3g} points", f"{self.probe_rows:,} held-out probe rows"
        largest = "" if self.classes else " (largest output)"
        if not self.population:
            what = "may have changed every one" if cost >= 1.0 else f"changed at most {points}"
            return (
                f"all removals together {what} of the predictions{largest} on training inputs, before training went "
                "on; there is no held-out data (probe=), so no bound for other inputs"
            )
        if cost >= 1.0:
            return f"{rows} are too few to bound what all removals together cost: give a larger probe="
        what = f"cost at most {points} of accuracy"
        if not self.classes:
            what = f"changed at most {points} of the predictions{largest}"
        return (
            f"all removals together {what}, with {100 * self.confidence:.0f} % confidence, before training went on "
            f"({rows})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return asdict(self)
