"""How runs, events, plans, ledgers and groups print, and what a notebook shows of them."""

import re
from html.parser import HTMLParser

import pytest
from torch import nn

from apoptosis import Apoptosis
from apoptosis.display import html
from distributed.launched import ran

HOSTILE = "<img src=x onerror=alert(1)>&$x_1$"


class Markup(HTMLParser):
    """Checks that tags nest; collects them and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.styles, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles.append(dict(attrs).get("style", ""))
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href", "class_")]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def trained(runs):
    """A run with events, whose first layer has a name that is markup."""
    net = nn.Sequential()
    for i, layer in enumerate(runs.mlp()):
        net.add_module(HOSTILE if i == 0 else str(i), layer)
    optimizer, records = runs.adam(net), []
    apo = runs.start(net, optimizer, log=records.append, exclude=("2",))
    events = runs.train(net, optimizer, apo)
    assert len(events) > 1
    return apo, events, records, net


def shown_by(trained):
    apo, events, _, _ = trained
    return {
        "apo": apo,
        "event": events[0],
        "plan": apo.plan(),
        "ledger": apo.ledger(),
        "group": apo.groups()[0],
        "pinned": apo.structure.groups[-1],
        "pin": apo.pins()[0],
    }


def test_a_run_prints_a_bar_for_every_group(trained):
    apo, events, _, net = trained
    text = str(apo)
    text.encode("ascii")  # any terminal and log file can show it
    width = net[0].out_features
    assert re.search(rf"^  {re.escape(HOSTILE)} +{width} of 32  #+\.+$", text, flags=re.MULTILINE)
    assert f"{len(events)} events" in text
    assert "2 groups cannot be pruned (apo.pins() says why)" in text
    assert apo.status() in text
    left = 100 * sum(p.numel() for p in net.parameters()) / apo.ledger().parameters[0]
    assert f"{left:.3g} % of the parameters" in apo.status()


def test_a_repr_is_one_short_line_without_arrays(trained):
    for name, one in shown_by(trained).items():
        if name == "pin":
            continue
        assert "\n" not in repr(one), name
        assert "array(" not in repr(one), name
        assert len(repr(one)) < 300, name


def test_notebooks_get_whole_escaped_markup(trained):
    for name, one in shown_by(trained).items():
        markup = Markup(one._repr_html_())
        assert markup.tags[0] == "div", name
        assert "img" not in markup.tags, name
        assert "script" not in markup.tags, name
        assert "style" not in markup.tags, name  # a notebook may drop them
        colours = re.findall(r"(?:color|background):([^;]+)", ";".join(markup.styles))
        assert set(colours) <= {"inherit", "none", html.KEPT, html.GONE}, name  # readable on dark and on light
    assert HOSTILE in "".join(Markup(trained[0]._repr_html_()).words)
    event = trained[1][0]
    before, after = event.groups[HOSTILE]
    assert {f"{before:,}", f"{after:,}"} <= set(Markup(event._repr_html_()).words)


def test_what_is_long_is_cut_and_counted():
    rows = [(f"g{i}", "1") for i in range(70)]
    words = Markup(html.table(("group", "n"), rows)).words
    assert "g49" in words
    assert "g50" not in words
    assert "and 20 more" in words
    assert "width:98.0%" in html.bar(9999, 10_000)  # not shown as all
    assert "width:0.0%" in html.bar(0, 0)


def test_what_failed_in_the_constructor_has_a_repr():
    unfinished = Apoptosis.__new__(Apoptosis)
    assert repr(unfinished) == str(unfinished) == "<Apoptosis, not set up>"
    assert "not set up" in unfinished._repr_html_()


def test_nothing_that_draws_is_imported_before_it_is_asked_for(tmp_path):
    code = """
import sys, torch
from apoptosis import Apoptosis
before = set(sys.modules)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
apo = Apoptosis(net, torch.optim.SGD(net.parameters(), 0.1), torch.zeros(2, 2))
apo.step(), str(apo), repr(apo), apo._repr_html_(), apo.ledger()._repr_html_()
names = {"matplotlib", "tqdm.auto", "rich.progress", "IPython"} & (set(sys.modules) - before)
sys.exit(str(names) if names else 0)
"""
    done = ran(code, cwd=tmp_path)
    assert done.wait() == 0, done.told()
