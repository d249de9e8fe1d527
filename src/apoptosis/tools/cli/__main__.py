"""`python -m apoptosis.tools.cli`, for torchrun -m (`apoptosis.cli` is the same).

Holds: that call. Elsewhere: anything else.
"""

from apoptosis.tools.cli import main

if __name__ == "__main__":
    main()
