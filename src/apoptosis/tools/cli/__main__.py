"""`python -m apoptosis.cli`, which is what torchrun -m takes.

Lives here: that call. Does not live here: anything else.
"""

from apoptosis.tools.cli import main

if __name__ == "__main__":
    main()
