"""`apoptosis inspect`: what can be pruned in a network, and what cannot, and why.

Holds: importing the user's network, the tables. Elsewhere: the analysis (graph).
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apoptosis.distributed.wrappers import unwrap
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.graph.trace.fakes import built_fake, make_fake
from apoptosis.model.evaluate import as_call, num_rows
from apoptosis.records import LinearSite, Structure
from apoptosis.storage.plain_json import parse
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target
from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.options import JsonFile, check_json_file, integers
from apoptosis.tools.cli.rank_errors import refuse_several
from apoptosis.tools.recipes.folder import write_json
from apoptosis.tools.recipes.networks import num_parameters

Call = tuple[tuple[Any, ...], dict[str, Any]]
Placer = Callable[[nn.Module, Call], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.',]|$)")  # of a module among others: layers.3.fc
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int64": torch.int64}


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="package.module:factory, importable from here; gives a model, or (model, example input)."),
    ],
    input_shape: Annotated[
        list[str] | None, typer.Option(help="Shape of one example, 3,32,32; repeat for several inputs.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples in the trial input.")] = 2,
    kwargs: Annotated[str, typer.Option(help='Arguments of the factory, as JSON: {"num_classes": 10}.')] = "{}",
    input_dtype: Annotated[str, typer.Option(help=f"Of the inputs: {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[
        str,
        typer.Option(
            help="Where the model is built: cpu, cuda ..., or meta or fake, which take no memory for weights."
        ),
    ] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """List the channel groups of a network, their widths and consumer sites, and what cannot be pruned and why."""
    refuse_several("inspect")
    check_json_file(json_file)
    inputs = [_trial(shape, batch, input_dtype) for shape in input_shape or ()]
    with placed(device) as place:
        network, example = build(model, kwargs)
        if inputs:
            example = tuple(inputs)
        elif example is None:
            raise ArgumentError(
                f"'{model}' gives no example input: give --input-shape, or return (model, example_input)."
            )
        network, args, named = place(unwrap(network).model, as_call(example))
        structure = rehearse(
            Target(model=network, optimizers=(), call=(args, named)), analyse(network, args, named), {}
        )
    record = describe(structure, network, max(1, num_rows((args, named))))
    if json_file is not None:
        write_json(json_file, {"model": model, "input_shape": list(input_shape or ()), "device": device, **record})
    show(record)


@contextmanager
def placed(device: str) -> Iterator[Placer]:
    """Build what is built inside on a device, or as fake tensors: shapes without numbers (but for what is small).

    Yields: a function that puts a model and the arguments of a call there, as far as they are not.

    Raises: ArgumentError: no such device.
    """
    if device == "fake":
        with built_fake() as mode:

            def fake(network: nn.Module, call: Call) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
                make_fake(network, mode)
                return network, *call

            yield fake
        return
    try:
        there = torch.device(device)
        torch.empty(0, device=there, dtype=torch.float32)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"--device: '{device}' cannot be used: {str(error).splitlines()[0]}") from error

    def move(network: nn.Module, call: Call) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(there), call)
        return network.to(there), args, kwargs

    with there:
        yield move


def build(model: str, kwargs: str) -> tuple[nn.Module, Any]:
    """Import `package.module:factory`, the working directory first, and call it; a module is taken as it is.

    Returns: the module, and the example input that the factory gave with it, or None.

    Raises: ArgumentError: it cannot be imported or called, or gives no torch.nn.Module.
    """
    module_name, _, name = model.partition(":")
    if not module_name or not name:
        raise ArgumentError(
            f"'{model}' is not of the form package.module:factory (for example torchvision.models:resnet18)."
        )
    try:
        arguments = parse(kwargs)
    except ValueError as error:
        raise ArgumentError(f"--kwargs: '{kwargs[:80]}' is not JSON ({error}).") from error
    if not isinstance(arguments, dict):
        raise ArgumentError(f"--kwargs: '{kwargs}' is not a JSON object.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
        network = found if isinstance(found, nn.Module) else found(**arguments)
    except Exception as error:  # the user's code may raise anything
        hint = " (its arguments are given with --kwargs)" if isinstance(error, TypeError) else ""
        raise ArgumentError(f"'{model}' cannot be built: {type(error).__name__}: {error}{hint}") from error
    example = None
    if isinstance(network, tuple) and len(network) == 2:
        network, example = network
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"'{model}' gives a {type(network).__name__}, not a torch.nn.Module.")
    return network, example


def describe(structure: Structure, network: nn.Module, batch: int) -> dict[str, Any]:
    """Return what a capture found as plain values; MACs are per example."""
    groups = [
        {
            "name": group.name,
            "channels": group.num_channels,
            "sites": [
                {"module": s.module, "kind": s.kind, "taps": s.taps if isinstance(s, LinearSite) else 1}
                for s in group.sites
            ],
            "members": [member.tensor for member in group.members],
            "macs_per_channel": group.macs_per_channel / batch,
            "pinned": group.pin is not None,
        }
        for group in structure.groups
    ]
    pins = [
        {
            "group": group.pin.group,
            "channels": group.pin.num_channels,
            "code": group.pin.code,
            "operator": group.pin.operator,
            "reason": group.pin.reason,
            "where": group.pin.where,
            "remedy": group.pin.remedy,
        }
        for group in structure.groups
        if group.pin is not None
    ]
    return {
        "parameters": num_parameters(network),
        "macs": structure.macs / batch,
        "groups": groups,
        "pins": pins,
        "notes": list(structure.notes),
    }


def _trial(shape: str, batch: int, dtype: str) -> Tensor:
    sizes = integers("--input-shape", shape)
    if min(sizes) < 1 or batch < 1:
        raise ArgumentError(f"--input-shape: sizes and batch must be at least 1 (given: {shape}, batch {batch}).")
    if dtype not in DTYPES:
        raise ArgumentError(f"--input-dtype: unknown '{dtype}'; there are {', '.join(DTYPES)}.")
    if dtype == "int64":
        return torch.zeros((batch, *sizes), dtype=torch.int64, device="cpu")
    return torch.randn(
        (batch, *sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(DTYPES[dtype])


def show(record: dict[str, Any]) -> None:
    """Print what `describe` returned: two tables, and the notes. Rows that differ in numbers alone are put together."""
    out = console()
    free = [group for group in record["groups"] if not group["pinned"]]
    table = _table("groups that can be pruned", {"group": "left", "channels": "right", "MACs per channel": "right",
                                              "read by": "left"})  # fmt: skip
    for row in _merged(
        (g["name"], str(g["channels"]), f"{g['macs_per_channel']:,.0f}", ", ".join(s["module"] for s in g["sites"]))
        for g in free
    ):
        table.add_row(*row)
    nothing = "nothing can be removed from this network: no group can be pruned"
    out.print(table if free else nothing, markup=False)
    table = _table("cannot be pruned", {"group": "left", "channels": "right", "why": "left", "operator": "left",
                                        "line": "left", "what would unpin it": "left"})  # fmt: skip
    for row in _merged(
        (p["group"], str(p["channels"]), _why(p), p["operator"], p["where"], p["remedy"]) for p in record["pins"]
    ):
        table.add_row(*row)
    if record["pins"]:
        out.print(table)
    for note in record["notes"]:
        out.print(f"note: {note}", soft_wrap=True, markup=False)
    out.print(f"{record['parameters']:,} parameters, {record['macs']:,.0f} MACs per example", markup=False)


def _table(title: str, columns: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, title=title, title_justify="left")
    for head, justify in columns.items():
        table.add_column(head, justify=justify, overflow="fold")
    return table


def _why(pin: dict[str, Any]) -> str:
    """Return a pin's reason without the operator, which has a column of its own."""
    return str(pin["reason"]).removeprefix(f"operator {pin['operator']} ") if pin["operator"] else str(pin["reason"])


def _merged(rows: Iterable[tuple[str, ...]]) -> list[tuple[Text, ...]]:
    """Put rows together that differ in the numbers of names alone: `layers.*.fc (x 12)`."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        found.setdefault(tuple(_NUMBER.sub("*", cell) for cell in row), []).append(row)
    merged = []
    for key, alike in found.items():
        shown = alike[0] if len(alike) == 1 else (f"{key[0]} (x {len(alike)})", *key[1:])
        merged.append(tuple(Text(cell) for cell in shown))
    return merged
