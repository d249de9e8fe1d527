"""The command `apoptosis`: train, compare, inspect, plan, report.

Lives here: the entry point, which needs none of the optional packages. Does not live here: any command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 bad input, 130 interrupted, 141 output unread; failures are one line."""
    try:
        from apoptosis.cli.app import run
    except KeyboardInterrupt:
        sys.stderr.write("apoptosis: error: interrupted before anything was begun\n")
        sys.exit(130)
    except MemoryError:
        sys.stderr.write("apoptosis: error: there is not enough memory to begin; raise the limit (ulimit -v)\n")
        sys.exit(2)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"apoptosis: error: {error}; install the command with: pip install 'torch-apoptosis[cli]'\n")
        sys.exit(2)
    sys.exit(run(sys.argv[1:] if argv is None else argv))
