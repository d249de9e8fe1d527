"""`apoptosis inspect`: what can be pruned in a network, and what cannot, and why.

Holds: placing the user's network, the tables. Elsewhere: importing it (recipes.own), the analysis (graph).
"""

from __future__ import annotations

import re
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
from apoptosis.errors import ArgumentError, CaptureError
from apoptosis.graph import analyse
from apoptosis.graph.trace.fakes import built_fake, make_fake
from apoptosis.model.evaluate import as_call, num_rows
from apoptosis.records import LinearSite, Structure
from apoptosis.surgery.rehearsal import rehearse
from apoptosis.surgery.target import Target
from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.options import JsonFile, check_json_file, integers
from apoptosis.tools.cli.rank_errors import refuse_several
from apoptosis.tools.recipes.folder import write_json
from apoptosis.tools.recipes.forecast import shrinkable_macs
from apoptosis.tools.recipes.memory import needs_numbers, within_memory
from apoptosis.tools.recipes.networks import num_parameters
from apoptosis.tools.recipes.own import call_factory, network_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
Placer = Callable[[nn.Module, Call], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

_NUMBER = re.compile(r"(?<=\.)\d+(?=[.',]|$)")  # of a module among others: layers.3.fc
_NUMBERS_READ = "--device fake: the network reads numbers off its weights, so that it was built with real ones"
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
    inputs = tuple(trial_input(shape, batch, input_dtype) for shape in input_shape or ())
    try:
        record = _described(model, kwargs, inputs, device)
    except (ArgumentError, CaptureError) as error:
        if device != "fake" or not needs_numbers(error):
            raise
        device = "cpu"
        with within_memory():
            record = _described(model, kwargs, inputs, device)
        record["notes"].append(f"{_NUMBERS_READ} ({' '.join(str(error).split())[:160]})")
    if json_file is not None:
        write_json(json_file, {"model": model, "input_shape": list(input_shape or ()), "device": device, **record})
    show(record)


def _described(model: str, kwargs: str, inputs: tuple[Tensor, ...], device: str) -> dict[str, Any]:
    """Build the network on a device, and return what can be pruned in it."""
    with placed(device) as place:
        network, example = network_of(model, call_factory(model, kwargs))
        example = inputs or example
        if example is None:
            raise ArgumentError(
                f"'{model}' gives no example input: give --input-shape, or return (model, example_input)."
            )
        network, args, named = place(unwrap(network).model, as_call(example))
        target = Target(model=network, optimizers=(), call=(args, named))
        structure = rehearse(target, analyse(network, args, named), {})
    return describe(structure, network, max(1, num_rows((args, named))))


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
        "macs_that_may_shrink": shrinkable_macs(structure) / batch,
        "groups": groups,
        "pins": pins,
        "notes": list(structure.notes),
    }


def trial_input(shape: str, batch: int, dtype: str) -> Tensor:
    """Return random examples of a shape that was typed, zeros where these are whole numbers.

    Raises: ArgumentError: no shape, no number of examples, or another type than DTYPES has.
    """
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
    out.print(summary(record), soft_wrap=True, markup=False)


def summary(record: dict[str, Any]) -> str:
    """Say in one line how large a network is, and how much of it may shrink."""
    macs, free = record["macs"], [group for group in record["groups"] if not group["pinned"]]
    channels, all_channels = (sum(g["channels"] for g in groups) for groups in (free, record["groups"]))
    share = 100 * record["macs_that_may_shrink"] / macs if macs else 0.0
    return (
        f"{record['parameters']:,} parameters, {macs:,.0f} MACs per example; {share:.3g} % of the MACs are in layers "
        f"that may shrink ({len(free)} of {len(record['groups'])} groups, {channels:,} of {all_channels:,} channels)"
    )


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
