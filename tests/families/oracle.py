"""The one oracle: what must hold after redundancy was planted in a model and removed at tolerance 0.

    operation = operate(family, torch.float64)
    for check in CHECKS.values():
        check(operation)

Every check is a property of its own, so that a failure says which one broke. `oracle(family)` runs all of them. None
changes the operation, so it can be shared. Elsewhere: the models (registry.py), planting (plant.py).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.utils._pytree import tree_map_only

from apoptosis import Event, load, save, set_widths_, shrink_, widths_of
from apoptosis.checkpoint.tensors import tensors_of
from apoptosis.checkpoint.widths import record_of
from apoptosis.errors import CheckpointError
from apoptosis.graph import analyse
from apoptosis.model.evaluate import as_call
from apoptosis.records import Group, Structure
from apoptosis.surgery.attributes import ATTRIBUTES
from families.family import Family
from families.plant import enliven, plant, settle

DROPOUTS = (nn.modules.dropout._DropoutNd,)
STEPS = 20
TOLERANCE64 = 1e-10


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A model before and after its redundancy was removed; nobody may change either.

    planted: group -> channels planted; not_planted: group -> why not. optimizer: Adam on `after`, one step before.
    """

    family: Family
    dtype: torch.dtype
    before: nn.Module
    after: nn.Module
    optimizer: Optimizer
    event: Event
    planted: Mapping[str, int]
    not_planted: Mapping[str, str]
    widths: Mapping[str, int]

    @property
    def tolerance(self) -> float:
        """Relative error of the outputs allowed."""
        return TOLERANCE64 if self.dtype == torch.float64 else self.family.tolerance32

    def copy(self) -> tuple[nn.Module, Optimizer]:
        """The shrunk model with its optimizer, free to change."""
        return copy.deepcopy((self.after, self.optimizer))


def build(family: Family, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The family's model, away from its initial values, in evaluation mode."""
    torch.manual_seed(seed)
    model = family.build().to(dtype)
    enliven(model, seed)
    return model.eval()


def inputs(family: Family, dtype: torch.dtype, seed: int, rows: int | None = None) -> Any:
    """Inputs as `shrink_` takes them."""
    torch.manual_seed(1000 + seed)
    example = family.example(rows or family.rows)
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, example)


def run(family: Family, model: nn.Module, example: Any, seed: int = 0) -> Tensor:
    """The output that counts; the same random numbers (stochastic depth) on every call."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, as_call(example))
    torch.manual_seed(seed)
    return family.read(model(*args, **kwargs))


def structure_of(family: Family, model: nn.Module, example: Any) -> Structure:
    """The structure that an event of this family sees."""
    args, kwargs = as_call(example)
    return analyse(model, args, kwargs, norm_widths=family.norm_widths)


def shrink(family: Family, model: nn.Module, example: Any, batches: list[Any], optimizer: Optimizer) -> Event:
    """One event in which only what is exactly redundant goes."""
    return shrink_(model, example, batches, tolerance=0, align=1, optimizer=optimizer, norm_widths=family.norm_widths)


def quiet(model: nn.Module) -> nn.Module:
    """Training mode with dropout off."""
    model.train()
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name and "path" not in name:
                setattr(module, name, 0.0)
    return model


def plant_all(model: nn.Module, structure: Structure, numbers: Mapping[str, int], seed: int) -> dict[str, str]:
    """Plant in every group that is named; returns why not, by group."""
    refused: dict[str, str] = {}
    for index, (name, num) in enumerate(numbers.items()):
        try:
            plant(model, structure, name, num, seed=seed + index)
        except (KeyError, ValueError) as error:
            refused[name] = str(error.args[0])
    return refused


def operate(family: Family, dtype: torch.dtype, seed: int = 0) -> Operation:
    """Build, train one step, plant, shrink with tolerance 0."""
    model = build(family, dtype, seed)
    example = inputs(family, dtype, seed, rows=4)
    batches = [inputs(family, dtype, seed + 1 + i) for i in range(family.batches)]
    optimizer = Adam(model.parameters(), lr=family.lr)
    quiet(model)
    run(family, model, batches[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    settle(model, lambda: run(family, model, batches[0]), seed)
    model.eval()
    structure = structure_of(family, model, example)
    refused = plant_all(model, structure, family.groups, seed)
    before = copy.deepcopy(model)
    event = shrink(family, model, example, batches, optimizer)
    planted = {name: num for name, num in family.groups.items() if name not in refused}
    return Operation(
        family=family,
        dtype=dtype,
        before=before,
        after=model,
        optimizer=optimizer,
        event=event,
        planted=planted,
        not_planted=refused,
        widths={group.name: group.num_channels for group in structure.groups},
    )


def difference(a: Tensor, b: Tensor) -> float:
    """Relative error ‖a - b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------- the properties


def check_planted(operation: Operation) -> None:
    """Every listed group is open, and what was planted in it was found."""
    for name in operation.family.groups:
        if name not in operation.family.missing:
            check_group(operation, name)


