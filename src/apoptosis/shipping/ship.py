"""`ship`: a shrunk network written so that it runs without this library.

Holds: what is written, in which order, and what is said of a file that cannot be. Elsewhere: the exporters
(programs.py), comparing (check.py), the README (readme.py).
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from apoptosis.distributed.sharded import has_shards
from apoptosis.distributed.wrappers import unwrapped
from apoptosis.errors import ApoptosisError, ArgumentError, DataError, one_line
from apoptosis.model.arguments import check_data
from apoptosis.model.evaluate import as_call
from apoptosis.shipping import programs
from apoptosis.shipping.check import (
    Apart,
    DifferentError,
    FailedSizeError,
    NotRunError,
    Reference,
    Runs,
    check_apart,
    compared,
    first_run,
    refer,
    runs_on,
)
from apoptosis.shipping.network import exportable
from apoptosis.shipping.readme import Described, readme
from apoptosis.shipping.records import FORMAT, ONNX, ONNX_DATA, OWN, PROGRAM, README, RECORD, Shipment, ShippedFile
from apoptosis.shipping.sizes import LENGTH, ROWS, Calls, find_sizes
from apoptosis.shipping.weights import write_weights, write_widths
from apoptosis.storage.files import placing_folder

_INSTALL = "pip install 'torch-apoptosis[onnx]'"
_KEEPS = "the network keeps something from one pass to the next, the file was checked on a first pass alone"
_HERE = os.path.dirname(__file__)
_ROOTS = (os.path.dirname(torch.__file__), os.path.dirname(_HERE))  # a line of whose code says little to the user


def ship(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_input: Any,
    *,
    onnx: bool | None = None,
    dynamic_shapes: Any = None,
) -> Shipment:
    """Write a network, shrunk or not, so that it runs without this library, and check every file against it.

    The folder holds the weights (`weights.safetensors`), the widths (`widths.json`), the network as a program of
    torch.export (`network.pt2`) and as an ONNX file (`network.onnx`), a README.md that says how to load each of them,
    and `shipment.json` with the same figures for programs. They compute on the CPU; a .pt2 file can be moved elsewhere.
    Every file is read again and its outputs are compared with the network's, in evaluation mode, on the example and on
    inputs of other sizes. What differs by more than rounding is not kept. Outputs of other libraries' classes become
    dicts, so that torch alone can load them; what is no tensor is left out.

    Args:
        model: the network; wrappers (compiled, data parallel, averaged) are taken off. It is left as it is.
        folder: is made; one that holds an earlier shipment and nothing else is replaced once the new one is complete.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        onnx: whether the ONNX file is written; None: where the packages of the extra `onnx` are installed.
        dynamic_shapes: as torch.export.export takes it: which sizes may vary. None: the number of rows, and the length
            of token sequences, where the network runs on other ones; all others are those of the example.

    Returns: what was written, and why a file was not. Such a file is warned of, and the others are written.

    Raises:
        ArgumentError: the network does not run on example_input, is spread over processes or has no data; or onnx=True
            without the packages. DataError: something else lies in the folder. OSError: it cannot be written. In each
            case nothing has changed.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     shipped = ship(net, f"{place}/small", torch.randn(5, 4), onnx=False)
        ...     again = torch.export.load(f"{place}/small/network.pt2").module()
        >>> shipped["network.pt2"].sizes, again(torch.ones(7, 4)).shape
        (('rows',), torch.Size([7, 2]))
    """
    network, call = _network(model), as_call(example_input)
    path = _destination(folder)
    absent = _absent(onnx)
    first_run(network, call)
    references = _references(network, call, dynamic_shapes)
    with placing_folder(path, replace=True) as partial:
        job = _Job(network=network, folder=partial, references=references, dynamic_shapes=dynamic_shapes)
        files = [write_weights(network, partial), write_widths(network, partial), _program(job)]
        files += [] if onnx is False else [_onnx(job, absent)]
        described = Described(
            model=network, calls=references[0].calls, outputs=references[0].wanted[0], onnx_inputs=job.onnx_inputs
        )
        shipment = Shipment(folder=path, files=tuple(files))
        (partial / README).write_text(readme(shipment, described), encoding="utf-8")
        (partial / RECORD).write_text(json.dumps(shipment.as_dict(), indent=2) + "\n", encoding="utf-8")
    for file in files:
        if file.missing and not (absent and onnx is None and file.name == ONNX):
            warnings.warn(f"ship: {file}", UserWarning, stacklevel=2)
    return shipment


def _network(model: object) -> nn.Module:
    """Take wrappers off, and check that what is inside can be copied.

    Raises: ArgumentError.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, not a torch.nn.Module.")
    if isinstance(model, nn.DataParallel | AveragedModel):
        model = model.module
    network = unwrapped(model)
    if has_shards(network):
        raise ArgumentError(
            "the model's parameters are spread over processes. Save it with save_sharded, load that into a model that "
            "is not sharded (load_sharded), and ship this one."
        )
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"module '{name}'" if name else "the model"
            raise ArgumentError(f"{what} is TorchScript, which torch.export does not take; torch.jit.save writes it.")
    check_data(network)
    return network


