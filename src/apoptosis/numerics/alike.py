"""Whether one weight looks like an average or an old copy of another.

Holds: their direction. Elsewhere: where copies are looked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALIKE = 0.5  # cosine of a weight and its average, at least; of two layers that were trained apart it is about 0
_LOOKED_AT = 65_536  # numbers of a weight that are compared
_PLAIN = frozenset(("Tensor", "Parameter"))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two weights have about the same direction; False for tensors without numbers here (meta, fake, shards).

    Example:
        >>> weight = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
        >>> alike(weight, 0.9 * weight + 0.01), alike(weight, weight.flip(0))
        (True, False)
    """
    plain = all(type(x).__name__ in _PLAIN and not x.is_meta and x.layout == torch.strided for x in (a, b))
    if not plain or a.device != b.device:
        return False
    a, b = (x.detach().reshape(-1)[:_LOOKED_AT] for x in (a, b))
    if a.is_complex() or b.is_complex():
        a, b = a.to(torch.complex64), b.to(torch.complex64)
        return bool(torch.vdot(a, b).real > _ALIKE * a.norm() * b.norm())
    a, b = a.to(torch.float32), b.to(torch.float32)
    return bool(a @ b > _ALIKE * a.norm() * b.norm())
