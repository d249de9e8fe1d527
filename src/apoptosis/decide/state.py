"""What a run of apoptosis remembers between steps, how it is written down and read again, and what follows from it.

Holds: the RunState as plain values, what the policy sees of it (telemetry), what an event may do. Elsewhere: files
(checkpoint), windows (observe), the structure of the model (graph), the ledger (summing.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from apoptosis.criteria import Criterion
from apoptosis.decide.acceptance import AcceptanceTest
from apoptosis.decide.goal import NEAR, FullSize, Goal, least_widths, share_of
from apoptosis.decide.ledger import Attempt, Event, Outcome
from apoptosis.decide.policy import NUM_GOAL_STEPS, Decision, PastEvent, Telemetry, allocate, goal_steps
from apoptosis.errors import ApoptosisError, CheckpointError
from apoptosis.graph.explain import Code
from apoptosis.graph.groups.frozen import is_of_frozen
from apoptosis.observe import ROWS_PER_CHANNEL
from apoptosis.planner import Costs, Request, Why
from apoptosis.records import Group, Pin, Structure, Timings
from apoptosis.surgery.target import with_pins

FEWEST_STEPS = 6  # a run of fewer is too short for a window
STEPS_NOT_EPOCHS = (
    "total_steps= counts optimizer steps, not epochs: give epochs * len(loader), or leave it out where it is not known."
)
VERSION = 3
_STORED = {"num_backoffs": "halvings", "require_full_sample": "thorough"}  # names that checkpoints have for fields
# What a bad state raises.
CORRUPT_STATE_ERRORS = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,
    ApoptosisError,
)
PRETRAINED_SHIFT = 0.125**2  # squared relative rms of the outputs that goes early from a pretrained network, all in all
PRETRAINED_RMS = 0.5  # relative rms of the outputs beyond which such an event is rolled back, whatever trials predict
RETRIES = 2  # of a step whose outputs moved too far, each half as large as the one before
PRETRAINED_GOAL = Goal(measure="macs", share=0.2)  # beyond which nothing goes then
MAX_DROP = 0.9  # an event leaves at least a tenth of every group
_LATER = (
    "attempts",
    "behind",
    "timings",
    "pretrained",
    "shift",
    "full_widths",
    "shifts",
    "spreads",
    "removals",
)  # fields that older checkpoints lack
_LIMITS = {"min_width": 0.0, "max_removed": MAX_DROP}
UNDECIDED = Decision(at_step=None, tolerance=0.0, reason="not decided yet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for.

    site_limit: what the errors of one site may add up to over all events. automatic: neither a
    tolerance nor a goal was given. calibrated: calibration= was given. goal:
    the size to reach, None for what the tolerance allows. min_width: channels of every group at least, a number or a
    share. max_removed: largest share of a group's channels that one event removes.
    """

    def as_dict(self) -> dict[str, Any]:
        """Plain values: a run that is resumed under other settings decides again."""
        return (
            {
                "criterion": self.criterion.name,
                "tolerance": self.tolerance,
                "total_steps": self.total_steps,
                "align": self.align,
            }
            | ({"goal": str(self.goal)} if self.goal is not None else {})
            | self._limits()
        )

    def _limits(self) -> dict[str, Any]:
        own = {"min_width": self.min_width, "max_removed": self.max_removed}
        return {name: value for name, value in own.items() if value != _LIMITS[name]}

    criterion: Criterion
    tolerance: float
    total_steps: int | None
    align: int
    seed: int
    site_limit: float = 0.0
    automatic: bool = False
    calibrated: bool = False
    goal: Goal | None = None
    min_width: float = 0.0
    max_removed: float = MAX_DROP


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What an event left: parameters, MACs per example, and the channels of the groups that it changed."""

    step: int
    parameters: int
    macs: float
    widths: Mapping[str, int]

    @classmethod
    def of(cls, event: Event) -> Removal:
        """Return what an event left."""
        widths = {name: after for name, (_, after) in event.groups.items()}
        return cls(step=event.step, parameters=event.parameters[1], macs=event.macs[1], widths=widths)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Removal:
        """Read what `asdict` gave. Raises: KeyError, TypeError, ValueError, AttributeError: it is damaged."""
        widths = {str(name): _number(width, "int") for name, width in stored["widths"].items()}
        step, parameters = (_number(stored[name], "int") for name in ("step", "parameters"))
        return cls(step=step, parameters=parameters, macs=_number(stored["macs"], "float"), widths=widths)


@dataclass(slots=True, kw_only=True)
class RunState:
    """Everything of a run that is neither the model's structure, nor the window, nor the error budget.

    full: parameters and MACs per example at construction; full_shapes: of every tensor then. overhead: calibrated fixed
    cost of an event in MACs. batch_rows: examples per step in the last window. site_cost: errors summed per site.
    own_seconds, hook_seconds: wall time spent so far, the open window's hooks excluded. require_full_sample: rows were
    too few for a width once, so that windows see all they ask for. history: what the policy counts; attempts:
    everything that was tried. behind: groups that the last event left out because they had seen too few rows.
    timings: what a training step takes, where the goal is in seconds. pretrained: the network was trained before.
    shift: of the outputs by all removals, as predicted.
    full_widths: channels of every group at construction.
    shifts: by the groups of a unit, (error, shift of the outputs) of its trials; by a branch, (share of width, shift).
    spreads: by step, what the last two looks found by module (observe.Look), numbers or tensors of one number.
    removals: what every event left, for plots; nothing decides by it.
    """

    full: tuple[int, float]
    full_shapes: dict[str, tuple[int, ...]]
    overhead: float
    step: int = 0
    num_backoffs: int = 0
    rolled_back: int = 0
    num_events: int = 0
    batch_rows: float = 0.0
    window_start: int = 0
    own_seconds: float = 0.0
    hook_seconds: float = 0.0
    closed: bool = False
    require_full_sample: bool = False
    history: tuple[PastEvent, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    behind: tuple[str, ...] = ()
    site_cost: dict[str, float] = field(default_factory=dict)
    timings: Timings | None = None
    pretrained: bool = False
    shift: float = 0.0
    full_widths: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    spreads: dict[int, dict[str, Any]] = field(default_factory=dict)
    removals: tuple[Removal, ...] = ()
    decision: Decision = UNDECIDED

    @property
    def full_size(self) -> FullSize:
        """What the network took at full width."""
        return FullSize(parameters=self.full[0], macs=self.full[1], timings=self.timings)

    def attempt(self, considered: int, outcome: Outcome, cause: str = "", reason: str = "") -> Attempt:
        """Return the record of an attempt that ends at this step; see `Attempt`."""
        return Attempt(
            step=self.step,
            opened=self.window_start,
            outcome=outcome,
            considered=considered,
            cause=cause,
            reason=reason,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        found = {_STORED.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        found |= {
            "full": list(self.full),
            "full_shapes": {name: list(shape) for name, shape in self.full_shapes.items()},
            "history": [asdict(past) for past in self.history],
            "attempts": [one.as_dict() for one in self.attempts],
            "behind": list(self.behind),
            "site_cost": dict(self.site_cost),
            "timings": None if self.timings is None else self.timings.as_dict(),
            "full_widths": dict(self.full_widths),
            "shifts": {name: [list(pair) for pair in pairs] for name, pairs in self.shifts.items()},
            "spreads": [[step, {k: float(v) for k, v in found.items()}] for step, found in self.spreads.items()],
            "removals": [asdict(one) for one in self.removals],
            "decision": asdict(self.decision),
        }
        return found


def read_run_state(state: Mapping[str, Any]) -> RunState:
    """Read what `RunState.as_dict` wrote.

    Raises: KeyError, TypeError, ValueError, AttributeError, IndexError: it is damaged; the caller words it.
    """
    names = (f.name for f in fields(RunState) if f.name not in _LATER)
    plain = {name: state[_STORED.get(name, name)] for name in names}
    parameters, macs = state["full"]
    plain |= {
        "full": (_number(parameters, "int"), _number(macs, "float")),
        "full_shapes": {str(k): tuple(_number(n, "int") for n in shape) for k, shape in state["full_shapes"].items()},
        "history": tuple(_record(PastEvent, past) for past in state["history"]),
        "attempts": tuple(_record(Attempt, one.as_dict()) for one in read_attempts(state)),
        "behind": tuple(str(name) for name in state.get("behind", ())),
        "timings": None if state.get("timings") is None else Timings.from_dict(state["timings"]),
        "pretrained": state.get("pretrained", False),  # earlier versions have none of these seven
        "shift": state.get("shift", 0.0),
        "full_widths": {str(name): _number(width, "int") for name, width in state.get("full_widths", {}).items()},
        "shifts": {
            str(name): [(_number(error, "float"), _number(shift, "float")) for error, shift in pairs]
            for name, pairs in state.get("shifts", {}).items()
        },
        "spreads": {
            _number(step, "int"): {str(name): _number(value, "float") for name, value in found.items()}
            for step, found in state.get("spreads", ())
        },
        "removals": tuple(Removal.read(one) for one in state.get("removals", ())),
        "site_cost": {str(key): _number(value, "float") for key, value in state["site_cost"].items()},
        "decision": _record(Decision, state["decision"]),
    }
    return _record(RunState, plain)


def read_attempts(state: Mapping[str, Any]) -> tuple[Attempt, ...]:
    """Read the attempts of a run's memory; a checkpoint of an earlier version holds but what the policy remembers.

    Raises: KeyError, TypeError, ValueError: they are damaged.
    """
    if "attempts" in state:
        return tuple(Attempt(**entry) for entry in state["attempts"])
    found = []
    for past in state["history"]:
        saved = past["macs_after"] < past["macs_before"]
        outcome: Outcome = "rolled back" if past["rolled_back"] else "event" if saved else "nothing"
        reason = "" if outcome == "event" else "the checkpoint that the run was resumed from does not say why"
        found.append(Attempt(step=past["step"], opened=past["step"], outcome=outcome, reason=reason))
    return tuple(found)


_R = TypeVar("_R", RunState, PastEvent, Decision, Attempt, Pin)


def _record(cls: type[_R], values: Mapping[str, Any]) -> _R:
    """Build a record whose plain fields are what their annotations say.

    Raises: TypeError, ValueError: they are not, or a number is negative or not finite; none of them may be.
    """
    kinds = {f.name: str(f.type) for f in fields(cls)}
    return cls(**{name: _plain(value, kinds.get(name, ""), name) for name, value in values.items()})


def _plain(value: Any, kind: str, name: str) -> Any:
    if value is None and kind.endswith(" | None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind in ("int", "float"):
        return _number(value, kind)
    if kind in ("bool", "str") and type(value).__name__ != kind:
        raise ValueError(f"{name} = {str(value)[:60]!r} is no {kind}")
    return value


def _number(value: Any, kind: str) -> Any:
    """Return a count ("int") or an amount ("float"), which are finite and at least 0."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not plain or (kind == "int" and (value != int(value) or value >= 2**62)):
        raise ValueError(f"{str(value)[:60]!r} is no {'count' if kind == 'int' else 'amount'}")
    return int(value) if kind == "int" else float(value)


