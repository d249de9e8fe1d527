"""Several processes for one network: `start_group` joins the group that torchrun, mpirun or srun started."""

from apoptosis.tools.launch import LAUNCHERS, Group, ProcessInfo, detect_launcher, start_group

__all__ = ["LAUNCHERS", "Group", "ProcessInfo", "detect_launcher", "start_group"]
