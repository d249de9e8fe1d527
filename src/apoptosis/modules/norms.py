"""Norms that lose channels and keep the statistics of the full width.

Holds: the classes that nn.LayerNorm and nn.RMSNorm become when channels go, their statistics, and which modules
can lose channels in which way. Elsewhere: finding them in a forward pass (graph), deciding what goes
(criteria, planner), exchanging classes (surgery).

A norm divides by a statistic over its full width C. Where each channel j that went was x_j = s_j x_k + c_j for one kept
channel k, sums over all channels are weighted sums over the kept ones (theory, Theorem 24).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor, nn

from apoptosis.errors import ShapeError
from apoptosis.interrupts import is_out_of_memory
from apoptosis.modules.response_norms import Response, computes_response, response
from apoptosis.records import NormStrategy

_EPS_NAMES = ("variance_epsilon", "eps")
_OWN_HOOKS = "apoptosis.observe."  # modules that these come from
_PROBE_ROWS = 3
_FLOAT32 = 1e-5  # relative error of a norm in float32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Sums over the full width by the kept channels, with x_j = s_j x_k + c_j for all j that k stands for, k included.

    mean_weights: sum of s_j. square_weights: sum of s_j². cross_weights: sum of s_j c_j; all (kept,). constant_sum: sum
    of c_j; constant_square: sum of c_j², over all channels. full_width: number of channels as built.
    """

    mean_weights: Tensor
    square_weights: Tensor
    cross_weights: Tensor
    constant_sum: float
    constant_square: float
    full_width: int

    @classmethod
    def plain(cls, width: int) -> Self:
        """Return those of a norm that has lost nothing."""
        ones = torch.ones(width, dtype=torch.float64, device="cpu")
        return cls(
            mean_weights=ones,
            square_weights=ones.clone(),
            cross_weights=torch.zeros(width, dtype=torch.float64, device="cpu"),
            constant_sum=0.0,
            constant_square=0.0,
            full_width=width,
        )

    def after(self, mix: Tensor, offset: Tensor | None) -> Statistics:
        """Return those after a further event, x = x_K @ mix + offset on the channels that are there now.

        Args:
            mix: (kept, channels) with at most one entry per column that is not zero.
            offset: (channels,) or None.

        Raises: ShapeError: another number of channels, or a column that mixes several kept channels.

        Example:
            >>> mix = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])  # the third channel is twice the first
            >>> found = Statistics.plain(3).after(mix, None)
            >>> found.mean_weights.tolist(), found.square_weights.tolist()
            ([3.0, 1.0], [5.0, 1.0])
        """
        mix = mix.detach().cpu().double()
        if mix.shape[1] != self.mean_weights.numel() or bool((mix.count_nonzero(0) > 1).any()):
            raise ShapeError(
                f"the statistics of a norm over {self.mean_weights.numel()} channels follow a removal in which each "
                f"channel is a multiple of one kept channel, not a mix of shape {tuple(mix.shape)}."
            )
        own = mix.new_zeros(mix.shape[1]) if offset is None else offset.detach().cpu().double()
        return Statistics(
            mean_weights=mix @ self.mean_weights,
            square_weights=mix.square() @ self.square_weights,
            cross_weights=mix @ (own * self.square_weights + self.cross_weights),
            constant_sum=self.constant_sum + float(own @ self.mean_weights),
            constant_square=self.constant_square
            + float(own.square() @ self.square_weights + 2.0 * (own @ self.cross_weights)),
            full_width=self.full_width,
        )

    def attributes(self) -> dict[str, Any]:
        """Return them as the attributes of a module."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS = tuple(field.name for field in fields(Statistics))  # the three tensors first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormEdit:
    """What a norm has to know of an event that removes channels of its input: x = x_K @ mix + offset, in its own order.

    mix: (kept, channels), at most one entry per column; offset: (channels,) or None. plain: channels that were always
    zero went, the module stays what it is, and ε follows the width as its weight does.
    """

    module: str
    mix: Tensor
    offset: Tensor | None
    plain: bool


def _fields_of(state: Tensor, kept: int) -> dict[str, Any]:
    rows = state[: 3 * kept].double().reshape(3, kept)
    tensors = {name: row.clone() for name, row in zip(_FIELDS, rows, strict=False)}
    constant_sum, constant_square, full_width = state[3 * kept :].tolist()
    numbers = {"constant_sum": constant_sum, "constant_square": constant_square, "full_width": int(full_width)}
    return {**tensors, **numbers}


class _Compensated(nn.Module):
    """What shrunk norms share: statistics that follow the module's device and are part of its state_dict."""

    __jit_unused_properties__ = ("statistics",)  # a scripted norm needs its forward pass alone
    if TYPE_CHECKING:  # torch.jit.script would evaluate what they say, and takes no strings
        mean_weights: Tensor
        square_weights: Tensor
        cross_weights: Tensor
        constant_sum: float
        constant_square: float
        full_width: int

    @property
    def statistics(self) -> Statistics:
        """The statistics, to be changed by an event only."""
        return Statistics(**{name: getattr(self, name) for name in _FIELDS})

    def get_extra_state(self) -> Tensor:
        """Return the statistics: with weight and bias alone the norm would compute something else.

        Returns: (3 * kept + 3,) float64, the fields of `Statistics` in order: one tensor, because what reads a
        state_dict (safetensors, save_pretrained, loops over its values) expects tensors.
        """
        numbers = [self.constant_sum, self.constant_square, float(self.full_width)]
        tensors = [getattr(self, name).double() for name in _FIELDS[:3]]
        return torch.cat([*tensors, torch.tensor(numbers, dtype=torch.float64, device=tensors[0].device)])

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take over what `get_extra_state` returned, or the dictionary of the fields that it was once.

        Raises: ShapeError: it is neither; nothing has changed.
        """
        if isinstance(state, Tensor):
            kept, rest = divmod(state.numel(), 3)
            damaged = state.dim() != 1 or rest or kept < 2 or not state.is_floating_point()
            found = {} if damaged else _fields_of(state.detach(), kept - 1)
        else:
            found = dict(state) if isinstance(state, Mapping) else {}
        if set(found) != set(_FIELDS):
            reported = (
                tuple(state.shape) if isinstance(state, Tensor) else sorted(map(str, found)) or type(state).__name__
            )
            raise ShapeError(f"this is no state of a {type(self).__name__}: {reported}.")
        device = self.mean_weights.device
        for name in _FIELDS:
            setattr(self, name, found[name].to(device) if isinstance(found[name], Tensor) else found[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own is without types
        device = fn(torch.empty(0, device=self.mean_weights.device, dtype=torch.float32)).device
        for name in _FIELDS[:3] if device.type != "mps" else ():  # which has no float64
            setattr(self, name, getattr(self, name).to(device))  # in float64 still
        return self

    def extra_repr(self) -> str:
        """Say how many channels there are, and were."""
        return f"{super().extra_repr()}, full_width={self.full_width}"

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, square, cross = self.mean_weights, self.square_weights, self.cross_weights
        return mean.to(x.device, x.dtype), square.to(x.device, x.dtype), cross.to(x.device, x.dtype)


class ShrunkLayerNorm(_Compensated, nn.LayerNorm):
    """What an nn.LayerNorm over one axis becomes when channels go: mean and variance stay those of the full width.

    Modules get this class from an event or from `load`; there is no reason to construct one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axis.

        The variance is a sum of squares around the mean, (s_j x_k + c_j - μ)² with x_k = d_k + μ, so that a large mean
        costs no digits.
        """
        x = _wide(input)
        by_mean, by_square, by_cross = self._sums(x)
        mean = ((x * by_mean).sum(-1, keepdim=True) + self.constant_sum) / self.full_width
        d = x - mean
        once, twice, cross = self.mean_weights, self.square_weights, self.cross_weights  # in float64, where they cancel
        away = (twice - once).to(x.device, x.dtype)  # sum of s (s - 1)
        total = (d * (d * by_square + 2.0 * (mean * away + by_cross))).sum(-1, keepdim=True)
        exact = x.dtype if x.device.type == "mps" else torch.float64
        spread = ((twice - 2.0 * once).sum() + self.full_width).to(x.device, exact)  # sum of (s - 1)²
        shift = (2.0 * (cross.sum() - self.constant_sum)).to(x.device, exact)  # twice the sum of (s - 1) c
        level = mean.to(exact)  # one number of each row: (s - 1) μ + c may be little of μ
        total = total + (level * (level * spread + shift) + self.constant_square).to(x.dtype)
        y = d * (total / self.full_width).clamp_min(0.0).add(self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight
        return (y if self.bias is None else y + self.bias).to(input.dtype)


def _takes_eps_of_input() -> bool:
    """Whether an nn.RMSNorm without an eps takes that of a short input type, as torch 2.6 does, or float32's."""
    x = torch.full((1, 1), 2.0**-10, dtype=torch.float16, device="cpu")  # far below the root of the short type's eps
    return float(nn.functional.rms_norm(x, (1,))) < 0.5


