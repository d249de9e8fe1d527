"""The real torchrun and the processes that it starts, forked from a server that has everything imported.

Torchrun, its agent, its rendezvous, its signals and the environment of its workers are the real ones; only `exec` of a
new Python, which would import torch for seconds, is a fork here. Launched(..., fresh=True) starts it by `exec`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress

#: Imported by the server before it forks: what the tests' processes would import one after the other.
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "sklearn.datasets",
    "apoptosis",
    "apoptosis.cli.app",
    "apoptosis.recipes.train",
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
        sys.argv = words[1:] if words[0] == "-m" else list(words)
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
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
        os._exit(status)
