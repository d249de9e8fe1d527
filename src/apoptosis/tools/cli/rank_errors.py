"""One line for one failure, however many processes fail.

Holds: which process of a run speaks, and the refusal of several. Elsewhere: the line itself (app).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from apoptosis.errors import ApoptosisError, ArgumentError, RankError
from apoptosis.tools.launch import Group, detect_launcher, start_group
from apoptosis.tools.launch.detect import STARTERS


class Failure(Exception):
    """What ended one process of several. error: it. speaks: whether this process tells it, or another one does."""

    def __init__(self, error: BaseException, *, speaks: bool) -> None:
        super().__init__(str(error))
        self.error, self.speaks = error, speaks


@contextmanager
def one_voice(launcher: str, device: str) -> Iterator[Group]:
    """Begin the group of a run; what makes it fail leaves as it is from one process alone, as Failure from several.

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
        raise Failure(error, speaks=not group.silent) from error


def works_alone(command: str) -> None:
    """Refuse to be one of several processes: each would do the whole work, and write into the same folder.

    Args: command: its name, "compare".

    Raises: Failure: a launcher started several; one on each machine says so.
    """
    try:
        place = detect_launcher()
    except ArgumentError:  # a cluster's own variables, by which nobody could run as one of several
        return
    if place.size > 1:
        error = ArgumentError(
            f"{command} works in one process, and this is one of {place.size} ({place}): start it without "
            f"{STARTERS[place.launcher]}, or unset these variables where they are left from something else. Only train "
            "runs in several."
        )
        raise Failure(error, speaks=place.local_rank == 0)


def speaks_alone(argv: Sequence[str]) -> bool:
    """Whether this process tells of an error that it met before it could ask the others: one per machine does.

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
