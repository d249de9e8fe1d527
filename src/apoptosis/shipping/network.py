"""The network as it is exported: on the CPU, in evaluation mode, returning plain containers of tensors.

Holds: copying without touching the original, turning what a model returns into plain containers. Elsewhere: exporting.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from apoptosis.errors import ArgumentError, one_line
from apoptosis.interrupts import is_out_of_memory, restoring
from apoptosis.model.module_state import Walk
from apoptosis.model.passes import internal_passes, marked_internal

_VALUES = (bool, int, float, complex, str, bytes, type, type(None))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


@contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """Give a network to export: on the CPU, in evaluation mode, returning plain containers.

    It is a copy, whose parameters share their memory with the original's where these lie on the CPU: nothing writes to
    them. Hooks stay, for they may belong to what the network computes. A network that cannot be copied is lent itself,
    and is afterwards as it was.

    Raises: ArgumentError: it can neither be copied nor lies on the CPU.
    """
    try:
        copied = _copy(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if any(x.device.type != "cpu" for x in (*model.parameters(), *model.buffers())):
            raise ArgumentError(f"the network cannot be copied ({one_line(error)}); move it to the CPU first") from None
        copied = None
    if copied is not None:
        with marked_internal():
            yield copied
        return
    with internal_passes(model):
        handle = model.register_forward_hook(_plain_hook)
        with restoring(handle.remove):
            yield model


def _copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if type(p) is nn.Parameter:
            memo[id(p)] = nn.Parameter(p.detach().to("cpu"), requires_grad=p.requires_grad)
    for tensor in Walk(model).tensors.values():  # results of an earlier pass cannot be copied
        memo[id(tensor)] = tensor.detach().to("cpu", copy=True)
    for module in model.modules():
        for hook in (hook for name in _HOOKS for hook in getattr(module, name).values()):
            own = type(hook).__module__.partition(".")[0] == "apoptosis"  # whose copies do nothing
            if not own and not isinstance(getattr(hook, "__self__", None), nn.Module):
                memo[id(hook)] = hook
    copied = copy.deepcopy(model, memo).to("cpu")
    for module in copied.modules():
        module.training = False
    copied.register_forward_hook(_plain_hook)  # the last: other hooks see what the model returns
    return copied


def _plain_hook(module: nn.Module, args: Any, out: Any) -> Any:
    return plain(out)


def plain(out: Any) -> Any:
    """Return an output as tuples, lists and dicts of tensors, which torch can load anywhere.

    What a class of another library holds (ModelOutput of transformers, a dataclass, a named tuple) becomes a dict of
    its fields. What is no tensor is left out; in tuples and lists None stands in its place.

    Example:
        >>> import torch
        >>> from typing import NamedTuple
        >>> class Out(NamedTuple):
        ...     logits: Tensor
        ...     loss: None = None
        >>> plain(([Out(torch.ones(1))], {"number": 1, "one": torch.ones(1)}, 2))
        ([{'logits': tensor([1.])}], {'one': tensor([1.])}, None)
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        return _named(out)
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return _named({name: getattr(out, name) for name in out._fields})
    if isinstance(out, list | tuple):
        made = [plain(item) for item in out]
        return tuple(made) if isinstance(out, tuple) else made
    if is_dataclass(out) and not isinstance(out, type):
        return _named({field.name: getattr(out, field.name) for field in fields(out)})
    if isinstance(out, _VALUES) or callable(out) or isinstance(out, nn.Module):
        return None
    return _named(dict(getattr(out, "__dict__", {}))) or None


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: plain(value) for name, value in found.items()}
    return {name: value for name, value in made.items() if leaves(value)}


def leaves(out: Any) -> dict[str, Tensor]:
    """Return the tensors of a plain output by their paths: "logits", "0", "caches.0.keys"; "output" for one alone.

    Example:
        >>> import torch
        >>> list(leaves(({"a": torch.ones(1)}, [torch.ones(2)])))
        ['0.a', '1.0']
    """
    if isinstance(out, Tensor):
        return {"output": out}
    return dict(_paths("", out))


def _paths(path: str, item: Any) -> list[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        return [(path, item)]
    parts = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list | tuple) else ()
    return [found for key, part in parts for found in _paths(f"{path}.{key}" if path else str(key), part)]
