"""When to look, when to remove and how much at most: a pure function of telemetry.

Holds: the schedule, the tolerance of an event, the question whether an event pays. Elsewhere: clocks,
models, random numbers. Costs are multiply-adds (MACs); what an event costs beside its arithmetic enters as
`overhead_macs`, calibrated once per run, so that the same seed and calibration give the same widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TRAIN_MACS = 3.0  # a training step costs about three forward passes: forward, and two products in backward
OPTIMISTIC_YIELD = 0.5  # share of MACs the first event is taken to save
POOR_YIELD = 0.02  # an event that saved less than this share makes the policy skip an event step
LAST_SHARE = 0.7  # no event later than this share of the run: what is left must be learnt again
WARMUP_SHARE, WARMUP_MIN, WARMUP_MAX = 0.03, 150, 500
SHORT_WARMUP = 0.25  # of a run at most
TRIAL_STEPS, TRIAL_WARMUP = 400, 0.1  # a run of fewer steps is a trial, which has to show something
NUM_EVENT_STEPS = 8  # between warm-up and LAST_SHARE of the run, dense at first (docs/schedule.md)
ALLOT_POWER = 0.25  # of a group's share of the cost; a half is optimal for MACs alone, less also shrinks parameters
PATIENCE_STEPS = 16  # a window lasts so long at least before groups that see few rows are left for the next one
SOON_SHARE = 0.25  # of the steps that a window has lasted: so long it waits in any case
NUM_GOAL_STEPS = 3  # event steps towards a goal, between two shares of the run:
GOAL_WARMUP, GOAL_SHARE = 0.08, 0.2
EARLY_WARMUP, EARLY_GOAL_SHARE = 0.02, 0.08  # of a pretrained network
AT_GOAL = "the goal is reached, or what goes early from a pretrained network has gone"
FIRST_LOOK = 0.5  # of the steps to the first event: where it is noted over how many directions activations spread
FORMING = 1.5  # by so much they spread over more directions with every doubling of the steps while features form
SITE_LIMIT_FACTOR = 8.0  # what the errors of one site may add up to over all events, in tolerances


@dataclass(frozen=True, slots=True, kw_only=True)
class PastEvent:
    """What the policy remembers of an attempt."""

    step: int
    macs_before: float
    macs_after: float
    rolled_back: bool = False

    @property
    def saved_share(self) -> float:
        """Share of the forward pass's MACs that the event removed."""
        return 1.0 - self.macs_after / self.macs_before if self.macs_before > 0 and not self.rolled_back else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """All the policy sees.

    step: optimizer steps so far. total_steps: of the whole run, None if unknown. macs: of one forward pass per example.
    batch_rows: examples per step, 0 before any window has counted them. event_macs: what a window and its
    factorisations cost in MACs at today's widths. overhead_macs: calibrated fixed cost of an event. tolerance: cap per
    site and event, relative rms. num_backoffs: rollbacks so far. untried: share of the MACs that belong to groups which
    the last event left for the next one. towards_goal: None without a goal; else whether it is still to be reached.
    pretrained: the network was trained before. too_dear: why the last attempt was not worth its cost in the long run,
    "" if it was.
    """

    step: int
    total_steps: int | None
    macs: float
    batch_rows: float
    event_macs: float
    overhead_macs: float
    tolerance: float
    num_backoffs: int
    history: tuple[PastEvent, ...] = ()
    untried: float = 0.0
    towards_goal: bool | None = None
    pretrained: bool = False
    too_dear: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Open a window at `at_step` with `tolerance` per site, or never again (`at_step` None), and why."""

    at_step: int | None
    tolerance: float
    reason: str


def warmup_steps(total_steps: int | None) -> int:
    """Return the steps before the first event: 3 % of the run within 150..500, at most a quarter of it.

    Of a run of fewer than 400 steps, a trial, at most a tenth.
    """
    if total_steps is None:
        return WARMUP_MIN
    wanted = min(max(round(WARMUP_SHARE * total_steps), WARMUP_MIN), WARMUP_MAX)
    return max(1, min(wanted, int((TRIAL_WARMUP if total_steps < TRIAL_STEPS else SHORT_WARMUP) * total_steps)))


def event_steps(total_steps: int | None, *, after: int) -> tuple[int, ...]:
    """Return the steps later than `after` at which an event may happen.

    With a known length: NUM_EVENT_STEPS from warm-up to LAST_SHARE of the run, the distance from the first growing with
    the square of the number, because a channel removed early saves most. With an unknown one: each at twice the last.

    Example:
        >>> event_steps(1000, after=0)
        (150, 225, 300, 375, 450, 525, 600, 700)
    """
    first = warmup_steps(total_steps)
    if total_steps is None:
        step = first
        while step <= after:
            step *= 2
        return (step,)
    last = int(LAST_SHARE * total_steps)
    count = max(1, min(NUM_EVENT_STEPS, (last - first) // 10 + 1))
    steps = [first]
    for i in range(1, count):  # never closer than half the warm-up: what was cut must settle first
        steps.append(max(first + round((last - first) * (i / (count - 1)) ** 2), steps[-1] + (first + 1) // 2))
    return tuple(step for step in steps if after < step <= max(last, first))


def goal_steps(total_steps: int, *, after: int, pretrained: bool) -> tuple[int, ...]:
    """Return the steps later than `after` at which an event goes towards a goal.

    NUM_GOAL_STEPS of them up to GOAL_SHARE of the run, or EARLY_GOAL_SHARE of a pretrained network, which has its
    features already; then at the same distance up to LAST_SHARE, for what did not succeed before.

    Example:
        >>> goal_steps(1000, after=0, pretrained=True)[:4], goal_steps(1000, after=150, pretrained=False)[:2]
        ((20, 50, 80, 110), (200, 260))
    """
    begin, end = (EARLY_WARMUP, EARLY_GOAL_SHARE) if pretrained else (GOAL_WARMUP, GOAL_SHARE)
    first, last = max(1, min(round(begin * total_steps), WARMUP_MAX)), max(2, round(end * total_steps))
    distance = max(1, (last - first) // (NUM_GOAL_STEPS - 1))
    return tuple(s for s in range(first, max(last, int(LAST_SHARE * total_steps)) + 1, distance) if s > after)


def first_look(total_steps: int | None) -> int:
    """Return the step after which the first look is taken at how activations spread, 0 in a run too short for it.

    Example:
        >>> first_look(4000), first_look(100), first_look(None)
        (75, 0, 0)
    """
    if total_steps is None or total_steps < TRIAL_STEPS:
        return 0
    return max(1, int(FIRST_LOOK * warmup_steps(total_steps)))


def still_forming(growth: float) -> str:
    """Say why nothing is removed while activations spread over ever more directions, "" if they do not.

    What is redundant then need not be so later: channels that an autoencoder could do without after 4 % of its run were
    missing at the end of it.

    Args: growth: factor by which the participation ratio grew with every doubling of the steps, mean over the layers.
    """
    if growth <= FORMING:
        return ""
    return (
        f"features still form: activations spread over {growth:.2f} times as many directions with every doubling of "
        f"the steps, more than {FORMING:g} times; what is redundant now may be needed later"
    )


def part_of_way(total_steps: int, step: int, *, pretrained: bool) -> float:
    """Return how much of the rest of the way an event goes whose window opened at `step`: 1/3, 1/2, then all of it.

    Example:
        >>> [round(part_of_way(1000, step, pretrained=True), 2) for step in (20, 50, 80, 110)]
        [0.33, 0.5, 1.0, 1.0]
    """
    later = len(goal_steps(total_steps, after=step, pretrained=pretrained))
    first = len(goal_steps(total_steps, after=0, pretrained=pretrained))
    return 1.0 / max(1, NUM_GOAL_STEPS - (first - later) + 1)


def tolerance_at(cap: float, num_backoffs: int) -> float:
    """Tolerance per consumer site of an event: the cap, halved by every rollback.

    Example:
        >>> tolerance_at(0.025, 0), tolerance_at(0.025, 1)
        (0.025, 0.0125)
    """
    return cap * 0.5**num_backoffs


def allocate(tolerance: float, macs_by_group: Mapping[str, float]) -> dict[str, float]:
    """Spread a tolerance over groups: the most expensive gets all of it, others by the fourth root of their share.

    An error is spent where it saves most: at equal rms curves, minimising multiply-adds at a given sum of squared
    errors lets a group's error grow with the square root of what its channels cost. Half that power is taken, because
    layers that cost few multiply-adds may hold most of the parameters.

    Args:
        tolerance: relative rms, the cap of every site.
        macs_by_group: what all channels of a group cost, multiply-adds.

    Example:
        >>> allocate(0.02, {"conv": 1600.0, "fc": 100.0})
        {'conv': 0.02, 'fc': 0.01}
    """
    most = max(macs_by_group.values(), default=0.0)
    if most <= 0.0:
        return dict.fromkeys(macs_by_group, tolerance)
    return {name: tolerance * (macs / most) ** ALLOT_POWER for name, macs in macs_by_group.items()}


def site_limit(cap: float) -> float:
    """Return what the relative errors of one site may add up to over all events.

    By the triangle inequality the sum bounds the error that all events together made at the site.
    """
    return SITE_LIMIT_FACTOR * cap


def saves(telemetry: Telemetry, share: float, step: int) -> float:
    """MACs saved until the end of the run by removing `share` of the forward pass's MACs at `step`."""
    remaining = step if telemetry.total_steps is None else telemetry.total_steps - step
    return share * TRAIN_MACS * telemetry.macs * telemetry.batch_rows * max(0, remaining)


