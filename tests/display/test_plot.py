"""`apo.plot()`: what is drawn is what happened."""

import sys

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from apoptosis.display.plot import plot_run
from apoptosis.errors import ApoptosisError, ArgumentError


@pytest.fixture(autouse=True)
def _agg(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def line_of(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_widths_and_sizes_fall_where_the_events_were(runs, monkeypatch):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)
    events = runs.train(net, optimizer, apo)
    assert events
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *_: pytest.fail("shown"))
    before = dict(mpl.rcParams)
    left, right = apo.plot()
    assert dict(mpl.rcParams) == before
    x, y = line_of(left, "0").get_data()
    changed = [e for e in events if "0" in e.groups]
    assert list(x) == [0, *(e.step for e in changed), runs.STEPS]
    assert list(y) == [32, *(e.groups["0"][1] for e in changed), net[0].out_features]
    x, y = line_of(right, "parameters").get_data()
    assert list(x) == [0, *(e.step for e in events), runs.STEPS]
    assert y[0] == 100
    assert y[-1] == pytest.approx(100 * sum(p.numel() for p in net.parameters()) / events[0].parameters[0])
    assert left.get_legend() is not None
    # a resumed run draws the same, into axes that it is given
    other = runs.mlp()
    for layer, mine in zip(other, net, strict=True):
        vars(layer).update({k: v for k, v in vars(mine).items() if k in ("in_features", "out_features")})
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.data = getattr(mine, name).data.clone()
    resumed = runs.start(other, runs.adam(other))
    resumed.load_state_dict(apo.state_dict())
    given = Figure().subplots(1, 2)
    again, _ = resumed.plot(given)
    assert again is given[0]
    assert line_of(again, "0").get_xydata().tolist() == line_of(left, "0").get_xydata().tolist()
    # a checkpoint from before removals were kept
    state = apo.state_dict()
    del state["memory"]["removals"]
    resumed.load_state_dict(state)
    assert list(line_of(resumed.plot()[0], "0").get_ydata()) == [32, net[0].out_features]
    with pytest.raises(ArgumentError, match="must be two axes"):
        apo.plot([given[0]])
    with pytest.raises(ArgumentError, match="must be two axes"):
        apo.plot(given[0])


def test_many_groups_and_odd_names_can_be_drawn():
    names = ["_hidden", "$x_1", "two\nlines", *map(str, range(20))]
    full = {name: 10 + i for i, name in enumerate(names)}
    removals = [(5, {"19": 7}, 90, 80.0), (8, {"19": 0}, 70, 60.0)]
    left, right = plot_run(full, removals, ({"19": 0}, 70, 60.0), full=(100, 100.0), step=10, rolled_back=[9])
    labelled = [text.get_text() for text in left.get_legend().get_texts()]
    assert labelled == [*map(str, range(12, 20)), "rolled back"]  # the widest
    assert line_of(left, "19").get_xydata().tolist() == [[0, 32], [5, 7], [8, 0], [10, 0]]
    assert line_of(right, "multiply-adds").get_xydata().tolist() == [[0, 100], [5, 80], [8, 60], [10, 60]]
    few = {name: 4 for name in names[:3]}
    left, _ = plot_run(few, [], (few, 0, 0.0), full=(0, 0.0), step=0)
    assert {text.get_text() for text in left.get_legend().get_texts()} == {" _hidden", "$x_1", "two lines"}
    left.figure.canvas.draw()


def test_without_matplotlib_the_error_names_the_remedy(runs, monkeypatch):
    net = runs.mlp()
    apo = runs.start(net, runs.adam(net))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ApoptosisError, match="pip install matplotlib") as caught:
        apo.plot()
    assert "\n" not in str(caught.value)