class ShrunkRMSNorm(_Compensated, nn.RMSNorm):
    """What an nn.RMSNorm over one axis becomes when channels go: the mean square stays that of the full width.

    Modules get this class from an event or from `load`; there is no reason to construct one.
    """

    __constants__ = [*nn.RMSNorm.__constants__, "_eps_of_input"]  # noqa: RUF012 - as torch declares it
    _eps_of_input: Final[bool] = _takes_eps_of_input()

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square over the last axis."""
        wide = _wide(x)
        _, by_square, by_cross = self._sums(wide)
        total = (wide * (wide * by_square + 2.0 * by_cross)).sum(-1, keepdim=True) + self.constant_square
        eps = self.eps
        if eps is None:  # torch's own; torch.finfo is what no script knows
            eps = 2.0**-52 if wide.dtype == torch.float64 else 2.0**-23
            if self._eps_of_input and x.dtype == torch.float16:
                eps = 2.0**-10
            elif self._eps_of_input and x.dtype == torch.bfloat16:
                eps = 2.0**-7
        y = wide * (total / self.full_width).clamp_min(0.0).add(eps).rsqrt()
        return (y if self.weight is None else y * self.weight).to(x.dtype)


class ShrunkResponseNorm(_Compensated):
    """What a module that computes a global response norm becomes when channels go: the mean stays that of all channels.

    Modules get this class from an event or from `load`; there is no reason to construct one.
    """

    if TYPE_CHECKING:
        layout: Response

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel by its share of what all channels respond."""
        gain, bias = self._parameters[self.layout.gain], self._parameters[self.layout.bias]
        assert gain is not None
        assert bias is not None
        return response(x, self.layout, gain, bias, self.mean_weights, self.full_width)


