"""`apoptosis plan` of a network that was not trained yet: what to expect of it.

Holds: from options to network, batch and training step, and the result as text. Elsewhere: the figures
(recipes.forecast).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from apoptosis.decide.goal import read_goal
from apoptosis.errors import ArgumentError
from apoptosis.model.evaluate import as_call
from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.inspect import trial_input
from apoptosis.tools.recipes.config import RunConfig, resolve_device
from apoptosis.tools.recipes.data import check_options
from apoptosis.tools.recipes.datasets import DATASETS
from apoptosis.tools.recipes.fitting import check_fit, loss_of, numbers_of, placed_on, run_on
from apoptosis.tools.recipes.folder import write_json
from apoptosis.tools.recipes.forecast import Forecast, Held, affordable_rows, forecast
from apoptosis.tools.recipes.loop import make_network
from apoptosis.tools.recipes.optim import make_optimizer
from apoptosis.tools.recipes.own import call_factory, network_of, what_went_wrong
from apoptosis.tools.recipes.train import prepare


def expect(
    typed: Mapping[str, Any], factory: str | None, shapes: tuple[str, ...], dtype: str, json_file: Path | None
) -> None:
    """Build a network, try it on a batch, and print what to expect.

    Args:
        typed: fields of RunConfig that were typed.
        factory: package.module:factory, as --model.
        shapes: of one example, as typed; () where data or the factory give one.
        dtype: of inputs of these shapes.
        json_file: gets the result as well.

    Raises: ArgumentError: neither network nor data are named, or one of them twice.
    """
    if factory is not None:
        if typed.get("model", factory) != factory:
            raise ArgumentError(f"--model: '{typed['model']}' and '{factory}' are two networks: leave one of them out.")
        typed = {**typed, "model": factory}
    if not {"model", "network", "data"} & typed.keys():
        raise ArgumentError("say what to plan: a run folder, package.module:factory, or --network and --data.")
    if shapes and "data" in typed:
        raise ArgumentError("--input-shape: --data say the shape: leave one of them out.")
    config = RunConfig.checked(**typed)
    if "data" in typed or config.model is None:
        model, inputs, small, optimizer, step = _of_data(config)
    else:
        model, inputs, small, optimizer, step = _of_shape(config, shapes, dtype)
    found = forecast(model, as_call(inputs), as_call(small), optimizer, step, goal=read_goal(config.target),
                     align=config.align, exclude=config.exclude)  # fmt: skip
    what = config.model or f"network {config.network}"
    show(console(), found, f"'{what}'" + (f" on '{config.data}'" if "data" in typed or config.model is None else ""))
    if json_file is not None:
        write_json(json_file, {"config": config.model_dump(mode="json"), **found.as_dict()})


Parts = tuple[nn.Module, Any, Any, Optimizer, Callable[[], object]]


def _of_data(config: RunConfig) -> Parts:
    """Return network, a batch of inputs and two of them, optimizer and a training step of a run."""
    data, device = prepare(config)
    torch.manual_seed(config.seed)
    model = make_network(config, data, device)
    loss = loss_of(data.kind, config.loss)
    if config.model is not None or config.data not in DATASETS:
        check_fit(model, data, loss, config.loss, device)
    small = placed_on(data.train.between(0, 2)[0], device)
    rows = affordable_rows(model, as_call(small), min(config.batch, len(data.train)))
    inputs, labels = data.train.between(0, rows)
    inputs, labels, optimizer = placed_on(inputs, device), labels.to(device), make_optimizer(config, model)
    return model, inputs, small, optimizer, _step(model, optimizer, lambda: loss(run_on(model, inputs), labels))


def _of_shape(config: RunConfig, shapes: tuple[str, ...], dtype: str) -> Parts:
    """Return the same of a network alone; the mean square of its output stands in for the loss."""
    assert config.model is not None
    check_options(config)
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, example = network_of(config.model, call_factory(config.model, config.kwargs))
    model = model.to(device)

    def trial(rows: int) -> Any:
        made = tuple(trial_input(shape, rows, dtype).to(device) for shape in shapes)
        return made[0] if len(made) == 1 else made

    if shapes:
        small = trial(2)
        try:
            rows = affordable_rows(model, as_call(small), config.batch)
        except Exception as error:  # the user's code may raise anything
            raise ArgumentError(f"'{config.model}' fails on --input-shape: {what_went_wrong(error)}") from error
        inputs = trial(rows)
    elif example is None:
        raise ArgumentError(f"'{config.model}' gives no example input: name --data, or --input-shape.")
    else:
        inputs = small = placed_on(example, device)
    optimizer = make_optimizer(config, model)
    return (
        model, inputs, small, optimizer,
        _step(model, optimizer, lambda: numbers_of(run_on(model, inputs)).float().square().mean()),
    )  # fmt: skip


def _step(model: nn.Module, optimizer: Optimizer, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss())
        optimizer.step()

    return step


def show(out: Console, found: Forecast, what: str) -> None:
    """Print a forecast."""

    def line(text: str) -> None:
        out.print(text, soft_wrap=True, markup=False)

    line(f"what to expect of {what}; nothing is trained or written")
    share = 100 * found.shrinkable / found.macs if found.macs else 0.0
    line(
        f"{found.parameters:,.0f} parameters, {found.macs:,.0f} MACs per example; {share:.3g} % of the MACs are in "
        f"layers that may shrink ({found.groups[0]} of {found.groups[1]} groups, {found.channels[0]:,} of "
        f"{found.channels[1]:,} channels)"
    )
    if not found.groups[0]:
        line("nothing can be removed from this network: no group can be pruned (apoptosis inspect says why)")
    else:
        out.print(_table(found))
    _say_how(line, found)
    if found.goal:
        line(found.goal)
    if found.held:
        line("pins worth removing, by what halving these channels, too, would save:")
    for held in found.held:
        line(f"  {_held_words(held)}")
    for note in found.notes:
        line(f"note: {note}")


def _table(found: Forecast) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("channels of every group that may shrink", "MACs", "parameters", "step, ms", "faster"):
        table.add_column(head, justify="left" if head.startswith("channels") else "right")
    table.add_row("all", "1", "1", f"{1000 * found.step:.2f}", "1.00x")
    for width in found.widths:
        table.add_row(
            f"{100 * width.share:.0f} %",
            f"{width.macs / found.macs:.3f}",
            f"{width.parameters / found.parameters:.3f}",
            f"{1000 * width.seconds:.2f}",
            f"{found.step / width.seconds:.2f}x",
        )
    return table


def _say_how(line: Callable[[str], None], found: Forecast) -> None:
    """Say how the seconds are made, and how far they are from the clock's."""
    line(
        f"seconds are of a training step of {found.rows} examples ({found.table}), by a table measured now: every "
        "layer that may shrink, forward and backward, at 1, 3/4, 1/2 and 1/4 of its width; other operators and the "
        "optimizer in proportion to their numbers"
    )
    if found.measured is not None:
        ratio = found.step / found.measured
        rough = "" if 0.75 <= ratio <= 1.33 else ": the table is rough here, take the ratios for a hint"
        line(f"whole steps, measured: {1000 * found.measured:.2f} ms, {ratio:.2f} of that by the table{rough}")
    line("how many channels go is said by the data while the network trains; see apoptosis compare")


def _held_words(held: Held) -> str:
    more = f" and {len(held.groups) - 1} more" if len(held.groups) > 1 else ""
    where = f" ({held.where})" if held.where else ""
    return (
        f"{100 * held.seconds:.0f} % of the step, {100 * held.macs:.0f} % of the MACs: '{held.groups[0]}'{more} "
        f"({held.channels:,} channels): {held.reason}{where}. {held.remedy}"
    )
