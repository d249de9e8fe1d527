"""`apoptosis train`, which stands still at known steps: python stops.py train ... , STOPS="20,24" in the environment.

"20;7,9": at step 20 at first, and at the seventh and ninth step after torchrun has started all anew, once.

In the midst of each of these optimizer steps process STOP_RANK (0 where it is not set) writes a file `at-STEP`, which
says whether a window is open and which process it is, and waits there for a signal from outside. The other processes
wait for it in their next sum, so that a test interrupts or kills the run at that step, however slow the machine is.
STOP_PAUSE: seconds that every step takes at least, so that votes on stopping, a few a second, come every few steps.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from apoptosis.tools.cli import main
from apoptosis.tools.recipes import loop

STEPS = [[int(step) for step in steps.split(",")] for steps in os.environ.get("STOPS", "0").split(";")]
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
PAUSE = float(os.environ.get("STOP_PAUSE", "0"))
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
OWN_RANK = next((os.environ[name] for name in RANKS if name in os.environ), "0")
WAITS = OWN_RANK == os.environ.get("STOP_RANK", "0") and ATTEMPT < len(STEPS)
made = []  # the Apoptosis of this process
done = 0


def remembered(*args, **kwargs):
    made.append(type_before(*args, **kwargs))
    return made[-1]


def after_step(optimizer, args, kwargs):
    global done
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        return  # of the optimizer by which learning rates are worked out
    done += 1
    time.sleep(PAUSE)
    if WAITS and done in STEPS[ATTEMPT]:
        written = Path(f"at-{done}.part")
        written.write_text(f"{bool(made and made[0].watching)} {os.getpid()}")
        written.rename(f"at-{done}")
        assert select.select([told], [], [], 200)[0], "no signal came"
        os.read(told, 64)


if __name__ == "__main__":
    type_before, loop.Apoptosis = loop.Apoptosis, remembered
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    register_optimizer_step_post_hook(after_step)
    main(sys.argv[1:])
