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

Cause = Literal["rows", "unseen", "waiting", "tolerance", "align", "shared", "limit", "another", "tied", "criterion"]


class Why(NamedTuple):
    """Why a group is left as it is.

    cause: "rows": a width was found that the rows seen cannot support. "unseen": no row was seen. "waiting": its sites
    have not seen their rows yet and the others do not wait. "tolerance": no narrower width meets the tolerance.
    "align": none does in steps of align=. "shared": other groups read by the same site took its tolerance. "limit":
    what all events together may change there is used up. "another": the event changes a group of the same channels.
    "tied": it has one width with a group that stays. "criterion": the criterion does not apply.
    text: one line, without the group's name.
    """

    cause: Cause
    text: str


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
    """Say that a site has seen nothing."""
    return Why("unseen", f"not observed yet: no pass of the window ran '{module_of(site.key)}', which reads it")


def waits(sites: Sequence[str]) -> Why:
    """Say that a group waits for a later event; sites: what its sites have seen, a phrase each."""
    seen = f": {sites[0]}" if sites else ""
    return Why("waiting", f"left for the next event, as waiting for its rows costs the other groups more{seen}")


def used_up(site: Site, left: float) -> Why:
    """Say that a site has no error left for any event. left: relative rms, of what all events together may make."""
    what = f"what all events together may still change at '{module_of(site.key)}' ({max(0.0, left):.2g})"
    return Why("limit", f"{what} is below round-off; a larger tolerance= allows more")


def too_few_rows(group: Group, key: str, *, rows: int, needed: int, kept: int) -> Why:
    """Say that the rows seen do not support the width found. kept: channels of a row that would stay."""
    return Why(
        "rows",
        f"'{module_of(key)}' has seen {rows:,} rows, and {needed:,} are needed to tell that {kept:,} of "
        f"{group.num_channels:,} channels suffice: more or larger batches",
    )


def missed_tolerance(
    group: Group, view: GroupView, limits: Mapping[str, float], step: int, align: int, tolerance: float
) -> Why:
    """Say why no narrower width was found.

    Args:
        group: that stays.
        view: what the criterion saw of it.
        limits: by site key, what was allowed.
        step: between the numbers kept that were tried.
        align: as the user gave it.
        tolerance: that the group gets in this event.
    """
    step, width = step_between(view, step), group.num_channels
    if align > 1:
        finer = f"an align= below {align} allows finer steps"
    else:
        finer = f"its {group.rows} rows stay alike" if group.rows > 1 else "so do others that have one width with it"
    if step >= width:
        return Why("align", f"its {width:,} channels go in steps of {step:,}, so no narrower width is left: {finer}")
    taken = next((key for key, limit in limits.items() if limit <= 0.0), None)
    if tolerance > 0 and taken is not None:
        return Why("shared", f"other groups that '{module_of(taken)}' reads took all of its tolerance in this event")
    if tolerance == 0:
        return Why("tolerance", f"none of its {width:,} channels is redundant to round-off (tolerance 0)")
    if step == 1:
        return Why("tolerance", f"fewer than {width:,} channels would change what reads it by more than {tolerance:g}")
    return Why(
        "tolerance",
        f"no multiple of {step:,} below {width:,} channels keeps the change of what reads it within {tolerance:g}; "
        f"{finer}",
    )