def expected_yield(telemetry: Telemetry) -> float:
    """Share of MACs the next event is taken to save: what the last attempt saved, optimistic of what was not tried."""
    done = [event for event in telemetry.history if not event.rolled_back]
    untried = OPTIMISTIC_YIELD * telemetry.untried
    return max(done[-1].saved_share, 0.5 * POOR_YIELD, untried) if done else OPTIMISTIC_YIELD


def cost_of(telemetry: Telemetry) -> float:
    """MACs that an event costs, its window included."""
    return telemetry.event_macs + telemetry.overhead_macs


def decide(telemetry: Telemetry) -> Decision:
    """Choose the next window: the next event step of the schedule at which an event is expected to pay, or none."""
    if telemetry.towards_goal is not None and telemetry.total_steps is not None:
        return _towards_goal(telemetry, telemetry.total_steps)
    if telemetry.too_dear:  # what is saved and what is lost later both fall with the steps that remain
        return Decision(at_step=None, tolerance=0.0, reason=f"the last attempt did not pay: {telemetry.too_dear}")
    upcoming = event_steps(telemetry.total_steps, after=telemetry.step)
    if not upcoming:
        reason = "the schedule has no event step left"
        if telemetry.total_steps is not None:
            reason += f": none comes later than {100 * LAST_SHARE:.0f} % of total_steps={telemetry.total_steps:,}"
        return Decision(at_step=None, tolerance=0.0, reason=reason)
    past = telemetry.history
    skip = 0
    for event in reversed(past):  # back off: one more step is skipped for every poor event in a row
        if event.saved_share >= POOR_YIELD or event.rolled_back:  # after a rollback the tolerance is another one
            break
        skip += 1
    if telemetry.total_steps is None:
        step = upcoming[0] << min(skip, 20)
    elif skip >= len(upcoming):
        reason = f"the last {skip} attempts saved less than {100 * POOR_YIELD:.0f} % of the multiply-adds each"
        return Decision(at_step=None, tolerance=0.0, reason=reason)
    else:
        step = upcoming[skip]
    tolerance = tolerance_at(telemetry.tolerance, telemetry.num_backoffs)
    if past and telemetry.batch_rows > 0:
        saved, cost = saves(telemetry, expected_yield(telemetry), step), cost_of(telemetry)
        if saved <= cost:
            return Decision(
                at_step=None,
                tolerance=0.0,
                reason=f"an event is expected to save {saved:.3g} multiply-adds in the steps that remain, "
                f"and to cost as much time as {cost:.3g}",
            )
    return Decision(at_step=step, tolerance=tolerance, reason="next event step of the schedule")


