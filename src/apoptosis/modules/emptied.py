"""What is left of modules of a residual branch that has lost all its channels.

Holds: the classes that such modules get under their identity: the constant, a module whose output has no channels, one
that passes its argument on. Elsewhere: which module gets which (graph), the exchange (surgery).

Constants are views of one bias, expanded: nothing is computed, and no memory is taken unless the caller writes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from apoptosis.errors import ShapeError
from apoptosis.records import StandIn

_PLAIN = (Tensor, int, float, complex, str, bool, list, tuple, dict, type(None))


class ConstantLinear(nn.Module):
    """A linear layer that reads no channels: its bias at every position. (..., anything) -> (..., out)."""

    bias: Tensor
    stand_in_dense: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant at every position of x."""
        return _dense(_cast(self.bias, x).expand(x.shape[:-1] + self.bias.shape), self.stand_in_dense)


class ConstantConv(nn.Module):
    """A convolution that reads no channels: its bias at every place that it would have computed."""

    bias: Tensor
    stand_in_dense: bool
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant at every place of the output."""
        sizes = _conv_sizes(x, self)
        bias = _cast(self.bias, x).reshape([-1] + [1] * len(self.kernel_size))
        batch = list(x.shape[: x.dim() - len(self.kernel_size) - 1])
        return _dense(bias.expand([*batch, self.bias.shape[0], *sizes]), self.stand_in_dense)


class ConstantNorm(nn.Module):
    """A batch norm behind a constant: what it would return in evaluation, in either mode. Shapes as nn.BatchNorm."""

    bias: Tensor
    stand_in_dense: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant at every place of x."""
        bias = self.bias.to(x.dtype).reshape([1, -1] + [1] * (x.dim() - 2))
        return _dense(bias.expand([x.shape[0], self.bias.shape[0], *x.shape[2:]]), self.stand_in_dense)


class ConstantBranch(nn.Module):
    """A whole branch that reads nothing any more: the constant, in the shape of one of its arguments.

    Of what it returned beside the output nothing is left: None each.
    """

    stand_in_axis: int
    stand_in_anchor: tuple[int, str]
    stand_in_extras: int
    stand_in_holder: str
    stand_in_after: tuple[str, ...]
    stand_in_dense: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the constant for as many positions as the argument has."""
        x = _anchor(self, args, kwargs)
        holder: Any = self.get_submodule(self.stand_in_holder) if self.stand_in_holder else self
        bias, axis = _cast(holder.bias, x), self.stand_in_axis % x.dim()
        shape = [bias.shape[0] if i == axis else size for i, size in enumerate(x.shape)]
        out = bias.reshape([-1 if i == axis else 1 for i in range(x.dim())]).expand(shape)
        out = _dense(out, self.stand_in_dense)
        for name in self.stand_in_after:
            out = self.get_submodule(name)(out)
        return out if self.stand_in_extras < 0 else (out, *[None] * self.stand_in_extras)


class NoChannelsLinear(nn.Module):
    """A linear layer none of whose outputs is read: (..., in) -> (..., 0)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return no channels at every position of x."""
        return _without_channels(x, -1)


class NoChannelsConv(nn.Module):
    """A convolution none of whose outputs is read: no channels at every place that it would have computed."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return no channels at every place of the output."""
        number = len(self.kernel_size)
        sizes = _conv_sizes(x, self)
        x = _without_channels(x, -number - 1)
        for axis in range(-number, 0):
            x = x.narrow(axis, 0, 1)
        return x.expand([*x.shape[:-number], *sizes])


class NoChannels(nn.Module):
    """A module of several layers none of whose outputs is read: no channels, else the shape of one of its arguments."""

    stand_in_axis: int
    stand_in_anchor: tuple[int, str]
    stand_in_extras: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return no channels for as many positions as the argument has."""
        x = _anchor(self, args, kwargs)
        out = _without_channels(x, self.stand_in_axis)
        return out if self.stand_in_extras < 0 else (out, *[None] * self.stand_in_extras)


class PassThrough(nn.Module):
    """A module whose output is read for its shape alone, or has no channels: it returns its argument."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


