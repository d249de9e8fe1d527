from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apoptosis.errors import ArgumentError, PinnedGroupError, ShapeError
from apoptosis.records import Group, LinearSite, Member, Pin, Reduction, Structure, TensorEdit
from apoptosis.surgery import Transaction, apply_edit, build_edits, merge_like, named_tensors, slice_like

C, KEEP = 6, (0, 2, 3, 5)


def _site(module: nn.Module, columns, input_columns=None, **more) -> LinearSite:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    linear = isinstance(module, nn.Linear)
    dim = 0 if transposed else 1
    fields = {
        "module": "reader",
        "kind": "linear" if linear else "conv_transpose" if transposed else "conv",
        "weight": "reader.weight",
        "dim": dim,
        "bias": "reader.bias" if module.bias is not None else None,
        "columns": columns,
        "input_columns": columns if input_columns is None else input_columns,
        "num_columns": module.weight.shape[dim],
        "taps": 1 if linear else int(np.prod(module.kernel_size)),
    }
    return LinearSite(**(fields | more))


def _structure(model: nn.Module, site: LinearSite, num_channels: int, nets) -> Structure:
    member = Member(tensor="source.weight", dim=0, positions=nets.positions(num_channels), role="producer")
    group = Group(name="source", num_channels=num_channels, members=(member,), sites=(site,))
    return Structure(groups=(group,), macs=0.0, shapes=nets.shapes(model))


def _readers():
    pos = np.arange(C)[:, None]
    flat = np.arange(C * 4).reshape(C, 4)
    paired = np.stack([np.arange(C), np.arange(C) + C], axis=1)  # two blocks of a grouped convolution
    return {
        "linear": (nn.Linear(C, 5), pos, pos, (3, C), True),
        "flatten": (nn.Linear(C * 4, 5), flat, flat, (3, C * 4), True),
        "conv1d": (nn.Conv1d(C, 5, 3), pos, pos, (3, C, 7), True),
        "conv2d": (nn.Conv2d(C, 5, 3, stride=2), pos, pos, (3, C, 7, 7), True),
        "conv2d padded": (nn.Conv2d(C, 5, 3, padding=1), pos, pos, (3, C, 7, 7), False),
        "conv3d": (nn.Conv3d(C, 5, 2), pos, pos, (3, C, 4, 4, 4), True),
        "grouped": (nn.Conv2d(2 * C, 4, 3, groups=2), pos, paired, (3, 2 * C, 5, 5), True),
        "grouped, repeated": (nn.Conv2d(2 * C, 4, 3, groups=2), np.repeat(pos, 2, 1), paired, (3, 2 * C, 5, 5), True),
        "twice": (nn.Conv2d(2 * C, 4, 3), paired, paired, (3, 2 * C, 5, 5), True),
        "transposed": (nn.ConvTranspose2d(C, 5, 3), pos, pos, (3, C, 5, 5), False),
        "transposed 1x1": (nn.ConvTranspose1d(C, 5, 1), pos, pos, (3, C, 5), True),
        "transposed grouped": (nn.ConvTranspose2d(2 * C, 4, 1, groups=2), paired, paired, (3, 2 * C, 5, 5), True),
    }


