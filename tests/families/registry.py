"""All families, by name; the modules that hold them are a literal list."""

from __future__ import annotations

from importlib import import_module

from families.family import Family

#: Every module has a tuple FAMILIES. A module that needs an extra returns an empty one where it is not installed.
MODULES = (
    "classic", "convolutional", "mobile", "generative", "mixed", "pruning", "other", "language", "vision_transformers",
)  # fmt: skip

FAMILIES: dict[str, Family] = {}
for _name in MODULES:
    for _family in import_module(f"families.{_name}").FAMILIES:
        if _family.name in FAMILIES:
            raise ValueError(f"two families are called '{_family.name}'.")
        FAMILIES[_family.name] = _family
