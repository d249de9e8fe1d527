"""What a user asks of a run: groups, pins, plan, ledger; and how the run is shown.

Holds: what is read and changes nothing. Elsewhere: the loop (the package itself), what a ledger sums up
(decide.summing), markup (display.html), drawing (display.plot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from apoptosis.checkpoint.widths import Widths, record_of
from apoptosis.criteria import Ranking
from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.ledger import Ledger
from apoptosis.decide.policy import Decision
from apoptosis.decide.state import RunState, Settings, allowed, progress
from apoptosis.decide.summing import make_ledger
from apoptosis.display.text import bar, columns, share, shortened
from apoptosis.engine.event_builder import num_parameters
from apoptosis.engine.sensitivity import towards
from apoptosis.engine.step import way_of
from apoptosis.observe import Observer
from apoptosis.planner import Plan, make_plan
from apoptosis.records import Group, Pin, Structure, Timings
from apoptosis.surgery.target import Target

if TYPE_CHECKING:
    from apoptosis.display.plot import Axes

_MOST = 30  # groups that print
_LONGEST = 40  # characters of a name


class RunView:
    """What can be asked of an Apoptosis, which makes what is named here."""

    _observer: Observer | None = None  # the open window
    _left = False  # whether a with block was left
    _target: Target
    _structure: Structure
    _memory: RunState
    _settings: Settings
    _acceptance: AcceptanceTest
    _has_classes: bool

    def groups(self) -> tuple[Group, ...]:
        """Coupled channel groups that may shrink, in forward order."""
        return self._structure.open_groups

    def pins(self) -> tuple[Pin, ...]:
        """Channels that are never removed, each with its reason."""
        return tuple(g.pin for g in self._structure.groups if g.pin is not None)

    def notes(self) -> tuple[str, ...]:
        """Say what else the capture met: modules that the example input does not run, parameters that nothing reads."""
        return self._structure.notes

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer at full width, by name."""
        return dict(self._memory.full_shapes)

    @property
    def widths(self) -> Widths:
        """The widths of now, as plain JSON: `set_widths_` gives them to another copy of the network."""
        groups = {g.name: g.num_channels for g in self.groups()}
        return record_of(self._target.model, groups, self._memory.full_shapes)

    @property
    def model(self) -> nn.Module:
        """The network that shrinks, without its wrappers."""
        return self._target.model

    @property
    def structure(self) -> Structure:
        """What the last capture found."""
        return self._structure

    @property
    def seconds(self) -> float:
        """Wall time spent in apoptosis so far: capture, hooks, planning, surgery, measuring."""
        return self._memory.own_seconds + self.hook_seconds

    @property
    def decision(self) -> Decision:
        """When the next window opens, or why none does."""
        return self._memory.decision

    @property
    def calibration(self) -> float:
        """Fixed cost of an event in MACs, which decisions rest on: same seed, data and calibration, same widths."""
        return self._memory.overhead

    @property
    def timings(self) -> Timings | None:
        """What a training step takes at given widths, measured at construction where the target is in seconds."""
        return self._memory.timings

    @property
    def hook_seconds(self) -> float:
        """The part of `seconds` spent on observing: hooks in the user's forward passes, and passes run again."""
        return self._memory.hook_seconds + (self._observer.hook_seconds if self._observer is not None else 0.0)

    @property
    def watching(self) -> bool:
        """Whether a window is open; a checkpoint of several ranks does not hold it, and they open another one."""
        return self._observer is not None

    def plan(self) -> Plan:
        """Say what an event would do now, from what the open window has seen so far: a dry run, changes nothing.

        Its multiply-adds are per example. Of several ranks it is the plan that the tolerance alone would make.
        """
        observations = {} if self._observer is None else self._observer.observations()
        request, examples = allowed(self._memory, self._settings, self.groups()), self._target.num_examples
        rankings: dict[str, Ranking] = {}
        way = way_of(self._memory, self._settings) if self._target.ranks.size == 1 else None  # trials are collective
        if way is not None:
            inputs = self._target.call if self._observer is None else self._observer.inputs or self._target.call
            way = replace(way, known=dict(way.known))
            request, _ = towards(way, self._target, self._structure, observations, request, rankings, inputs)
        plan = make_plan(self._target.model, self._structure, observations, request, rankings=rankings)
        return replace(plan, macs_before=plan.macs_before / examples, macs_after=plan.macs_after / examples)

    def ledger(self) -> Ledger:
        """Sum up what all removals so far cost at most, and with what confidence."""
        return make_ledger(
            self._memory,
            self._settings,
            self._acceptance,
            parameters=num_parameters(self._target.model),
            macs=self._structure.macs / self._target.num_examples,
            hook_seconds=self.hook_seconds,
            has_classes=self._has_classes,
            watching=self.watching,
            num_open=len(self.groups()),
            goal=progress(self._memory, self._settings, self._structure, self._target.num_examples),
        )

    # ------------------------------------------------------------------ how it is shown

    def status(self) -> str:
        """Say in one line where the run stands: steps, events, what is left, and what comes next.

        Example: "step 318 of 1,000: 2 events, 77.3 % of the parameters, 76.9 % of the multiply-adds; next window at
        step 420", ready for the postfix of a progress bar.
        """
        total = f" of {self._settings.total_steps:,}" if self._settings.total_steps is not None else ""
        macs = share(self._structure.macs / self._target.num_examples, self._memory.full[1])
        return f"step {self._memory.step:,}{total}: {self._brief()}, {macs} of the multiply-adds; {self._next()}"

    def _brief(self) -> str:
        """Return what has room beside a progress bar."""
        events = f"{self._memory.num_events} event{'s' * (self._memory.num_events != 1)}"
        return f"{events}, {share(num_parameters(self._target.model), self._memory.full[0])} of the parameters"

    def _next(self) -> str:
        memory = self._memory
        if memory.closed or self._left:
            return "closed" if memory.closed else "its with block was left"
        if self.watching:
            return f"a window is open since step {memory.window_start:,}"
        due = memory.decision.at_step
        return "no further window" if due is None else f"next window at step {due:,}"

    def _widths(self) -> list[tuple[str, int, int]]:
        """Return name, channels at full width and now, of all groups that may shrink, or have."""
        full, groups = self._memory.full_widths, self._structure.groups
        found = [(g.name, full.get(g.name, g.num_channels), g.num_channels, g.pin is None) for g in groups]
        shown = [(name, before, now) for name, before, now, is_open in found if is_open or now < before]
        last: dict[str, int] = {}
        for one in self._memory.removals:
            last |= one.widths
        there = {group.name for group in groups}
        return shown + [(name, full.get(name, 0), 0) for name, now in last.items() if not now and name not in there]

    def __repr__(self) -> str:
        if "_memory" not in vars(self):  # the constructor failed
            return f"<{type(self).__name__}, not set up>"
        return f"<{type(self).__name__} of {type(self._target.model).__name__}, {self.status()}>"

    def __str__(self) -> str:
        """Return the status, and a line for every group with a bar of what is left of it."""
        if "_memory" not in vars(self):
            return repr(self)
        widths, pins = self._widths(), self.pins()
        rows = [(shortened(n, _LONGEST), f"{now:,} of {full:,}", bar(now, full)) for n, full, now in widths[:_MOST]]
        lines = [f"{type(self).__name__} of {type(self._target.model).__name__}, {self.status()}"]
        lines += [f"  {line}" for line in columns(rows, frozenset({1}))]
        if len(widths) > _MOST:
            lines.append(f"  and {len(widths) - _MOST:,} more (apo.groups())")
        if pins:
            lines.append(f"  {len(pins):,} group{'s' * (len(pins) != 1)} cannot be pruned (apo.pins() says why)")
        if not widths:
            lines.append("  no group can be pruned")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from apoptosis.display import html

        if "_memory" not in vars(self):
            return html.card(repr(self))
        pins, ledger = self.pins(), self.ledger()
        parts = [html.line(self.status(), muted=True)]
        if widths := self._widths():
            parts.append(html.widths_table(widths))
        if ledger.idle:
            parts.append(html.line(f"Nothing was removed: {ledger.idle}"))
        if pins:
            rows = [(pin.group, f"{pin.num_channels:,}", pin.reason, pin.remedy) for pin in pins]
            found = html.table(("group", "channels", "why it cannot be pruned", "remedy"), rows, numeric=(1,))
            parts.append(html.folded(f"{len(pins):,} group{'s' * (len(pins) != 1)} cannot be pruned", found))
        return html.card(f"{type(self).__name__} of {type(self._target.model).__name__}", *parts)

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw the widths of groups, and what is left of parameters and multiply-adds, over the steps so far.

        Args:
            axes: two axes of matplotlib to draw into; None: a new figure of `matplotlib.pyplot`.

        Returns: the two axes; nothing is shown or saved (`axes[0].figure.savefig(...)`, `matplotlib.pyplot.show()`).

        Raises: ApoptosisError: matplotlib is not installed. ArgumentError: axes= are not two.
        """
        from apoptosis.display.plot import plot_run

        memory, now, macs = self._memory, self._widths(), self._structure.macs / self._target.num_examples
        return plot_run(
            {name: full for name, full, _ in now},
            [(one.step, one.widths, one.parameters, one.macs) for one in memory.removals],
            ({name: width for name, _, width in now}, num_parameters(self._target.model), macs),
            full=memory.full,
            step=memory.step,
            rolled_back=[one.step for one in memory.attempts if one.outcome == "rolled back"],
            axes=axes,
        )  # fmt: skip