MARK = "_apoptosis_stand_in"
"""Attribute in which a module keeps what it stands in for, for checkpoints."""
OUTLINE = "_apoptosis_outline"
"""Attribute in which a module keeps what it was, for loading a checkpoint from before it was emptied."""
STAND_INS: tuple[type[nn.Module], ...] = (
    ConstantLinear,
    ConstantConv,
    ConstantNorm,
    ConstantBranch,
    NoChannelsLinear,
    NoChannelsConv,
    NoChannels,
    PassThrough,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A module without the memory of its parameters, so that it can be put together again.

    shell: a copy without anything in it. parameters, buffers: on the meta device, but for buffers that a state_dict
    leaves out. children: the modules inside. others: attributes that a stand-in overwrites.

    Copies and pickles of a model leave it out: what else is needed to widen a model is known in this process alone, and
    what is inside may be nothing that can be pickled.
    """

    shell: nn.Module
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    children: dict[str, Outline | None]
    others: dict[str, Any]

    def __reduce__(self) -> Any:
        """Become None in pickles and copies."""
        return type(None), ()


@dataclass(frozen=True)
class Held:
    """Stands in an attribute of a module for a parameter of it. weak: where a weak reference stood."""

    name: str
    weak: bool = False


def outline_of(module: nn.Module, overwritten: Iterable[str] = (), made: Sequence[nn.Parameter] = ()) -> Outline:
    """Return the outline of a module; of one that has lost something before, as it was then.

    Args: overwritten: names of attributes that change. made: parameters that it has got just now, and had not before.

    Example:
        >>> found = outline_of(nn.Sequential(nn.Linear(2, 3)))
        >>> found.children["0"].parameters["weight"].shape, found.children["0"].parameters["weight"].device.type
        (torch.Size([3, 2]), 'meta')
    """
    own = [name for name in overwritten if name in vars(module) and name != MARK and not name.startswith("stand_in_")]
    others = {name: vars(module)[name] for name in own}
    if isinstance(known := vars(module).get(OUTLINE), Outline):
        return replace(known, others=others | known.others) if overwritten else known
    shell = empty_copy_of(module)
    vars(shell).update({name: value for name, value in held_of(module).items() if name not in others})
    kept = module._non_persistent_buffers_set
    buffers = {n: t if n in kept or t is None else t.to("meta") for n, t in module._buffers.items()}
    parameters = {
        n: None if p is None or any(p is q for q in made) else _on_meta(p) for n, p in module._parameters.items()
    }
    children = {n: None if inner is None else outline_of(inner, (), made) for n, inner in module._modules.items()}
    return Outline(shell=shell, parameters=parameters, buffers=buffers, children=children, others=others)


def empty_copy_of(module: nn.Module) -> nn.Module:
    """Return a module of its own with what a module holds beside tensors and modules, hooks included."""
    new = nn.Module.__new__(type(module))  # copy.copy would ask __getstate__, which may refuse
    hooks = {k: type(v)(v) for k, v in vars(module).items() if k.endswith(("_hooks", "_hooks_with_kwargs"))}
    vars(new).update({**vars(module), **hooks, "_parameters": {}, "_buffers": {}, "_modules": {}})
    return new


def held_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that hold parameters of the module a second time (of a recurrent layer, say) without them.

    Example:
        >>> held_of(nn.RNN(2, 3, bias=False))["_flat_weights"]
        [Held(name='weight_ih_l0', weak=False), Held(name='weight_hh_l0', weak=False)]
    """
    names = {id(p): name for name, p in module._parameters.items() if p is not None}

    def without(value: Any) -> Any:
        weak = isinstance(value, ref)
        name = names.get(id(value() if weak else value))
        return value if name is None else Held(name, weak)

    found = {}
    for key, value in vars(module).items() if names else ():
        if key in ("_parameters", "_buffers", "_modules"):
            continue
        new = _mapped(value, without)
        if new is not value:
            found[key] = new
    return found


def filled(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of `held_of` with the module's parameters in them."""

    def with_own(value: Any) -> Any:
        p = module._parameters.get(value.name) if isinstance(value, Held) else None
        return value if not isinstance(value, Held) else ref(p) if value.weak and p is not None else p

    every = {key: (value, _mapped(value, with_own)) for key, value in vars(module).items()}
    return {key: new for key, (value, new) in every.items() if new is not value}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value, or a plain list, tuple or dictionary of values, changed; the same object where nothing is."""
    if type(value) is dict:
        new: Any = {key: change(item) for key, item in value.items()}
        return new if any(new[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        new = [change(item) for item in value]
        return type(value)(new) if any(a is not b for a, b in zip(new, value, strict=True)) else value
    return change(value)


def _on_meta(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)


def class_of(stand_in: StandIn, module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module gets; None where it keeps its own.

    Raises: ShapeError: a forward pass was set on the module itself, so that its class does not matter.
    """
    if stand_in.kind == "written_out":
        return None
    if "forward" in vars(module):
        raise ShapeError(f"a forward pass was set on the {type(module).__name__} '{stand_in.module}' itself.")
    if stand_in.kind == "branch":
        return ConstantBranch
    if stand_in.kind == "pass":
        return PassThrough
    conv = isinstance(module, _ConvNd)
    if stand_in.kind == "constant":
        return ConstantConv if conv else ConstantNorm if isinstance(module, _BatchNorm) else ConstantLinear
    if stand_in.anchor[1] or stand_in.anchor[0] or module._modules:
        return NoChannels
    return NoChannelsConv if conv else NoChannelsLinear


def attributes_of_stand_in(stand_in: StandIn, module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes that a stand-in reads in its forward pass, by names that no user's module has."""
    mark: dict[str, Any] = {MARK: stand_in}
    if stand_in.kind == "written_out":
        encoder = isinstance(module, nn.TransformerEncoder)
        return {**mark, "use_nested_tensor": False} if encoder else {**mark, "activation_relu_or_gelu": 0}
    names = {"constant": ("dense",), "branch": ("axis", "anchor", "extras", "holder", "after", "dense"), "pass": ()}
    read = names.get(stand_in.kind, ("axis", "anchor", "extras"))
    return mark | {f"stand_in_{name}": getattr(stand_in, name) for name in read}


def stand_in_of(module: nn.Module) -> StandIn | None:
    """Return what a module stands in for, None for every other module."""
    found = vars(module).get(MARK)
    return found if isinstance(found, StandIn) else None


def is_stand_in(module: nn.Module) -> bool:
    """Whether a module is what was left of one."""
    return type(module) in STAND_INS


def _anchor(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the argument that says how many positions there are."""
    place, name = module.stand_in_anchor
    for key, value in kwargs.items():
        if not isinstance(value, _PLAIN):
            raise RuntimeError(
                f"a branch of this network has been removed, and with it what it would have kept in {key}= "
                f"({type(value).__name__}). Call the model without it (use_cache=False)."
            )
    x = args[place] if 0 <= place < len(args) else kwargs.get(name)
    if not isinstance(x, Tensor):
        raise RuntimeError(
            f"a branch of this network has been removed; it needs '{name}' to say for how many positions."
        )
    return x


def _without_channels(x: Tensor, axis: int) -> Tensor:
    """Return x without any of its channels, in memory of its own: a ReLU behind may work in place."""
    return x.detach().narrow(axis, 0, 0).clone()


def _cast(bias: Tensor, x: Tensor) -> Tensor:
    """Return a bias in the type that a product with x would have."""
    if is_scripting() or not torch.is_autocast_enabled(x.device.type):
        return bias
    return bias.to(torch.get_autocast_dtype(x.device.type))


def _dense(x: Tensor, dense: bool) -> Tensor:
    return x.contiguous() if dense else x


def _conv_sizes(x: Tensor, conv: Any) -> list[int]:
    """Return the sizes of a convolution's output."""
    number = len(conv.kernel_size)
    sizes = list(x.shape[x.dim() - number :])
    if isinstance(conv.padding, str):
        same = conv.padding == "same"
        padding = [conv.dilation[i] * (conv.kernel_size[i] - 1) if same else 0 for i in range(number)]
    else:
        padding = [2 * conv.padding[i] for i in range(number)]
    spans = [conv.dilation[i] * (conv.kernel_size[i] - 1) + 1 for i in range(number)]
    return [(sizes[i] + padding[i] - spans[i]) // conv.stride[i] + 1 for i in range(number)]
