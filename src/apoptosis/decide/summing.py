"""What all removals of a run come to: its ledger, and why a run had none.

Holds: these, from what a run remembers. Elsewhere: how a ledger prints (ledger.py), the memory itself (state.py).
"""

from __future__ import annotations

from apoptosis.decide.acceptance import ALPHA, AcceptanceTest
from apoptosis.decide.ledger import Ledger
from apoptosis.decide.state import STEPS_NOT_EPOCHS, RunState, Settings, has_goal

REMEDIES = {
    "tolerance": "A larger tolerance= allows more; a network without redundant channels stays as it is.",
    "align": "A smaller align= allows finer steps.",
    "limit": "A larger tolerance= allows more over the whole run.",
    "rows": "Larger batches, or a longer run, show more rows.",
    "waiting": "Larger batches, or a longer run, show more rows.",
    "unseen": "Call the model in training mode, with gradients, on the batches of training.",
    "gain": "A longer run, or a larger tolerance=, saves more; on a network this small events may never pay.",
    "forming": "With tolerance= or target= channels go all the same.",
    "exchange": "With tolerance= or target= channels go all the same.",
    "": "",
}


def idle(memory: RunState, settings: Settings, *, watching: bool, num_open: int) -> str:
    """Say why a run has had no event so far and what to do about it, "" if it had one.

    watching: a window is open. num_open: groups that may shrink.
    """
    step, total, due, attempts = memory.step, settings.total_steps, memory.decision.at_step, memory.attempts
    if memory.num_events:
        return ""
    if num_open == 0:
        return "no group can be pruned: pins() lists the reasons, and what would let a group shrink."
    if step == 0:
        return "step() has not been called: call it once after every optimizer.step()."
    if total is not None and step > total:
        return f"the run has made {step:,} steps of total_steps={total:,}. {STEPS_NOT_EPOCHS}"
    if watching:
        window = f"the window that opened at step {memory.window_start:,} still waits for rows at step {step:,}"
        return f"{window}. {REMEDIES['rows']}"
    if not attempts and memory.closed:
        return f"close() was called at step {step:,}, before the first attempt."
    if not attempts and due is not None:
        known = "" if total is not None else "; total_steps= lets short runs begin sooner"
        return f"the first window opens at step {due:,}, and the run has made {step:,}{known}."
    if not attempts:
        return f"{memory.decision.reason}."
    remedy = REMEDIES.get(attempts[-1].cause, "")
    if due is not None:
        return f"the next window opens at step {due:,}. {remedy}".strip()
    return f"no further window opens: {memory.decision.reason}. {remedy}".strip()


def make_ledger(
    memory: RunState,
    settings: Settings,
    acceptance: AcceptanceTest,
    *,
    parameters: int,
    macs: float,
    hook_seconds: float,
    has_classes: bool,
    watching: bool,
    num_open: int,
    goal: str = "",
) -> Ledger:
    """Make the ledger of a run.

    parameters, macs: as they are now, the latter per example. hook_seconds: the open window's included. has_classes:
    whether classes can be read off the outputs. watching, num_open: as in `idle`. goal: see `progress`.
    """
    budget, held_out = acceptance.error_budget, acceptance.held_out
    cost = budget.spent if held_out else acceptance.training_flips
    reused = "some probe rows were used by several attempts, or are counted so, which widens the limits"
    return Ledger(
        events=memory.num_events,
        attempts=sum(one.outcome != "skipped" for one in memory.attempts),
        rolled_back=memory.rolled_back,
        parameters=(memory.full[0], parameters),
        macs=(memory.full[1], macs),
        accuracy_cost=min(1.0, cost) if has_classes else None,  # a share, though limits add up to more
        confidence=1.0 - ALPHA if held_out else 1.0,
        population=held_out,
        probe_rows=budget.rows * budget.ranks,
        budget=budget.budget,
        classes=acceptance.named,
        site_cost=dict(memory.site_cost),
        site_limit=None if has_goal(memory, settings) else settings.site_limit,
        seconds=memory.own_seconds + hook_seconds,
        hook_seconds=hook_seconds,
        history=memory.attempts,
        idle=idle(memory, settings, watching=watching, num_open=num_open),
        notes=(reused,) if budget.reused else (),
        goal=goal,
    )
