"""Sums over MPI, under the real mpirun: what they promise, and that they equal gloo's."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.launched import Launched, mpirun
from distributed.test_launch import SMALL, STOPS, TRAIN, records, result

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def has_mpi():
    try:
        import mpi4py  # noqa: F401 - not its MPI module, which would begin MPI here
    except ImportError:
        return False
    return mpirun() is not None


with_mpi = pytest.mark.skipif(not has_mpi(), reason="needs the extra 'mpi'")


def test_the_tests_of_make_have_mpi():
    """Else everything below might be skipped for ever."""
    assert "mpi" in (ROOT / "Makefile").read_text().split('-e ".[')[1].split("]")[0].split(",")
    assert {"mpi4py", "mpich"} <= {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}


def finished(launcher, size, *program, cwd, **variables):
    run = Launched(launcher, size, *program, cwd=cwd, **variables)
    assert run.wait() == 0, run.told()
    return run


@with_mpi
def test_what_ranks_of_mpi_promise(tmp_path):
    """Sums, votes, exchanges, averages that overlap, and an error in time where one stays away."""
    run = Launched("mpi", 4, str(HERE / "mpi_calls.py"), cwd=tmp_path)
    run.wait()
    told = [line for line in run.out.read_text().splitlines() if line.endswith("done")]
    assert sorted(told) == [f"{rank} done" for rank in range(4)], run.told()


@with_mpi
def test_a_users_loop_is_the_same_under_mpirun_and_torchrun(tmp_path):
    """Several buckets, BatchNorm, one line to begin: events, ranks and weights agree. Here MPI's are new Pythons."""
    found = {}
    for launcher in ("mpi", "torchrun"):
        folder = tmp_path / launcher
        folder.mkdir()
        finished(launcher, 2, str(HERE / "user_script.py"), str(folder), cwd=folder, fresh=launcher == "mpi")
        found[launcher] = torch.load(folder / "found.pt", weights_only=False)
    mpi, gloo = found["mpi"], found["torchrun"]
    assert (mpi["launcher"], mpi["kind"], mpi["size"]) == ("mpi", "MpiRanks", 2)
    assert (gloo["launcher"], gloo["kind"], gloo["size"]) == ("torchrun", "TorchRanks", 2)
    assert mpi["events"]
    assert [step for step, _ in mpi["events"]] == [step for step, _ in gloo["events"]]
    for one in found.values():
        assert one["sums"][0] == one["sums"][1]
    assert {n: t.shape for n, t in mpi["state"].items()} == {n: t.shape for n, t in gloo["state"].items()}
    for name, tensor in mpi["state"].items():
        torch.testing.assert_close(tensor, gloo["state"][name], rtol=1e-4, atol=1e-5)


@with_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_the_command_under_mpirun_equals_torchrun(tmp_path, size):
    """Two ranks have one order to add in; four are summed in others by MPI than by gloo."""
    program = [*TRAIN, "--epochs", "3", "--quiet"]
    for launcher in ("mpi", "torchrun"):
        finished(launcher, size, *program, "--out", launcher, cwd=tmp_path)
    mpi, gloo = (result(tmp_path / launcher) for launcher in ("mpi", "torchrun"))
    assert mpi["widths"] == gloo["widths"]
    assert mpi["parameters"] == gloo["parameters"] < 7770
    assert mpi["test_metric"] == pytest.approx(gloo["test_metric"], abs=0.01)
    assert mpi["loss"] == pytest.approx(gloo["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / launcher / "last.safetensors") for launcher in ("mpi", "torchrun"))
    weights = [name for name in one if name.startswith("model.")]
    assert weights
    for name in weights:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert [(run["launcher"], run["ranks"]) for run in records(tmp_path / "mpi", "run")] == [("mpi", size)]


@with_mpi
def test_a_folder_with_a_run_is_one_line(tmp_path):
    (tmp_path / "mpi").mkdir()
    (tmp_path / "mpi" / "config.json").write_text("{}")
    (tmp_path / "mpi" / "last.safetensors").write_bytes(b"of a run that has saved")
    refused = Launched("mpi", 2, *TRAIN, "--out", "mpi", cwd=tmp_path)
    assert refused.wait() != 0
    assert len(refused.lines()) == 1
    assert "holds a run already" in refused.lines()[0]


@with_mpi
def test_four_ranks_whose_rows_do_not_divide_resume_after_an_interrupt(tmp_path):
    program = [*STOPS, "--epochs", "10", "--batch", "66", "--out", "run"]
    run = Launched("mpi", 4, *program, cwd=tmp_path, STOPS="30")
    run.until(30)
    run.interrupt()
    assert run.wait() != 0
    resumed = finished("mpi", 4, "-m", "apoptosis.cli", "train", "--resume", "run", "--launcher", "mpi", cwd=tmp_path)
    assert "test accuracy" in resumed.out.read_text()
    found = result(tmp_path / "run")
    assert found["steps"] == 10 * (1500 // 66)
    assert found["parameters"] < 7770
    assert found["test_metric"] > 0.6
    assert [run["ranks"] for run in records(tmp_path / "run", "run")] == [4, 4]


@with_mpi
def test_a_loss_that_is_not_finite_is_one_line(tmp_path):
    run = Launched("mpi", 2, *TRAIN, "--epochs", "2", "--lr", "1e30", "--no-apoptosis", "--out", "run", cwd=tmp_path)
    assert run.wait() != 0
    assert len(run.lines()) == 1
    assert "the training loss is" in run.lines()[0]


def test_missing_mpi_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no MPI here')\n")
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from apoptosis.tools.cli import main; "
    run = Launched("none", 1, "-c", f"{begin}main({['train', *SMALL, '--launcher', 'mpi']!r})", cwd=tmp_path)
    assert run.wait() == 2
    assert run.lines() == [
        "apoptosis: error: launcher 'mpi' needs mpi4py and an MPI library (no MPI here); install them with: "
        "pip install 'torch-apoptosis[mpi]', or start with torchrun."
    ]


@with_mpi
def test_a_library_that_the_launcher_is_not_for_is_one_line(tmp_path):
    """MPICH, started by Open MPI's mpirun, would end the program by itself, in lines that name no remedy."""
    if "mpich" not in {found.metadata["Name"] for found in metadata.distributions()}:
        pytest.skip("needs MPICH")
    told = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    run = Launched("none", 1, *TRAIN, cwd=tmp_path, **told, PMIX_RANK="0", PMIX_NAMESPACE="none")
    assert run.wait() == 2, run.told()
    assert run.told() == (
        "apoptosis: error: the mpirun that started this process is Open MPI's, and the MPI library that mpi4py loads "
        "is MPICH: take the mpirun of this Python environment.\n"
    )
