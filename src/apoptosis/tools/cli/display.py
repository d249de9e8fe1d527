"""What is printed while a network trains, and how numbers are written.

Holds: progress bars on a terminal, one plain line per epoch elsewhere. Elsewhere: results' tables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from apoptosis.decide.ledger import Event
from apoptosis.tools.recipes.datasets import Dataset
from apoptosis.tools.recipes.loop import SILENT, Epoch, Trainer, Watcher
from apoptosis.tools.report.words import metric_value

PLAIN_WIDTH = 140


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Raise: the command reports it; rich would exit without a message."""
        raise BrokenPipeError


def console() -> Console:
    """Return a console on stdout; wide enough for tables where it is no terminal."""
    out = _Output(highlight=False)
    return out if out.is_terminal else _Output(highlight=False, width=PLAIN_WIDTH, no_color=True)


class Lines(Watcher):
    """One plain line per epoch and per event."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def data(self, data: Dataset) -> None:
        """Print what the user should know of data of their own."""
        for note in data.notes:
            self.out.print(f"data: {note}", soft_wrap=True, markup=False)

    def event(self, trainer: Trainer, event: Event) -> None:
        """Print what was removed."""
        self.out.print(f"  {event}", soft_wrap=True, markup=False)

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        """Print the epoch's numbers."""
        self.out.print(f"{method(trainer)}  {epoch_words(trainer, epoch)}", soft_wrap=True, markup=False)


class Bars(Lines):
    """One progress bar per run: loss, metric, widths, time left; events as lines above."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=out,
            refresh_per_second=2,
            # A thread that draws would take time from training at moments of its own; drawing is done in step().
            auto_refresh=False,
        )
        self._tasks: dict[int, TaskID] = {}
        self._metric: dict[int, str] = {}
        self._drawn = 0.0

    def step(self, trainer: Trainer, loss: float) -> None:
        """Move the bar."""
        state = f"loss {loss:.4f}  {self._metric.get(id(trainer), '')}{widths_words(trainer.widths())}"
        self.progress.update(self._task(trainer), completed=trainer.step, state=state)
        if time.monotonic() - self._drawn > 0.5:
            self.progress.refresh()
            self._drawn = time.monotonic()

    def epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        """Show the epoch's metric from now on."""
        if epoch.metric is not None:
            self._metric[id(trainer)] = f"{trainer.data.metric} {metric_value(trainer.data.metric, epoch.metric)}  "
        self.step(trainer, epoch.loss)
        self.progress.refresh()

    def _task(self, trainer: Trainer) -> TaskID:
        if id(trainer) not in self._tasks:
            self._tasks[id(trainer)] = self.progress.add_task(
                method(trainer), total=trainer.total_steps, state="", completed=trainer.step
            )
        return self._tasks[id(trainer)]


@contextmanager
def display(out: Console, quiet: bool) -> Iterator[Watcher]:
    """Choose by terminal and --quiet; a context because bars have to be cleared away."""
    if quiet:
        yield SILENT
    elif out.is_terminal:
        bars = Bars(out)
        with bars.progress:
            yield bars
    else:
        yield Lines(out)


def method(trainer: Trainer) -> str:
    """Return a run's method and seed."""
    return f"{'apoptosis' if trainer.apo is not None else 'dense':9} seed {trainer.config.seed}"


def epoch_words(trainer: Trainer, epoch: Epoch) -> str:
    """Put an epoch's numbers in one line."""
    metric = ""
    if epoch.metric is not None:
        metric = f"validation {trainer.data.metric} {metric_value(trainer.data.metric, epoch.metric)}  "
    return (
        f"epoch {epoch.epoch}/{trainer.config.epochs}  loss {epoch.loss:.4f}  {metric}"
        f"parameters {epoch.parameters:,}  {widths_words(epoch.widths)}{epoch.seconds:.1f} s"
    )


def widths_words(widths: Mapping[str, int]) -> str:
    """Write widths as 704-664-208; of many only the first and the last.

    Example:
        >>> widths_words({"0": 704, "2": 664}), widths_words({})
        ('widths 704-664  ', '')
    """
    numbers = [str(width) for width in widths.values()]
    if not numbers:
        return ""
    if len(numbers) > 8:
        numbers = [*numbers[:4], "..", *numbers[-2:]]
    return f"widths {'-'.join(numbers)}  "
