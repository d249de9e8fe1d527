"""`apoptosis inspect`: what may shrink in a network, and what may not, and why.

Lives here: importing the user's network, the tables. Does not live here: the analysis (graph).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn

from apoptosis.cli.display import console
from apoptosis.cli.options import JsonFile, integers
from apoptosis.errors import ArgumentError
from apoptosis.graph import analyse
from apoptosis.recipes.folder import write_json
from apoptosis.recipes.networks import num_parameters
from apoptosis.records import Structure

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int64": torch.int64}


def inspect(
    model: Annotated[str, typer.Argument(help="package.module:factory, importable from here.")],
    input_shape: Annotated[list[str], typer.Option(help="Shape of one example, 3,32,32; repeat for several inputs.")],
    batch: Annotated[int, typer.Option(help="Examples in the trial input.")] = 2,
    kwargs: Annotated[str, typer.Option(help='Arguments of the factory, as JSON: {"num_classes": 10}.')] = "{}",
    input_dtype: Annotated[str, typer.Option(help=f"Of the inputs: {', '.join(DTYPES)}.")] = "float32",
    json_file: JsonFile = None,
) -> None:
    """List the coupled channel groups of a network, their widths and consumer sites, and what is pinned and why."""
    network = build(model, kwargs)
    inputs = tuple(_trial(shape, batch, input_dtype) for shape in input_shape)
    structure = analyse(network, inputs, {})
    record = describe(structure, network, batch)
    if json_file is not None:
        write_json(json_file, {"model": model, "input_shape": list(input_shape), **record})
    _show(record)


def build(model: str, kwargs: str) -> nn.Module:
    """Import `package.module:factory`, the working directory first, and call it; a module is taken as it is.

    Raises: ArgumentError: it cannot be imported or called, or gives no torch.nn.Module.
    """
    module_name, _, name = model.partition(":")
    if not module_name or not name:
        raise ArgumentError(f"'{model}' is not of the form package.module:factory.")
    try:
        arguments = json.loads(kwargs)
    except ValueError as error:
        raise ArgumentError(f"--kwargs: '{kwargs}' is not JSON ({error}).") from error
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
        raise ArgumentError(f"'{model}' cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"'{model}' gives a {type(network).__name__}, not a torch.nn.Module.")
    return network


def describe(structure: Structure, network: nn.Module, batch: int) -> dict[str, Any]:
    """Return what a capture found as plain values; MACs are per example."""
    groups = [
        {
            "name": group.name,
            "channels": group.num_channels,
            "sites": [{"module": site.module, "kind": site.kind, "taps": site.taps} for site in group.sites],
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
        return torch.zeros((batch, *sizes), dtype=torch.int64)
    return torch.randn((batch, *sizes), generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])


def _show(record: dict[str, Any]) -> None:
    out = console()
    table = Table(box=box.SIMPLE, pad_edge=False, title="groups that may shrink", title_justify="left")
    for head, justify in (("group", "left"), ("channels", "right"), ("MACs per channel", "right"), ("read by", "left")):
        table.add_column(head, justify="right" if justify == "right" else "left", overflow="fold")
    for group in record["groups"]:
        if not group["pinned"]:
            sites = ", ".join(site["module"] for site in group["sites"])
            table.add_row(group["name"], str(group["channels"]), f"{group['macs_per_channel']:,.0f}", sites)
    out.print(table if table.row_count else "no group may shrink")
    if record["pins"]:
        out.print("pinned:", markup=False)
    for pin in record["pins"]:
        place = f" ({pin['where']})" if pin["where"] else ""
        remedy = f" {pin['remedy']}" if pin["remedy"] else ""
        line = f"  '{pin['group']}' ({pin['channels']} channels): {pin['reason']}{place}.{remedy}"
        out.print(line, soft_wrap=True, markup=False)
    for note in record["notes"]:
        out.print(f"note: {note}", soft_wrap=True, markup=False)
    out.print(f"{record['parameters']:,} parameters, {record['macs']:,.0f} MACs per example", markup=False)
