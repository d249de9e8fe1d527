"""The README of a shipment: what every file is, how it was checked, how to load it without this library.

Holds: its text. Elsewhere: the files.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from apoptosis.shipping.records import ONNX, ONNX_DATA, PROGRAM, RECORD, WEIGHTS, WIDTHS, Shipment
from apoptosis.shipping.sizes import Calls

_WHAT = {
    WEIGHTS: "the weights by name, in safetensors",
    WIDTHS: "the widths: how large every layer is",
    PROGRAM: "the network with its weights, as a program of torch.export",
    ONNX: f"the network with its weights, as ONNX (with `{ONNX_DATA}` beside it where that exists)",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Described:
    """What a README tells of the network.

    calls: the example is the first of its checks. outputs: what the network returns there, by path. onnx_inputs: names
    in the ONNX file.
    """

    model: nn.Module
    calls: Calls
    outputs: Mapping[str, Tensor]
    onnx_inputs: Sequence[str]


def readme(shipment: Shipment, found: Described) -> str:
    """Return the text of the README."""
    number = sum(p.numel() for p in found.model.parameters())
    parts = [
        f"# {type(found.model).__name__}, {number:,} parameters",
        f"Written by torch-apoptosis {import_module('apoptosis').__version__}, which no file here needs, with "
        f"{_versions()}.",
        _table(shipment),
        _inputs(found),
    ]
    there = {file.name: file for file in shipment.files if not file.missing}
    if PROGRAM in there:
        parts.append(_of_program(found))
    if ONNX in there:
        parts.append(_of_onnx(found))
    parts.append(_of_weights(found))
    return "\n\n".join(parts) + "\n"


def _versions() -> str:
    names = [f"torch {torch.__version__}"]
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            names.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*names, f"Python {platform.python_version()}"])


def _table(shipment: Shipment) -> str:
    rows = [
        "| file | bytes | what it is | sizes of inputs that may vary | largest difference from the network | checked |",
        "|---|---|---|---|---|---|",
    ]
    for file in shipment.files:
        what = _WHAT[file.name]
        if file.missing:
            rows.append(f"| `{file.name}` | - | {what}: **not written** | - | - | {_cell(file.missing)} |")
            continue
        apart = "-" if file.largest is None else f"{file.largest:.2g} ({file.relative:.1g} of the largest output)"
        varies = (", ".join(file.sizes) or "none") if file.name in (PROGRAM, ONNX) else "-"
        rows.append(f"| `{file.name}` | {file.bytes:,} | {what} | {varies} | {apart} | {_cell(file.checked) or '-'} |")
    rows.append(f"| `{RECORD}` | - | these figures, for programs | - | - | - |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _inputs(found: Described) -> str:
    call = found.calls.checks[0]
    leaves, _ = tree_flatten_with_path((call[0], dict(call[1])))
    lines = ["## Inputs and outputs", "", "| | name | type | shape |", "|---|---|---|---|"]
    for (path, x), axes in zip(leaves, found.calls.axes, strict=True):
        name = "".join(str(key) for key in path[1:]).removeprefix("['").removesuffix("']")
        if isinstance(x, Tensor):
            shape = ", ".join(f"{axes[dim]}={size}" if dim in axes else str(size) for dim, size in enumerate(x.shape))
            lines.append(f"| input | `{name}` | {_dtype(x)} | {shape or 'one number'} |")
        else:
            lines.append(f"| input | `{name}` | always {_cell(repr(x))} | - |")
    for name, x in found.outputs.items():
        shape = ", ".join(map(str, x.shape)) or "one number"
        lines.append(f"| output | `{name}` | {_dtype(x)} | {shape} |")
    if found.calls.names:
        names = _names([f"*{name}*" for name in found.calls.names])
        lines += ["", f"Of the sizes {names} may be others than the example's, in the files whose row above says so."]
    return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    return " and ".join(names)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _of_program(found: Described) -> str:
    args, kwargs = found.calls.checks[0]
    given = ", ".join([*map(code_of, args), *(f"{name}={code_of(value)}" for name, value in kwargs.items())])
    return f"""## {PROGRAM}: with torch alone

```python
import torch

network = torch.export.load("{PROGRAM}").module()
with torch.no_grad():
    outputs = network({given})
```

It computes in evaluation mode on the CPU; `torch.export.passes.move_to_device_pass(program, "cuda")` on what
`torch.export.load` returns moves it to another device. torch reads files of its own version and, as a rule, of earlier
ones."""


def _of_onnx(found: Described) -> str:
    call = found.calls.checks[0]
    tensors = [x for x in tree_flatten((call[0], dict(call[1])))[0] if isinstance(x, Tensor)]
    pairs = zip(found.onnx_inputs, tensors, strict=False)
    given = ", ".join(f'"{name}": numpy.zeros({tuple(x.shape)}, "{_dtype(x)}")' for name, x in pairs)
    return f"""## {ONNX}: with onnxruntime

```python
import numpy, onnxruntime

session = onnxruntime.InferenceSession("{ONNX}")
outputs = session.run(None, {{{given}}})
```

Outputs come in the order of the table above, as {_names([f"`{name}`" for name in found.outputs])}."""


def _of_weights(found: Described) -> str:
    kind = type(found.model).__name__
    text = f"""## {WEIGHTS}: into your own module

```python
from safetensors.torch import load_model

load_model(network, "{WEIGHTS}")
```

`network` is a `{kind}` built with the widths in `{WIDTHS}` (`shapes` there says how large every tensor is; where
torch-apoptosis is installed, `apoptosis.set_widths_(network, widths)` gives them to one of full width). What is tied is
stored once; `load_file` returns the tensors by name."""
    own = sorted(name for name, m in found.model.named_modules() if type(m).__module__.startswith("apoptosis."))
    if own:
        text += (
            "\n\n"
            f"These modules are no longer of the class that your code builds: {', '.join(f'`{n}`' for n in own[:8])}"
            f"{', ...' if len(own) > 8 else ''}. The weights alone do not make this network: use the other files, or "
            "load a checkpoint with torch-apoptosis."
        )
    return text


def code_of(value: Any) -> str:
    """Return Python code for an input of this form, all zeros.

    Example:
        >>> code_of({"ids": torch.ones(1, 2, dtype=torch.int64), "n": [3]})
        "{'ids': torch.zeros((1, 2), dtype=torch.int64), 'n': [3]}"
    """
    if isinstance(value, Tensor):
        return f"torch.zeros({tuple(value.shape)}, dtype={value.dtype})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {code_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(code_of, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(f"{code_of(item)}, " for item in value) + ")"
    return repr(value)
