"""The user's own code, named as package.module:factory.

Holds: importing it, calling it with arguments given as JSON, and the network that it makes. Elsewhere: what it returns
as data (datasets.own).
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import apoptosis
from apoptosis.errors import ApoptosisError, ArgumentError
from apoptosis.storage.plain_json import parse

# Where code that is not the user's lies.
_OTHERS = ("<", *(os.path.dirname(str(module.__file__)) + os.sep for module in (os, torch, apoptosis)))


def is_factory(given: str) -> bool:
    """Whether a text has the form package.module:factory.

    Example:
        >>> is_factory("my.nets:build"), is_factory("digits"), is_factory("runs/first"), is_factory("C:/runs")
        (True, False, False, False)
    """
    module, _, name = given.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def find_object(spec: str) -> Any:
    """Import `package.module:name`, the working directory first.

    Raises: ArgumentError: it has another form or cannot be imported; says which of module and name is missing.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ArgumentError(
            f"'{spec}' is not of the form package.module:factory (for example torchvision.models:resnet18)."
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's code may raise anything
        raise ArgumentError(
            f"'{spec}' cannot be imported: {what_went_wrong(error)}{_hint(error, module_name)}"
        ) from error
    return found


def call_factory(spec: str, kwargs: str = "{}", offered: Mapping[str, Any] | None = None) -> Any:
    """Import a factory and call it; a module is taken as it is.

    Args:
        spec: package.module:factory.
        kwargs: its arguments, as JSON.
        offered: further arguments, given where the factory has parameters of these names and kwargs does not.

    Raises: ArgumentError: it cannot be imported or called; the error of the user's code is told with its line.
    """
    try:
        arguments = parse(kwargs)
    except ValueError as error:
        raise ArgumentError(f"--kwargs: '{kwargs[:80]}' is not JSON ({error}).") from error
    if not isinstance(arguments, dict):
        raise ArgumentError(f"--kwargs: '{kwargs}' is not a JSON object.")
    found = find_object(spec)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ArgumentError(f"'{spec}' is a {type(found).__name__}, not a factory: name a function or a class.")
    taken = _parameters(found)
    given = {name: value for name, value in (offered or {}).items() if name in taken and name not in arguments}
    try:
        return found(**given, **arguments)
    except ApoptosisError:
        raise
    except Exception as error:  # the user's code may raise anything
        hint = " (its arguments are given with --kwargs)" if isinstance(error, TypeError) else ""
        raise ArgumentError(f"'{spec}' cannot be built: {what_went_wrong(error)}{hint}") from error


def network_of(spec: str, made: Any) -> tuple[nn.Module, Any]:
    """Return the network, and the example input that a factory gave with it, or None.

    Raises: ArgumentError: what was made is no torch.nn.Module.
    """
    example = None
    if isinstance(made, tuple) and len(made) == 2:
        made, example = made
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"'{spec}' gives a {type(made).__name__}, not a torch.nn.Module.")
    return made, example


def _parameters(found: Any) -> set[str]:
    """Return the names of parameters that may be given by name."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # built in
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def what_went_wrong(error: BaseException) -> str:
    """Return an error's kind, its text, and the last line of the user's code that it came through."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(_OTHERS) and f"{os.sep}site-packages{os.sep}" not in name:
            where = f" ({os.path.basename(name)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def _hint(error: BaseException, module_name: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if module_name == error.name or module_name.startswith(f"{error.name}."):
            return f"; modules are looked for in the working directory ('{os.getcwd()}') and where Python looks"
        return f"; '{module_name}' itself was found, and imports it"
    return ""
