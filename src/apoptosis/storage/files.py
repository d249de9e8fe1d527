"""Files written atomically.

Holds: replacing a file by a complete one, refusing what is no regular file, removing what killed writers have left.
Elsewhere: what is in the files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_FOREIGN_AGE = 24 * 3600.0  # seconds; older ones of other machines, whose processes cannot be looked up, are left over
_PARTIAL = re.compile(r"\.apoptosis-([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-\d+\.tmp")
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe (FIFO)"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)
_counter = itertools.count()


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and no regular file: reading a pipe would wait for ever, replacing a device destroys it.

    Raises: OSError: in one line. A missing file is no error here.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:  # a zero character
        raise OSError(f"{os.fspath(path)!r} is no name of a file ({error})") from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "special file")
        raise OSError(f"'{os.fspath(path)}' is a {kind}, not a regular file; name another one")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty file beside `path` to write to; it takes the place of `path` when the block has ended well.

    An old file keeps its permissions, and is as it was after any failure; a symbolic link is written through. What
    killed writers of the same file have left is removed. New files have the permissions that the umask leaves.

    Yields: the file to write, which may be replaced meanwhile by another of its name.

    Raises: OSError: no such folder, a disk that is full, a target that is no regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/a.txt") as partial:
        ...         _ = partial.write_text("whole")
        ...     Path(folder, "a.txt").read_text(), len(list(Path(folder).iterdir()))
        ('whole', 1)
    """
    check_regular(path)
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)  # as the user's umask has it
        finally:
            os.close(handle)
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(target.stat().st_mode)
        partial.chmod(0o600)  # not readable by others before it has the mode of the file that it replaces
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, target)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            _sync(target.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write says what happened, but not to what
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def placing_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill; it becomes `path` when the block has ended well.

    One that another process has put there meanwhile is left, and this one removed; with `replace` the new one takes the
    place of one that is there.

    Raises: OSError: it cannot be made, or something else lies at `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with placing_folder(f"{place}/data") as partial:
        ...         _ = (partial / "a").write_text("whole")
        ...     [path.name for path in Path(place, "data").iterdir()]
        ['a']
    """
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        partial.mkdir()
        yield partial
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():
                raise
            if replace:
                _exchange(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """Put a folder in the place of another, which is removed."""
    old = _partial(target)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _partial(target: Path) -> Path:
    """Return a name beside a target that no other writer has, and remove what killed writers of it have left."""
    own = f"{zlib.crc32(os.fsencode(target.name)):08x}"
    _remove_left_over(target.parent, own)
    return target.with_name(f".apoptosis-{own}-{_machine()}-{os.getpid()}-{next(_counter)}.tmp")


def _remove_left_over(folder: Path, target: str) -> None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = _PARTIAL.fullmatch(entry.name)
            if match is not None and match[1] == target and _is_left_over(entry, match[2], int(match[3])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                    continue
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_left_over(entry: os.DirEntry[str], machine: str, process: int) -> bool:
    if machine != _machine():
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _FOREIGN_AGE
    if os.name != "posix":  # there is no asking without a signal that ends the process
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Return what distinguishes this machine, or this container, from others that share the folder."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {numbers}'.encode()):08x}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