def check_group(operation: Operation, name: str) -> None:
    """One listed group is open and lost at least what was planted."""
    assert name not in operation.not_planted, f"'{name}' must not be pinned: {operation.not_planted[name]}"
    width, planted = operation.widths[name], operation.planted[name]
    kept = operation.event.groups.get(name, (width, width))[1]
    assert kept <= width - planted, (
        f"'{name}': {width} channels, {planted} planted, {kept} kept; {'; '.join(operation.event.notes)}"
    )


def check_eval_outputs(operation: Operation) -> None:
    """Outputs in evaluation mode are the same on inputs that were not used."""
    x = inputs(operation.family, operation.dtype, 77)
    with torch.no_grad():
        expected, found = (run(operation.family, m, x) for m in (operation.before, operation.after))
    assert float((expected - expected.mean(0)).norm()) > 1e-3 * float(expected.norm()), "the outputs hardly vary"
    error = difference(found, expected)
    assert error <= operation.tolerance, f"outputs changed by {error:.3g} relative in evaluation mode"


def check_train_outputs(operation: Operation) -> None:
    """Outputs in training mode without dropout are the same, twice, and so are those in evaluation mode after it."""
    pair = [quiet(copy.deepcopy(m)) for m in (operation.before, operation.after)]
    with torch.no_grad():
        for turn in range(2):
            x = inputs(operation.family, operation.dtype, 78 + turn)
            expected, found = (run(operation.family, m, x, seed=turn) for m in pair)
            error = difference(found, expected)
            assert error <= operation.tolerance, f"outputs changed by {error:.3g} relative in training mode"
        x = inputs(operation.family, operation.dtype, 77)
        expected, found = (run(operation.family, m.eval(), x) for m in pair)
    error = difference(found, expected)
    assert error <= operation.tolerance, f"outputs changed by {error:.3g} relative in evaluation mode after training"


def check_attributes(operation: Operation) -> None:
    """Attributes of modules say what the tensors' shapes say."""
    for name, module in operation.after.named_modules():
        kind = next((cls for cls in type(module).__mro__ if cls in ATTRIBUTES), None)
        gated = isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for leaf, dim, attribute, times_groups in () if kind is None or gated else ATTRIBUTES[kind]:
            tensor = getattr(module, leaf, None)
            if not isinstance(tensor, Tensor) or tensor.dim() <= dim:
                continue
            value = getattr(module, attribute)
            value = value[dim] if isinstance(value, tuple) else value
            size = tensor.shape[dim] * (module.groups if times_groups else 1)
            if isinstance(module, nn.PReLU) and value == 1:
                continue
            assert value == size, f"'{name}'.{attribute} is {value}, its tensor says {size}"


def check_checkpoint(operation: Operation) -> None:
    """A checkpoint loads into a freshly built full-width model, which then is the same network."""
    family = operation.family
    fresh = quiet(build(family, operation.dtype, seed=5)).eval()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "net.safetensors", operation.after)
        load(Path(folder) / "net.safetensors", fresh)
    x = inputs(family, operation.dtype, 77)
    with torch.no_grad():
        expected, found = run(family, operation.after, x), run(family, fresh, x)
    assert torch.equal(found, expected), f"outputs differ by {difference(found, expected):.3g} after save and load"
    assert repr(fresh) == repr(operation.after)


def check_widths(operation: Operation) -> None:
    """A record of widths, as JSON, makes a fresh model one that takes the state_dict; and wide again after that."""
    family, x = operation.family, inputs(operation.family, operation.dtype, 77)
    full = {name: tuple(tensor.shape) for name, tensor in tensors_of(operation.before).items()}
    records = [json.loads(json.dumps(record_of(net, {}, full))) for net in (operation.after, operation.before)]
    fresh = quiet(build(family, operation.dtype, seed=5)).eval()
    for record, net in zip((*records, records[0]), (operation.after, operation.before, operation.after), strict=True):
        set_widths_(fresh, record)
        fresh.load_state_dict(net.state_dict())
        with torch.no_grad():
            expected, found = run(family, net, x), run(family, fresh, x)
        assert torch.equal(found, expected), f"outputs differ by {difference(found, expected):.3g} after set_widths_"
    try:
        told = widths_of(operation.after.state_dict(), fresh)
    except CheckpointError as error:
        assert "apo.widths" in str(error)  # noqa: PT017 - either is right
        return
    other = quiet(build(family, operation.dtype, seed=6)).eval()
    set_widths_(other, told)
    other.load_state_dict(operation.after.state_dict())
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # a number of the network's own; never another result
        found = run(family, other, x)
        expected = run(family, operation.after, x)
        assert torch.equal(found, expected), f"outputs differ by {difference(found, expected):.3g}, widths from shapes"


def check_state_dict(operation: Operation) -> None:
    """A state_dict goes out and into another model of the same widths, strictly."""
    other, _ = operation.copy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(operation.after.state_dict())
    x = inputs(operation.family, operation.dtype, 77)
    with torch.no_grad():
        expected, found = run(operation.family, operation.after, x), run(operation.family, other, x)
    assert torch.equal(found, expected)


