"""Files that are there whole or not at all: permissions, links, special files, and what killed writers leave."""

import json
import os
import signal
import threading
import time

import pytest
from torch import nn

from apoptosis import load, save
from apoptosis.errors import CheckpointError
from apoptosis.storage.files import check_regular, placing_folder, replacing
from apoptosis.storage.plain_json import MAX_DEPTH, parse

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, pipes and links of another kind")


def write(path, text):
    with replacing(path) as partial:
        partial.write_text(text)


@posix
def test_an_old_file_keeps_its_permissions_and_a_new_one_has_those_of_the_umask(tmp_path):
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_text("old")
    private.chmod(0o600)
    before = os.umask(0o027)
    try:
        for path in (private, new):
            with replacing(path) as partial:
                assert partial.stat().st_mode & 0o777 == 0o600  # nobody reads along
                partial.write_text("whole")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    assert new.stat().st_mode & 0o777 == 0o640
    net = nn.Linear(2, 2)
    save(private, net)
    assert private.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "private"]


def fail(path, error):
    with replacing(path) as partial:
        partial.write_text("half")
        raise error


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write(path, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nowhere"):
        write(tmp_path / "nowhere" / "a", "")


@posix
def test_links_are_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real" / "a", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"


@posix
@pytest.mark.parametrize("through_link", [False, True])
def test_pipes_devices_and_folders_are_refused_for_reading_and_writing(tmp_path, through_link):
    net = nn.Linear(2, 2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    found = {
        tmp_path / "pipe": "named pipe",
        tmp_path / "folder": "folder",
        "/dev/null": "device",
        "/dev/zero": "device",
    }
    for number, (target, kind) in enumerate(found.items()):
        path = target
        if through_link:
            path = tmp_path / f"link{number}"
            path.symlink_to(target)
        before = os.lstat(target).st_ino
        with pytest.raises(OSError, match=f"is a {kind}"):
            write(path, "new")
        with pytest.raises(CheckpointError, match=f"cannot be written.* is a {kind}"):
            save(path, net)
        with pytest.raises(CheckpointError, match=f"cannot be loaded.* is a {kind}"):
            load(path, net)
        assert os.lstat(target).st_ino == before
    with pytest.raises(OSError, match="no name of a file"):
        check_regular("a\0b")


def killed_while_writing(path):
    child = os.fork()
    if child == 0:
        with replacing(path) as partial, placing_folder(path) as folder:
            partial.write_text("half")
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@posix
def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_stays(tmp_path):
    path, other = tmp_path / "net", tmp_path / "other"
    for target in (path, other):
        killed_while_writing(target)
    assert len(list(tmp_path.iterdir())) == 4
    with replacing(path) as first:
        first.write_text("first")
        save(path, nn.Linear(2, 2))  # by another thread, say
        assert first.exists()
        names = {p.name for p in tmp_path.iterdir()}
        assert len(names) == 4  # the checkpoint, what is being written, and the leftovers of another file
    assert path.read_text() == "first"
    write(other, "")
    assert {p.name for p in tmp_path.iterdir()} == {"net", "other"}


@posix
def test_what_other_machines_left_goes_after_a_day(tmp_path):
    path = tmp_path / "net"
    with replacing(path) as partial:
        name = partial.name
    own, machine = name.split("-")[1:3]
    foreign = tmp_path / name.replace(f"{own}-{machine}", f"{own}-{'0' * 8}")
    foreign.write_text("half")
    write(path, "a")
    assert foreign.exists()
    os.utime(foreign, (time.time() - 90_000,) * 2)
    write(path, "b")
    assert {p.name for p in tmp_path.iterdir()} == {"net"}


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "net"
    threads = [threading.Thread(target=write, args=(path, letter * 10_000)) for letter in "abcdefghijkl"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = path.read_text()
    assert text == text[0] * len(text)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", b"\xff\xfe\xfa", "1" * 10_000, '{"a": 1} x'])
def test_what_is_no_json_is_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 500, 100_000])
def test_deep_json_is_refused_without_recursion(levels):
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH}"):
        parse("[" * levels + "]" * levels)
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH}"):
        parse('{"a":' * levels + "1" + "}" * levels)
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH) == json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
