"""What a network has to gain before it is trained: how much of it may shrink.

Holds: shares of multiply-adds. Elsewhere: the analysis (graph), what other widths cost (planner.costs).
"""

from __future__ import annotations

from apoptosis.planner.costs import open_axes, weight_macs
from apoptosis.records import ProductSite, Structure


def shrinkable_macs(structure: Structure) -> float:
    """Return the multiply-adds, per pass of the example input, of all that loses work when groups lose channels.

    These are the contractions with a weight that has channels of an open group along an axis, whole, since either axis
    takes work away, and the products of two activations over channels of such groups.

    Example:
        >>> from torch import nn, zeros
        >>> from apoptosis.graph import analyse
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Softmax(1), nn.Linear(2, 5))
        >>> shrinkable_macs(analyse(net, (zeros(1, 4),), {}))
        36.0
    """
    macs = weight_macs(structure)
    weights = sum(macs.get(name, 0.0) for name in open_axes(structure))
    products = 0.0
    for group in structure.open_groups:
        if not group.name.partition("#")[0].endswith(":heads"):  # the same products once more
            own = group.product_macs or sum(s.macs for s in group.sites if isinstance(s, ProductSite))
            products += own * group.num_channels
    return min(weights + products, structure.macs)