def _loss(family: Family, model: nn.Module, example: Any) -> Tensor:
    """Distance from targets that are fixed for a shape."""
    out = run(family, model, example)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return F.mse_loss(out, target)


def _gradients(family: Family, model: nn.Module, example: Any) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(family, model, example).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(operation: Operation) -> None:
    """Whatever had a gradient before has one of its own shape, and one step of the optimizer changes it."""
    family = operation.family
    x = inputs(family, operation.dtype, 79)
    old = _gradients(family, quiet(copy.deepcopy(operation.before)), x)
    model, optimizer = operation.copy()
    new = _gradients(family, quiet(model), x)
    largest = max(float(g.abs().max()) for g in old.values())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in old or float(old[name].abs().max()) <= 1e-6 * largest:
            continue
        assert name in new, f"'{name}' has no gradient"
        assert new[name].shape == parameter.shape
        assert bool(new[name].isfinite().all()), f"the gradient of '{name}' is not finite"
        assert bool(new[name].any()), f"the gradient of '{name}' is zero"
        assert not torch.equal(parameter, values[name]), f"a step left '{name}' as it was"


def check_training(operation: Operation) -> None:
    """The loss falls over 20 steps with the optimizer that went through the surgery; its state has the new shapes."""
    model, optimizer = operation.copy()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape, f"{key} of '{name}' has shape {tuple(value.shape)}"
    quiet(model)
    x = inputs(operation.family, operation.dtype, 79)
    losses = []
    for _ in range(STEPS):
        loss = _loss(operation.family, model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}"


def shares(groups: Mapping[str, Group], name: str) -> int:
    """Into how many equal parts a group falls, of each of which an event can take one out of all that go along."""
    along = [group for group in (groups[name], *(groups[n] for n in groups[name].tied_groups if n in groups))]
    return math.gcd(*(group.num_channels // group.rows for group in along))


def event_of(operation: Operation, name: str) -> tuple[int, int]:
    """Channels of a group before and after the event."""
    width = operation.widths[name]
    return operation.event.groups.get(name, (width, width))


def check_second_event(operation: Operation) -> None:
    """Planted again in the shrunk model, redundancy is found again."""
    family, dtype = operation.family, operation.dtype
    model, optimizer = operation.copy()
    example = inputs(family, dtype, 50, rows=4)
    structure = structure_of(family, model, example)
    groups = {g.name: g for g in structure.groups}
    gone = [name for name in operation.planted if name not in groups]
    assert not gone, f"groups that are no longer found after the first event: {gone}"
    numbers = {
        name: groups[name].num_channels // parts
        for name in operation.planted
        if name not in family.missing and event_of(operation, name)[1] > 1 and (parts := shares(groups, name)) >= 3
    }
    widths = {name: groups[name].num_channels for name in numbers}
    refused = plant_all(model, structure, numbers, seed=50)
    assert not refused, f"pinned after the first event: {refused}"
    before = copy.deepcopy(model)
    batches = [inputs(family, dtype, 51 + i) for i in range(family.batches)]
    event = shrink(family, model, example, batches, optimizer)
    for name, num in numbers.items():
        kept = event.groups.get(name, (0, widths[name]))[1]
        assert kept <= widths[name] - num, f"'{name}': {num} of {widths[name]} planted, {kept} kept; {event.notes}"
    x = inputs(family, dtype, 77)
    with torch.no_grad():
        expected, found = run(family, before, x), run(family, model, x)
    error = difference(found, expected)
    assert error <= operation.tolerance, f"outputs changed by {error:.3g} relative in the second event"


Check = Callable[[Operation], None]
#: property -> its check and the precisions in which it is asked.
CHECKS: dict[str, tuple[Check, tuple[torch.dtype, ...]]] = {
    "planted": (check_planted, (torch.float64, torch.float32)),
    "eval outputs": (check_eval_outputs, (torch.float64, torch.float32)),
    "train outputs": (check_train_outputs, (torch.float64, torch.float32)),
    "attributes": (check_attributes, (torch.float64,)),
    "checkpoint": (check_checkpoint, (torch.float32,)),
    "widths": (check_widths, (torch.float32,)),
    "state_dict": (check_state_dict, (torch.float32,)),
    "gradients": (check_gradients, (torch.float32,)),
    "training": (check_training, (torch.float32,)),
    "second event": (check_second_event, (torch.float64,)),
}


def oracle(family: Family, seed: int = 0) -> None:
    """Run every check in every precision it is asked in; raises AssertionError with the property that broke."""
    for dtype in (torch.float64, torch.float32):
        operation = operate(family, dtype, seed)
        for name, (check, dtypes) in CHECKS.items():
            if dtype in dtypes:
                try:
                    check(operation)
                except AssertionError as error:
                    raise AssertionError(f"{family.name}, {name}, {dtype}: {error}") from error
