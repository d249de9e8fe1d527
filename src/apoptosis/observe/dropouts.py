"""The input of a dropout module instead of its output, whose covariance holds the noise of the masks.

Holds: inputs and outputs of every dropout of a pass. Elsewhere: other hooks
(window.py), what a known rate means for moments (numerics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apoptosis.observe.hooks import is_wrapped

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Dropped:
    """Inputs and outputs of the dropout modules of the running pass, by module name."""

    def __init__(self) -> None:
        self._passed: dict[str, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._passed.clear()

    def hook(self, name: str, trains: Callable[[], bool]) -> Callable[..., None]:
        """Make a hook that records the module of that name while `trains()` is true."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and isinstance(output, Tensor) and not is_wrapped(x) and trains():
                self.note(name, module, x, output)

        return hook

    def note(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Record input and output of a dropout module, unless it works in place."""
        own = x.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()
        if own or not module.training:
            self._passed[name] = (x.detach(), output.detach())

    def before(self, x: Tensor) -> tuple[Tensor, float]:
        """Return the same view of the input of the dropout that x comes from, and 0.0; or x itself and 1.0."""
        rate, left = 1.0, list(self._passed.values())
        while left:
            storage = x.untyped_storage().data_ptr()
            hit = next((i for i, (_, out) in enumerate(left) if out.untyped_storage().data_ptr() == storage), None)
            if hit is None:
                break
            source, output = left.pop(hit)
            offset = x.storage_offset() - output.storage_offset()
            if not output.is_contiguous() or offset < 0:
                break
            base = source.contiguous()
            x, rate = base.as_strided(x.size(), x.stride(), base.storage_offset() + offset), 0.0
        return x, rate
