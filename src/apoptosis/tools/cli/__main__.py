"""`python -m apoptosis.cli`, which is what torchrun -m takes.

Holds: that call. Elsewhere: anything else.
"""

from apoptosis.tools.cli import main

if __name__ == "__main__":
    main()
