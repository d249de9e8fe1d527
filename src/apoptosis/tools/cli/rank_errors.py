"""One line for one failure, however many processes fail.

Holds: which process of a run reports an error, and the refusal of several. Elsewhere: the line itself (app).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from apoptosis.errors import ApoptosisError, ArgumentError, RankError
from apoptosis.tools.launch import Group, detect_launcher, start_group
from apoptosis.tools.launch.detect import STARTERS


class Failure(Exception):
    """The error that ended one process of several. reports: whether this process prints it, or another one."""

    def __init__(self, error: BaseException, *, reports: bool) -> None:
        super().__init__(str(error))
        self.error, self.reports = error, reports


@contextmanager
def joined_group(launcher: str, device: str) -> Iterator[Group]:
    """Join the group of a run; an error leaves as it is from one process alone, as Failure from several.

    Warnings are shown by rank 0 alone, for all have the same.
    """
    group = start_group(launcher, device=device)
    if group.rank:
        warnings.simplefilter("ignore")
    try:
        with group:
            yield group
    except BaseException as error:
        if group.size == 1:
            raise
        if group.rank and isinstance(error, ApoptosisError) and not isinstance(error, RankError):
            error = type(error)(f"rank {group.rank} of {group.size}: {error}")
        raise Failure(error, reports=not group.reported_elsewhere) from error


def refuse_several(command: str) -> None:
    """Refuse to run as one of several processes: each would do all the work, and write into the same folder.

    Args: command: its name, "compare".

    Raises: Failure: a launcher started several; one on each machine says so.
    """
    try:
        process = detect_launcher()
    except ArgumentError:  # variables of the cluster itself, which no launcher would set so
        return
    if process.size > 1:
        error = ArgumentError(
            f"'apoptosis {command}' runs in one process, and this is one of {process.size} ({process}): start it "
            f"without {STARTERS[process.launcher]}, or unset these variables if they are stale. Only 'apoptosis train' "
            "runs in several."
        )
        raise Failure(error, reports=process.local_rank == 0)


def reports_alone(argv: Sequence[str]) -> bool:
    """Whether this process reports an error met before it could ask the others: one per machine does.

    Args: argv: of the command; `train` alone runs as one of several processes.
    """
    words = [word for given in argv for word in given.split("=")]
    launcher = words[words.index("--launcher") + 1 :][:1] if "--launcher" in words else []
    if words[:1] != ["train"] or launcher == ["none"]:
        return True
    try:
        return detect_launcher().local_rank == 0
    except ApoptosisError:  # variables that contradict one another: each process has its own
        return True
