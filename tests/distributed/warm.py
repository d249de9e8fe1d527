"""The real launchers and the processes that they start, forked from a server that has everything imported.

Torchrun, its agent, its rendezvous, its signals and the environment of its workers are the real ones; only `exec` of a
new Python, which would import torch for seconds, is a fork here. The real mpirun starts light Pythons (warm_exec.py),
for each of which the server forks a process. Launched(..., fresh=True) starts them by `exec`.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

#: Imported by the server before it forks: what the tests' processes would import one after the other.
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "sklearn.datasets",
    "apoptosis",
    "apoptosis.tools.cli.app",
    "apoptosis.tools.recipes.train",
    "distributed.warm",
)


def context():
    """Return the forkserver's context; the server lives as long as this process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(PRELOAD))
    return found


class Warm:
    """A process of the forkserver, used as a `subprocess.Popen` is."""

    def __init__(self, words, *, cwd, env, out, err):
        """words: the command line behind `python`."""
        arguments = (list(words), os.fspath(cwd), dict(env), os.fspath(out), os.fspath(err))
        self._process = context().Process(target=_launch, args=arguments)
        self._process.start()
        self.pid, self.args = self._process.pid, words

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode


def _launch(words, cwd, env, out, err):
    """Become the launcher, in a session of its own."""
    os.setsid()
    os.chdir(cwd)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _Forked
    _run(words, env)


class _Forked(subprocess.Popen):
    """A child that is forked instead of executed; else the real Popen."""

    def _execute_child(self, args, _executable, _preexec, _close, _pass, _cwd, env, *_):
        self.pid = os.fork()
        self._child_created = True
        if not self.pid:
            os.setsid()
            _run(args[1:], env)


# ------------------------------------------------------------------ for launchers that start programs by themselves


@cache
def server():
    """Begin to listen; return the path of the socket for warm_exec.py. It ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")  # short: paths of sockets are
    atexit.register(folder.cleanup)
    path = os.path.join(folder.name, "socket")
    ready, told = context().Pipe(duplex=False)
    context().Process(target=_serve, args=(path, told), daemon=True).start()
    ready.recv()
    return path


def interpreter():
    """Return the words that stand for `python` where the server forks for it."""
    return [sys.executable, "-S", "-E", str(Path(__file__).with_name("warm_exec.py")), server()]


def _serve(path, told):
    """Fork a process for each that connects; tell it how that ended; end it when the other is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    told.send(True)
    while True:
        for key, _ in waiting.select():
            if key.data is None:
                other, _ = listener.accept()
                pid = _forked(other, listener)
                number = os.pidfd_open(pid)
                waiting.register(other, selectors.EVENT_READ, (pid, number, other))
                waiting.register(number, selectors.EVENT_READ, (pid, number, other))
                continue
            pid, number, other = key.data
            if key.fileobj is number:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                waiting.unregister(number)
                os.close(number)
                with suppress(KeyError, ValueError):
                    waiting.unregister(other)
                with suppress(OSError):
                    other.sendall(status.to_bytes(4, "little", signed=True))
                other.close()
            elif other.fileno() >= 0:
                signals = other.recv(64)
                for one in signals or bytes([signal.SIGKILL]):
                    signal.pidfd_send_signal(number, one)
                if not signals:
                    waiting.unregister(other)


def _forked(other, listener):
    """Fork what runs the command line that the other end of the connection was given; return its process."""
    length, files, *_ = socket.recv_fds(other, 4, 16)
    wanted, told = int.from_bytes(length, "little"), b""
    while len(told) < wanted:
        told += other.recv(wanted - len(told))
    if pid := os.fork():
        for file in files:
            os.close(file)
        return pid
    try:
        started = json.loads(told)
        os.setsid()
        listener.close()
        other.close()
        _enter(files[:3])
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 200) for file in files[3:]]  # out of the way of the numbers wanted
        for file, number in zip(high, started["files"], strict=True):
            os.dup2(file, number)
        for file in (*files, *high):
            if file not in started["files"]:
                os.close(file)
        os.chdir(started["cwd"])
        _run(started["words"], started["env"])
    except BaseException:  # noqa: BLE001 - nobody else would tell
        traceback.print_exc()
    finally:
        os._exit(1)


def enter_spaces_of(pid):
    """Enter the namespaces of a process."""
    _enter([os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("user", "net", "uts")])


def _enter(spaces):
    """Enter namespaces (user, network, host name), of which files are given, where they are not this process's."""
    for file, name in zip(spaces, ("user", "net", "uts"), strict=True):
        if os.fstat(file).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
            library = ctypes.CDLL(None, use_errno=True)
            if library.setns(file, 0):
                raise OSError(ctypes.get_errno(), f"{name} namespace: {os.strerror(ctypes.get_errno())}")


def _run(words, env):
    """Run a command line of Python in this process, and end it as a Python of its own would."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
        words = [word for word in words if word != "-u"]
        sys.argv = {"-m": words[1:], "-c": ["-c", *words[2:]]}.get(words[0], list(words))
        first = os.getcwd() if words[0] in ("-m", "-c") else os.path.dirname(os.path.abspath(words[0]))
        sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        status = 130
    except BaseException:  # noqa: BLE001 - what an interpreter does at its end
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        if "mpi4py.MPI" in sys.modules:
            ctypes.CDLL(None).exit(status)  # MPICH takes leave of mpirun when the C library ends the process
        os._exit(status)
