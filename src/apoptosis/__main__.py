"""`python -m apoptosis`: the command, where its folder is not on the path.

Holds: that call. Elsewhere: anything else.
"""

from apoptosis.tools.cli import main

if __name__ == "__main__":
    main()
