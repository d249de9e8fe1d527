"""`apoptosis report`: a run's log as one page.

Holds: the command. Elsewhere: page and plots (apoptosis.tools.report).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apoptosis.tools.cli.display import console
from apoptosis.tools.cli.options import path_of
from apoptosis.tools.cli.rank_errors import refuse_several


def report(run: Annotated[Path, typer.Argument(help="Folder of a run of train or compare.", parser=path_of)]) -> None:
    """Write one self-contained HTML page about a run, and its plots as PNGs."""
    refuse_several("report")
    from apoptosis.tools.report import write_report

    console().print(f"report: {write_report(run)}", soft_wrap=True, markup=False)
