"""Processes that see one another over links of their own, in network namespaces of this machine.

Holds: namespaces joined by a bridge, links cut and mended, slowed down by tc. Elsewhere: what runs there.

No rights are needed where the system lets anybody make user namespaces; `why_not` says what is missing elsewhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_PROGRAMS = ("unshare", "nsenter", "ip", "cat")
_START = 60.0  # seconds that a namespace may take to come up


def why_not() -> str:
    """Say why this machine gives no links, "" where it does."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"network namespaces need the program {missing[0]}"
    try:
        with Links(2):
            return ""
    except (subprocess.SubprocessError, OSError, TimeoutError) as error:
        output = str(getattr(error, "stderr", "") or error).strip()
        return f"this machine allows no network namespaces: {output.splitlines()[-1] if output else error!r}"


class Links:
    """Namespaces 0..size-1, each with one interface, eth0, at one bridge; use it as a context.

    Each has its address for a host name as well, so that a look-up of the own name gives what others can reach.

    Raises: subprocess.CalledProcessError, OSError: the machine does not allow it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            hub = self._hold(["unshare", "--user", "--map-root-user", "--net"])
            self._at_hub("ip", "link", "add", "bridge", "type", "bridge")
            self._at_hub("ip", "link", "set", "bridge", "up")
            for rank in range(self.size):
                own = self._hold([*_inside(hub, "--user"), "unshare", "--net", "--uts"])
                peer = ("peer", "name", "eth0", "netns", str(own))
                self._at_hub("ip", "link", "add", f"port{rank}", "type", "veth", *peer)
                self._at_hub("ip", "link", "set", f"port{rank}", "master", "bridge", "up")
                for words in (("link", "set", "lo", "up"), ("address", "add", f"{host(rank)}/24", "dev", "eth0"),
                              ("link", "set", "eth0", "up")):  # fmt: skip
                    _run([*self.enter(rank), "ip", *words])
                name = f"import socket; socket.sethostname({host(rank)!r})"
                _run([*self.enter(rank), sys.executable, "-c", name])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def enter(self, rank: int, *, from_another: bool = False) -> list[str]:
        """Return the words that, before a command, run it in a rank's namespace.

        from_another: where the command stands in the namespace of another rank, which has its user already.
        """
        user = () if from_another else ("--user",)
        return _inside(self.holder(rank), *user, "--net", "--uts")

    def holder(self, rank: int) -> int:
        """Return the process that holds a rank's namespaces."""
        return self._holders[rank + 1].pid

    def cut(self, rank: int) -> None:
        """Take a rank's link down: what is sent is lost without a notice."""
        self._at_hub("ip", "link", "set", f"port{rank}", "down")

    def mend(self, rank: int) -> None:
        """Take it up again."""
        self._at_hub("ip", "link", "set", f"port{rank}", "up")

    def close(self) -> None:
        """End the namespaces."""
        for holder in reversed(self._holders):
            holder.kill()
            holder.wait()
            for pipe in (holder.stdin, holder.stderr):
                if pipe is not None:
                    pipe.close()
        self._holders = []

    def _hold(self, words: list[str]) -> int:
        """Start a process that keeps a new namespace as long as this one lives; return its id once it is there."""
        holder = subprocess.Popen([*words, "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self._holders.append(holder)
        end = time.monotonic() + _START
        while _program(holder.pid) != "cat":
            if holder.poll() is not None:
                output = holder.stderr.read() if holder.stderr is not None else b""
                raise subprocess.CalledProcessError(holder.returncode, words, stderr=output.decode())
            if time.monotonic() > end:
                raise TimeoutError(f"{words[0]} did not start within {_START:.0f} s")
            time.sleep(0.01)
        return holder.pid

    def _at_hub(self, *words: str) -> None:
        _run([*_inside(self._holders[0].pid, "--user", "--net"), *words])


def host(rank: int) -> str:
    """Address and host name of a rank's namespace."""
    return f"10.77.0.{rank + 1}"


def slow_down(bits_per_second: float | None) -> None:
    """Bound what this process' namespace sends, by a token bucket; None: no bound. Call it inside the namespace."""
    subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], capture_output=True)  # fails where there is none
    if bits_per_second is not None:
        rate = f"{bits_per_second / 1e6:.0f}mbit"
        _run(["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms"])


def bytes_sent() -> int:
    """Bytes that eth0 of this process' namespace has sent, headers and all."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()  # /sys shows the namespace that mounted it
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("eth0:"))


def _inside(process: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(process), *namespaces, "--preserve-credentials"]


def _program(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=_START)