@pytest.mark.parametrize("name", _readers())
def test_the_edited_reader_computes_what_the_old_one_computes_on_the_reconstruction(name, nets):
    torch.manual_seed(1)
    reader, columns, inputs, shape, offset = _readers()[name]
    model = nn.ModuleDict({"source": nn.Linear(2, C), "reader": reader}).double()
    site = _site(reader, columns, inputs, zero_padded="padded" in name)
    structure = _structure(model, site, C, nets)
    reduction = nets.random_reduction(structure.groups[0], KEEP, offset=offset)
    tensors = named_tensors(model)
    edits = {e.tensor: e for e in build_edits(structure, [reduction])}
    new = {n: apply_edit(edits[n], t, tensors) if n in edits else t for n, t in tensors.items()}

    z = torch.randn(shape, dtype=torch.float64)
    along = z.movedim(1, -1)
    spots = torch.from_numpy(inputs)
    mix, shift = reduction.sites[site.key].mix, reduction.sites[site.key].offset
    guess = along.clone()
    for spot in spots.T:
        guess[..., spot] = along[..., spot[list(KEEP)]] @ mix + (0.0 if shift is None else shift)
    kept = torch.sort(spots[list(KEEP)].flatten()).values
    call = {
        nn.Linear: lambda x, w, b, groups: nn.functional.linear(x, w, b),
        nn.Conv1d: lambda x, w, b, groups: nn.functional.conv1d(x, w, b),
        nn.Conv2d: lambda x, w, b, g: nn.functional.conv2d(x, w, b, reader.stride, reader.padding, groups=g),
        nn.Conv3d: lambda x, w, b, groups: nn.functional.conv3d(x, w, b),
        nn.ConvTranspose1d: lambda x, w, b, groups: nn.functional.conv_transpose1d(x, w, b),
        nn.ConvTranspose2d: lambda x, w, b, g: nn.functional.conv_transpose2d(x, w, b, groups=g),
    }[type(reader)]
    small = along[..., kept].movedim(-1, 1).contiguous()
    got = call(small, new["reader.weight"], new["reader.bias"], getattr(reader, "groups", 1))
    torch.testing.assert_close(got, reader(guess.movedim(-1, 1).contiguous()), rtol=1e-10, atol=1e-10)
    assert new["source.weight"].equal(tensors["source.weight"][list(KEEP)])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_several_groups_of_one_event_fold_together(data, nets):
    widths = (3, data.draw(st.integers(2, 7)), data.draw(st.integers(2, 7)), 2)
    model = nets.mlp(widths, torch.float64, seed=data.draw(st.integers(0, 99)))
    structure = nets.mlp_structure(model)
    reductions, folds = [], {}
    for group in structure.groups:
        kept = data.draw(st.sets(st.integers(0, group.num_channels - 1), min_size=1))
        reductions.append(nets.random_reduction(group, sorted(kept), seed=len(folds)))
        folds[group.name] = reductions[-1]
    tensors = named_tensors(model)
    edits = {e.tensor: e for e in build_edits(structure, reductions)}
    new = {n: apply_edit(edits[n], t, tensors) if n in edits else t for n, t in tensors.items()}
    x = torch.randn(4, 3, dtype=torch.float64)
    small, guess = x, x
    for name in ("0", "2", "4"):
        small = torch.nn.functional.linear(small, new[f"{name}.weight"], new[f"{name}.bias"])
        guess = torch.nn.functional.linear(guess, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        if name in folds:
            small, guess = small.relu(), guess.relu()
            (site,) = folds[name].sites.values()
            shift = 0.0 if site.offset is None or not site.offset.any() else site.offset
            guess = guess[:, folds[name].keep] @ site.mix + shift
    torch.testing.assert_close(small, guess, rtol=1e-8, atol=1e-8)


def test_two_groups_in_one_reader_add_up(nets):
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4), "reader": nn.Linear(7, 5)}).double()
    cols = {"a": np.arange(3)[:, None], "b": np.arange(3, 7)[:, None]}
    groups = tuple(
        Group(
            name=n,
            num_channels=len(c),
            members=(Member(tensor=f"{n}.weight", dim=0, positions=nets.positions(len(c)), role="producer"),),
            sites=(nets.linear_site("reader", c, 7),),
        )
        for n, c in cols.items()
    )
    structure = Structure(groups=groups, macs=0.0, shapes=nets.shapes(model))
    ra, rb = nets.random_reduction(groups[0], (1, 2)), nets.random_reduction(groups[1], (0, 3), seed=5)
    edits = {e.tensor: e for e in build_edits(structure, [ra, rb])}
    tensors = named_tensors(model)
    weight = apply_edit(edits["reader.weight"], tensors["reader.weight"], tensors)
    bias = apply_edit(edits["reader.bias"], tensors["reader.bias"], tensors)
    za, zb = torch.randn(9, 3).double(), torch.randn(9, 4).double()
    key = "reader:reader.weight:1"
    guess = torch.cat([z[:, r.keep] @ r.sites[key].mix + r.sites[key].offset for z, r in ((za, ra), (zb, rb))], 1)
    small = torch.cat([za[:, [1, 2]], zb[:, [0, 3]]], 1)
    torch.testing.assert_close(small @ weight.T + bias, model["reader"](guess), rtol=1e-10, atol=1e-10)


def _normed(nets, **more):
    reader = nn.Conv2d(C, 4, 3, bias=False)
    model = nn.ModuleDict({"source": nn.Linear(2, C), "reader": reader, "norm": nn.BatchNorm2d(4)}).double()
    with torch.no_grad():
        model["norm"].running_mean.normal_()
        model["norm"].running_var.uniform_(0.5, 2.0)
    site = _site(reader, np.arange(C)[:, None], norm="norm", **more)
    return model, _structure(model, site, C, nets), site


