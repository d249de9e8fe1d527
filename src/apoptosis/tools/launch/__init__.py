"""Several processes that train one network: how they were started, and the group they form.

    >>> from apoptosis.tools.launch import start_group
    >>> with start_group("none") as group:
    ...     (group.rank, group.size, group.launcher)
    (0, 1, 'none')

detect.py reads the environment, group.py begins the process group, mpi.py sums over MPI.
"""

from apoptosis.tools.launch.detect import LAUNCHERS, ProcessInfo, detect_launcher
from apoptosis.tools.launch.group import Group, start_group

__all__ = ["LAUNCHERS", "Group", "ProcessInfo", "detect_launcher", "start_group"]
