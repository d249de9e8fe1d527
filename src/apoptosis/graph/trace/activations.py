"""Modules that are one neuron type though they are computed by several operators: of torch, and the user's own.

Holds: module type -> neuron type, and what the passing of such a module means for the steps of a Value.
Elsewhere: the neuron types (numerics.activations), activations that are one operator (rules/table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apoptosis.errors import ArgumentError
from apoptosis.graph.trace.values import Path, Value
from apoptosis.numerics.activations import NEURON_TYPES, NeuronType, Symmetry, register_neuron_type

if TYPE_CHECKING:
    from apoptosis.graph.trace.tracer import Tracer

_SAMPLE = 4096  # elements of an output that are compared with the formula


@dataclass(frozen=True, slots=True)
class _Entry:
    """name: of the neuron type. arguments: attributes that hold its scalar arguments. own: registered by the user."""

    name: str
    arguments: tuple[str, ...] = ()
    own: bool = False


_REGISTRY: dict[type[nn.Module], _Entry] = {
    getattr(nn, kind.module): _Entry(kind.name) for kind in NEURON_TYPES.values() if kind.composed
}


def register_activation(
    name: str,
    phi: Callable[..., Tensor],
    *,
    module_type: type[nn.Module],
    lipschitz: float | Callable[..., float],
    homogeneous: bool = False,
    reflection: float | None = None,
    jump: float = 0.0,
    arguments: Mapping[str, float] | None = None,
) -> None:
    """Make a module type of one's own a neuron type, so that neurons behind it can be merged by their weights.

    Every module of exactly this type (not of a subclass) then counts as one elementwise function, whatever operators
    its forward is made of. What is said of phi is tried on a grid now, and at every capture the module's output is
    compared with phi: where they differ, nothing is merged and the structure's notes say so.

    Args:
        name: of the neuron type, new.
        phi: phi(x, *arguments) on tensors, elementwise.
        module_type: the class of the modules that compute it, called with one tensor.
        lipschitz: L with |phi(a) - phi(b)| <= L |a - b| + jump for all a, b; a number, or a function of the arguments.
        homogeneous: phi(s x) = s phi(x) for every s > 0.
        reflection: c with phi(-x) = c - phi(x) for every x (0.0 for odd functions), None where there is no such c.
        jump: height of phi's steps together, 0 where it is continuous.
        arguments: attribute of the module -> its usual value, for the plain numbers that phi depends on. Whatever is
            said of phi has to hold for all their values.

    Raises: ArgumentError: the name or the module type is taken, or phi is not what is said of it.

    References: docs/extending.md, with an example.
    """
    if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
        raise ArgumentError(f"module_type is {module_type!r}; give a class derived from torch.nn.Module.")
    if not isinstance(name, str) or not callable(phi):
        raise ArgumentError(f"name={name!r} and phi={phi!r} must be a string and a function.")
    if not callable(lipschitz) and not hasattr(lipschitz, "__float__"):
        raise ArgumentError(f"lipschitz={lipschitz!r} must be a number, or a function of the arguments.")
    if module_type in _REGISTRY or module_type in _of_torch():
        raise ArgumentError(f"module type '{module_type.__name__}' is a neuron type already; there are {_listed()}.")
    usual = dict(arguments or {})
    constant = lipschitz if callable(lipschitz) else lambda *_: float(lipschitz)
    symmetry = Symmetry(homogeneous=homogeneous, reflection=reflection)
    register_neuron_type(
        NeuronType(
            name=name,
            module=module_type.__name__,
            phi=phi,
            lipschitz=constant,
            symmetry=lambda *_: symmetry,
            defaults=tuple(float(value) for value in usual.values()),
            jump=lambda *_: float(jump),
        )
    )
    _REGISTRY[module_type] = _Entry(name, tuple(usual), own=True)


def _of_torch() -> frozenset[type]:
    return frozenset(getattr(nn, kind.module) for kind in NEURON_TYPES.values() if hasattr(nn, kind.module))


def _listed() -> str:
    names = sorted({kind.module for kind in NEURON_TYPES.values()} | {kind.__name__ for kind in _REGISTRY})
    return ", ".join(name for name in names if name)


@dataclass(frozen=True, slots=True)
class RunningNeuron:
    """A module that is a neuron type while its forward runs: what it reads, and a sample of the numbers."""

    module: nn.Module
    value: Value
    sample: Tensor | None

    def on_exit(self, tracer: Tracer, output: Tensor) -> Value:
        """Return what is known of the module's output; where it is no such neuron after all, that is noted."""
        entry = _REGISTRY[type(self.module)]
        args, fault = _arguments(self.module, entry)
        if not fault and self.sample is not None:
            with _unseen(tracer):
                fault = _difference(NEURON_TYPES[entry.name], args, self.sample, output)
        paths = {key: None if fault else _step(path, entry.name, args) for key, path in self.value.paths.items()}
        note = f"{type(self.module).__name__} is no neuron of type '{entry.name}' here: {fault}"
        if fault and note not in tracer.trace.notes:
            tracer.trace.notes.append(note)
        return replace(tracer.value(output), paths=paths)


def on_enter(tracer: Tracer, module: nn.Module, args: Any) -> RunningNeuron | None:
    """Note what a module that is a neuron type reads (it may write to it); None for any other module."""
    entry = _REGISTRY.get(type(module))
    if entry is None or not args or not isinstance(args[0], Tensor):
        return None
    with _unseen(tracer):
        sampled = entry.own and _holds_numbers(args[0])
        sample = args[0].detach().reshape(-1)[:_SAMPLE].clone() if sampled else None
    return RunningNeuron(module, tracer.value(args[0]), sample)


@contextmanager
def _unseen(tracer: Tracer) -> Iterator[None]:
    """Run operators and modules that are none of the model's."""
    tracer.suspended = True
    try:
        yield
    finally:
        tracer.suspended = False


def _holds_numbers(x: Tensor) -> bool:
    return x.is_floating_point() and not x.is_meta and not hasattr(x, "fake_mode")


def _step(path: Path | None, name: str, args: tuple[float, ...]) -> Path | None:
    if path is None or path.activated:
        return None
    return replace(path, activation=name, args=args, activated=True)


def _arguments(module: nn.Module, entry: _Entry) -> tuple[tuple[float, ...], str]:
    found: list[float] = []
    for attribute in entry.arguments:
        value: Any = getattr(module, attribute, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return (), f"its attribute '{attribute}' is no plain number."
        found.append(float(value))
    return tuple(found), ""


def _difference(kind: NeuronType, args: tuple[float, ...], x: Tensor, output: Tensor) -> str:
    """Compare numbers that the module has put out with the formula, to half the digits of their type."""
    got = output.detach().reshape(-1)[:_SAMPLE]
    with torch.no_grad():
        want = kind.phi(x, *args)
    if want.shape != got.shape:
        return "its output has another shape than its input."
    allowed = torch.finfo(got.dtype).eps ** 0.5 * (1.0 + want.abs())
    wrong = ~((got - want).abs() <= allowed) & torch.isfinite(want)
    return f"it puts out {float(got[wrong][0]):g} where phi gives {float(want[wrong][0]):g}." if wrong.any() else ""
