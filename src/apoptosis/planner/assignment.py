"""Which rank plans which groups.

Holds: parts of a plan that know nothing of one another, and their distribution by cost. Elsewhere: the
planning (plan.py), the exchange (ranks).
"""

from __future__ import annotations

from collections.abc import Sequence

from apoptosis.records import Group

Choice = Sequence[Sequence[Group]]  # sets of groups of which one is taken


def owners(choices: Sequence[Choice], size: int) -> list[int]:
    """Return for every choice the rank that plans it: those that share a site go to one rank, the dearest first.

    Args: choices: sets of groups. size: number of ranks.
    """
    parent = list(range(len(choices)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    by_site: dict[str, int] = {}
    for i, sets in enumerate(choices):
        for key in sorted({site.key for groups in sets for group in groups for site in group.sites}):
            one, other = root(i), root(by_site.setdefault(key, i))
            parent[max(one, other)] = min(one, other)  # the same on every rank, whatever its hashes
    costs: dict[int, float] = {}
    for i, sets in enumerate(choices):
        cost = sum(float(group.num_channels) ** 3 * len(group.sites) for groups in sets for group in groups)
        costs[root(i)] = costs.get(root(i), 0.0) + cost
    load = [0.0] * size
    rank_of: dict[int, int] = {}
    for part in sorted(costs, key=lambda p: (-costs[p], p)):
        rank_of[part] = load.index(min(load))
        load[rank_of[part]] += costs[part]
    return [rank_of[root(i)] for i in range(len(choices))]