def _towards_goal(telemetry: Telemetry, total_steps: int) -> Decision:
    """Choose the next step towards a goal; every rollback halves the way that the next event goes."""
    if not telemetry.towards_goal:
        return Decision(at_step=None, tolerance=0.0, reason=AT_GOAL)
    upcoming = goal_steps(total_steps, after=telemetry.step, pretrained=telemetry.pretrained)
    if not upcoming:
        return Decision(at_step=None, tolerance=0.0, reason=f"no step is left in total_steps={total_steps:,}")
    tolerance = tolerance_at(telemetry.tolerance, telemetry.num_backoffs)
    return Decision(at_step=upcoming[0], tolerance=tolerance, reason="next step towards the goal")


def delay_of(telemetry: Telemetry, elapsed: int) -> int:
    """Return the steps by which a group comes later that an event leaves for the next window.

    Those until the next event step, and those that this window has lasted (elapsed), because the next one starts
    over; all that remain of the run where no other event is expected to pay.
    """
    upcoming = _next_event(telemetry)
    if upcoming is not None:
        return upcoming - telemetry.step + elapsed
    return telemetry.step if telemetry.total_steps is None else max(0, telemetry.total_steps - telemetry.step)


def is_due(telemetry: Telemetry, steps: float) -> bool:
    """Whether a group that was left out before is waited for now, `steps` long: no earlier event comes for it."""
    upcoming = _next_event(telemetry)
    return upcoming is None or upcoming - telemetry.step >= steps


