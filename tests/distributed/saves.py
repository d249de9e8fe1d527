"""`apoptosis train`, which tells the step of every checkpoint: python saves.py SECONDS train ...

SECONDS: how long one may be put off.
"""

import sys

from apoptosis.tools.cli import main
from apoptosis.tools.recipes import train

write = train.write_checkpoint


def told(folder, trainer, epochs):
    if trainer.group.rank == 0:
        sys.stdout.write(f"saved {trainer.step} {len(epochs)} {trainer.watching}\n")
    write(folder, trainer, epochs)


if __name__ == "__main__":
    train.write_checkpoint, train.LONGEST_PUT_OFF = told, float(sys.argv[1])
    main(sys.argv[2:])
