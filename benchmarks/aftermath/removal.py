"""What is taken away in a trial: a share of groups by surgery, or a residual branch; and what is known beforehand.

Holds: one observation window, plans of chosen groups, predictors. Elsewhere: training on (training.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis.criteria import get_criterion, relative_error
from apoptosis.criteria.views import column_squares, output_variance
from apoptosis.decide.acceptance import AcceptanceResult
from apoptosis.engine.applying import apply_reductions
from apoptosis.graph import analyse, replay
from apoptosis.model.outputs import Change
from apoptosis.observe import Observation, Observer
from apoptosis.planner import Plan, Request, Why, macs_after, make_plan
from apoptosis.planner.views import make_view
from apoptosis.records import Group, LinearSite, Structure
from apoptosis.surgery.target import Target
from benchmarks.aftermath.tasks import call
from benchmarks.aftermath.training import Run

WINDOW = (8, 12)  # fewest and most steps of an observation window
EXAMPLES = 2  # in the example input of a task
BRANCH_BATCHES = 4  # that a branch's mean is taken over


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """A network's structure with what a window saw of it. gradients: rows of gradients by (group, site key)."""

    structure: Structure
    observations: dict[tuple[str, str], Observation]
    gradients: dict[tuple[str, str], int]

    @property
    def open(self) -> list[Group]:
        """Open groups, every site of which was observed."""
        groups = self.structure.open_groups
        return [g for g in groups if all((g.name, site.key) in self.observations for site in g.sites)]

    def units(self) -> list[tuple[str, ...]]:
        """Names of groups that change together, in the order of the network."""
        names, units, taken = {g.name for g in self.open}, [], set[str]()
        for group in self.open:
            if group.name not in taken:
                unit = (group.name, *(name for name in group.tied_groups if name in names))
                taken.update(unit)
                units.append(unit)
        return units