def check_fits(state: object, widths: Mapping[str, int]) -> Mapping[str, Any]:
    """Return a state of this version and of a network of these widths (group name -> channels).

    Raises: CheckpointError: it is neither.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, Mapping) else None
        raise CheckpointError(f"apoptosis state has version {found!r}, this library reads {VERSION}.")
    stored = state.get("widths")
    if not isinstance(stored, Mapping) or dict(widths) != dict(stored):
        odd = _differing(widths, stored)[:4] if isinstance(stored, Mapping) else []
        if isinstance(stored, Mapping) and stored.keys() == widths.keys():
            name = next(name for name in widths if widths[name] != stored[name])
            raise CheckpointError(
                f"apoptosis state is of other widths: '{name}' had {str(stored[name])[:40]} channels and has "
                f"{widths[name]} now. Load the checkpoint that it belongs to into a freshly built model with "
                "apoptosis.load, which sets the widths."
            )
        raise CheckpointError(f"apoptosis state is of another network or other widths, for instance {odd}.")
    return state


def _differing(widths: Mapping[str, int], stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    mine, theirs = ({(name, str(width)[:40]) for name, width in found.items()} for found in (widths, stored))
    return sorted(mine ^ theirs)


def write_state(
    memory: RunState,
    settings: Settings,
    structure: Structure,
    acceptance: AcceptanceTest,
    window: Mapping[str, Any] | None,
    buckets: Sequence[Mapping[str, Any] | None] = (),
) -> dict[str, Any]:
    """Write a run down as plain values and tensors. buckets: what `layouts_of` returns for the wrappers."""
    return {
        "version": VERSION,
        "widths": {g.name: g.num_channels for g in structure.groups},
        "pins": [asdict(g.pin) for g in structure.groups if g.pin is not None],
        "settings": settings.as_dict(),
        "memory": memory.as_dict(),
        "verdict": acceptance.state_dict(),
        "window": window,
        **({"refused": dict(structure.refused)} if has_goal(memory, settings) else {}),
        **({"buckets": list(buckets)} if buckets else {}),
    }


def read_state(
    state: Mapping[str, Any], settings: Settings, structure: Structure, own: Sequence[Pin]
) -> tuple[Structure, RunState, Mapping[str, Any] | None]:
    """Read what `write_state` wrote: the structure with its pins, the memory, and the window.

    Under other settings than those of the state the decision is open again and the window is left out.

    Args:
        state: what was written.
        settings: of this run.
        structure: as just captured.
        own: the pins of this run, exclusions among them.

    Raises: one of CORRUPT_STATE_ERRORS.
    """
    names = {group.name for group in structure.groups}
    found = [_record(Pin, _with_code(entry)) for entry in state["pins"]]
    for pins in (own, found):  # those of this run first: files from before pins had codes hold none
        structure = with_pins(structure, {p.group: p for p in pins if p.group in names and not is_of_frozen(p)})
    memory, window = read_run_state(state["memory"]), state["window"]
    overruled = not settings.automatic and any(one.cause == "exchange" for one in memory.attempts[-1:])
    if state["settings"] != settings.as_dict() or overruled:
        memory.decision, window = UNDECIDED, None
    return structure, memory, window


def _with_code(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stored pin with the code of a frozen parameter, where it is of a file from before pins had codes."""
    old = "code" not in entry and "requires no gradient" in entry["reason"]
    return {**entry, "code": Code.FROZEN.code} if old else entry


