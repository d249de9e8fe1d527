"""Measurements of this repository. A package, because others bring one of this name."""