def has_to_end(telemetry: Telemetry, elapsed: int) -> bool:
    """Whether a window ends that has lasted so many steps (elapsed): the next one towards the goal would open now."""
    if telemetry.towards_goal is None or telemetry.total_steps is None:
        return False
    opened = telemetry.step - elapsed
    upcoming = goal_steps(telemetry.total_steps, after=opened, pretrained=telemetry.pretrained)
    return bool(upcoming) and telemetry.step >= upcoming[0]


def _next_event(telemetry: Telemetry) -> int | None:
    """Return the next event step, None where there is none or no event is expected to pay then."""
    if telemetry.towards_goal is not None and telemetry.total_steps is not None:
        steps = goal_steps(telemetry.total_steps, after=telemetry.step, pretrained=telemetry.pretrained)
        return steps[0] if steps else None
    upcoming = event_steps(telemetry.total_steps, after=telemetry.step)
    if not upcoming or saves(telemetry, expected_yield(telemetry), upcoming[0]) <= cost_of(telemetry):
        return None
    return upcoming[0]


def worth_waiting(ready: float, waiting: Iterable[tuple[float, float]], delay: int) -> bool:
    """Whether a window should go on for groups that have not seen enough yet, while others have.

    Every step of waiting costs what the ready groups would save in it; a group that is left for the next window saves
    later than it would. Both in proportion to the multiply-adds that the groups hold.

    Args:
        ready: multiply-adds of the groups that have seen enough.
        waiting: of every other group the multiply-adds, and the steps that it still needs (may be infinite).
        delay: steps by which a group comes later that is left (`delay_of`).

    Example:
        >>> worth_waiting(99.0, [(1.0, 56.0)], 91), worth_waiting(50.0, [(50.0, 56.0)], 91)
        (False, True)
    """
    gained = 0.0
    for macs, steps in sorted(waiting, key=lambda group: group[1]):
        gained += macs  # of all that are ready within so many steps
        if ready <= 0.0 or gained * delay > ready * steps:
            return True
    return False


def loss_of(telemetry: Telemetry, macs_after: float) -> str:
    """Say why a plan does not pay in the steps that remain, "" if it does; the window is not counted any more."""
    share = 1.0 - macs_after / telemetry.macs if telemetry.macs > 0 else 0.0
    if share <= 0.0:
        return "what can be removed saves no multiply-adds"
    saved = saves(telemetry, share, telemetry.step)
    if telemetry.total_steps is None or saved > telemetry.overhead_macs:
        return ""
    remain = max(0, telemetry.total_steps - telemetry.step)
    return (
        f"removing {100 * share:.3g} % of the multiply-adds saves {saved:.3g} of them in the {remain:,} steps that "
        f"remain, and costs as much time as {telemetry.overhead_macs:.3g}"
    )