def telemetry(memory: RunState, settings: Settings, structure: Structure, *, rows: int) -> Telemetry:
    """Gather what the policy sees. rows: examples in the example input, which `structure.macs` is for."""
    event = sum(len(g.sites) * (ROWS_PER_CHANNEL + 1.0) * g.num_channels**3 for g in structure.open_groups)
    held = [g.num_channels * g.macs_per_channel for g in structure.groups if g.name in memory.behind]
    return Telemetry(
        step=memory.step,
        total_steps=settings.total_steps,
        macs=structure.macs / rows,
        batch_rows=memory.batch_rows,
        event_macs=event,
        overhead_macs=memory.overhead,
        tolerance=settings.tolerance,
        num_backoffs=memory.num_backoffs,
        history=memory.history,
        untried=min(1.0, sum(held) / structure.macs) if structure.macs > 0 else 0.0,
        towards_goal=_towards_goal(memory, settings, structure, rows),
        pretrained=memory.pretrained,
        too_dear=_too_dear(memory, settings),
    )


def _too_dear(memory: RunState, settings: Settings) -> str:
    """Return why the last attempt was put back for its cost in the long run, "" if it was not, or if that is open."""
    last = next(iter(memory.attempts[-1:]), None)
    asks = settings.automatic and not has_goal(memory, settings) and memory.decision != UNDECIDED
    return last.reason if asks and last is not None and last.cause == "exchange" else ""


