"""Lookups and writes by position, and what lays elements out anew, on channels and beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apoptosis.graph import analyse

GEN = torch.Generator().manual_seed(0)
SEQ = torch.randn(4, 5, 8, generator=GEN)
IMG = torch.randn(3, 3, 6, 6, generator=GEN)
WORDS = torch.randint(0, 9, (4, 5), generator=GEN)


class Net(nn.Module):
    """a: 8 -> 6, b: 6 -> 2, and what lies between; (batch, 5 positions, channels)."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **modules) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 6), nn.Linear(6, 2), between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return self.b(self.between(self, self.a(x)))

    def which(self) -> Tensor:
        """Return positions that depend on the input."""
        return self.x[0, 0, :6].argsort()


class Images(Net):
    """The same with 1x1 convolutions; (batch, channels, 6, 6)."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **modules) -> None:
        super().__init__(between, **modules)
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)


def order(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1]).flip(0)


def put(h: Tensor) -> Tensor:
    out = torch.zeros(4, 7, h.shape[-1], dtype=h.dtype)
    out[:, torch.tensor([0, 2, 4, 5, 6])] = h
    return out


def masked(h: Tensor) -> Tensor:
    out = h.clone()
    out[torch.arange(4) > 1] = 2.0 * h[:2]
    return out


def numbered(h: Tensor) -> Tensor:
    out = h.clone()
    out[torch.arange(4), torch.arange(4)] = 0.5
    return out


def scattered(m: nn.Module, h: Tensor) -> Tensor:
    mask = (torch.arange(5) > 2)[None, :, None].expand(h.shape)
    return h.masked_scatter(mask, h[:, :2].contiguous())


def experts(h: Tensor) -> Tensor:
    flat = h.reshape(-1, h.shape[-1])
    out = torch.zeros_like(flat)
    for start in (0, 1):
        rows = torch.arange(start, flat.shape[0], 2)
        out.index_add_(0, rows, flat[rows] * (start + 1.0))
    return out.view(h.shape)


def complex_halves(h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2))
    turn = torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None])
    return torch.view_as_real(z * turn).flatten(-2)


BESIDE = {
    "gather": lambda m, h: h.gather(1, order(h)[None, :3, None].expand(4, 3, h.shape[-1])),
    "gather, repeated": lambda m, h: h.gather(1, order(h)[None, :3, None].repeat(4, 1, h.shape[-1])),
    "gather in the order of a sort": lambda m, h: h.gather(1, h.argsort(1)),
    "quantile": lambda m, h: h.quantile(0.5, 1),
    "quantised": lambda m, h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127),
    "take_along_dim": lambda m, h: torch.take_along_dim(h, order(h)[None, :, None], 1),
    "index": lambda m, h: h[:, order(h)],
    "index by mask": lambda m, h: h[torch.arange(4) > 1],
    "index_select": lambda m, h: h.index_select(1, order(h)),
    "scatter": lambda m, h: torch.zeros_like(h).scatter(1, order(h)[None, :, None].expand(h.shape), h),
    "scatter a number": lambda m, h: h.scatter(1, order(h)[None, :2, None].expand(4, 2, h.shape[-1]), 1.5),
    "scatter_add": lambda m, h: h.scatter_add(1, order(h)[None, :, None].expand(h.shape), h),
    "scatter_reduce": lambda m, h: h.scatter_reduce(1, order(h)[None, :, None].expand(h.shape), h, "amax"),
    "index_add": lambda m, h: h.index_add(1, order(h), h),
    "index_copy": lambda m, h: h.index_copy(1, order(h), 2.0 * h),
    "index_fill": lambda m, h: h.index_fill(1, order(h)[:2], 0.5),
    "index_put": lambda m, h: masked(h),
    "a number at some rows": lambda m, h: numbered(h),
    "index_put into zeros": lambda m, h: put(h),
    "index_add into zeros": lambda m, h: experts(h),
    "masked_scatter": scattered,
    "sort": lambda m, h: h.sort(1).values,
    "topk": lambda m, h: h.topk(3, dim=1).values,
    "kthvalue": lambda m, h: h.kthvalue(2, 1).values,
    "mode": lambda m, h: h.mode(1).values,
    "median": lambda m, h: h.median(1).values,
    "cummax": lambda m, h: h.cummax(1).values,
    "cumsum": lambda m, h: h.cumsum(1),
    "logcumsumexp": lambda m, h: h.logcumsumexp(1),
    "variance": lambda m, h: h.var(1),
    "product": lambda m, h: h.prod(1),
    "all by mask": lambda m, h: h * (h > 9).any(1, keepdim=True).logical_not(),
    "tile": lambda m, h: h.tile(1, 2, 1),
    "repeat_interleave": lambda m, h: h.repeat_interleave(2, 1),
    "repeat_interleave, counted": lambda m, h: h.repeat_interleave(torch.tensor([1, 2, 0, 1, 1]), 1),
    "repeat_interleave of channels": lambda m, h: h.repeat_interleave(2, -1).unflatten(-1, (-1, 2)).sum(-1),
    "isin": lambda m, h: h * torch.isin(h.round(), torch.tensor([0.0, 1.0])),
    "rot90": lambda m, h: h.rot90(1, (0, 1)),
    "movedim": lambda m, h: h.movedim(1, 0),
    "roll": lambda m, h: h.roll(1, 1),
    "diagonal": lambda m, h: h[:, :4].diagonal(0, 0, 1).movedim(-1, 0),
    "triangle": lambda m, h: h.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 5).tril().sum(-1).transpose(1, 2),
    "fft over positions": lambda m, h: torch.fft.fft(h, dim=1).real,
    "real fft and back": lambda m, h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=5, dim=1),
    "complex and back": lambda m, h: torch.view_as_real(torch.complex(h, 2.0 * h)).sum(-1),
    "imaginary part": lambda m, h: torch.complex(h, 2.0 * h).conj().imag,
    "as_strided": lambda m, h: h.as_strided((4, 4, h.shape[-1]), (5 * h.shape[-1], h.shape[-1], 1), h.shape[-1]),
    "unfold": lambda m, h: h.unfold(1, 2, 1).mean(-1),
    "bucketize": lambda m, h: h * torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0])),
    "einsum over positions": lambda m, h: torch.einsum("btc,ts->bsc", h, torch.ones(5, 3)),
    "asserted": lambda m, h: h + 0.0 * torch.ones(1).clamp(0, 1),
    "xor of signs": lambda m, h: h * ((h > 0) ^ (h > 1)),
    "lerp": lambda m, h: h.lerp(h.tanh(), 0.3),
    "bessel": lambda m, h: torch.special.i1(h),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_channels_beside_the_axis_pass(oracle, name: str) -> None:
    oracle(Net(BESIDE[name]), (SEQ,), {"a": 6})


BESIDE_IMAGES = {
    "unfold and fold": lambda m, h: F.fold(F.unfold(h, 3, padding=1), (6, 6), 3, padding=1),
    "grid_sample": lambda m, h: F.grid_sample(h, F.affine_grid(torch.eye(2, 3).expand(3, 2, 3), (3, 1, 4, 4), align_corners=False), align_corners=False),  # noqa: E501
    "bicubic": lambda m, h: F.interpolate(h, scale_factor=2, mode="bicubic"),
    "bilinear, antialias": lambda m, h: F.interpolate(h, size=4, mode="bilinear", antialias=True),
    "nearest exact": lambda m, h: F.interpolate(h, size=4, mode="nearest-exact"),
    "area": lambda m, h: F.interpolate(h, size=3, mode="area"),
    "reflected": lambda m, h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda m, h: F.pad(h, (1, 1, 1, 1), mode="circular"),
    "2d fft": lambda m, h: torch.fft.ifft2(torch.fft.fft2(h)).real,
    "power pooling": lambda m, h: F.lp_pool2d(h.abs(), 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE_IMAGES)
def test_channels_of_images_pass(oracle, name: str) -> None:
    oracle(Images(BESIDE_IMAGES[name]), (IMG,), {"a": 6})


def test_channels_own_the_positions_of_a_kernel(oracle) -> None:
    class Unfolded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.unfold(self.a(x), 3).transpose(1, 2))

    structure = oracle(Unfolded(), (IMG,), {"a": 4})
    assert structure.groups[0].sites[0].columns.tolist() == [list(range(9 * c, 9 * c + 9)) for c in range(4)]


def test_pairs_of_a_complex_number_go_together() -> None:
    structure = analyse(Net(lambda m, h: complex_halves(h)), (SEQ,), {})
    assert structure.groups[0].pin is None
    assert structure.groups[0].num_channels == 3
    assert structure.groups[0].members[0].positions.tolist() == [[0, 1], [2, 3], [4, 5]]


ALONG = {
    "gather": (lambda m, h: h.gather(2, torch.zeros(4, 5, 6, dtype=torch.long)), "picks channels by number"),
    "gather of its own": (
        lambda m, h: h.gather(1, torch.arange(6).remainder(5).expand(4, 5, 6)), "positions of its own"),
    "scatter": (lambda m, h: h.scatter(2, torch.zeros(4, 5, 1, dtype=torch.long), 0.0), "writes channels by number"),
    "scatter into the first": (
        lambda m, h: h.scatter(1, torch.zeros(4, 1, 3, dtype=torch.long), 0.0), "writes the first of the channels"),
    "masked_scatter": (
        lambda m, h: h.masked_scatter(torch.arange(6) > 2, torch.ones(120)), "positions of its own"),
    "index by data": (lambda m, h: h[..., m.which()], "numbers that are data"),
    "index_select by data": (lambda m, h: h.index_select(-1, m.which()), "numbers that are data"),
    "index_select at random": (lambda m, h: h.index_select(-1, torch.randperm(6)), "numbers that are data"),
    "equal": (lambda m, h: h * float(torch.equal(h, h)), "compares channels"),
    "index_fill": (lambda m, h: h.index_fill(2, torch.tensor([1]), 0.0), "writes channels by number"),
    "sort": (lambda m, h: h.sort(-1).values, "orders channels"),
    "argsort": (lambda m, h: h.argsort(-1) * 1.0, "orders channels"),
    "topk": (lambda m, h: h.topk(6, -1).values, "orders channels"),
    "cummax": (lambda m, h: h.cummax(-1).values, "over channels"),
    "kthvalue": (lambda m, h: h + h.kthvalue(1, -1, keepdim=True).values, "reduces over channels"),
    "cdist": (lambda m, h: h + torch.cdist(h, h)[..., :1], "measures distances over all channels"),
    "bilinear": (lambda m, h: F.bilinear(h, h, torch.ones(6, 6, 6)), "multiplies all channels"),
    "fft": (lambda m, h: torch.fft.fft(h).real, "transforms channels into one another"),
    "tril": (lambda m, h: h.tril(), "numbers channels along a diagonal"),
    "index": (lambda m, h: h + torch.arange(9.0)[h.detach().argmax(1).clamp(0, 8)][:, None], "as an index"),
    "masked_select": (lambda m, h: h + h.masked_select(h > 9).sum(), "drops elements by their value"),
    "nonzero": (lambda m, h: h + (h > 0).nonzero().sum(), "makes positions of channels"),
    "searchsorted": (lambda m, h: h + torch.searchsorted(torch.arange(3.0), h.detach()).sum(), "compares channels"),
    "cosine": (lambda m, h: h * F.cosine_similarity(h, h, dim=-1)[..., None], "normalises|reduces over channels"),
    "maximum": (lambda m, h: h / h.amax(-1, keepdim=True), "reduces over channels"),
    "as_strided": (lambda m, h: h[..., ::2].as_strided((4, 5, 6), (30, 6, 1)), "memory beyond its operand"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONG)
def test_channels_along_the_axis_are_pinned_by_name(name: str) -> None:
    between, text = ALONG[name]
    pin = analyse(Net(between), (SEQ,), {}).groups[0].pin
    assert pin is not None
    assert any(part in pin.reason for part in text.split("|"))
    assert pin.where.startswith("test_rules_lookup.py:")
    assert pin.remedy


def test_every_channel_by_number_is_followed_by_number() -> None:
    """Literal positions along the channel axis are executed; verification sees to it that they stay the same ones."""
    net = Net(lambda m, h: h[..., [5, 4, 3, 2, 1, 0]])
    structure = analyse(net, (SEQ,), {})
    assert structure.groups[0].pin is None
    assert structure.classes["b.weight"][1].tolist() == structure.classes["a.weight"][0][::-1].tolist()


class Embedded(nn.Module):
    def __init__(self, table: nn.Module, *, tied: bool = False) -> None:
        super().__init__()
        self.table, self.b = table, nn.Linear(6, 9 if tied else 2)
        if tied:
            self.b.weight = table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.b(self.table(words).relu())


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_columns_of_a_table_are_channels(oracle, make, options) -> None:
    table = make(9, 6, **options)
    structure = oracle(Embedded(table), (WORDS,), {"table": 6})
    group = next(g for g in structure.groups if g.name == "table")
    assert [(m.tensor, m.dim, m.role) for m in group.members] == [("table.weight", 1, "producer")]
    assert (group.neuron is None) == isinstance(table, nn.EmbeddingBag)
    rows = structure.classes["table.weight"][0]
    assert set(rows.tolist()) <= set(structure.pinned_classes.tolist())


def test_tied_input_and_output_tables_pin() -> None:
    structure = analyse(Embedded(nn.Embedding(9, 6), tied=True), (WORDS,), {})
    assert all(g.pin is not None for g in structure.groups)


def test_channels_as_words_pin() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table, self.b = nn.Linear(8, 6), nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.table(self.a(x).abs().long().clamp(0, 8)))

    pins = {g.name: g.pin for g in analyse(Quantised(), (SEQ,), {}).groups}
    assert pins["a"] is not None
    assert "uses them as an index" in pins["a"].reason
    assert pins["table"] is None


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=GEN))


TABLES = {
    "sliced": (lambda m, h: h + m.t[:, :5], (1, 9, 6)),
    "indexed": (lambda m, h: h + m.t[torch.arange(5)], (9, 6)),
    "index_select": (lambda m, h: h + m.t.index_select(0, torch.arange(5)), (9, 6)),
    "gathered": (lambda m, h: h + m.t.gather(0, torch.arange(5)[:, None].expand(5, m.t.shape[1])), (9, 6)),
    "dropped out": (lambda m, h: h + F.dropout(m.t, 0.1, m.training), (1, 5, 6)),
    "added to a token": (lambda m, h: h + (m.t + m.t[:, :1]), (1, 5, 6)),
    "resized": (lambda m, h: h + F.interpolate(m.t.transpose(1, 2), size=5).transpose(1, 2), (1, 9, 6)),
    "repeated": (lambda m, h: h + m.t.repeat(4, 1, 1), (1, 5, 6)),
    "joined": (lambda m, h: torch.cat([m.t.expand(4, 2, -1), h], 1), (1, 2, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_positions_follow_their_channels(oracle, name: str) -> None:
    between, shape = TABLES[name]
    structure = oracle(Net(between, t=table(*shape)), (SEQ,), {"a": 6}, training=name != "dropped out")
    assert {(m.tensor, m.dim) for m in structure.groups[0].members} == {
        ("a.weight", 0), ("a.bias", 0), ("t", len(shape) - 1)
    }  # fmt: skip


def test_relative_bias_table_keeps_its_heads() -> None:
    """(positions, heads)[index] -> (heads, length, length): the columns stay apart, the rows are pinned."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = table(9, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
            self.register_buffer("index", torch.arange(36).remainder(9))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.table[self.index].view(6, 6, -1).permute(2, 0, 1).contiguous()
            return self.b(self.a(x) + bias[None])

    structure = analyse(Biased(), (IMG,), {})
    assert structure.groups[0].pin is None
    assert ("table", 1) in {(m.tensor, m.dim) for m in structure.groups[0].members}
    assert set(structure.classes["table"][0].tolist()) <= set(structure.pinned_classes.tolist())


