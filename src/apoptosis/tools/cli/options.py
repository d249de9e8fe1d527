"""Options of the commands: those of a run, made from the fields of RunConfig, and the few that are none of its fields.

Holds: how a field becomes an option, how what was typed becomes a RunConfig. Elsewhere: names, types, defaults, limits
and help texts of the fields (RunConfig).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from apoptosis.errors import ArgumentError
from apoptosis.storage.files import check_regular
from apoptosis.tools.recipes.config import RunConfig


def path_of(text: str) -> Path:
    """Take a path that was typed; an empty one would be the current folder.

    Raises: ArgumentError: it is empty, or holds a character that no name can.
    """
    if not text.strip() or "\0" in text:
        raise ArgumentError(f"{text!r} names no file or folder: leave the option out, or name one.")
    return Path(text)


Out = Annotated[Path | None, typer.Option(help="Run folder. Default: runs/DATA-NETWORK-TIME.", parser=path_of)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", parser=path_of, metavar="FILE")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]


def with_run_options(
    *, fields: Sequence[str] | None = None, instead: Mapping[str, str | None] = MappingProxyType({})
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of RunConfig.

    The command is `command(typed, ...)`: `typed` are the fields that were typed, parsed; its other parameters become
    options of its own, after those of the fields.

    Args:
        fields: only these, and without defaults, for a command that changes a configuration which it reads.
        instead: field -> the command's own parameter that takes its place in the help, None for no option.
    """
    names = tuple(RunConfig.model_fields if fields is None else fields)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(list(inspect.signature(command, eval_str=True).parameters.items())[1:])
        placed = {"ctx": inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)}
        placed |= {name: p for name, p in own.items() if p.default is inspect.Parameter.empty}
        for name in names:
            shown = instead.get(name, name)
            if shown is not None:
                placed[shown] = own.get(shown) or _parameter(name, default=fields is None)
        placed |= own

        @functools.wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            given = [n for n in names if n in values and n not in own and _was_typed(ctx, n)]
            command({n: _parsed(n, values[n]) for n in given}, **{n: values[n] for n in own})

        order = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in placed.values()]
        run.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]  # typer reads it
        run.__annotations__ = {p.name: p.annotation for p in order}
        return run

    return decorate


def same_config(stored: RunConfig, typed: Mapping[str, Any], run: Path) -> RunConfig:
    """Return the stored configuration of a run to resume, if nothing typed contradicts it.

    Raises: ArgumentError: names the option that differs.
    """
    asked = RunConfig.checked(**{**stored.model_dump(), **typed})
    for name in typed:
        if getattr(asked, name) != getattr(stored, name):
            raise ArgumentError(
                f"{option_name(name)}: the run in '{run}' has {getattr(stored, name)}, not "
                f"{getattr(asked, name)}; a resumed run keeps its configuration."
            )
    return stored


def check_json_file(path: Path | None) -> None:
    """Refuse, before anything runs, a result file that could not be written in the end.

    Raises: ArgumentError: no such folder, or something there that is no file.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ArgumentError(f"--json: there is no folder '{path.parent}': create it, or name a file elsewhere.")
    try:
        check_regular(path)
    except OSError as error:
        raise ArgumentError(f"--json: {error}.") from error


def integers(option: str, text: str) -> tuple[int, ...]:
    """Parse "64,128".

    Raises: ArgumentError: not whole numbers separated by commas.

    Example:
        >>> integers("--widths", "64,128")
        (64, 128)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"{option}: '{text}' is not whole numbers separated by commas.") from error


def option_name(field: str) -> str:
    """Return how a field is written on the command line."""
    return "--" + field.replace("_", "-")


def _parameter(name: str, *, default: bool) -> inspect.Parameter:
    """Make the option of a field; typer reads type and default off it."""
    field, option = RunConfig.model_fields[name], option_name(name)
    kind, value = _kind(field.annotation), field.default if default and field.default != () else None
    names = (f"{option}/--no-{name}",) if kind is bool and value else (option,)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=kind | None if value is None else kind,
        default=typer.Option(value, *names, help=field.description),
    )


def _kind(annotation: Any) -> Any:
    """Return the type of what is typed for a field: numbers of a list are one word; RunConfig checks choices."""
    inner = _unwrapped(annotation)
    if get_origin(inner) is tuple:
        return list[str] if get_args(inner)[0] is str else str
    return str if get_origin(inner) is Literal else inner


def _unwrapped(annotation: Any) -> Any:
    """Return a field's type without `| None` and limits."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parsed(name: str, value: Any) -> Any:
    if isinstance(value, str) and get_origin(_unwrapped(RunConfig.model_fields[name].annotation)) is tuple:
        return integers(option_name(name), value)
    return tuple(value) if isinstance(value, list) else value
