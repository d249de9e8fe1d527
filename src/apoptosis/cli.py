"""`python -m apoptosis.cli`: the command, for launchers that start modules (torchrun -m, mpirun)."""

from apoptosis.tools.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
