"""nn.MultiheadAttention with narrower and fewer heads: equal to torch's own, and to a network written out by hand."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from apoptosis.checkpoint import load, save
from apoptosis.checkpoint.file import read_file, write_file
from apoptosis.errors import CheckpointError, ShapeError
from apoptosis.modules.attention import ShrunkMultiheadAttention, shrunk_attributes
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction
from apoptosis.surgery.attributes import attributes_of

WIDTH, HEADS = 12, 3
SIZE = WIDTH // HEADS


def attention(separate=False, dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    more = {"kdim": 7, "vdim": 9} if separate else {}
    module = nn.MultiheadAttention(WIDTH, HEADS, **more, **settings).to(dtype)
    with torch.no_grad():
        for p in module.parameters():  # torch starts biases at zero, where nothing shows
            p += 0.1 * torch.randn_like(p)
    return module


def turned(module):
    """The same module as one of the other class, nothing removed."""
    copied = copy.deepcopy(module)
    for name, value in shrunk_attributes(copied).items():
        setattr(copied, name, value)
    return copied


def inputs(module, length=5, source=6, batch=2, kind="cross", dtype=torch.float64):
    torch.manual_seed(1)
    shape = (lambda n: (n,)) if batch is None else (lambda n: (batch, n) if module.batch_first else (n, batch))
    query = torch.randn(*shape(length), WIDTH, dtype=dtype)
    if kind == "self":
        return query, query, query
    return query, *(torch.randn(*shape(source), d, dtype=dtype) for d in (module.kdim, module.vdim))


def edits_of(module, heads, query=range(SIZE), value=range(SIZE)):
    """Edits that keep these heads, and of every head these channels of queries and keys, and of values."""
    q = torch.tensor([h * SIZE + c for h in heads for c in query])
    v = torch.tensor([h * SIZE + c for h in heads for c in value])
    packed = torch.cat([q, WIDTH + q, 2 * WIDTH + v])
    edits = [TensorEdit(tensor="out_proj.weight", keep={1: v})]
    if module.in_proj_weight is not None:
        edits.append(TensorEdit(tensor="in_proj_weight", keep={0: packed}))
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        edits += [TensorEdit(tensor=n, keep={0: k}) for n, k in zip(names, (q, q, v), strict=True)]
    if module.in_proj_bias is not None:
        edits.append(TensorEdit(tensor="in_proj_bias", keep={0: packed}))
    return edits


def silence_(module, heads, query, value):
    """Give the channels that `edits_of` removes no effect, so that torch's own module says what must come out."""
    with torch.no_grad():
        parts = module.in_proj_weight.chunk(3) if module.in_proj_weight is not None else None
        k, out = (parts[1] if parts else module.k_proj_weight), module.out_proj.weight
        for h, c in itertools.product(range(HEADS), range(SIZE)):
            if h not in heads or c not in query:
                k[h * SIZE + c] = 0.0
                if module.in_proj_bias is not None:
                    module.in_proj_bias[WIDTH + h * SIZE + c] = 0.0
            if h not in heads or c not in value:
                out[:, h * SIZE + c] = 0.0


def close(a, b, bound=1e-12):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape
            assert (x - y).abs().nan_to_num(0.0).max() <= bound * y.abs().nan_to_num(0.0).max()
            assert x.isnan().equal(y.isnan())


