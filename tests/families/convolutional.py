"""Convolutional networks."""

from __future__ import annotations

from families.family import Family

FAMILIES: tuple[Family, ...] = ()
