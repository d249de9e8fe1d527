"""A run's log as one self-contained page and PNG plots.

Holds: the one verb, `write_report`. Elsewhere: reading the log (`run`), drawing (`figures`), markup
(`page`) and looks (`theme`). The report reads `events.jsonl` alone; it never imports the training side.
"""

from __future__ import annotations

import os
from pathlib import Path

from apoptosis.errors import ApoptosisError, DataError
from apoptosis.storage.files import replacing
from apoptosis.tools.report.run import RunData, read_run

__all__ = ["RunData", "read_run", "write_report"]

PAGE = "report.html"
PLOTS = "plots"


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run: one HTML page that needs nothing else, and its plots as PNG files.

    Whatever the log does not hold yet (a paired run without apoptosis, events, a ledger) is a sentence on the page.

    Args:
        run_dir: folder of a run, with its `events.jsonl`; the plots go to `run_dir/plots/`.
        out: the page to write; default `run_dir/report.html`.

    Returns: the path of the page.

    Raises: DataError: not a run folder, or a damaged log. ApoptosisError: matplotlib is missing, or a file cannot be
        written. An older page stays as it was.
    """
    run = read_run(Path(run_dir))
    try:
        from apoptosis.tools.report.figures import draw_all
        from apoptosis.tools.report.page import render
    except ImportError as error:
        remedy = 'pip install "torch-apoptosis[cli]"'
        raise ApoptosisError(f"the report needs matplotlib and jinja2 ({error}); install them with: {remedy}") from None
    page = Path(out) if out is not None else Path(run_dir) / PAGE
    plots = draw_all(run)
    try:
        folder = Path(run_dir) / PLOTS
        folder.mkdir(exist_ok=True)
        for plot in plots:
            if plot.png:
                with replacing(folder / f"{plot.key}.png") as partial:
                    partial.write_bytes(plot.png)
            else:  # a plot of an earlier state of this folder would contradict the page
                (folder / f"{plot.key}.png").unlink(missing_ok=True)
        with replacing(page) as partial:  # a reader sees the old page or the new one, never half of it
            partial.write_bytes(render(run, plots).encode(errors="replace"))
    except OSError as error:
        raise DataError(f"report '{page}': cannot be written ({error.strerror or error})") from None
    return page