def _destination(folder: object) -> Path:
    """Return where to write. Raises: ArgumentError: it is no path. DataError: something else lies there."""
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ArgumentError(f"folder={folder!r} must be the path of a folder.")
    path = Path(os.fspath(folder))
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in OWN or entry.is_dir())
        if foreign or (any(path.iterdir()) and not _is_shipment(path)):
            what = f"'{foreign[0]}'" if foreign else "files of another origin"
            raise DataError(f"folder '{path}' holds {what}, which would be lost: name an empty one, or a new one.")
    elif path.exists() or path.is_symlink():
        raise DataError(f"'{path}' is no folder: name one that is not there yet.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _is_shipment(path: Path) -> bool:
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _absent(onnx: object) -> list[str]:
    """Return the packages that an ONNX file would need and that are not installed."""
    if onnx not in (None, True, False):
        raise ArgumentError(f"onnx={onnx!r} must be True, False or None.")
    absent = programs.lacks("onnx", "onnxscript")
    if onnx and absent:
        raise ArgumentError(f"onnx=True needs {' and '.join(absent)}: {_INSTALL}, or leave onnx= out.")
    return absent


def _references(network: nn.Module, call: Any, dynamic_shapes: Any) -> list[Reference]:
    """Return what to compare with: for the sizes that may vary, for fewer of them, for none."""
    runs = runs_on(network)
    calls = find_sizes(call, runs, () if dynamic_shapes is not None else (ROWS, LENGTH))
    found = [calls]
    if len(calls.names) > 1:
        found.append(find_sizes(call, runs, (ROWS,)))
    if calls.names:
        found.append(calls.fixed)
    return [refer(network, one) for one in found]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """One shipment in the making.

    exported: programs of torch.export, or why there is none, by the sizes that vary. onnx_inputs: names in the ONNX
    file.
    """

    network: nn.Module
    folder: Path
    references: Sequence[Reference]
    dynamic_shapes: Any
    exported: dict[tuple[str, ...], Any] = field(default_factory=dict)
    onnx_inputs: list[str] = field(default_factory=list)

    def program(self, calls: Calls) -> Any:
        """Return the exported program for these sizes. Raises: what the exporter raised."""
        if calls.names not in self.exported:
            try:
                with exportable(self.network) as network:
                    self.exported[calls.names] = programs.export(network, calls, self.dynamic_shapes)
            except Exception as error:  # noqa: BLE001 - kept: the next file fails for the same reason
                self.exported[calls.names] = error
        found = self.exported[calls.names]
        if isinstance(found, Exception):
            raise found
        return found


def _program(job: _Job) -> ShippedFile:
    path = job.folder / PROGRAM

    def make(reference: Reference) -> Runs:
        programs.write_program(job.program(reference.calls), path)
        return programs.read_program(path)

    return _written(job, path, make, "torch.export")


def _onnx(job: _Job, absent: Sequence[str]) -> ShippedFile:
    path = job.folder / ONNX
    if absent:
        return ShippedFile(name=ONNX, missing=f"{' and '.join(absent)} not installed: {_INSTALL}")

    def make(reference: Reference) -> Runs | None:
        exported = job.program(reference.calls)
        job.onnx_inputs[:] = programs.write_onnx(exported, path, reference.calls, list(reference.wanted[0]))
        return None if programs.lacks("onnxruntime") else programs.read_onnx(path)

    return _written(job, path, make, "onnxruntime")


def _written(job: _Job, path: Path, make: Callable[[Reference], Runs | None], checked_with: str) -> ShippedFile:
    """Write and check one file, for as many sizes as possible."""
    why = ""
    for reference in job.references:
        apart, names = None, reference.calls.names
        try:
            runs = make(reference)
            if runs is not None:
                apart = compared(runs, reference, exact_paths=path.name == PROGRAM)
                check_apart(apart)
            text = _how_checked(reference, runs is not None, apart, checked_with)
        except NotRunError as error:
            text = f"not checked: {error}"
        except Exception as error:  # noqa: BLE001 - an exporter may raise anything; the other files are written
            why = why or _reason(error)
            _remove(path)
            continue
        if why:
            text += f"; only for inputs of the example's {'length' if names else 'sizes'} ({why})"
        if reference.keeps:
            text += f"; {_KEEPS}"
        return ShippedFile(
            name=path.name,
            bytes=sum(file.stat().st_size for file in _parts(path) if file.exists()),
            largest=None if apart is None else apart.largest,
            relative=None if apart is None else apart.relative,
            sizes=names,
            checked=text,
        )
    return ShippedFile(name=path.name, missing=why)


def _how_checked(reference: Reference, ran: bool, apart: Apart | None, checked_with: str) -> str:
    if not ran:
        return f"not checked: {checked_with} is not installed"
    if apart is None:
        return f"runs in {checked_with}; not compared, for the network draws random numbers in evaluation mode"
    return f"checked with {checked_with} on {_sizes_of(reference.calls)}"


def _sizes_of(calls: Calls) -> str:
    number = len(calls.checks) - calls.num_like_example + 1
    values = ", and on other values" if calls.num_like_example > 1 else ""
    return f"{'the example' if number == 1 else f'inputs of {number} sizes'}{values}"


def _parts(path: Path) -> tuple[Path, ...]:
    return (path, path.with_name(ONNX_DATA)) if path.name == ONNX else (path,)


def _remove(path: Path) -> None:
    for part in _parts(path):
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Say in one line why a file could not be made: the first cause, and the user's line where it was raised."""
    if isinstance(error, DifferentError | FailedSizeError | ApoptosisError):
        return str(error).rstrip(".")
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = [
        frame
        for one in (first, error)
        for frame in traceback.extract_tb(one.__traceback__)
        if frame.filename.endswith(".py") and "site-packages" not in frame.filename
    ]
    own = [frame for frame in frames if not frame.filename.startswith(_ROOTS)]
    place = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    text = one_line(first)
    if type(first).__name__ == "GuardOnDataDependentSymNode":
        text = "the code branches on a number that it reads off a tensor; torch.where or torch.cond can be exported"
    return f"{text[:300]}{'...' if len(text) > 300 else ''}{place}"