def test_a_token_in_front_belongs_to_the_channels_behind(oracle) -> None:
    """[token, positions] + table: the table along the positions meets one channel axis, not two."""

    class Classified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.table = table(1, 1, 6), table(1, 6, 6)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1)
            return self.b((h + self.table).relu())

    structure = oracle(Classified(), (SEQ,), {"a": 6})
    assert {m.tensor for m in structure.groups[0].members} == {"a.weight", "a.bias", "token", "table"}


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped matrix product")
def test_a_stack_of_experts_has_one_hidden_width(oracle) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = table(3, 48, 8), table(3, 8, 24)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.a(x).flatten(0, 1)
            ends = torch.tensor([4, 11, rows.shape[0]], dtype=torch.int32)
            gate, value = torch._grouped_mm(rows, self.up.transpose(-2, -1), offs=ends).chunk(2, -1)
            return self.b(torch._grouped_mm(F.silu(gate) * value, self.down.transpose(-2, -1), offs=ends))

    structure = oracle(Experts(), (SEQ,), {"a": 8, "up": 24, "down": 8}, every=2)
    group = next(g for g in structure.groups if g.num_channels == 24)
    assert [(m.tensor, m.dim) for m in group.members] == [("up", 1)]
    assert group.members[0].positions.tolist() == [[c, c + 24] for c in range(24)]
    assert [(s.weight, s.dim, s.functional) for s in group.sites] == [("down", 2, True)]
    assert set(structure.classes["up"][0].tolist()) <= set(structure.pinned_classes.tolist())


def test_a_table_of_rates_follows_its_channels(oracle) -> None:
    """The decay of a state space: exp of (channels, states), every channel with states of its own."""
    decayed = Net(lambda m, h: (h[..., None] * -m.t.exp()).cumsum(1).sum(-1), t=table(6, 3))
    structure = oracle(decayed, (SEQ,), {"a": 6})
    assert ("t", 0) in {(m.tensor, m.dim) for m in structure.groups[0].members}
    assert set(structure.classes["t"][1].tolist()) <= set(structure.pinned_classes.tolist())
