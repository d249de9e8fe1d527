"""Records as flat scalars; loggers of other libraries that take them."""

import json
import re

import pytest

from apoptosis.errors import ArgumentError
from apoptosis.events import scalars, to_mlflow, to_tensorboard, to_wandb


@pytest.fixture(scope="module")
def records(runs):
    found = []
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer, log=found.append)
    found += [event := next(e for e in runs.train(net, optimizer, apo)), apo.ledger()]
    assert [r["kind"] for r in found[:-2]].count("event") >= 1
    assert event.step == found[0]["step"]
    return found


def test_an_event_is_flat_numbers_by_names_that_loggers_take(records):
    record, event = records[0], records[-2]
    flat = scalars(record)
    assert flat == scalars(event) == scalars(json.loads(json.dumps(record)))
    assert (flat["event/parameters_before"], flat["event/parameters_after"]) == event.parameters
    assert (flat["event/macs_before"], flat["event/macs_after"]) == event.macs
    assert flat["event/step"] == event.step
    assert flat["event/rolled_back"] == 0
    assert flat["event/output_rms"] == event.measured["output_rms"]
    assert flat["event/channels_removed"] == sum(a - b for a, b in event.groups.values()) > 0
    assert all(flat[f"event/width/{name}"] == after for name, (_, after) in event.groups.items())
    assert flat["event/site_error"] == max(c.value for c in event.certificates if c.kind == "empirical")
    for name, value in flat.items():
        assert re.fullmatch(r"[/\w.\- ]+", name)  # what MLflow allows
        assert type(value) is float


def test_other_records_are_scalars_too(records):
    ledger = records[-1]
    assert scalars(ledger)["ledger/events"] == ledger.events
    assert scalars(ledger)["ledger/parameters_after"] == ledger.parameters[1]
    attempt = {"kind": "attempt", "step": 9, "outcome": "nothing", "groups": {"a": "too few rows"}, "considered": 2}
    assert scalars(attempt) == {"attempt/step": 9.0, "attempt/considered": 2.0}
    undone = {"kind": "event", "rolled_back": True, "reason": "", "step": 3, "measured": {"flips": float("nan")}}
    assert scalars(undone) == {"event/step": 3.0, "event/rolled_back": 1.0}
    alike = {"kind": "event", "step": 1, "groups": {"a#1": [4, 2], "a:1": [4, 3]}}
    assert [scalars(alike)[f"event/width/a_1{end}"] for end in ("", "_2")] == [2, 3]
    for odd in ({"kind": "epoch"}, 3, {}):
        with pytest.raises(ArgumentError, match="is no record"):
            scalars(odd)


def test_tensorboard_shows_events_at_their_steps(runs, records, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        net = runs.mlp()
        optimizer = runs.adam(net)
        apo = runs.start(net, optimizer, log=to_tensorboard(writer))
        events = runs.train(net, optimizer, apo)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert {"event/parameters_after", "event/width/0"} <= set(found.Tags()["scalars"])
    points = [(point.step, point.value) for point in found.Scalars("event/parameters_after")]
    assert points == [(event.step, event.parameters[1]) for event in events] != []


def test_lightnings_loggers_take_what_mlflow_takes(records, tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers", reason="lightning is not installed")
    logger = loggers.CSVLogger(tmp_path)
    to_mlflow(logger)(records[0])
    logger.save()
    head, line = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert int(row["step"]) == records[0]["step"]
    assert float(row["event/parameters_after"]) == records[0]["parameters"][1]


def test_wandb_gets_no_step_that_it_would_drop(records):
    class Run:  # the one method of wandb's that is called, which is not installed here
        def log(self, data, step=None):
            self.seen = data, step

    run = Run()
    to_wandb(run)(records[0])
    assert run.seen == (scalars(records[0]), None)


def test_a_logger_given_as_it_is_is_refused_with_its_adapter(runs, records):
    class Writer:
        def add_scalar(self, tag, value, step):
            raise AssertionError

    net = runs.mlp()
    with pytest.raises(ArgumentError, match=r"to_tensorboard\(writer\)"):
        runs.start(net, runs.adam(net), log=Writer())
    for adapter in (to_tensorboard, to_mlflow, to_wandb):
        with pytest.raises(ArgumentError, match=f"{adapter.__name__}.*it has no"):
            adapter(3)
