"""Compiled and data-parallel models shrink under the names of the module inside; other wrappers are refused by name."""

from __future__ import annotations

import copy
import gc
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from apoptosis import Apoptosis, load, save, shrink_
from apoptosis.distributed.wrappers import check_alone, rebuild_wrappers, unwrap, unwrapped
from apoptosis.errors import ArgumentError, CheckpointError
from apoptosis.graph import analyse


@pytest.fixture(autouse=True)
def _forgotten():
    gc.collect()  # windows of other tests' runs, which nobody closed, hold the compiler's stance
    yield
    torch.compiler.reset()


@pytest.fixture
def alone():
    """A process group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def widths(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters()]


def run(runs, wrap, **arguments):
    """Train the wrapped network; returns it, the network inside, the optimizer and the events."""
    inside = runs.mlp()
    runs.doubled(inside, 0)
    model = wrap(inside)
    optimizer = runs.adam(inside)
    apo = runs.start(model, optimizer, **arguments)
    events = runs.train(model, optimizer, apo)
    return model, inside, apo, events


WRAPS = {
    "compiled": compiled,
    "parallel": DistributedDataParallel,
    "both": lambda net: compiled(DistributedDataParallel(net)),
    "both, the other way": lambda net: DistributedDataParallel(compiled(net)),
    "bucket views": lambda net: DistributedDataParallel(net, gradient_as_bucket_view=True, static_graph=True),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_wrapped_model_shrinks_as_the_one_inside_does(runs, wrap):
    model, inside, apo, events = run(runs, wrap)
    plain, _, twin, wanted = run(runs, lambda net: net)
    assert events
    assert [e.groups for e in events] == [e.groups for e in wanted]
    assert widths(inside) == widths(plain) != widths(runs.mlp())
    assert {g.name for g in apo.structure.groups} == {g.name for g in twin.structure.groups} == {"0", "2", "4"}
    assert set(apo.structure.shapes) == {name for name, _ in inside.named_parameters()}
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(inside.parameters(), plain.parameters(), strict=True))
    x = runs.inputs(8, 5)
    torch.testing.assert_close(model(x), inside(x))
    assert runs.num_hooks(inside) == 0


def test_a_compiled_model_is_compiled_again_after_an_event(runs):
    passes = []

    def backend(graph, inputs):
        def run(*args):
            passes.append(tuple(args[0].shape))
            return graph.forward(*args)

        return run

    inside = runs.mlp()
    model, optimizer = torch.compile(inside, backend=backend), runs.adam(inside)
    apo = runs.start(model, optimizer)
    seen = []

    def after(step):
        seen.append((len(passes), apo._observer is not None and apo._observer.is_open))

    events = runs.train(model, optimizer, apo, after=after)
    assert events
    ran = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    for count, (_, is_open) in zip(ran, seen, strict=False):
        assert (count == 0) == is_open  # eagerly in a window, compiled outside
    assert ran[-1] > 0
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_what_compiling_took_counts_as_a_cost_of_events_unless_their_cost_was_given(runs):
    start = time.perf_counter()
    analyse(runs.mlp(), (runs.inputs(4, 99),), {})
    pause = max(0.2, 30 * (time.perf_counter() - start))  # far more than captures take, however busy the machine is

    def backend(graph, inputs):
        time.sleep(pause)
        return graph.forward

    found = []
    for given in (None, 1.0):
        torch.compiler.reset()
        inside = runs.mlp()
        optimizer, log = runs.adam(inside), []
        arguments = {"total_steps": 60, "tolerance": 0.1, "align": 1, "calibration": given, "log": log.append}
        apo = Apoptosis(torch.compile(inside, backend=backend), optimizer, runs.inputs(4, 99), **arguments)
        before = apo.calibration
        events = runs.train(torch.compile(inside, backend=backend), optimizer, apo)
        found.append((before, apo.calibration, events, inside[0].out_features))
    (before, after, events, width), (_, kept, others, small) = found
    assert after > before  # what compiling took is worth more than this small network can save
    assert not events
    assert width == 32
    assert kept == 1.0
    assert "compiles again" in " ".join(others[0].notes)
    assert small < 32


def test_a_module_compiled_in_place_and_one_inside_another(runs):
    def in_place(net):
        net.compile(backend="eager")
        return net

    _, inside, _, events = run(runs, in_place)
    assert events
    assert inside[0].out_features < 32
    torch.compiler.reset()
    outer = nn.Sequential(compiled(runs.mlp()), nn.ReLU(), nn.Linear(4, 4))
    optimizer = runs.adam(outer)
    assert runs.train(outer, optimizer, runs.start(outer, optimizer))


def test_a_compiled_training_step_is_seen_too(runs):
    net = runs.mlp()
    optimizer = runs.adam(net)
    apo = runs.start(net, optimizer)

    @torch.compile(backend="eager")
    def forward(x):
        return net(x)

    events = runs.train(lambda_module(net, forward), optimizer, apo)
    assert events


def lambda_module(net, forward):
    """What train() wants of a model, around a compiled function."""

    class Called:
        def train(self):
            net.train()

        def __call__(self, x):
            return forward(x)

    return Called()


def test_one_shot_on_a_compiled_model(runs):
    inside = runs.mlp()
    runs.doubled(inside, 0)
    model = compiled(inside)
    x = runs.inputs(16, 1)
    before = model(x).detach()
    event = shrink_(model, runs.inputs(4, 0), [runs.inputs(512, 2)], tolerance=0)
    assert event.groups == {"0": (32, 16)}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_averaged_copies_of_a_compiled_model_follow(runs):
    inside = runs.mlp()
    model, optimizer = compiled(inside), runs.adam(inside)
    apo = runs.start(model, optimizer)
    averaged = AveragedModel(model)
    apo.follow(averaged)
    assert runs.train(model, optimizer, apo, after=lambda step: averaged.update_parameters(model))
    assert [tuple(p.shape) for p in averaged.parameters()] == widths(inside)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_goes_from_one_wrapper_to_another(runs, tmp_path):
    model, inside, apo, events = run(runs, compiled)
    assert events
    save(tmp_path / "net.safetensors", model, None, apo)
    fresh = runs.mlp(seed=1)
    parallel = DistributedDataParallel(fresh)
    again = Apoptosis(parallel, runs.adam(fresh), runs.inputs(4, 99), total_steps=60, tolerance=0.1, align=1)
    load(tmp_path / "net.safetensors", parallel, None, again)
    assert widths(fresh) == widths(inside)
    x = runs.inputs(8, 3)
    torch.testing.assert_close(parallel(x), inside(x))
    parallel(x).sum().backward()  # buckets of the old shapes would fail here
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fresh.parameters())


def test_the_user_keeps_his_own_stance(runs):
    inside = runs.mlp()
    model, optimizer = compiled(inside), runs.adam(inside)
    apo = runs.start(model, optimizer)
    with torch.compiler.set_stance("eager_on_recompile"):
        runs.train(model, optimizer, apo, steps=60)
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.usefixtures("alone")
def test_a_wrapper_keeps_its_communication_hooks(runs, tmp_path):
    net, buckets = runs.mlp(), []

    def sums(state, bucket):
        state.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    hooked = DistributedDataParallel(net)
    hooked.register_comm_hook(buckets, sums)
    save(tmp_path / "narrow.safetensors", runs.mlp(width=16))
    load(tmp_path / "narrow.safetensors", hooked)
    hooked(runs.inputs(8, 3)).sum().backward()
    assert sum(buckets) == sum(p.numel() for p in net.parameters())
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.usefixtures("alone")
def test_a_wrapper_keeps_its_own_process_group(runs):
    group = dist.new_group([0])
    parallel = DistributedDataParallel(runs.mlp(), process_group=group, find_unused_parameters=True)
    assert unwrap(parallel).wrappers == (parallel,)
    old = parallel.reducer
    rebuild_wrappers([parallel], parallel.module)
    assert parallel.process_group is group
    assert parallel.reducer is not old
    assert parallel.find_unused_parameters


@pytest.mark.usefixtures("alone")
def test_what_a_wrapper_would_lose_is_refused(runs):
    hooked = DistributedDataParallel(runs.mlp())
    hooked._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    with pytest.raises(ArgumentError, match="built-in communication hook"):
        unwrap(hooked)
    with pytest.raises(ArgumentError, match=r"module '0' is wrapped.*whole model"):
        unwrap(nn.Sequential(DistributedDataParallel(runs.mlp())))


@pytest.mark.usefixtures("alone")
def test_sharded_models_are_refused_by_name_where_one_process_acts_alone():
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(copy.deepcopy(net), mesh=mesh)
    with pytest.raises(
        ArgumentError, match=r"several processes \(fully_shard over 1 process\).*before it is wrapped or sharded"
    ):
        check_alone(unwrap(sharded))
    with pytest.raises(CheckpointError, match=r"spread over processes.*save_sharded"):
        save("nowhere.safetensors", sharded)
    with pytest.raises(CheckpointError, match=r"spread over processes.*load_sharded"):
        load("nowhere.safetensors", sharded)
    spread = copy.deepcopy(net)
    spread[0].weight = nn.Parameter(dist.tensor.distribute_tensor(spread[0].weight.data, mesh))
    with pytest.raises(ArgumentError, match=r"parameter '0\.weight' is a DTensor not of fully_shard"):
        Apoptosis(spread, torch.optim.SGD(spread.parameters(), 0.1), torch.zeros(2, 6))
    old = object.__new__(FullyShardedDataParallel)  # made in full it wants an accelerator
    nn.Module.__init__(old)
    with pytest.raises(ArgumentError, match="FullyShardedDataParallel"):
        unwrap(old)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own parts
def test_other_wrappers_and_programs_are_refused_by_name(runs):
    net, x = runs.mlp().eval(), runs.inputs(4, 0)
    program = torch.export.export(net, (x,))
    cases = {
        "DataParallel": nn.DataParallel(net),
        "ScriptModule": torch.jit.script(net),
        "module '0' is a ScriptModule": nn.Sequential(torch.jit.trace(net, x)),
        "exported graph": program.module(),
        "UnflattenedModule": torch.export.unflatten(program),
        "ExportedProgram.*that was exported": program,
    }
    for what, model in cases.items():
        with pytest.raises(ArgumentError, match=what):
            Apoptosis(model, runs.adam(net), x)


def test_bare_takes_wrappers_off_without_asking(runs):
    net = runs.mlp()
    assert unwrapped(net) is net
    assert unwrapped(compiled(net)) is net
    averaged = AveragedModel(net)
    assert unwrapped(averaged) is averaged  # surgery knows these
