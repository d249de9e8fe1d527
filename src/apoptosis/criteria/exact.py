"""Tolerance 0 in double precision: whether a removal changes a site by round-off only.

Holds: the root that least squares works on, the decision per output. Elsewhere: how roots are taken
(numerics.moments), what else a removal must meet (certificate.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from apoptosis.criteria.views import SiteView
from apoptosis.numerics.decompose import complement
from apoptosis.numerics.linalg import EPS
from apoptosis.records import SiteReduction

ROUNDINGS = 32.0  # of an output: reproducing a channel takes a few products and the fold
EXACT_SHARE = 1e-11  # of the variation of an output: round-off of the layers before


def gram_root(site: SiteView) -> Tensor | None:
    """Return F with FᵀF = views.gram to round-off of the rms, or None where only the Gram matrix is known.

    Example:
        >>> from apoptosis.numerics.moments import Moments
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 1.0], [3.0, 1.0]]).double(), exact=True)
        >>> root = gram_root(SiteView(key="s", weight=torch.ones(1, 2, 1), moments=moments, centred=False))
        >>> bool(torch.allclose(root.T @ root, moments.second_moment()))
        True
    """
    root = None if site.moments is None else site.moments.root()
    if root is None or site.moments is None:
        return None
    root = root if site.centred else torch.cat([root, site.moments.mean[None]])
    return root if site.mixes else root.norm(dim=0).diag()


def below_roundoff(site: SiteView, keep: Tensor, reduction: SiteReduction) -> bool:
    """Whether no output of the site changes by more than round-off; true where that is not known.

    Output o adds up products w_oc z_c, each known to eps: what it comes to is known to eps sqrt(Σ_c w_oc² E[z_c²]), the
    mean of z included. ROUNDINGS of that, or EXACT_SHARE of the output's variation, count as no change. A BatchNorm
    amplifies a small signal on a large mean, so errors are compared output by output, and as rms, which moments alone
    do not resolve.
    """
    root = None if site.moments is None else site.moments.root()
    if root is None or site.moments is None:
        return True
    mean, mix = site.moments.mean, reduction.mix.to(root)
    keep = keep.to(root.device)
    bias = mean - mean[keep] @ mix
    if reduction.offset is not None:
        bias = bias - reduction.offset.to(root)
    gone = complement(keep, len(mean)) if reduction.offset is None or not bool(reduction.offset[keep].any()) else None
    left = torch.cat([root - root[:, keep] @ mix, bias[None]])
    weight = site.weight.detach().to(root)
    size = root.square().sum(0) + mean.square()
    level = (weight.square() * size[:, None]).sum((1, 2))
    varying = torch.einsum("nc,ocp->onp", root, weight).square().sum((1, 2))
    if gone is not None:
        left, weight = left[:, gone], weight[:, gone]
    error = torch.einsum("nc,ocp->onp", left, weight).square().sum((1, 2))
    return bool((error <= torch.maximum((ROUNDINGS * EPS) ** 2 * level, EXACT_SHARE**2 * varying)).all())
