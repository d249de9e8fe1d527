"""Residual branches that may be emptied: which modules would be constant, and which compute for them alone.

Holds: the search, from every layer that reads a group, and why a group has no such branch. Elsewhere: what is constant
of what (trace/calls.py), trying it on the model (surgery).

A branch ends with its layer: what that returns is constant once the channels it reads are gone, and the network's
output must not be constant then. The largest module around the layer that returns nothing else is replaced as a whole;
where the branch is no module of its own, every module that makes channels of it alone is.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from apoptosis.graph.explain import may_go_whole
from apoptosis.graph.trace.calls import ALWAYS, ModuleCall
from apoptosis.graph.trace.result import TraceResult
from apoptosis.records import Branch, Group, IntArray, LinearSite, NormSite, StandIn

_MODES = ("training", "evaluation")
BoolArray = npt.NDArray[np.bool_]


class _NoBranch(Exception):
    """Why a layer ends no branch that may be emptied; never leaves this module."""


def with_branches(
    model: nn.Module, trace: TraceResult, groups: Sequence[Group], labels: IntArray, aliases: Mapping[str, str]
) -> tuple[Group, ...]:
    """Return the groups with the branches that may be emptied with them, or why there are none.

    Args:
        model: that was captured.
        trace: of its passes.
        groups: all groups.
        labels: by id, the number of its channel.
        aliases: tied name -> first name.
    """
    if any(mode not in trace.log.calls for mode in _MODES):
        return tuple(groups)
    finder = _Finder(model, trace, groups, labels, frozenset((*aliases, *aliases.values())))
    found: dict[str, Branch] = {}
    why: dict[str, str] = {}
    for layer in sorted((name for name in finder.readings if name in trace.log.bits), key=finder.place):
        read = [group for group, _ in finder.readings[layer]]
        try:
            branch = finder.branch(layer)
        except _NoBranch as error:
            why.update({group.name: str(error) for group in read if group.name not in why})
            continue
        if taken := found.keys() & set(branch.groups):
            outer = max((found[name] for name in taken), key=lambda one: one.parameters)
            if outer.parameters > branch.parameters:
                continue
        found.update(dict.fromkeys(branch.groups, branch))
    return tuple(
        replace(group, branch=found.get(group.name), unbranched="" if group.name in found else why.get(group.name, ""))
        for group in groups
    )


@dataclass(slots=True)
class _Around:
    """A layer with what it reads.

    read: the groups, whose channels are all that it reads. site: of the first of them. norm: the BatchNorm behind it.
    """

    layer: str
    bit: int
    read: list[Group]
    site: LinearSite
    norm: str | None

    @property
    def end(self) -> str:
        """The module that gives the constant."""
        return self.layer if self.norm is None else self.norm


class _Finder:
    """Looks for branches in what the passes of one model showed."""

    def __init__(
        self, model: nn.Module, trace: TraceResult, groups: Sequence[Group], labels: IntArray, shared: frozenset[str]
    ) -> None:
        self._trace, self._groups, self._labels, self._shared = trace, groups, labels, shared
        self._modules = dict(model.named_modules())
        self._tensors = trace.channel_ids.tensors
        self._places: dict[str, dict[str, list[int]]] = {mode: {} for mode in _MODES}
        for mode in _MODES:
            for place, call in enumerate(trace.log.calls[mode]):
                self._places[mode].setdefault(call.module, []).append(place)
        self.readings: dict[str, list[tuple[Group, LinearSite]]] = {}  # groups and sites of every layer
        for group, site in ((own, s) for own in groups for s in own.sites if isinstance(s, LinearSite)):
            attends = isinstance(self._modules.get(site.module), nn.MultiheadAttention)
            if not attends or site.weight == f"{site.module}.out_proj.weight":
                self.readings.setdefault(site.module, []).append((group, site))
        self._own: dict[str, list[str]] = {}  # tensors inside of every module
        for name in self._tensors:
            for module in _lineage(name)[:-1]:
                self._own.setdefault(module, []).append(name)
        self._feeders: dict[str, set[str]] = {}  # modules whose output is read while a module runs
        for maker, users in trace.log.users.items():
            for running in users:
                for module in running:
                    self._feeders.setdefault(module, set()).add(maker)
        self._known: dict[str, IntArray] = {}  # channels by group
        firsts = [0 if call.ids is None else int(call.ids.flat[0]) for call in trace.log.calls["training"]]
        self._first = np.where(np.array(firsts) > 0, labels[firsts], -1) if firsts else np.zeros(0, dtype=np.int64)

    def place(self, module: str) -> int:
        """Return when a module was called first in training mode."""
        return self._places["training"].get(module, [1 << 30])[0]

    def branch(self, layer: str) -> Branch:
        """Return the branch that ends with a layer. Raises: _NoBranch: there is none."""
        found = self._around(layer)
        if self._trace.log.outputs & found.bit:
            raise _NoBranch(f"the network's output would be constant: it depends on the input through '{layer}' alone")
        outer = self._outer(found)
        if outer is not None:
            return self._made(found, self._whole(found, outer), (outer,))
        return self._made(found, *self._one_by_one(found))

    # ------------------------------------------------------------------ the layer

    def _around(self, layer: str) -> _Around:
        for mode in _MODES:
            if len(self._places[mode].get(layer, ())) != 1:
                raise _NoBranch(f"'{layer}' does not run once in every pass")
        own = self.readings.get(layer, [])
        read = [(g, s) for g, s in own if may_go_whole(g.pin) and not _is_whole(g)]
        if not read:
            raise _NoBranch(f"'{layer}' reads channels that cannot be removed")
        first = read[0][1]
        if first.factors != (1.0, 1.0) or first.normal is not None or (first.conv is not None):
            raise _NoBranch(f"'{layer}' computes its weight")
        columns = np.unique(np.concatenate([s.columns.reshape(-1) for _, s in read]))
        if any((s.weight, s.dim, s.select) != (first.weight, first.dim, ()) for _, s in own):
            raise _NoBranch(f"'{layer}' multiplies with several weights")
        if columns.size != first.num_columns:
            raise _NoBranch(f"'{layer}' reads other channels, too, which stay")
        holder: Any = self._modules[layer]
        holder = holder.out_proj if isinstance(holder, nn.MultiheadAttention) else holder
        if first.bias is None and holder.bias is not None:
            raise _NoBranch(f"the bias of '{layer}' is used elsewhere, too")
        if getattr(holder, "groups", 1) > 1:
            raise _NoBranch(f"'{layer}' is a convolution with several groups")
        norm = first.norm
        if norm is not None:
            module = self._modules.get(norm)
            known = isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
            norm = norm if known and self._once(norm) else None
        return _Around(layer, self._trace.log.bits[layer], [g for g, _ in read], first, norm)

    def _once(self, module: str) -> bool:
        return all(len(self._places[mode].get(module, ())) == 1 for mode in _MODES)

    def _call(self, module: str, mode: str = "training") -> ModuleCall:
        return self._trace.log.calls[mode][self._places[mode][module][0]]

    # ------------------------------------------------------------------ a module of its own

    def _outer(self, found: _Around) -> str | None:
        """Return the largest module around the layer that returns what the layer makes and nothing else; None: none."""
        best, calls = None, self._trace.log.calls["training"]
        made = self._made_by(found)
        place = self._call(found.layer).parent
        while place > 0:  # 0 is the model itself
            call = calls[place]
            if not self._once(call.module) or not all(self._call(call.module, m).bits & found.bit for m in _MODES):
                break
            if not call.odd and call.bits != ALWAYS and self._alone(call.module) and self._axis(call, made) is not None:
                best = call.module if self._anchors(call, self._axis(call, made) or 0) else best
            place = call.parent
        module = self._modules[found.layer]
        if best is None and isinstance(module, nn.MultiheadAttention):
            call = self._call(found.layer)
            if call.odd:
                raise _NoBranch(f"'{found.layer}' cannot be replaced: {call.odd}")
            return found.layer
        return best

    def _made_by(self, found: _Around) -> IntArray:
        """Return the channels that the layer makes, in order."""
        weight = self._tensors[found.site.weight]
        return self._labels[weight.axis(1 - found.site.dim)]

    def _axis(self, call: ModuleCall, made: IntArray) -> int | None:
        """Return the axis, counted from the last, along which a module returns these channels; None: no such axis."""
        if call.ids is None:
            return None
        varying = [axis for axis, size in enumerate(call.ids.shape) if size > 1]
        if len(varying) != 1 or not np.array_equal(self._labels[call.ids.reshape(-1)], made):
            return None
        return varying[0] - call.ids.ndim

    def _anchors(self, call: ModuleCall, axis: int) -> list[tuple[int, str]]:
        """Return the arguments of a call whose sizes are those of what it returns, but for one axis."""
        own = list(call.shape)
        own[axis] = 0
        found = []
        for argument in call.inputs:
            other = list(argument.shape)
            if len(other) == len(own) and argument.bits != ALWAYS:
                other[axis] = 0
                found += [(argument.place, argument.name)] if other == own else []
        return found

    def _alone(self, module: str) -> bool:
        """Whether everything inside a module runs in it alone, and none of its parameters is used elsewhere."""
        inside = f"{module}."
        for mode in _MODES:
            calls, at = self._trace.log.calls[mode], self._places[mode][module][0]
            for place, call in enumerate(calls):
                if call.module.startswith(inside) and not self._is_in(calls, place, at):
                    return False
        own = self._own.get(module, [])
        return not self._shared.intersection(own) and not any(self._read_outside(name, inside) for name in own)

    @staticmethod
    def _is_in(calls: Sequence[ModuleCall], place: int, outer: int) -> bool:
        while place > outer:
            place = calls[place].parent
        return place == outer

    def _read_outside(self, tensor: str, inside: str) -> bool:
        readers = {reader.removeprefix("@") for reader in self._trace.reads.get(tensor, ())} - {"operator"}
        return any(not f"{reader}.".startswith(inside) for reader in readers)

    def _whole(self, found: _Around, outer: str) -> list[StandIn]:
        call, module = self._call(outer), self._modules[found.layer]
        holder = found.end
        if isinstance(module, nn.MultiheadAttention):
            holder = f"{found.layer}.out_proj"
        axis = self._axis(call, self._made_by(found))
        anchors = self._anchors(call, -1 if axis is None else axis)
        if axis is None or not anchors:
            raise _NoBranch(f"the shape of what '{outer}' returns is that of none of its arguments")
        for group in found.read:
            self._check_inside(group, (outer,))
        behind = self._dropouts(outer, found)
        return [
            StandIn(
                module=outer,
                kind="branch",
                axis=axis,
                anchor=anchors[0],
                extras=call.extras,
                holder=holder[len(outer) + 1 :],
                after=tuple(name[len(outer) + 1 :] for name in behind),
                dense=bool(self._trace.log.written & found.bit),
            ),
            StandIn(module=holder, kind="constant"),
        ]

    def _dropouts(self, outer: str, found: _Around) -> list[str]:
        """Return the dropouts in a module that what the layer makes goes through."""
        calls, at = self._trace.log.calls["training"], self._places["training"][outer][0]
        behind = range(self._places["training"][found.layer][0] + 1, len(calls))
        return [
            calls[place].module
            for place in behind
            if self._is_in(calls, place, at)
            and isinstance(self._modules.get(calls[place].module), _DropoutNd)
            and any(argument.bits != ALWAYS and argument.bits & found.bit for argument in calls[place].inputs)
        ]

    # ------------------------------------------------------------------ module by module

    def _one_by_one(self, found: _Around) -> tuple[list[StandIn], tuple[str, ...]]:
        """Return the stand-ins of modules that make channels of the branch alone, and the names of all of these."""
        if not isinstance(self._modules[found.end], nn.Module) or found.end in self._shared:
            raise _NoBranch(f"'{found.end}' cannot be replaced")
        channels = np.zeros(int(self._labels.max()) + 1, dtype=bool)
        for group in found.read:
            channels[self._channels(group)] = True
        while True:
            empty = self._empty(channels)
            region = (*empty, found.layer, *(() if found.norm is None else (found.norm,)))
            more = [
                group
                for group in self._groups
                if group.sites
                and all(_within(site.module, region) for site in group.sites)
                and not any(isinstance(site, NormSite) for site in group.sites)
                and not self._is_of(group, channels)
            ]
            if not more:
                break
            for group in more:
                channels[self._channels(group)] = True
        self._check_region(found, channels, region)
        stand_ins = [self._as_empty(name) for name in empty if self._holds(name)]
        dense = bool(self._trace.log.written & found.bit)
        if found.norm is not None:
            stand_ins.append(StandIn(module=found.layer, kind="empty", axis=self._axis_of(found.layer)))
        stand_ins.append(StandIn(module=found.end, kind="constant", axis=self._axis_of(found.layer), dense=dense))
        return stand_ins, region

    def _channels(self, group: Group) -> IntArray:
        if group.name not in self._known:
            parts = [self._labels[self._tensors[m.tensor].axis(m.dim)[m.positions.reshape(-1)]] for m in group.members]
            self._known[group.name] = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
        return self._known[group.name]

    def _is_of(self, group: Group, channels: BoolArray) -> bool:
        """Whether channels are those of a group; a group's are or are not, all of them."""
        own = self._channels(group)
        return bool(own.size) and bool(channels[own[0]])

    def _empty(self, channels: BoolArray) -> list[str]:
        """Return the outermost modules that return these channels and nothing else."""
        found: list[str] = []
        calls = self._trace.log.calls["training"]
        for place in np.flatnonzero(channels[self._first] & (self._first >= 0)):
            call = calls[place]
            if not call.module or call.ids is None or _within(call.module, found):
                continue
            ids = call.ids.reshape(-1)
            if bool((ids == 0).any()) or not bool(channels[self._labels[ids]].all()):
                continue
            if self._once(call.module) and (not self._modules[call.module]._modules or self._alone(call.module)):
                found.append(call.module)
        return found

    def _holds(self, name: str) -> bool:
        """Whether a module has parameters or buffers, in itself or inside."""
        return name in self._own

    def _axis_of(self, layer: str) -> int:
        call = self._call(layer)
        varying = [] if call.ids is None else [axis for axis, size in enumerate(call.ids.shape) if size > 1]
        if len(varying) != 1 or call.ids is None:
            raise _NoBranch(f"the channels of what '{layer}' returns lie along no single axis")
        return varying[0] - call.ids.ndim

    def _as_empty(self, name: str) -> StandIn:
        module, call = self._modules[name], self._call(name)
        if name in self._trace.log.bits and not isinstance(module, nn.MultiheadAttention):
            return StandIn(module=name, kind="empty", axis=self._axis_of(name))
        if not module._modules and call.inputs and call.inputs[0].shape == call.shape:
            return StandIn(module=name, kind="pass")
        axis = self._axis_of(name)
        anchors = self._anchors(call, axis)
        if call.odd or not anchors:
            why = call.odd or "the shape of what it returns is that of none of its arguments"
            raise _NoBranch(f"'{name}' cannot be replaced: {why}")
        return StandIn(module=name, kind="empty", axis=axis, anchor=anchors[0], extras=call.extras)

    def _check_region(self, found: _Around, channels: BoolArray, region: Sequence[str]) -> None:
        """Raise unless all channels are made and read by modules that are replaced, and nowhere else."""
        for group in self._groups:
            if self._is_of(group, channels):
                self._check_inside(group, region)
        for name in (found.layer, *region):
            if self._shared.intersection(self._own.get(name, ())):
                raise _NoBranch(f"a parameter of '{name}' is used elsewhere, too")

    @staticmethod
    def _check_inside(group: Group, region: Sequence[str]) -> None:
        """Raise unless the channels of a group are made and read inside of some modules alone."""
        for site in group.sites:
            if not _within(site.module, region):
                raise _NoBranch(f"its channels are read by '{site.module}' as well")
        for member in group.members:
            if not _within(member.tensor.rpartition(".")[0], region):
                raise _NoBranch(f"its channels are also in '{member.tensor}', whose module does more than that")

    # ------------------------------------------------------------------ what goes

    def _made(self, found: _Around, stand_ins: list[StandIn], region: Sequence[str]) -> Branch:
        bias = f"{next(s.module for s in reversed(stand_ins) if s.kind == 'constant')}.bias"
        norms = self._in_front(region)
        going = (*region, *norms)
        made = self._tensors[found.site.weight].shape[1 - found.site.dim]  # numbers of the constant
        removed = list(dict.fromkeys(n for module in going for n in self._own.get(module, ()) if n != bias))
        gone = set(removed)
        along = [g for g in self._groups if self._goes(g, gone, going)]
        return Branch(
            name=found.end if len(region) > 1 else region[0],
            groups=(*(g.name for g in found.read), *(g.name for g in along if g not in found.read)),
            num_read=len(found.read),
            site=found.site.key,
            layer=found.layer,
            norm=found.norm,
            bias=bias,
            stand_ins=(*stand_ins, *(StandIn(module=name, kind="pass") for name in norms), *self._written_out(region)),
            removed=tuple(removed),
            macs=self._macs(going),
            norm_eps=0.0 if found.norm is None else float(getattr(self._modules[found.norm], "eps", 0.0)),
            parameters=sum(self._size(name) for name in removed) - (0 if bias in self._tensors else made),
        )

    def _size(self, name: str) -> int:
        info = self._tensors[name]
        return 0 if info.is_buffer else math.prod(info.shape)

    @staticmethod
    def _goes(group: Group, gone: set[str], going: Sequence[str]) -> bool:
        """Whether a group is made by weights that go alone, and read by none that stays."""
        made = [member.tensor in gone for member in group.members if member.role == "producer"]
        return bool(made) and all(made) and all(_within(site.module, going) for site in group.sites)

    def _in_front(self, region: Sequence[str]) -> list[str]:
        """Return the modules in front of a branch that nothing else reads: norms, a depthwise convolution."""
        found: list[str] = []
        while True:
            around = frozenset((*region, *found))
            near = set[str]().union(*(self._feeders.get(module, set()) for module in around)) - around
            more = [name for name in sorted(near, key=self.place) if self._feeds(name, around)]
            if not more:
                return found
            found += more

    def _feeds(self, name: str, region: frozenset[str]) -> bool:
        """Whether a module that keeps the shape of its input is read by these modules alone."""
        module = self._modules.get(name)
        if module is None or isinstance(module, _BatchNorm) or _within(name, region) or not self._once(name):
            return False
        if not all(region.intersection(running) for running in self._trace.log.users[name]):
            return False
        call = self._call(name)
        same = bool(call.inputs) and call.inputs[0].shape == call.shape and call.inputs[0].place == 0
        return same and not self._shared.intersection(self._own.get(name, ()))

    def _written_out(self, region: Sequence[str]) -> Iterator[StandIn]:
        """Yield torch's own transformer layers around the branch, whose fused pass reads weights that go."""
        for name, module in self._modules.items():
            layer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
            if layer and any(one.startswith(f"{name}.") for one in region):
                yield StandIn(module=name, kind="written_out")

    def _macs(self, region: Sequence[str]) -> float:
        """Return the multiply-adds of modules, each with what is inside of it once."""
        outermost = [name for name in region if not _within(name.rpartition(".")[0], region)]
        return sum(self._call(name).macs for name in outermost)


@lru_cache(maxsize=1 << 16)
def _lineage(name: str) -> tuple[str, ...]:
    """Return the names of a module and of those around it, the outermost first."""
    parts = name.split(".")
    return tuple(".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _within(name: str, modules: Container[str]) -> bool:
    """Whether a module is one of these, or inside of one."""
    return any(outer in modules for outer in _lineage(name))


def _is_whole(group: Group) -> bool:
    return group.name.partition("#")[0].endswith(":heads")
