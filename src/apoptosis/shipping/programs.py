"""The network as a program of torch.export and as an ONNX file: exported, written, read again.

Holds: what is asked of torch.export, torch.onnx and onnxruntime. Elsewhere: deciding what to write (ship.py), comparing
(check.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from apoptosis.model.evaluate import Call
from apoptosis.shipping.check import NotRunError, Runs
from apoptosis.shipping.network import leaves
from apoptosis.shipping.sizes import Calls, spec


def export(model: nn.Module, calls: Calls, dynamic_shapes: Any = None) -> Any:
    """Export a copy of the network (see `exportable`).

    Args:
        model: the copy.
        calls: on what, and which sizes vary.
        dynamic_shapes: as torch.export takes it, in their place.

    Returns: torch.export.ExportedProgram.
    """
    if dynamic_shapes is None and calls.names:
        auto = torch.export.Dim.AUTO
        dynamic_shapes = spec(calls.traced, calls.axes, lambda found: dict.fromkeys(found, auto) or None)
    args, kwargs = on_cpu(calls.traced)
    with quiet(), torch.no_grad():
        return torch.export.export(model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)


def on_cpu(call: Call) -> Call:
    """Return a call with copies of its tensors on the CPU."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), (call[0], dict(call[1])))
    return args, kwargs


def write_program(program: Any, path: Path) -> None:
    """Write a program of torch.export."""
    with quiet():
        torch.export.save(program, path)


def read_program(path: Path) -> Runs:
    """Read a program of torch.export again, to be run on calls."""
    with quiet():
        network = torch.export.load(path).module()

    kept = {name: x.clone() for name, x in network.named_buffers()}

    def run(call: Call) -> Mapping[str, Tensor]:
        args, kwargs = on_cpu(call)
        with torch.no_grad():
            out = network(*args, **kwargs)
            for name, x in network.named_buffers():  # a pass may have written to it
                x.copy_(kept[name])
        return leaves(out)

    return run


def lacks(*packages: str) -> list[str]:
    """Return those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def write_onnx(program: Any, path: Path, calls: Calls, output_names: Sequence[str]) -> list[str]:
    """Translate a program of torch.export to ONNX and write it; what is larger than 2 GB lies in a file beside it.

    Returns: the names of its inputs, in the order of the tensors of a call.
    """
    named = spec(calls.traced, calls.axes, lambda found: dict(found) or None) if calls.names else None
    with quiet():
        made: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, output_names=list(output_names), dynamic_shapes=named
        )
        made.save(path, external_data=None)
        return [value.name for value in made.model.graph.inputs]


def read_onnx(path: Path) -> Runs:
    """Read an ONNX file again, to be run on calls by onnxruntime. Inputs count in their order.

    Raises: NotRunError: onnxruntime has no kernel for an operator of this type on the CPU.
    """
    import onnx
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except NoKernel as error:
        onnx.checker.check_model(str(path))
        raise NotRunError(f"onnxruntime cannot run it on the CPU ({str(error).rpartition(' : ')[2][:160]})") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(call: Call) -> Mapping[str, Tensor]:
        given = [x for x in tree_flatten((call[0], dict(call[1])))[0] if isinstance(x, Tensor)]
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(names, given, strict=True)}
        found = session.run([entry.name for entry in session.get_outputs()], feeds)
        return {str(i): torch.from_numpy(x) for i, x in enumerate(found)}

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters log, print and warn of to themselves: errors are raised, and what comes out is checked."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