def masks(kind, module, length, source, batch):
    """Arguments beside query, key and value."""
    torch.manual_seed(2)
    n = 1 if batch is None else batch
    boolean = torch.zeros(length, source, dtype=torch.bool)
    boolean[:, -1] = True
    boolean[0, 1] = True
    padding = torch.zeros(n, source, dtype=torch.bool)
    padding[0, -2:] = True
    padding = padding[0] if batch is None else padding
    floating = torch.randn(length, source, dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": boolean},
        "float": {"attn_mask": floating},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": boolean, "key_padding_mask": padding},
        "per_head": {"attn_mask": torch.randn(n * module.num_heads, length, source, dtype=torch.float64)},
        "causal": {"attn_mask": torch.ones(length, source, dtype=torch.bool).triu(1), "is_causal": True},
        "causal_padding": {
            "attn_mask": torch.ones(length, source, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": padding,
        },
    }[kind]


MASKS = ("none", "bool", "float", "padding", "both", "per_head", "causal", "causal_padding")


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["first", "second", "unbatched"])
@pytest.mark.parametrize(("separate", "kind"), [(False, "self"), (False, "cross"), (True, "cross")])
def test_nothing_removed_is_torchs_own(separate, kind, layout, mask, weights):
    module = attention(separate, batch_first=layout == "first")
    batch = None if layout == "unbatched" else 2
    xs = inputs(module, source=6 if kind == "cross" else 5, batch=batch, kind=kind)
    more = masks(mask, module, 5, 6 if kind == "cross" else 5, batch)
    close(turned(module)(*xs, **more, **weights), module(*xs, **more, **weights))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers_and_gradients_agree(need_weights, bias):
    module = attention(dropout=0.4, bias=bias, batch_first=True)
    other = turned(module)
    (x, _, _) = inputs(module, kind="self")
    for net in (module, other):
        torch.manual_seed(7)
        net(x, x, x, need_weights=need_weights)[0].square().sum().backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10)
    module.eval()
    other.eval()
    with torch.no_grad():  # torch's fused kernel, in float32
        x = x.float()
        assert torch.allclose(other.float()(x, x, x)[0], module.float()(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("heads", "query", "value"),
    [
        ((0, 1, 2), range(SIZE), (1, 3)),
        ((0, 1, 2), (0, 2, 3), range(SIZE)),
        ((0, 2), range(SIZE), range(SIZE)),
        ((1,), (3,), (0, 1, 2)),
    ],
)
def test_narrowed_heads_compute_what_the_silenced_ones_did(heads, query, value, separate, bias):
    module = attention(separate, bias=bias, batch_first=True)
    silence_(module, heads, query, value)
    xs = inputs(module)
    stock = copy.deepcopy(module)
    expected = module(*xs, average_attn_weights=False)
    expected = expected[0], expected[1][:, list(heads)]
    opt = torch.optim.AdamW(module.parameters())
    with Transaction(module, [opt], [follower := copy.deepcopy(module)]) as transaction:
        transaction.apply(edits_of(module, heads, query, value))
    for net in (module, follower, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(net) is ShrunkMultiheadAttention
        assert (net.num_heads, net.query_width, net.value_width) == (
            len(heads),
            len(heads) * len(query),
            len(heads) * len(value),
        )
        assert net.out_proj.in_features == len(heads) * len(value)
        close(net(*xs, average_attn_weights=False), expected)
        close(net(*xs, need_weights=False), (expected[0], None))
    module(*xs)[0].square().sum().backward()
    opt.step()
    assert type(stock) is nn.MultiheadAttention


def test_a_second_event_and_a_rollback():
    module = attention(batch_first=True)
    xs = inputs(module)
    before, attributes = module(*xs), dict(vars(module))
    with Transaction(module) as transaction:
        transaction.apply(edits_of(module, (0, 2), (0, 1, 3)))
        transaction.rollback()
    assert type(module) is nn.MultiheadAttention
    assert {k: v for k, v in vars(module).items() if k[0] != "_"} == {
        k: v for k, v in attributes.items() if k[0] != "_"
    }
    assert module._qkv_same_embed_dim is True
    close(module(*xs), before, 0.0)
    with Transaction(module) as transaction:
        transaction.apply(edits_of(module, (0, 2), (0, 1, 3)))
    scale, expected = module.head_scale, module(*xs)
    keep = torch.arange(6)
    with Transaction(module) as transaction:  # of two heads of 3 and 4: the first channel of the values goes
        v = torch.tensor([1, 2, 3, 5, 6, 7])
        rows = torch.cat([keep, 6 + keep, 12 + v])
        transaction.apply(
            [
                TensorEdit(tensor="in_proj_weight", keep={0: rows}),
                TensorEdit(tensor="in_proj_bias", keep={0: rows}),
                TensorEdit(tensor="out_proj.weight", keep={1: v}),
            ]
        )
    assert (module.query_width, module.value_width, module.num_heads) == (6, 6, 2)
    assert module.head_scale == scale == SIZE**-0.5
    out, weights = module(*xs)
    close([weights], [expected[1]])
    assert out.shape == expected[0].shape
    assert not torch.allclose(out, expected[0])


def test_narrower_inputs_and_outputs_are_no_matter_of_the_heads():
    module = attention(batch_first=True)
    keep = torch.arange(1, WIDTH)
    x = inputs(module, kind="self")[0]
    expected = x.clone()
    expected[..., 0] = 0.0
    expected = module(expected, expected, expected)[0][..., 1:]
    with Transaction(module) as transaction:
        edits = [TensorEdit(tensor="in_proj_weight", keep={1: keep})]
        edits += [TensorEdit(tensor=f"out_proj.{n}", keep={0: keep}) for n in ("weight", "bias")]
        transaction.apply(edits)
    narrow = x[..., 1:]
    close([module(narrow, narrow, narrow)[0]], [expected])
    assert (module.embed_dim, module.kdim, module.num_heads, module.head_dim) == (WIDTH - 1, WIDTH - 1, HEADS, SIZE)
    module.eval()
    with torch.no_grad():  # torch's own class would pass this to a kernel that takes embed_dim for everything
        close([module(narrow, narrow, narrow)[0]], [expected])


class MyAttention(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("module", "change", "text"),
    [
        (nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), {}, "add_bias_kv"),
        (nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True), {}, "add_zero_attn"),
        (MyAttention(WIDTH, HEADS), {}, "MyAttention derives"),
        (attention(), {0: torch.arange(35)}, "unequal heads"),
        (
            attention(),
            {0: torch.cat([torch.arange(8), 12 + torch.arange(4, 12), 24 + torch.arange(8)])},
            "unequal heads",
        ),
        (attention(), {0: torch.cat([torch.tensor([0, 4, 8]), torch.arange(12, 36)])}, "different widths"),
        (attention(), {0: torch.arange(24)}, "heads none"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(module, change, text):
    keep = change or {0: torch.arange(0, 36, 2)}
    edits = [TensorEdit(tensor=n, keep=keep) for n in ("in_proj_weight", "in_proj_bias")]
    kind = type(module)
    with pytest.raises(ShapeError, match=text), Transaction(module) as transaction:
        transaction.apply(edits)
    assert type(module) is kind


def test_biases_that_keep_other_rows_are_refused():
    module = attention()
    edits = edits_of(module, (0, 1))
    with pytest.raises(ShapeError, match="different rows"), Transaction(module) as transaction:
        transaction.apply([e for e in edits if e.tensor != "in_proj_bias"])


def test_inputs_that_torch_refuses_are_refused():
    module = turned(attention(batch_first=True))
    x = inputs(module, kind="self")[0]
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask is"):
        module(x, x, x, attn_mask=torch.zeros(2, 5, 5))
    with pytest.raises(RuntimeError, match="key_padding_mask is"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"torch\.int64"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="dims"):
        module(x, x[0], x)


class Small(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.att = attention(seed=seed, batch_first=True)
        self.head = nn.Linear(WIDTH, 2).double()

    def forward(self, x):
        return self.head(self.att(x, x, x)[0])


@pytest.mark.parametrize("value", [range(SIZE), (0, 3)])  # widths that are torch's own, too, have to be restored
def test_checkpoints_restore_class_and_widths(value, tmp_path):
    net = Small()
    opt = torch.optim.Adam(net.parameters())
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    net(x).square().sum().backward()
    opt.step()
    with Transaction(net, [opt]) as transaction:
        found = edits_of(net.att, (0, 1, 2), (0, 1), value)
        transaction.apply([TensorEdit(tensor=f"att.{e.tensor}", keep=e.keep) for e in found])
    save(tmp_path / "a", net, opt)
    fresh = Small(seed=4)
    fresh_opt = torch.optim.Adam(fresh.parameters())
    load(tmp_path / "a", fresh, fresh_opt)
    assert type(fresh.att) is ShrunkMultiheadAttention
    assert attributes_of(fresh.att) == attributes_of(net.att)
    assert fresh(x).equal(net(x))
    load(tmp_path / "a", net, opt)
    assert fresh(x).equal(net(x))
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        assert opt.state[p]["exp_avg"].equal(fresh_opt.state[q]["exp_avg"])
    other = nn.Module()
    other.att, other.head = MyAttention(WIDTH, HEADS), nn.Linear(WIDTH, 2)
    with pytest.raises(CheckpointError, match="MyAttention derives"):
        load(tmp_path / "a", other.double())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"__class__": "Popen"}, "'att' is Popen there and MultiheadAttention here"),
        ({"num_heads": "2"}, "are damaged"),
        ({"forward": 2}, "are damaged"),
    ],
)
def test_no_other_class_is_restored(change, text, tmp_path):
    net = Small()
    with Transaction(net) as transaction:
        transaction.apply([TensorEdit(tensor=f"att.{e.tensor}", keep=e.keep) for e in edits_of(net.att, (0, 1))])
    save(tmp_path / "a", net)
    manifest, tensors = read_file(tmp_path / "a")
    manifest["model"]["attributes"]["att"].update(change)
    write_file(tmp_path / "a", tensors, manifest)
    fresh = Small(seed=4)
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path / "a", fresh)
    assert type(fresh.att) is nn.MultiheadAttention
    assert fresh.att.in_proj_weight.shape == (3 * WIDTH, WIDTH)
