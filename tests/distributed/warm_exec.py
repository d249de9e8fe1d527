"""A light Python in the place of a heavy one: `python -S -E warm_exec.py SOCKET WORDS...`, started by the real mpirun.

It hands its command line, environment and open files to the server of warm.py at the SOCKET, which forks a process with
everything imported that runs the command line there, in the namespaces of this one; signals are passed on, and it ends
as that process does. MPI finds what it needs in the environment and in the open files.
"""

import json
import os
import signal
import socket
import sys

SPACES = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("user", "net", "uts")]
FILES = [0, 1, 2, *(int(os.environ[name]) for name in ("PMI_FD",) if name in os.environ)]


def main(path, *words):
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    started = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "files": FILES}).encode()
    socket.send_fds(server, [len(started).to_bytes(4, "little")], SPACES + FILES)
    server.sendall(started)
    for file in FILES[3:]:
        os.close(file)  # mpirun is told by its end that a rank has left
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    if not (told := server.recv(4)):
        os._exit(1)  # the server is gone
    status = int.from_bytes(told, "little", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
