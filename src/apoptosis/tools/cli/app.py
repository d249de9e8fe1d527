"""The commands put together, and every foreseen failure turned into one line.

Holds: registration, exit statuses. Elsewhere: what a command does.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from apoptosis import __version__
from apoptosis.errors import ApoptosisError
from apoptosis.tools.cli.compare import compare
from apoptosis.tools.cli.inspect import inspect
from apoptosis.tools.cli.plan import plan
from apoptosis.tools.cli.rank_errors import Failure, reports_alone
from apoptosis.tools.cli.report import report
from apoptosis.tools.cli.ship import ship
from apoptosis.tools.cli.train import train

BAD_INPUT, INTERRUPTED, UNREAD = 2, 130, 141

app = typer.Typer(
    name="apoptosis",
    help="Remove redundant neurons while a network trains.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (train, compare, inspect, plan, report, ship):
    app.command()(_command)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"apoptosis {__version__} (torch {torch.__version__}, Python {platform.python_version()})\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and end.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Remove redundant neurons while a network trains."""


_FORESEEN = (ApoptosisError, OSError, MemoryError, torch.OutOfMemoryError)
# How torch and Python say in a RuntimeError that memory is short, also for a thread.
_OUT_OF_MEMORY = re.compile(
    r"alloc_cpu|can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|"
    r"failed to map segment|std::length_error|storage size calculation overflowed|can't start new thread|"
    r"resource temporarily unavailable",
    re.IGNORECASE,
)
_UNREAD = "the output was closed; what was saved stays: continue a run with train --resume FOLDER"
_STOPPED = "interrupted; what was saved stays: continue a run with train --resume FOLDER"
# typer hands on the errors of its parser, whose base class it exports in some versions only.
_ParserError: type[Exception] = typer.BadParameter.__mro__[2]


def run(argv: Sequence[str]) -> int:
    """Run one command.

    Returns: its exit status: 0 done, 2 bad input, 130 interrupted, 141 output unread. Failures print one line on
        stderr; where several processes of one run fail, one of them does.
    """
    try:
        status = _status(argv)
    except Failure as failure:
        status, message = _exit_of(failure.error)
        return _fail(message, status) if failure.reports else status
    except (*_FORESEEN, _ParserError, RuntimeError, ImportError) as error:
        status, message = _exit_of(error)
        return _fail(message, status) if reports_alone(argv) else status
    if status == INTERRUPTED:  # typer turns an interrupt into this status by itself, in some versions
        return _fail(_STOPPED, INTERRUPTED)
    return status


def _status(argv: Sequence[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Without arguments: the help.
            status = typer.main.get_command(app)(args=list(argv) or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _exit_of(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the line for a foreseen failure; raise any other."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, _STOPPED
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return UNREAD, _UNREAD
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | ImportError) and _OUT_OF_MEMORY.search(str(error))
    ):
        return BAD_INPUT, _memory_text(error)
    if isinstance(error, _ParserError):
        return BAD_INPUT, getattr(error, "format_message", error.__str__)()
    if isinstance(error, _FORESEEN):
        return BAD_INPUT, str(error) or type(error).__name__
    raise error


def _memory_text(error: BaseException) -> str:
    asked = re.search(r"allocate (\d+) bytes", str(error))
    size = f" for {int(asked[1]) / 2**30:,.1f} GiB at once" if asked else ""
    first = "" if asked else next(iter(str(error).strip().splitlines()), "")
    return (
        f"there is not enough memory{size}, or a limit (ulimit -v, -u) forbids more: lower --widths, --batch, "
        f"--train-rows or --threads, or raise the limit{f' ({first[:160]})' if first else ''}"
    )


def _discard_output() -> None:
    """Point stdout elsewhere: Python would complain about the broken pipe once more when it ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no such file behind it
        return


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"apoptosis: error: {' '.join(message.split())}\n")
    return status


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
    sys.stderr.write(f"apoptosis: warning: {' '.join(str(message).split())}\n")
