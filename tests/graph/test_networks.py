"""Many small networks, each held against the removal oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apoptosis.graph import analyse


class Fn(nn.Module):
    """Modules by name and a function that uses them."""

    def __init__(self, fn, **modules):
        super().__init__()
        self.fn = fn
        for name, module in modules.items():
            if isinstance(module, nn.Module) or isinstance(module, nn.Parameter):
                setattr(self, name, module)
            else:
                self.register_buffer(name, module)

    def forward(self, *args, **kwargs):
        return self.fn(self, *args, **kwargs)


def conv_bn(i: int, o: int, k: int = 3, **kw) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o))


def noisy(model: nn.Module) -> nn.Module:
    """Norm weights and statistics away from their defaults, so that a wrong slice shows."""
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype.is_floating_point and tensor.dim() == 1:
                tensor.add_(torch.rand(tensor.shape, generator=gen))
    return model


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SEQ = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
IMG = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_mlp(oracle) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 3))
    structure = oracle(net, (X,), {"0": 6, "2": 7})
    first, second, last = structure.groups
    assert first.neuron is not None
    assert (first.neuron.weight, first.neuron.bias, first.neuron.activation) == ("0.weight", "0.bias", "relu")
    assert second.neuron is not None
    assert (second.neuron.bias, second.neuron.activation) == (None, "tanh")
    assert last.pin is not None
    assert last.pin.reason == "they are the network's output"
    assert structure.macs == 4 * (8 * 6 + 6 * 7 + 7 * 3)
    assert first.macs_per_channel == 4 * (8 + 7)
    assert first.sites[0].bias is None
    assert second.sites[0].bias == "4.bias"


def test_sequence_inputs_contiguous_or_not(oracle) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    oracle(net, (SEQ,), {"0": 6})
    net = Fn(lambda m, x: m.b(m.a(x.transpose(1, 2)).relu().transpose(0, 1)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    structure = oracle(net, (SEQ,), {"a": 6})
    assert structure.groups[0].neuron is not None
    assert [m.role for m in structure.groups[0].members] == ["producer", "bias"]


def test_cnn_flatten_norm_dropout(oracle) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv_bn(6, 5), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.25), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip
    structure = oracle(noisy(net), (IMG,), {"0": 6, "4.0": 5, "9": 7}, training=False)
    first, second, third, _ = structure.groups
    assert [(m.tensor, m.role) for m in first.members] == [
        ("0.weight", "producer"), ("0.bias", "bias"), ("1.weight", "channelwise"), ("1.bias", "channelwise"),
        ("1.running_mean", "channelwise"), ("1.running_var", "channelwise"),
    ]  # fmt: skip
    assert first.members[4].is_buffer
    assert first.neuron is not None
    assert (first.neuron.norm, first.neuron.max_pool) == ("1", True)
    site = first.sites[0]
    assert (site.taps, site.zero_padded, site.norm, site.dropout, site.num_columns) == (9, True, "4.1", 0.0, 6)
    flat = second.sites[0]
    assert flat.columns.tolist() == [[4 * c + i for i in range(4)] for c in range(5)]
    assert (flat.dropout, flat.norm, flat.kind) == (0.25, None, "linear")
    assert second.neuron is not None
    assert not second.neuron.max_pool
    assert third.sites[0].dropout == 0.0
    assert structure.macs == 3 * (6 * 3 * 9 * 64 + 5 * 6 * 9 * 16 + 20 * 7 + 14)
    assert first.macs_per_channel == pytest.approx(3 * (3 * 9 * 64 + 5 * 9 * 16))


class Residual(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, o), conv_bn(o, o)
        self.skip = nn.Identity() if i == o else conv_bn(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + self.skip(x))


def test_residual_identity_and_projection(oracle) -> None:
    net = nn.Sequential(conv_bn(3, 4), nn.ReLU(), Residual(4, 4), Residual(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(6, 2))  # fmt: skip
    structure = oracle(noisy(net), (IMG,), {"0.0": 4, "2.a.0": 4, "3.a.0": 6, "3.b.0": 6})
    stem = structure.groups[0]
    assert {m.tensor for m in stem.members if m.role == "producer"} == {"0.0.weight", "2.b.0.weight"}
    assert {s.module for s in stem.sites} == {"2.a.0", "3.a.0", "3.skip.0"}
    assert stem.neuron is None


def test_concatenation(oracle) -> None:
    def forward(m, x):
        h1 = m.a(x).relu()
        h2 = m.b(h1).relu()
        return m.head(m.c(torch.cat([h1, h2, h1], 1)).mean((2, 3)))

    net = Fn(
        forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 3, padding=1), c=nn.Conv2d(13, 6, 1), head=nn.Linear(6, 2)
    )
    structure = oracle(net, (IMG,), {"a": 4, "b": 5, "c": 6})
    shared = next(s for s in structure.groups[0].sites if s.module == "c")
    assert shared.columns.tolist() == [[c, c + 9] for c in range(4)]
    assert structure.groups[0].neuron is not None


def test_shared_module_pools_its_inputs(oracle) -> None:
    def forward(m, x, y):
        return m.head(m.shared(m.a(x).relu()).relu() + m.shared(m.b(y).relu()).relu())

    net = Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(8, 6), shared=nn.Linear(6, 5), head=nn.Linear(5, 2))
    structure = oracle(net, (X, X + 1), {"a": 6, "shared": 5})
    assert len(structure.groups[0].sites) == 1
    assert len([m for m in structure.groups[0].members if m.role == "producer"]) == 2
    assert structure.macs == 4 * (2 * 48 + 2 * 30 + 10)


def test_shared_module_in_a_loop_ties_rows_and_columns(oracle) -> None:
    def forward(m, x):
        h = m.a(x).relu()
        for _ in range(3):
            h = m.loop(h).relu()
        return m.head(h)

    oracle(Fn(forward, a=nn.Linear(8, 6), loop=nn.Linear(6, 6), head=nn.Linear(6, 2)), (X,), {"a": 6})


def test_two_inputs_two_outputs_dict(oracle) -> None:
    def forward(m, left, right):
        h = m.b(torch.cat([m.a(left).relu(), right], 1)).relu()
        return {"p": m.p(h), "q": m.q(h)}

    net = Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(14, 5), p=nn.Linear(5, 2), q=nn.Linear(5, 3))
    structure = oracle(net, (), {"a": 6, "b": 5}, {"left": X, "right": X + 1})
    assert [g.name for g in structure.groups if g.pin] == ["p", "q"]


def test_output_that_is_also_read_pins(oracle) -> None:
    net = Fn(lambda m, x: (m.b(m.a(x)), m.a(x)), a=nn.Linear(8, 6), b=nn.Linear(6, 2))
    oracle(net, (X,), {})


def test_mobile_block(oracle) -> None:
    net = nn.Sequential(
        conv_bn(3, 6, 1), nn.ReLU6(), conv_bn(6, 6, groups=6), nn.ReLU6(), conv_bn(6, 4, 1), nn.Conv2d(4, 2, 1)
    )
    structure = oracle(noisy(net), (IMG,), {"0.0": 6, "4.0": 4}, every=2)
    assert structure.groups[0].macs_per_channel == pytest.approx(3 * 64 * (3 + 9 + 4))


def test_max_unpool(oracle) -> None:
    def forward(m, x):
        h, where = F.max_pool2d(m.a(x).relu(), 2, return_indices=True)
        return m.b(F.max_unpool2d(h, where, 2))

    oracle(Fn(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 2, 1)), (IMG,), {"a": 4})


def test_movements(oracle) -> None:
    def forward(m, x):
        h = m.a(x).relu()  # (4, 5, 6)
        h = torch.roll(h.flip(1), 2, 1).permute(2, 0, 1).contiguous().view(-1, 20).t().reshape(4, 5, -1)
        h = torch.stack(h.unbind(1), 1)[:, [3, 1, 1]].index_select(1, torch.tensor([2, 0]))
        h = torch.stack([h, h], 1).expand(2, -1, -1, -1, -1)[0].flatten(1, 2).unsqueeze(0).squeeze(0)
        left, right = h.repeat(2, 1, 1).chunk(2, 0)
        return m.b(left - right + 2.0 * left.unfold(1, 2, 1).sum(-1).repeat_interleave(2, 1)[:, :4].clone())

    oracle(Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 2)), (SEQ,), {"a": 6})


def test_glu_and_gates(oracle) -> None:
    def forward(m, x):
        h = F.glu(m.a(x), -1)
        u, v = m.b(h).chunk(2, -1)
        return m.c(F.silu(u) * v)

    net = Fn(forward, a=nn.Linear(8, 12), b=nn.Linear(6, 10), c=nn.Linear(5, 2))
    structure = oracle(net, (X,), {"a": 6, "b": 5})
    assert structure.groups[0].members[0].positions.tolist() == [[c, c + 6] for c in range(6)]
    assert all(g.neuron is None for g in structure.groups)


def test_squeeze_excitation(oracle) -> None:
    def forward(m, x):
        h = m.a(x).relu()
        gate = m.up(m.down(h.mean((2, 3))).relu()).sigmoid()
        return m.b(h * gate[:, :, None, None])

    net = Fn(forward, a=nn.Conv2d(3, 6, 3), down=nn.Linear(6, 4), up=nn.Linear(4, 6), b=nn.Conv2d(6, 2, 1))
    structure = oracle(net, (IMG,), {"a": 6, "down": 4})
    assert {s.module for s in structure.groups[0].sites} == {"down", "b"}


def test_layer_scale_and_positions(oracle) -> None:
    def forward(m, x):
        h = m.a(x) + m.pos
        return m.c(h + m.gamma * m.b(h.relu()))

    net = Fn(
        forward, a=nn.Linear(8, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2),
        pos=nn.Parameter(torch.randn(1, 5, 6)), gamma=nn.Parameter(torch.randn(6)),
    )  # fmt: skip
    structure = oracle(net, (SEQ,), {"a": 6})
    assert {(m.tensor, m.dim) for m in structure.groups[0].members if m.role == "channelwise"} == {
        ("pos", 2),
        ("gamma", 0),
    }


def test_buffer_that_follows_channels(oracle) -> None:
    def forward(m, x):
        h = m.a(x)
        if m.training:
            m.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return m.b((h - m.mean).relu())

    oracle(Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 2), mean=torch.randn(6)), (X,), {"a": 6})


def test_instance_norm(oracle) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 1))
    analysed = analyse(net, (IMG,), {})
    group = analysed.groups[0]
    assert group.pin is None
    assert {m.tensor for m in group.members} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_written_in_place(oracle) -> None:
    def forward(m, x):
        h = F.relu_(m.a(x))
        view = h.view(4, -1)
        view += 1.0
        h.mul_(2.0)
        out = torch.empty(4, h.shape[1] + view.shape[1])
        out[:, : h.shape[1]] = h
        out[:, h.shape[1] :].copy_(torch.tanh(view))
        return m.b(out)

    net = Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(12, 2))
    structure = oracle(net, (X,), {"a": 6})
    assert structure.groups[0].sites[0].columns.tolist() == [[c, c + 6] for c in range(6)]


def test_shapes_changed_in_place(oracle) -> None:
    def forward(m, x):
        h = m.a(x).relu()
        h.unsqueeze_(0).transpose_(1, 2).squeeze_(0)
        return m.b(h.t_())

    oracle(Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 2)), (X,), {"a": 6})


def test_in_place_activations_keep_the_neuron(oracle) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Dropout(0.1, inplace=True), nn.Linear(6, 2))
    structure = oracle(net, (X,), {"0": 6}, training=False)
    assert structure.groups[0].neuron is not None
    assert structure.groups[0].sites[0].dropout == 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(oracle, reentrant: bool) -> None:
    def forward(m, x):
        h = checkpoint(lambda t: m.b(F.relu(m.a(t))).relu(), x, use_reentrant=reentrant)
        return m.c(h)

    net = Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 2))
    structure = oracle(net, (X.clone().requires_grad_(),), {"a": 6, "b": 5})
    assert all(g.neuron is not None for g in structure.groups[:2])


def test_autocast_inside(oracle) -> None:
    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.b(m.a(x).relu()).float()

    structure = analyse(Fn(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 2)), (X,), {})
    assert [(g.name, g.pin is None) for g in structure.groups] == [("a", True), ("b", False)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        net(X)  # fills the cache of cast weights
        assert analyse(net, (X,), {}).groups[0].pin is None