def test_an_offset_moves_the_running_mean_of_a_bias_free_reader(nets):
    model, structure, site = _normed(nets)
    reduction = nets.random_reduction(structure.groups[0], KEEP)
    tensors = named_tensors(model)
    edits = {e.tensor: e for e in build_edits(structure, [reduction])}
    weight, mean = (apply_edit(edits[n], tensors[n], tensors) for n in ("reader.weight", "norm.running_mean"))
    model.eval()
    z = torch.randn(2, C, 5, 5).double()
    mix = reduction.sites[site.key]
    guess = (z[:, list(KEEP)].movedim(1, -1) @ mix.mix + mix.offset).movedim(-1, 1)
    want = model["norm"](model["reader"](guess))
    model["norm"].running_mean.copy_(mean)
    got = model["norm"](torch.nn.functional.conv2d(z[:, list(KEEP)], weight))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_without_running_statistics_the_batch_takes_up_the_offset(nets):
    _model, structure, _ = _normed(nets)
    without = {n: s for n, s in structure.shapes.items() if "running" not in n}
    reduction = nets.random_reduction(structure.groups[0], KEEP)
    edits = build_edits(replace(structure, shapes=without), [reduction], {})
    assert {e.tensor for e in edits} == {"source.weight", "reader.weight"}


def test_dropped_variance_is_taken_off_and_never_reaches_zero(nets):
    model, structure, site = _normed(nets)
    reduction = nets.reduction(structure.groups[0], KEEP)
    var = model["norm"].running_var
    dropped = torch.stack([0.25 * var[0], 2 * var[1], torch.zeros(()).double(), -var[3]])
    edits = {e.tensor: e for e in build_edits(structure, [reduction], {site.key: dropped, "other": dropped})}
    new = apply_edit(edits["norm.running_var"], var, {})
    torch.testing.assert_close(new, torch.stack([0.75 * var[0], 1e-3 * var[1], var[2], 2 * var[3]]))
    with pytest.raises(ShapeError, match="dropped variance"):
        build_edits(structure, [reduction], {site.key: torch.ones(3)})


def test_a_shared_weight_is_folded_once_or_refused(nets):
    model = nn.ModuleDict({"source": nn.Linear(2, C), "reader": nn.Linear(C, 4), "other": nn.Linear(C, 4)}).double()
    model["other"].weight = model["reader"].weight
    site = _site(model["reader"], np.arange(C)[:, None])
    other = replace(site, module="other", bias="other.bias")
    structure = _structure(model, site, C, nets)
    structure = replace(structure, groups=(replace(structure.groups[0], sites=(site, other)),))
    reduction = nets.random_reduction(structure.groups[0], KEEP)
    edits = {e.tensor: e for e in build_edits(structure, [reduction])}
    assert len(edits["reader.weight"].folds) == 1
    assert all(len(edits[f"{n}.bias"].offsets) == 1 for n in ("reader", "other"))
    two = dict(reduction.sites)
    two[other.key] = replace(two[other.key], mix=two[other.key].mix * 2)
    with pytest.raises(ShapeError, match="two ways"):
        build_edits(structure, [replace(reduction, sites=two)])


def test_aliases_lead_to_the_first_name(nets):
    model = nets.mlp()
    structure = nets.mlp_structure(model)
    members = (replace(structure.groups[0].members[0], tensor="again.weight"), structure.groups[0].members[1])
    groups = (replace(structure.groups[0], members=members), structure.groups[1])
    tied = replace(structure, groups=groups, aliases={"again.weight": "0.weight"})
    edits = build_edits(tied, [nets.reduction(groups[0], range(4))])
    assert [e.tensor for e in edits] == ["0.weight", "0.bias", "2.weight"]


def _change(reduction: Reduction, **fields) -> Reduction:
    (key,) = reduction.sites
    return replace(reduction, sites={key: replace(reduction.sites[key], **fields)})


def test_reductions_that_do_not_fit_are_refused(nets):
    model = nets.mlp()
    structure = nets.mlp_structure(model)
    group = structure.groups[0]
    good = nets.reduction(group, (0, 2, 4))
    pinned = replace(structure, groups=(replace(group, pin=Pin(group="0", num_channels=8, reason="no")),))
    homeless = replace(structure, groups=(replace(group, sites=(replace(group.sites[0], bias=None),)),))
    padded = replace(structure, groups=(replace(group, sites=(replace(group.sites[0], zero_padded=True),)),))
    shifted = nets.random_reduction(group, (0, 2, 4))
    cases = [
        (structure, [replace(good, group="x")], ArgumentError, "no group is called 'x'"),
        (structure, [good, good], ArgumentError, "two reductions"),
        (pinned, [good], PinnedGroupError, "'0'"),
        (structure, [replace(good, keep=torch.tensor([], dtype=torch.int64))], ShapeError, "at least one"),
        (structure, [replace(good, keep=torch.tensor([2, 0, 4]))], ShapeError, "ascending"),
        (structure, [replace(good, keep=torch.tensor([0, 2, 8]))], ShapeError, "below 8"),
        (structure, [replace(good, keep=torch.tensor([-1, 2, 4]))], ShapeError, "below 8"),
        (structure, [_change(good, mix=torch.ones(3, 7))], ShapeError, "mix at site"),
        (structure, [_change(good, offset=torch.ones(3))], ShapeError, "offset at site"),
        (structure, [replace(good, merge=torch.ones(8, 3))], ShapeError, "merge"),
        (structure, [replace(good, sites={})], ShapeError, "says nothing about its site"),
        (homeless, [shifted], ShapeError, "nowhere to go"),
        (padded, [shifted], ShapeError, "border"),
    ]
    for where, reductions, kind, message in cases:
        with pytest.raises(kind, match=message):
            build_edits(where, reductions)
    assert build_edits(padded, [_change(good, offset=torch.zeros(8))])  # no offset in truth
    assert build_edits(structure, [nets.reduction(group, range(8))]) == ()


