"""How a product of two activations (queries times keys) is shown to a criterion.

Holds: the site view of a product, what its errors relate to. Elsewhere: the second moments' arithmetic
(numerics.bilinear), sites with a weight of their own (views.py).
"""

from __future__ import annotations

import numpy as np
import torch

from apoptosis.criteria import SiteView
from apoptosis.errors import ArgumentError
from apoptosis.numerics.bilinear import blocks_of, joint, pooled, product_error, same_sum, square_root
from apoptosis.numerics.moments import Moments
from apoptosis.observe import Observation
from apoptosis.observe.linear_map import sums_of
from apoptosis.records import ProductSite

_NOTE = "of the sums over paired channels (scores before the softmax), taking both operands as independent"


def show_product(site: ProductSite, seen: Observation, rows: int) -> SiteView:
    """Show a product as a linear map of its left operand.

    With L and R the second moments of the operands within one sum, an error e of the left one costs tr(E[e eᵀ] R), so
    a square root of R is the weight, and blocks are the channels of the same sums. Errors relate to tr(L Cov(r)), the
    variance of the sums that the right operand causes: a softmax over it ignores the rest, and it is never more than
    the variance of the sums. Where there is no weight to fold into, channels can only be dropped.

    Args:
        site: the product.
        seen: moments of both operands at every position.
        rows: of the group.

    Raises: ArgumentError: the right operand was not observed.
    """
    if seen.right is None:
        raise ArgumentError(f"site '{site.key}' was observed without its right operand.")
    sums = sums_of(site, rows)
    left, right = seen.moments.second_moment(), seen.right.second_moment()
    exact = seen.moments.exact and seen.right.exact
    num_rows = min(seen.moments.num_rows, seen.right.num_rows)
    inside = same_sum(sums).to(left.device)
    scale = float(torch.where(inside, left * seen.right.covariance().to(left), 0.0).sum().clamp_min(0.0))
    blocks = blocks_of(sums) if site.weight else None
    if blocks is None:
        matrix = joint(left, right, sums)
        return SiteView(
            key=site.key,
            weight=torch.ones(1, matrix.shape[0], 1, dtype=torch.float64, device=matrix.device),
            moments=Moments.of_second_moment(matrix, num_rows=num_rows, exact=exact),
            centred=False,
            scale=scale,
            mixes=False,
            note=_NOTE,
        )
    # Pooling over positions is exact where the right operand is the same at all of them (several heads of queries read
    # one of keys), each in a sum of its own.
    count = sums.shape[1]
    apart = all(len(np.unique(own)) == count for own in sums)
    plain = count == 1 or (apart and site.columns.shape[1] == 1)
    return SiteView(
        key=site.key,
        weight=square_root(pooled(right, sums), blocks)[:, :, None] * count**0.5,
        moments=Moments.of_second_moment(pooled(left, sums), num_rows=num_rows, exact=exact),
        centred=False,
        measure=None if plain else lambda keep, found: product_error(left, right, sums, keep, found.mix),
        scale=scale,
        blocks=torch.from_numpy(blocks),
        note=_NOTE,
    )
