"""A base with types for modes that see every operator.

Holds: that. Elsewhere: what is done with the operators (graph, decide, tools).
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class has no types, as below
    """torch's mode, with types for those that derive from it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)  # type: ignore[no-untyped-call] # as above
