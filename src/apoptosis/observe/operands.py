"""Operands of products of activations that are outputs of modules, so that hooks see them in the user's own passes.

Holds: their accumulators, by module, and what they observed by site. Elsewhere: which passes count (window.py),
products whose operands are computed otherwise, for which the model is run again (replay.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from apoptosis.numerics.moments import Moments
from apoptosis.observe.accumulators import Accumulator, Observation
from apoptosis.observe.replay import positions_per_sum, right_key
from apoptosis.records import Group, ProductSite

Key = tuple[str, str]


class Operands:
    """Accumulators of the left and the right operand of products.

    Args:
        model: whose modules are observed.
        exact, spread: as in `Accumulator`.
    """

    def __init__(self, model: nn.Module, *, exact: bool, spread: bool) -> None:
        self._model, self._exact, self._spread = model, exact, spread
        self.by_module: dict[str, list[Accumulator]] = {}
        self._sites: list[tuple[str, ProductSite, Key]] = []

    def watch(self, group: Group, site: ProductSite) -> dict[Key, Accumulator]:
        """Observe both operands of a product; return their accumulators."""
        key, made = (group.name, site.key), {}
        for own, output in zip((key, right_key(key)), site.outputs, strict=True):
            parameters = self._model.get_submodule(output.module).parameters()
            device = next((p.device for p in parameters), torch.device("cpu"))
            columns, rows_for = output.columns.reshape(-1, 1), positions_per_sum(site, group.rows)
            watch = Accumulator(
                site, columns, rows_for, device, exact=self._exact, spread=self._spread, width=output.width
            )
            self.by_module.setdefault(output.module, []).append(watch)
            made[own] = watch
        self._sites.append((group.name, site, key))
        return made

    def places(self) -> Iterator[tuple[str, ProductSite, Key]]:
        """Yield group, site and key of every accumulator."""
        for group, site, key in self._sites:
            yield group, site, key
            yield group, site, right_key(key)

    def observations(self, moments: Mapping[Key, Moments]) -> dict[Key, Observation]:
        """Return the observations by (group name, site key); products without any are left out."""
        return {
            (group, site.key): Observation(moments=moments[key], right=moments[right_key(key)])
            for group, site, key in self._sites
            if key in moments and right_key(key) in moments
        }
