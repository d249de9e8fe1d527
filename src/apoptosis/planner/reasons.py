"""Why a plan leaves a group as it is: a cause that code can ask for, and a line that a user can act on.

Holds: causes and their wording. Elsewhere: the decision (plan.py), why channels are pinned (graph).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from apoptosis.criteria import GroupView
from apoptosis.criteria.constraints import step_between
from apoptosis.records import Group, Site

Cause = Literal[
    "rows", "unseen", "waiting", "tolerance", "align", "shared", "limit", "another", "tied", "criterion", "goal"
]


class Why(NamedTuple):
    """Why a group is left as it is.

    cause: "rows": a width was found, but too few rows were observed to rely on it. "unseen": no row was observed.
    "waiting": its sites lack rows, and the event does not wait for them. "tolerance": no narrower width meets the
    tolerance. "align": none does in steps of align=. "shared": other groups that the same site reads used up its
    tolerance. "limit": the site's error budget over all events is used up. "another": the event changes a group of the
    same channels. "tied": it keeps the width of a group that is not changed. "criterion": the criterion does not apply.
    "goal": the run's goal is reached without it.
    text: one line, without the group's name.
    """

    cause: Cause
    text: str


NOT_CHOSEN = Why("goal", "changing other groups reaches target= with less loss")


def summary(left: Mapping[str, Why]) -> tuple[Cause | Literal[""], str]:
    """Sum up why all groups are left as they are: the cause of most, and one line with an example of every cause."""
    counts = Counter(why.cause for why in left.values())
    said = []
    for cause, count in counts.most_common():
        name, why = next((name, why) for name, why in left.items() if why.cause == cause)
        said.append(f"'{name}'{f' and {count - 1} more' if count > 1 else ''}: {why.text}")
    first: list[tuple[Cause, int]] = counts.most_common(1)
    return first[0][0] if first else "", "; ".join(said)


def module_of(key: str) -> str:
    """Return the module that a site's key names, as messages call it."""
    return key.split(":")[0]


def unseen(site: Site) -> Why:
    """Say that no input of a site was observed."""
    return Why("unseen", f"not observed yet: no pass of the window ran '{module_of(site.key)}', which reads it")


def waits(sites: Sequence[str]) -> Why:
    """Say that a group is left for a later event; sites: how much was observed of each of its sites, a phrase each."""
    seen = f": {sites[0]}" if sites else ""
    return Why("waiting", f"left for the next event: the other groups do not wait until it has enough rows{seen}")


def used_up(site: Site, left: float) -> Why:
    """Say that the error budget of a site is used up. left: what is left of it, relative rms."""
    what = f"the error budget that is left for all further events at '{module_of(site.key)}' ({max(0.0, left):.2g})"
    return Why("limit", f"{what} is below round-off; a larger tolerance= gives more")


def too_few_rows(group: Group, key: str, *, rows: int, needed: int, kept: int) -> Why:
    """Say that too few rows were observed for the width that was found. kept: channels of a row that would be kept."""
    return Why(
        "rows",
        f"{rows:,} rows were observed at '{module_of(key)}', and {needed:,} are needed to tell that {kept:,} of "
        f"{group.num_channels:,} channels suffice: use more or larger batches",
    )


def missed_tolerance(
    group: Group, view: GroupView, limits: Mapping[str, float], step: int, align: int, tolerance: float
) -> Why:
    """Say why no narrower width was found.

    Args:
        group: that is not changed.
        view: of the group, as the criterion saw it.
        limits: by site key, the errors that were allowed.
        step: between the widths that were tried.
        align: as the user gave it.
        tolerance: of the group in this event.
    """
    step, width = step_between(view, step), group.num_channels
    if align > 1:
        finer = f"an align= below {align} allows finer steps"
    else:
        rows = f"its {group.rows} rows keep one length"
        finer = rows if group.rows > 1 else "other groups have to keep the same share of their channels"
    if step >= width:
        return Why(
            "align",
            f"its {width:,} channels can only be removed {step:,} at a time, so no narrower width is possible: {finer}",
        )
    taken = next((key for key, limit in limits.items() if limit <= 0.0), None)
    if tolerance > 0 and taken is not None:
        return Why("shared", f"other groups that '{module_of(taken)}' reads used up its tolerance in this event")
    if tolerance == 0:
        return Why("tolerance", f"none of its {width:,} channels is redundant to round-off (tolerance 0)")
    if step == 1:
        return Why("tolerance", f"fewer than {width:,} channels would change what reads it by more than {tolerance:g}")
    return Why(
        "tolerance",
        f"no multiple of {step:,} below {width:,} channels keeps the change of what reads it within {tolerance:g}; "
        f"{finer}",
    )