def arguments(run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    example = run.task.example
    return ((), example) if isinstance(example, dict) else ((example,), {})


def look(run: Run, step: int) -> tuple[Seen, list[float]]:
    """Capture the network and observe it for some steps of its training; return the losses of these, too."""
    args, kwargs = arguments(run)
    structure = analyse(run.model, args, kwargs)
    observer = Observer(run.model, structure.open_groups, seed=step, replay=replay, gradients=True, whole=False)
    observer.open()
    losses: list[float] = []
    while len(losses) < WINDOW[1]:
        losses.append(run.step(step + len(losses)))
        if observer.end_step() and len(losses) >= WINDOW[0]:
            break
    observer.close()
    observer.pool()
    found = observer.observations()
    # the unit of gradients does not matter to the planner, and so is not in what it sees
    counted = {key: max(observer._gradients.counted(k) for k in (key, ("", key[1]))) for key in found}
    return Seen(structure=structure, observations=found, gradients=counted), losses


def plan_of(run: Run, seen: Seen, names: Iterable[str], share: float) -> Plan:
    """Plan to remove a share of the channels of some groups, whatever the error."""
    chosen = set(names)
    others = {g.name: Why("waiting", "not in this trial") for g in seen.structure.open_groups if g.name not in chosen}
    request = Request(criterion=get_criterion("interpolative"), tolerance=1e9, align=1, max_drop=share, seed=0,
                      rows_per_channel=0, waiting=others)  # fmt: skip
    return make_plan(run.model, seen.structure, seen.observations, request)


def _accept(change: Change) -> AcceptanceResult:
    return AcceptanceResult(change=change, refused="")


def without(run: Run, seen: Seen, plan: Plan) -> Run | str:
    """Return a twin that lost what the plan says, or why it could not."""
    twin = run.twin()
    target = Target(model=twin.model, optimizers=(twin.optimizer,), call=arguments(run))
    done = apply_reductions(target, seen.structure, plan.reductions, plan.dropped_variance, None, _accept)
    return twin if done.committed else done.refused


def known(run: Run, seen: Seen, plan: Plan) -> dict[str, Any]:
    """Return what could have foretold the cost of a plan.

    error: largest relative rms of a site, weighted by gradients. error_squared, plain_squared: sums over groups of
    their worst site's squared error, weighted and not. energy: half the mean square of g · r times rows and predictions
    of a batch, summed over sites, g the gradient of a batch's mean loss and r the change of what sites read: the
    divergence of the outputs as far as single sites and gradients tell it. channels, kept, share_removed: of all groups
    together. rank: effective rank of the first group.
    """
    error, weighted, plain, energy, ranks = 0.0, 0.0, 0.0, 0.0, []
    by_name = {g.name: g for g in seen.structure.groups}
    for reduction in plan.reductions:
        group = by_name[reduction.group]
        view = make_view(run.model, group, seen.observations, 0, grad_factor=True, neurons=False).view
        errors = plan.errors[group.name]
        error = max(error, *errors.values())
        weighted += max(errors.values()) ** 2
        bare = [
            relative_error(replace(v, grad_factor=None), reduction.keep, reduction.sites[v.key]) for v in view.sites
        ]
        plain += max(bare) ** 2
        for site, shown in zip(group.sites, view.sites, strict=True):
            raw = seen.observations[group.name, site.key].grad_factor
            if shown.grad_factor is not None and raw is not None:
                size = float(column_squares(raw[:, :, None]).mean()) / max(1, seen.gradients[group.name, site.key])
                rows = site.macs / (EXAMPLES * shown.weight.shape[0] * shown.weight.shape[2])  # of one example
                energy += 0.5 * rows * errors[site.key] ** 2 * output_variance(shown) * size
        if isinstance(group.sites[0], LinearSite) and view.sites[0].moments is not None:
            ranks.append(_effective_rank(view.sites[0].moments.covariance()))
    channels = sum(before for before, _ in plan.widths.values())
    kept = sum(after for _, after in plan.widths.values())
    return {"groups": sorted(plan.widths), "error": error, "error_squared": weighted, "plain_squared": plain,
            "energy": energy * _predictions(run), "channels": channels, "kept": kept,
            "share_removed": 1 - kept / channels, "rank": ranks[0] if ranks else None,
            "macs_left": plan.macs_after / plan.macs_before,
            "kind": kinds(by_name[name] for name in plan.widths)}  # fmt: skip


def _predictions(run: Run) -> float:
    """Examples of a batch times predictions of a batch."""
    inputs, labels = run.task.batch(0)
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    return float(len(first) * labels.numel())


def _effective_rank(covariance: Tensor) -> float | None:
    """Exponential of the entropy of the eigenvalues' shares."""
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0.0)
    if not float(values.sum()) > 0.0:
        return None
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def kinds(groups: Iterable[Group]) -> str:
    """Return the kinds of the sites that read some groups, in a word."""
    return "+".join(sorted({site.kind for group in groups for site in group.sites}))


# ---------------------------------------------------------------------- branches


def without_branch(run: Run, name: str, step: int) -> Run:
    """Return a twin in which the last layer of a residual branch gives its mean, and stays so."""
    twin = run.twin()
    layer: Any = twin.model.get_submodule(name)
    mean = _mean_output(twin.model, layer, [run.task.batch(step - 1 - i)[0] for i in range(BRANCH_BATCHES)])
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(mean.to(layer.bias))
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    return twin


def left_without(seen: Seen, name: str) -> float:
    """Return the share of the multiply-adds that is left without the branch that a layer or norm ends."""
    groups = {g.name: g for g in seen.structure.groups}
    inside: dict[str, int] = {}
    for group in groups.values():
        ends = any(site.module == name or (isinstance(site, LinearSite) and site.norm == name) for site in group.sites)
        if ends and not inside.keys() & set(group.conflicts_with):
            inside |= dict.fromkeys((group.name, *group.tied_groups), 0)
    return macs_after(seen.structure, inside) / seen.structure.macs


def _mean_output(model: nn.Module, layer: nn.Module, inputs: Sequence[Any]) -> Tensor:
    """Mean of a layer's outputs over examples and positions, in evaluation mode."""
    sums: list[Tensor] = []

    def watch(module: nn.Module, args: Any, out: Tensor) -> None:
        dims = (0, *range(2, out.dim())) if isinstance(module, nn.BatchNorm2d) else tuple(range(out.dim() - 1))
        sums.append(out.double().mean(dims))

    handle = layer.register_forward_hook(watch)
    mode = model.training
    model.eval()
    with torch.no_grad():
        for one in inputs:
            call(model, one)
    model.train(mode)
    handle.remove()
    return torch.stack(sums).mean(0)