SHRUNK: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: ShrunkLayerNorm, nn.RMSNorm: ShrunkRMSNorm}
"""Class as built -> class once channels are gone. A further norm layer is a class above and an entry here."""


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def is_shrunk(module: nn.Module) -> bool:
    """Whether a norm has lost channels and makes up for them."""
    return isinstance(module, _Compensated)


def gain_of(module: nn.Module) -> Tensor | None:
    """Return the parameter that a norm multiplies its channels with, None where it has none."""
    layout = response_of(module)
    return module._parameters.get("weight" if layout is None else layout.gain)


def statistics_of(module: nn.Module) -> Statistics:
    """Return the statistics of a norm, lost channels or not. Raises: ShapeError: it has no weight."""
    if isinstance(module, _Compensated):
        return module.statistics
    weight = gain_of(module)
    if weight is None:
        raise ShapeError(f"{type(module).__name__} has no weight, so that its width is not known.")
    return Statistics.plain(weight.numel())


def response_of(module: nn.Module) -> Response | None:
    """Return the layout of a module that computes a global response norm, lost channels or not; None for others."""
    if isinstance(module, ShrunkResponseNorm):
        return module.layout
    return computes_response(module) if is_unhooked(module) else None


def is_unhooked(module: nn.Module) -> bool:
    """Whether a module's own forward pass is all that runs on its input: no hook before it, no forward in its place.

    Hooks behind it take what it returns, as any reader does; a window's own hooks change nothing.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> handle = norm.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
        >>> is_unhooked(norm), is_unhooked(nn.LayerNorm(4))
        (False, True)
    """
    hooks = (str(getattr(hook, "__module__", "")) for hook in module._forward_pre_hooks.values())
    return "forward" not in vars(module) and all(name.startswith(_OWN_HOOKS) for name in hooks)


def eps_name(module: nn.Module) -> str | None:
    """Return the attribute that a root-mean-square norm of its own forward pass holds ε in, None for other modules.

    nn.RMSNorm with a number for ε is one, too.
    """
    if type(module) is not nn.RMSNorm and type(module).__module__.startswith("torch."):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or module._buffers or module._modules:
        return None
    return next((name for name in _EPS_NAMES if type(vars(module).get(name)) is float), None)


def norm_strategy_of(module: nn.Module) -> NormStrategy:
    """Return how channels of a module's input can be removed: "class", "plain", "either", or "" where they cannot.

    "class": the module becomes a norm that knows what is gone, be it multiples of kept channels or constants; so does a
    global response norm, "response", of multiples. "plain": channels that are always zero go, with ε and the weight
    following the width, and the module stays what it is.

    Modules with a forward pass of their own are compared with the formula on a few numbers. None can where something
    runs before a module's forward pass or in its place (`is_unhooked`).
    """
    if response_of(module) is not None:
        return "response"
    weight = module._parameters.get("weight")
    if not is_unhooked(module) or weight is None or weight.dim() != 1 or weight.is_meta or hasattr(weight, "fake_mode"):
        return ""
    if is_shrunk(module):
        return "class"
    name = eps_name(module)
    is_rms = name is not None and (type(module) is nn.RMSNorm or _is_rms_norm(module, weight, getattr(module, name)))
    if type(module) in SHRUNK:
        return "either" if is_rms else "class"
    return "plain" if is_rms else ""


def _is_rms_norm(module: nn.Module, weight: Tensor, eps: float) -> bool:
    """Whether the module computes x / sqrt(mean(x²) + ε) * weight, on numbers large and small beside ε."""
    rows = torch.randn(
        _PROBE_ROWS, weight.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    if not weight.is_floating_point() or not 0.0 <= eps < 1.0:
        return False
    allowed = max(torch.finfo(weight.dtype).eps ** 0.5, _FLOAT32)  # some compute in float32 whatever comes in
    for size in (1.0, max(eps, 1e-30) ** 0.5):
        x = (rows * size).to(weight.device, weight.dtype)
        wide = x.double()
        want = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.detach().double()
        try:
            with torch.no_grad():
                got = module.forward(x)
        except Exception as error:  # the user's forward may raise anything: then it is no such norm
            if is_out_of_memory(error):
                raise
            return False
        if not isinstance(got, Tensor) or got.shape != x.shape:
            return False
        if bool(((got.double() - want).abs() > allowed * (1e-3 + want.abs())).any()):
            return False
    return True
