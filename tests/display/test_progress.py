"""The progress line: opt-in, on terminals and in notebooks alone, by tqdm or rich."""

import gc
import io
import os
import sys
import weakref

import pytest

from apoptosis.display import progress
from apoptosis.errors import ArgumentError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def to_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("library", progress.LIBRARIES)
def test_the_line_tells_steps_events_and_sizes(runs, library, monkeypatch):
    pytest.importorskip(library)
    if library == "tqdm" and os.environ.get("TQDM_DISABLE"):
        pytest.skip("TQDM_DISABLE is set")
    terminal = to_terminal(monkeypatch)
    net = runs.mlp()
    optimizer = runs.adam(net)
    with runs.start(net, optimizer, progress=library) as apo:
        events = runs.train(net, optimizer, apo)
    shown = terminal.getvalue()
    assert "apoptosis" in shown
    assert f"{runs.STEPS}/{runs.STEPS}" in shown
    parameters = 100 * sum(p.numel() for p in net.parameters()) / events[0].parameters[0]
    assert f"{len(events)} events, {parameters:.3g} % of the parameters" in shown
    assert apo._line is None
    length = len(terminal.getvalue())
    del apo
    gc.collect()
    assert len(terminal.getvalue()) == length


def test_nobody_to_see_it_or_not_asked_for_is_no_line(runs, monkeypatch):
    net = runs.mlp()
    assert runs.start(net, runs.adam(net))._line is None
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a log file
    assert runs.start(net, runs.adam(net), progress=True)._line is None


def test_a_line_does_not_keep_a_dropped_run_alive(runs, monkeypatch):
    to_terminal(monkeypatch)
    net = runs.mlp()
    apo = runs.start(net, runs.adam(net), progress=True)
    apo.step()
    gone = weakref.ref(apo)
    del apo
    assert gone() is None


def test_what_cannot_be_drawn_is_refused_with_the_remedy(runs, monkeypatch):
    net = runs.mlp()
    with pytest.raises(ArgumentError, match=r"progress='bar' must be one of True, False, 'tqdm', 'rich'"):
        runs.start(net, runs.adam(net), progress="bar")
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="needs tqdm or rich: pip install tqdm"):
        runs.start(net, runs.adam(net), progress=True)
    monkeypatch.setattr(progress, "find_spec", lambda name: name == "rich" or None)
    assert progress.check_progress(True) == "rich"
