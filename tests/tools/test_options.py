"""One field of RunConfig is one option of the command, with its default and its help, and there are no others."""

import pytest
import typer

from apoptosis.errors import ArgumentError
from apoptosis.tools.cli.app import app
from apoptosis.tools.cli.options import option_name, with_run_options
from apoptosis.tools.cli.plan import OF_A_NETWORK, OF_A_RUN
from apoptosis.tools.recipes.config import RunConfig
from apoptosis.tools.recipes.networks import NETWORKS, network
from apoptosis.tools.report.figures import PLOTS, plot

OWN = {
    "train": {"out", "launcher", "resume", "quiet"},
    "compare": {"seeds", "out", "json_file", "quiet"},
    "plan": {"checkpoint", "input_shape", "input_dtype", "json_file"},
}
VALUES = {
    "data": "csv:table.csv",
    "data_dir": "files",
    "train_rows": 70,
    "test_rows": 30,
    "label": "price",
    "drop": ("id", "name"),
    "task": "regression",
    "size": 32,
    "validation": 0.25,
    "model": "my.nets:build",
    "kwargs": '{"hidden": 3}',
    "loss": "my.nets:loss",
    "network": "cnn",
    "widths": (64, 32),
    "activation": "gelu",
    "dropout": 0.5,
    "epochs": 3,
    "batch": 64,
    "optimizer": "sgd",
    "lr": 0.5,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "seed": 7,
    "device": "cpu",
    "precision": "bf16",
    "threads": 2,
    "apoptosis": False,
    "tolerance": 0.02,
    "target": "macs=0.5",
    "criterion": "greedy",
    "budget": 0.002,
    "probe_rows": 100,
    "align": 4,
    "exclude": ("0", "2*"),
    "calibration": 1e6,
    "tensorboard": True,
}


def commands():
    return typer.main.get_command(app).commands


@pytest.mark.parametrize(
    ("command", "without"),
    [("train", set()), ("compare", {"seed", "apoptosis"})],
)
def test_every_field_is_an_option_and_every_option_a_field(command, without):
    options = {option.name: option for option in commands()[command].params}
    assert set(options) - OWN[command] == set(RunConfig.model_fields) - without
    for name in set(options) - OWN[command]:
        field = RunConfig.model_fields[name]
        assert options[name].help == field.description
        assert option_name(name) in options[name].opts
        assert (options[name].default or None) == (field.default or None)


def test_plan_changes_what_it_names_and_has_no_defaults_of_its_own():
    options = {option.name: option for option in commands()["plan"].params}
    assert set(options) - OWN["plan"] == {*OF_A_RUN, *OF_A_NETWORK}
    assert set(OF_A_RUN) == {"tolerance", "target", "criterion", "data_dir", "device"}
    assert all(options[name].default is None for name in set(options) - OWN["plan"])


def typed_words(name, value):
    option = option_name(name)
    if value is True:
        return [option]
    if value is False:
        return [option.replace("--", "--no-", 1)]
    if name in ("exclude", "drop"):
        return [word for item in value for word in (option, item)]
    return [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def test_what_is_typed_arrives_and_nothing_else():
    got = []
    own = typer.Typer()

    @own.command()
    @with_run_options()
    def command(typed, more: str = "x"):
        got.append((typed, more))

    run = typer.main.get_command(own)
    run(args=[], standalone_mode=False)
    assert got.pop() == ({}, "x")
    assert VALUES.keys() == RunConfig.model_fields.keys()
    run(args=[w for name, value in VALUES.items() for w in typed_words(name, value)], standalone_mode=False)
    typed, _ = got.pop()
    assert typed == VALUES
    assert RunConfig.checked(**typed).model_dump() == VALUES
    run(args=["--epochs", str(RunConfig().epochs), "--more", "y"], standalone_mode=False)
    assert got.pop() == ({"epochs": RunConfig().epochs}, "y")  # typed, though it is the default


def test_a_plot_or_network_of_a_name_that_is_taken_is_refused() -> None:
    before = dict(NETWORKS), dict(PLOTS)
    with pytest.raises(ArgumentError, match="network 'mlp' is there already; there are mlp, cnn"):
        network(8)(NETWORKS["mlp"].build)
    key = next(iter(PLOTS))
    with pytest.raises(ArgumentError, match=f"plot '{key}' is there already"):
        plot(key, "", "")(lambda run: "")
    assert before == (NETWORKS, PLOTS)
