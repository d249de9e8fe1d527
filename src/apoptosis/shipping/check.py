"""Outputs of a written file compared with the network's.

Holds: running the network for reference, the largest difference, and how large it may be. Elsewhere: writing files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apoptosis.errors import ArgumentError, OutOfMemoryError, one_line
from apoptosis.model.evaluate import Call, as_probe, outputs
from apoptosis.model.passes import internal_passes
from apoptosis.shipping.network import leaves, plain
from apoptosis.shipping.sizes import Calls

_ALLOWED = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest difference over the largest output. Float32: that of products in TF32, where the network is on such a GPU."""
_WHOLE = 0.01  # share of whole numbers (classes) that may differ: two may be all but equally likely
_TINY = 1e-12

Runs = Callable[[Call], Mapping[str, Tensor]]
"""A written file that was read again: its outputs by their paths."""


class DifferentError(Exception):
    """A written file computes something else than the network, in one line."""


class NotRunError(Exception):
    """A written file cannot be run here, in one line; it may run elsewhere."""


class FailedSizeError(Exception):
    """A written file fails on inputs of another size than the example's, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What the network returns on each call of `calls.checks`.

    random: it draws numbers, so that nothing compares. keeps: a second pass gives something else than the first.
    """

    calls: Calls
    wanted: Sequence[Mapping[str, Tensor]]
    random: bool = False
    keeps: bool = False


@dataclass(slots=True)
class Apart:
    """How far outputs lie apart: the largest difference, the same over the largest output, whole numbers changed."""

    largest: float = 0.0
    relative: float = 0.0
    allowed: float = field(default=0.0)
    whole: int = 0
    changed: int = 0


def runs_on(model: nn.Module) -> Callable[[Call], bool]:
    """Return a function that says whether the network runs on a call."""

    def runs(call: Call) -> bool:
        try:
            _run(model, call, 0)
        except OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - the user's forward may raise anything
            return False
        return True

    return runs


def refer(model: nn.Module, calls: Calls) -> Reference:
    """Run the network on all calls, twice on the example, with other random numbers.

    Raises: ArgumentError: it returns no tensor on the example.
    """
    wanted = [_run(model, call, 0) for call in calls.checks]
    if not wanted[0]:
        raise ArgumentError("the network returns no tensor on example_input, so that there is nothing to ship.")
    random = _differs(wanted[0], _run(model, calls.checks[0], 1))
    keeps = not random and _differs(wanted[0], _second(model, calls.checks[0]))
    return Reference(calls=calls, wanted=wanted, random=random, keeps=keeps)


def _second(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Return what a second pass gives, with all that the first has left behind."""
    with internal_passes(model, seed=0):
        for _ in range(2):
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (call[0], dict(call[1])))
            out = model(*args, **kwargs)
    return _outputs(out)


def _differs(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    try:
        apart = _compare(wanted, got)
    except (DifferentError, KeyError):
        return True
    return apart.relative > apart.allowed or apart.changed > 0


def first_run(model: nn.Module, call: Call) -> None:
    """Run the network on the example once.

    Raises: ArgumentError: it fails there, with what it raised.
    """
    try:
        _run(model, call, 0)
    except OutOfMemoryError:
        raise
    except Exception as error:
        raise ArgumentError(f"example_input: the network fails on it in evaluation mode: {one_line(error)}") from error


def _run(model: nn.Module, call: Call, seed: int) -> dict[str, Tensor]:
    (out,) = outputs(model, as_probe(call), seed=seed)
    return _outputs(out)


def _outputs(out: Any) -> dict[str, Tensor]:
    return {path: x.detach().cpu() for path, x in leaves(plain(out)).items()}


def compared(runs: Runs, reference: Reference, *, exact_paths: bool = True) -> Apart | None:
    """Compare what a file returns with what the network returned, on all calls.

    Args:
        runs: the file.
        reference: the network.
        exact_paths: False where the file's outputs have names of their own: then they count in their order.

    Returns: how far they lie apart; None where the network draws at random.

    Raises: DifferentError, FailedSizeError: it is no good for these calls. Whatever the file raises on the example.
    """
    found = Apart()
    for number, (call, wanted) in enumerate(zip(reference.calls.checks, reference.wanted, strict=True)):
        try:
            got: Mapping[str, Tensor] = runs(call)
        except Exception as error:
            if number < reference.calls.num_like_example:
                raise
            raise FailedSizeError(one_line(error)) from error
        if not exact_paths and len(got) == len(wanted):
            got = dict(zip(wanted, got.values(), strict=True))
        if set(got) != set(wanted):
            raise DifferentError(f"it returns {_names(got)}, the network {_names(wanted)}")
        if not reference.random:
            _merge(found, _compare(wanted, got))
    return None if reference.random else found


def _names(found: Mapping[str, Any]) -> str:
    return ", ".join(found) or "nothing"


def _compare(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Apart:
    found = Apart()
    for path, x in wanted.items():
        y = got[path].cpu()
        if x.shape != y.shape:
            raise DifferentError(f"output '{path}' has shape {tuple(y.shape)}, the network's {tuple(x.shape)}")
        if not (x.is_floating_point() or x.is_complex()):
            found.whole += x.numel()
            found.changed += int((x != y).sum())
            continue
        allowed = _ALLOWED.get(x.real.dtype if x.is_complex() else x.dtype, 0.1)
        a, b = (t.to(torch.complex128 if x.is_complex() else torch.float64) for t in (x, y))
        same = (a == b) | (a.isnan() & b.isnan())
        apart = (a - b).abs().masked_fill(same, 0.0)
        if not bool(apart.isfinite().all()):
            raise DifferentError(f"output '{path}' has other infinite or missing numbers than the network's")
        finite = a.abs().masked_fill(~a.isfinite(), 0.0)
        largest = float(apart.max()) if apart.numel() else 0.0
        relative = largest / max(float(finite.max()) if finite.numel() else 0.0, _TINY)
        _merge(found, Apart(largest=largest, relative=relative, allowed=allowed))
        if relative > allowed:
            found.largest, found.relative, found.allowed = largest, relative, allowed
    return found


def _merge(found: Apart, more: Apart) -> None:
    found.largest, found.relative = max(found.largest, more.largest), max(found.relative, more.relative)
    found.allowed = max(found.allowed, more.allowed)
    found.whole, found.changed = found.whole + more.whole, found.changed + more.changed


def check_apart(found: Apart | None) -> None:
    """Raise DifferentError where outputs lie too far apart for rounding."""
    if found is None:
        return
    if found.relative > found.allowed > 0.0:
        raise DifferentError(
            f"its outputs differ from the network's by {found.largest:.2g} ({found.relative:.1g} of the largest output)"
        )
    if found.changed > _WHOLE * found.whole:
        raise DifferentError(f"{found.changed:,} of {found.whole:,} whole numbers differ from the network's")