def test_merge_follows_the_chain_rule_for_producers_only(nets):
    model = nets.mlp()
    structure = nets.mlp_structure(model)
    group = structure.groups[0]
    merge = torch.zeros(7, 8).double()
    merge[:, :7] = torch.eye(7)
    merge[2, 7] = 0.5  # channel 7 goes into channel 2 with s = 1/2
    edits = {e.tensor: e for e in build_edits(structure, [nets.reduction(group, range(7), merge, merge=merge)])}
    moment = torch.randn(8, 5)
    want = moment[:7].clone()
    want[2] += 0.5 * moment[7]
    torch.testing.assert_close(merge_like(edits["0.weight"], moment), want)
    torch.testing.assert_close(merge_like(edits["0.bias"], moment[:, 0]), want[:, 0])
    assert not edits["2.weight"].merge
    assert slice_like(edits["0.weight"], moment).equal(moment[:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edits_leave_the_old_tensor_alone_and_keep_dtype_and_layout(dtype, nets):
    reader = nn.Conv2d(C, 4, 3).to(dtype=dtype, memory_format=torch.channels_last)
    model = nn.ModuleDict({"source": nn.Linear(2, C), "reader": reader}).to(dtype)
    structure = _structure(model, _site(reader, np.arange(C)[:, None]), C, nets)
    edits = {e.tensor: e for e in build_edits(structure, [nets.random_reduction(structure.groups[0], KEEP)])}
    tensors = named_tensors(model)
    before = {n: t.detach().clone() for n, t in tensors.items()}
    new = {n: apply_edit(e, tensors[n], tensors) for n, e in edits.items()}
    assert all(t.equal(before[n]) for n, t in tensors.items())
    assert new["reader.weight"].is_contiguous(memory_format=torch.channels_last)
    assert all(t.dtype is dtype and not t.requires_grad for t in new.values())
    assert all(t.data_ptr() != tensors[n].data_ptr() for n, t in new.items())


def test_a_mix_that_changes_kept_channels_is_folded_whole(nets):
    model = nets.mlp(dtype=torch.float64)
    structure = nets.mlp_structure(model)
    mix = torch.randn(3, 8).double()
    edits = {e.tensor: e for e in build_edits(structure, [nets.reduction(structure.groups[0], (1, 4, 6), mix)])}
    weight = model[2].weight.detach()
    torch.testing.assert_close(apply_edit(edits["2.weight"], weight, {}), weight @ mix.T)


def test_an_edit_of_another_shape_is_refused():
    edit = TensorEdit(tensor="w", keep={1: torch.tensor([0, 5])})
    for wrong in (torch.ones(3), torch.ones(3, 5)):
        for function in (slice_like, merge_like, lambda e, t: apply_edit(e, t, {})):
            with pytest.raises(ShapeError, match="does not fit"):
                function(edit, wrong)


def test_sparse_gradients_are_sliced():
    module = nn.Embedding(6, 5, sparse=True)
    with torch.sparse.check_sparse_tensor_invariants(True):
        module(torch.tensor([1, 4, 1])).square().sum().backward()
        dense = module.weight.grad.to_dense()
        with Transaction(module) as transaction:
            transaction.apply([TensorEdit(tensor="weight", keep={1: torch.tensor([0, 3])})])
        assert module.weight.grad.is_sparse
        assert module.weight.grad.to_dense().equal(dense[:, [0, 3]])


def test_second_moments_have_the_layout_of_what_they_came_from():
    tensor = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    edit = TensorEdit(tensor="w", keep={0: torch.tensor([0, 3])})
    assert slice_like(edit, tensor).is_contiguous(memory_format=torch.channels_last)
