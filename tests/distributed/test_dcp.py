"""Checkpoints of sharded networks carry their widths, and are read by any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from apoptosis import Apoptosis, load_sharded, save_sharded
from apoptosis.checkpoint.sharded import _alone
from apoptosis.errors import ApoptosisError, CheckpointError
from distributed.processes import together
from distributed.sharding import perceptron, shard, train, whole

STEPS, SAVED, FEW = 40, 24, 4
OPTIONS = {"tolerance": 0.05, "total_steps": STEPS, "align": 1, "calibration": 1.0}


def run(net, rank, size, **options):
    return train(net, rank, size, steps=STEPS, **options)


def write(rank, size, folder):
    """A run that is saved at two steps into one folder."""

    def keep(step, net, optimizer, apo):
        if step in (5, SAVED):
            save_sharded(folder, net, optimizer, apo, step=step, note=torch.arange(3))

    return run(shard(perceptron()), rank, size, after=keep)


def read(rank, size, folder, sharded=True):
    """What is loaded, and where the run ends that goes on from it."""
    net = shard(perceptron(1)) if sharded else perceptron(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    apo = Apoptosis(net, optimizer, torch.zeros(2, 12), **OPTIONS)
    before = [id(p) for p in net.parameters()]
    extra = load_sharded(folder, net, optimizer, apo)
    assert before == [id(p) for p in net.parameters()]
    assert extra["note"].tolist() == [0, 1, 2]
    state = {name: whole(p) for name, p in net.named_parameters()}
    moments = {f"{n}.{k}": whole(v) for n, p in net.named_parameters() for k, v in optimizer.state[p].items()}
    found = train(net, rank, size, steps=STEPS, given=(optimizer, apo), start=extra["step"] + 1)
    return {"state": state, "moments": moments}, found


def mean_losses(runs):
    """Of all examples, as every rank has as many."""
    return torch.tensor([run["losses"] for run in runs], dtype=torch.float64).mean(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "net"
    results, faults = together(write, str(folder), timeout=120)
    assert faults == [None, None]
    return folder, results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_goes_on_with_another_number_of_processes(written, size):
    folder, undisturbed = written
    results, faults = together(read, str(folder), size=size, timeout=120)
    assert faults == [None] * size
    loaded, found = results[0]
    following = mean_losses([found for _, found in results])[:FEW]
    torch.testing.assert_close(following, mean_losses(undisturbed)[SAVED + 1 :][:FEW], rtol=1e-4, atol=1e-6)
    assert loaded["state"]["0.weight"].shape[0] < 97
    assert loaded["moments"]["0.weight.exp_avg"].shape == loaded["state"]["0.weight"].shape
    if size == 2:  # else other rows are seen by each rank, and the next event is another one
        assert all(torch.equal(found["state"][name], value) for name, value in undisturbed[0]["state"].items())
    for other, _ in results:
        for kind in ("state", "moments"):
            assert all(torch.equal(loaded[kind][name], other[kind][name]) for name in loaded[kind])


def test_it_is_read_without_processes(written):
    folder, undisturbed = written
    loaded, found = read(0, 1, str(folder), sharded=False)
    assert loaded["state"]["0.weight"].shape[0] < 97
    following = mean_losses([found])[:FEW]
    torch.testing.assert_close(following, mean_losses(undisturbed)[SAVED + 1 :][:FEW], rtol=1e-4, atol=1e-6)


def beside_another(rank, size, folder):
    """Two of three processes train, save and load; the third one waits for the end."""
    mesh = DeviceMesh("cpu", [1, 2])
    if rank == 0:
        return None
    found = []

    def keep(step, net, optimizer, apo):
        if step == SAVED:
            save_sharded(folder, net, optimizer, apo, step=step)
            found.append({name: whole(p) for name, p in net.named_parameters()})

    run(shard(perceptron(), mesh=mesh), rank - 1, 2, after=keep)
    net = shard(perceptron(1), mesh=mesh)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    assert load_sharded(folder, net, optimizer, Apoptosis(net, optimizer, torch.zeros(2, 12), **OPTIONS))
    return found[0], {name: whole(p) for name, p in net.named_parameters()}


def test_a_mesh_that_leaves_processes_out_has_its_own_checkpoints(tmp_path):
    results, faults = together(beside_another, str(tmp_path / "net"), size=3, timeout=180)  # the third waits for all
    assert faults == [None] * 3
    for saved, loaded in results[1:]:
        assert saved["0.weight"].shape[0] < 97
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    net = perceptron()
    load_sharded(tmp_path / "net", net)
    assert all(torch.equal(p, results[1][0][name]) for name, p in net.named_parameters())


def other_widths():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))


def refusals(rank, size, folder):
    told = []
    for make in (other_widths, lambda: nn.Sequential(nn.Linear(12, 97), nn.ReLU(), nn.Linear(97, 3))):
        net = shard(make())
        before = {name: whole(p) for name, p in net.named_parameters()}
        try:
            load_sharded(folder, net)
        except ApoptosisError as error:
            told.append(str(error))
        assert all(torch.equal(whole(p), before[name]) for name, p in net.named_parameters())
        net(torch.randn(4, 12)).sum().backward()
    occupied = Path(folder).with_name("occupied")
    if rank == 0:
        occupied.mkdir()
        (occupied / "thesis.tex").write_text("years of work")
    torch.distributed.barrier()
    try:
        save_sharded(occupied, shard(perceptron()))
    except ApoptosisError as error:
        told.append(str(error))
    assert (occupied / "thesis.tex").exists()
    return told


def test_other_networks_are_refused_in_one_line(written):
    folder, _ = written
    results, faults = together(refusals, str(folder), timeout=120)
    assert faults == [None, None]
    for widths, names, occupied in results:
        assert "is of another network: '0.weight' was built with shape (97, 12), here (20, 12)" in widths
        assert "is of another network" in names
        assert "exists and is no checkpoint" in occupied
        assert "\n" not in widths + names + occupied


def damaged(folder, manifest):
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    text = json.dumps(manifest).encode() if manifest is not None else b"{"
    return tensors | {"manifest": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by what writes a damaged one here
@pytest.mark.filterwarnings("ignore:.*written without checksums")  # as those were whose manifest is a tensor
@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (None, "damaged"),
        ({"version": 7}, "version 7"),
        ({"version": 1}, "damaged"),
        ({"version": 1, "model": {}}, "damaged"),
    ],
)
def test_damaged_manifests_are_told_of(tmp_path, manifest, told):
    net = perceptron()
    save_sharded(tmp_path / "net", net)
    dcp.save(damaged(tmp_path / "net", manifest), checkpoint_id=tmp_path / "bad", **_alone(True))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(CheckpointError, match=told):
        load_sharded(tmp_path / "bad", net)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_one_that_was_not_finished_is_told_of_and_the_old_one_is_found(tmp_path):
    net = perceptron()
    save_sharded(tmp_path / "net", net, epoch=1)
    save_sharded(tmp_path / "net", net, epoch=2)
    assert load_sharded(tmp_path / "net", net) == {"epoch": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    shutil.move(tmp_path / "net", tmp_path / "net.old")  # ended between the two renamings
    assert load_sharded(tmp_path / "net", net) == {"epoch": 2}
    (tmp_path / "net.old" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint, or one that was not finished"):
        load_sharded(tmp_path / "net", net)
    with pytest.raises(CheckpointError, match="no checkpoint, or one"):
        load_sharded(tmp_path / "nowhere", net)