def progress(memory: RunState, settings: Settings, structure: Structure, rows: int) -> str:
    """Say how far a run has come towards its goal, "" if it has none. rows: examples in the example input."""
    goal = settings.goal
    return "" if goal is None else goal.progress(_share(goal, memory, structure, rows))


def _share(goal: Goal, memory: RunState, structure: Structure, rows: int) -> float:
    return share_of(goal, Costs(structure, memory.timings).of({}), memory.full_size, rows)


def has_goal(memory: RunState, settings: Settings) -> bool:
    """Whether widths are chosen by what they shift the outputs: towards a goal, or early in a pretrained network."""
    early = memory.pretrained and settings.automatic and settings.total_steps is not None
    return settings.goal is not None or early


def _towards_goal(memory: RunState, settings: Settings, structure: Structure, rows: int) -> bool | None:
    if not has_goal(memory, settings):
        return None
    if settings.goal is None:
        first = goal_steps(settings.total_steps or 1, after=0, pretrained=True)[:NUM_GOAL_STEPS]
        return memory.step < first[-1] and memory.shift < (1.0 - NEAR) * PRETRAINED_SHIFT
    return not settings.goal.reached(_share(settings.goal, memory, structure, rows))


def allowed(
    memory: RunState, settings: Settings, groups: Sequence[Group], waiting: Mapping[str, Why] | None = None
) -> Request:
    """Say what an event may do now: the decided tolerance, spread over groups, within what is left of every site.

    waiting: groups that it leaves for a later one.
    """
    tolerance = memory.decision.tolerance
    return Request(
        criterion=settings.criterion,
        tolerance=tolerance,
        allotted=allocate(tolerance, {g.name: g.num_channels * g.macs_per_channel for g in groups}),
        remaining_error={
            s.key: settings.site_limit - memory.site_cost.get(s.key, 0.0) for g in groups for s in g.sites
        },
        align=settings.align,
        max_drop=settings.max_removed,
        seed=settings.seed + memory.step,
        waiting=waiting or {},
        least=least_widths(settings.min_width, groups, memory.full_widths),
        empty=has_goal(memory, settings) and settings.max_removed >= MAX_DROP,
    )
