"""What a run of apoptosis remembers, as plain values and tensors, and how it is taken up again.

Lives here: the fields of `Apoptosis.state_dict()` and the checks before they are loaded. Does not live here: files
(surgery.checkpoint).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apoptosis.errors import ApoptosisError, CheckpointError
from apoptosis.graph import analyse
from apoptosis.observe import Observer
from apoptosis.operate import with_pins
from apoptosis.policy import Decision, PastEvent
from apoptosis.records import Pin

if TYPE_CHECKING:
    from apoptosis.engine import Apoptosis

VERSION = 1
_PLAIN = (
    "_step",
    "_halvings",
    "_rolled_back",
    "_num_events",
    "_batch_rows",
    "_overhead",
    "_window_start",
    "_own_seconds",
    "_hook_seconds",
    "_closed",
)


def dump_state(apo: Apoptosis) -> dict[str, Any]:
    """All that decides what `apo` does next."""
    observer: Observer | None = apo._observer
    return {
        "version": VERSION,
        "widths": {g.name: g.num_channels for g in apo._structure.groups},
        "full": list(apo._full),
        "full_shapes": {name: list(shape) for name, shape in apo.full_shapes.items()},
        "pins": [asdict(g.pin) for g in apo._structure.groups if g.pin is not None],
        "plain": {name.lstrip("_"): getattr(apo, name) for name in _PLAIN},
        "history": [asdict(past) for past in apo._history],
        "site_cost": dict(apo._site_cost),
        "verdict": apo._verdict.state_dict(),
        "decision": asdict(apo._decision),
        "window": None if observer is None else observer.state_dict(),
    }


def restore_state(apo: Apoptosis, state: Mapping[str, Any]) -> None:
    """Take over what `dump_state` wrote, or raise CheckpointError and change nothing."""
    window: Observer | None = apo._observer
    if window is not None:  # the capture below is no pass of the user's
        window.close()
    try:
        _restore(apo, state)
    except BaseException:
        if window is not None:
            window.open()
        raise


def _restore(apo: Apoptosis, state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, Mapping) else None
        raise CheckpointError(f"apoptosis state has version {found!r}, this library reads {VERSION}.")
    structure = analyse(apo._patient.model, *apo._patient.call)
    have = {g.name: g.num_channels for g in structure.groups}
    widths = state.get("widths")
    if not isinstance(widths, Mapping) or have != dict(widths):
        odd = sorted(set(have.items()) ^ set(widths.items()))[:4] if isinstance(widths, Mapping) else []
        raise CheckpointError(f"apoptosis state is of another network or other widths, for instance {odd}.")
    try:
        pins = {entry["group"]: Pin(**entry) for entry in state["pins"]}
        kept = {g.name: g.pin for g in apo._structure.groups if g.pin is not None}  # exclude= of this run
        structure = with_pins(with_pins(structure, pins), {n: p for n, p in kept.items() if n in have})
        history = tuple(PastEvent(**past) for past in state["history"])
        decision = Decision(**state["decision"])
        plain = {name: type(getattr(apo, name))(state["plain"][name.lstrip("_")]) for name in _PLAIN}
        full = (int(state["full"][0]), float(state["full"][1]))
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in state["full_shapes"].items()}
        site_cost = {str(k): float(v) for k, v in state["site_cost"].items()}
        observer = None
        if state["window"] is not None:
            observer = apo._new_observer(tuple(g for g in structure.groups if g.pin is None))
            observer.load_state_dict(state["window"])
        apo._verdict.load_state_dict(state["verdict"])  # the last that can fail; it changes all or nothing
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ApoptosisError) as error:
        raise CheckpointError(f"apoptosis state is damaged or of another network: {error!r}.") from error
    apo._drop_window()
    for name, value in plain.items():
        setattr(apo, name, value)
    apo._structure, apo.full_shapes, apo._full = structure, shapes, full
    apo._history, apo._decision, apo._site_cost = history, decision, site_cost
    if observer is not None and not apo._closed:
        observer.open()
        apo._observer = observer
