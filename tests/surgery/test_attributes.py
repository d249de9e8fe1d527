from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from apoptosis.checkpoint import load, save
from apoptosis.errors import ArgumentError, ShapeError
from apoptosis.records import TensorEdit
from apoptosis.surgery import Transaction, register_attributes
from apoptosis.surgery.attributes import ATTRIBUTES, attributes_of


class MyLinear(nn.Linear):
    """A subclass goes by its parent's rows."""


def _example(kind: type[nn.Module]) -> nn.Module:
    made = {
        nn.Linear: lambda: MyLinear(5, 5),
        nn.Bilinear: lambda: nn.Bilinear(5, 5, 5),
        nn.modules.conv._ConvNd: lambda: nn.Conv2d(5, 5, 3),
        nn.modules.conv._ConvTransposeNd: lambda: nn.ConvTranspose1d(5, 5, 3),
        nn.modules.batchnorm._NormBase: lambda: nn.BatchNorm2d(5),
        nn.GroupNorm: lambda: nn.GroupNorm(1, 5),
        nn.LayerNorm: lambda: nn.LayerNorm((5, 5, 5)),
        nn.RMSNorm: lambda: nn.RMSNorm((5, 5, 5)),
        nn.PReLU: lambda: nn.PReLU(5),
        nn.Embedding: lambda: nn.Embedding(5, 5),
        nn.EmbeddingBag: lambda: nn.EmbeddingBag(5, 5),
    }
    return made[kind]()


ROWS = [
    (kind, row)
    for kind, rows in ATTRIBUTES.items()
    if not isinstance(kind, str) and not issubclass(kind, nn.RNNBase | nn.RNNCellBase)  # their rows hold several gates
    for row in rows
]


@pytest.mark.parametrize(("kind", "row"), ROWS, ids=[f"{kind.__name__}.{row.tensor}.{row.dim}" for kind, row in ROWS])
def test_every_row_of_the_attribute_table(kind, row):
    leaf, dim, attribute, _ = row
    module = _example(kind)
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=leaf, keep={dim: torch.tensor([0, 2, 3])})])
    value = getattr(module, attribute)
    assert (value[dim] if isinstance(value, tuple) else value) == 3
    other = {k: v for k, v in attributes_of(module).items() if k not in (attribute, "groups", "num_groups")}
    assert all(v == 5 or v == (5, 5, 5) for v in other.values())
    assert repr(module)


def test_unaffine_batch_norm_goes_by_its_buffers():
    module = nn.BatchNorm1d(5, affine=False)
    keep = {0: torch.tensor([1, 4])}
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=n, keep=keep) for n in ("running_mean", "running_var")])
    assert module.num_features == 2
    assert module(torch.randn(6, 2)).shape == (6, 2)


@pytest.mark.parametrize(
    ("module", "keep", "shape"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), {0: [0, 2, 5]}, (3, 3, 3)),  # depthwise
        (nn.Conv2d(4, 8, 3, groups=4), {0: [2, 3, 6, 7]}, (2, 4, 2)),  # two outputs per input, whole groups go
        (nn.Conv2d(4, 8, 3, groups=4), {0: [0, 2, 4, 6]}, (4, 4, 4)),  # one output of each input goes
        (nn.Conv2d(6, 6, 3, groups=2), {0: [0, 2, 3, 5]}, (6, 4, 2)),
        (nn.Conv2d(6, 6, 3, groups=2), {1: [0, 2]}, (4, 6, 2)),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), {0: [1, 2]}, (2, 2, 2)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), {0: [0, 1, 3, 4]}, (4, 4, 2)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), {1: [1]}, (6, 2, 2)),
    ],
)
def test_grouped_convolutions_stay_true(module, keep, shape):
    edits = [TensorEdit(tensor="weight", keep={d: torch.tensor(k) for d, k in keep.items()})]
    num_out = shape[1]
    edits.append(TensorEdit(tensor="bias", keep={0: torch.arange(num_out)}))
    with Transaction(module) as transaction:
        transaction.apply(edits)
    assert (module.in_channels, module.out_channels, module.groups) == shape
    assert module(torch.randn(2, module.in_channels, 5, 5)).shape[1] == module.out_channels
    fresh = type(module)(*shape[:2], 3, groups=shape[2])
    assert fresh.weight.shape == module.weight.shape


def test_ragged_groups_are_refused():
    module = nn.Conv2d(6, 6, 3, groups=2)
    with pytest.raises(ShapeError, match="different sizes"), Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor="weight", keep={0: torch.tensor([0, 1, 2, 3])})])
    assert module.weight.shape == (6, 3, 3, 3)


GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}
HIDDEN, KEEP = 5, torch.tensor([0, 2, 3])


def recurrent_edits(module, hidden=KEEP):
    """Edits that keep these hidden channels; of a projected LSTM, as many of what it puts out."""
    gates = GATES[type(module)]
    rows = torch.cat([gate * HIDDEN + hidden for gate in range(gates)])
    projected = bool(getattr(module, "proj_size", 0))
    edits = []
    for name, _ in module.named_parameters():
        kind = name.rpartition("_")[0] if "_l" in name else name
        if kind.startswith("weight_hr"):
            edits.append(TensorEdit(tensor=name, keep={1: hidden}))
        elif kind.startswith("bias"):
            edits.append(TensorEdit(tensor=name, keep={0: rows}))
        else:
            deeper = kind.startswith("weight_ih") and "_l1" in name and not projected
            recurs = kind.startswith("weight_hh") and not projected
            columns = torch.cat([d * HIDDEN + hidden for d in range(1 + module.bidirectional)]) if deeper else hidden
            edits.append(TensorEdit(tensor=name, keep={0: rows, **({1: columns} if deeper or recurs else {})}))
    return edits


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (2, True)])
def test_recurrent_modules_lose_silent_hidden_channels(kind, layers, both, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        return kind(4, HIDDEN, num_layers=layers, bidirectional=both, batch_first=True).double()

    net, x = make(0), torch.randn(2, 6, 4, dtype=torch.float64)
    gone = [1, 4]
    with torch.no_grad():
        for name, p in net.named_parameters():  # nobody reads them: what they do does not matter
            if name.startswith("weight_hh"):
                p[:, gone] = 0.0
            elif name.startswith("weight_ih") and "_l1" in name:
                p[:, [d * HIDDEN + c for d in range(1 + both) for c in gone]] = 0.0
    kept = torch.cat([d * HIDDEN + KEEP for d in range(1 + both)])
    expected = net(x)[0][..., kept].detach()
    opt = torch.optim.Adam(net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    values = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt.step()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(values[name])
    second = opt.state[net.weight_hh_l0]["exp_avg_sq"].clone()
    edits = recurrent_edits(net)
    with Transaction(net, [opt]) as transaction:
        transaction.apply(edits)
    assert net.hidden_size == 3
    assert (net(x)[0] - expected).abs().max() < 1e-12
    rows = next(e for e in edits if e.tensor == "weight_hh_l0").keep[0]
    assert opt.state[net.weight_hh_l0]["exp_avg_sq"].equal(second[rows][:, KEEP])
    net(x)[0].square().sum().backward()
    opt.step()
    save(tmp_path / "a", net, opt)
    fresh = make(1)
    load(tmp_path / "a", fresh, torch.optim.Adam(fresh.parameters()))
    assert fresh(x)[0].equal(net(x)[0])
    assert (fresh.hidden_size, fresh.input_size) == (3, 4)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_lose_silent_hidden_channels(kind):
    torch.manual_seed(0)
    net, x = kind(4, HIDDEN).double(), torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        net.weight_hh[:, [1, 4]] = 0.0
    net.bidirectional = False

    def run(h):
        return h if isinstance(h, torch.Tensor) else h[0]

    expected = run(net(x, net(x)))[:, KEEP].detach()
    with Transaction(net) as transaction:
        transaction.apply(recurrent_edits(net))
    assert (net.hidden_size, net.input_size) == (3, 4)
    assert (run(net(x, net(x))) - expected).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_lstms_follow_both_widths(tmp_path):
    net = nn.LSTM(4, HIDDEN, proj_size=3, num_layers=2)
    with pytest.raises(ShapeError, match="would not exceed the projected one"), Transaction(net) as transaction:
        transaction.apply(recurrent_edits(net))  # torch would take it for one without projections
    with Transaction(net) as transaction:
        transaction.apply(recurrent_edits(net, torch.tensor([0, 1, 2, 4])))
    assert (net.hidden_size, net.proj_size) == (4, 3)
    with Transaction(net) as transaction:
        keep = torch.tensor([0, 2])
        edits = [TensorEdit(tensor=f"weight_hr_l{i}", keep={0: keep}) for i in range(2)]
        edits += [TensorEdit(tensor=n, keep={1: keep}) for n in ("weight_hh_l0", "weight_hh_l1", "weight_ih_l1")]
        transaction.apply([*edits, TensorEdit(tensor="weight_ih_l0", keep={1: torch.tensor([3])})])
    assert (net.input_size, net.hidden_size, net.proj_size) == (1, 4, 2)
    x = torch.randn(5, 2, 1)
    assert net(x)[0].shape == (5, 2, 2)
    save(tmp_path / "a", net)
    fresh = nn.LSTM(4, HIDDEN, proj_size=3, num_layers=2)
    load(tmp_path / "a", fresh)
    assert fresh(x)[0].equal(net(x)[0])


def test_layers_of_one_module_keep_one_width():
    net = nn.GRU(4, HIDDEN, num_layers=2)
    edits = [e for e in recurrent_edits(net) if e.tensor.endswith("_l1")]
    edits = [e if e.tensor != "weight_ih_l1" else TensorEdit(tensor=e.tensor, keep={0: e.keep[0]}) for e in edits]
    with pytest.raises(ShapeError, match="GRU would have different widths"), Transaction(net) as transaction:
        transaction.apply(edits)
    assert net.weight_hh_l1.shape == (3 * HIDDEN, HIDDEN)


def test_group_norms_follow_where_groups_go_or_thin_alike():
    for keep, groups in (([0, 2, 4], 3), ([2, 3, 4, 5], 2), (range(6), 3)):
        module = nn.GroupNorm(3, 6)
        with Transaction(module) as transaction:
            transaction.apply([TensorEdit(tensor=n, keep={0: torch.tensor(list(keep))}) for n in ("weight", "bias")])
        assert (module.num_groups, module.num_channels) == (groups, len(keep))
        assert module(torch.randn(2, len(keep), 4)).shape == (2, len(keep), 4)
    module = nn.GroupNorm(3, 6)
    with pytest.raises(ShapeError, match="normalisation with 3 groups"), Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor=n, keep={0: torch.arange(3)}) for n in ("weight", "bias")])
    assert module.num_groups == 3


def test_grouped_convolutions_thin_to_one_channel_per_block():
    module = nn.Conv2d(4, 4, 3, groups=2)
    with Transaction(module) as transaction:
        edits = [TensorEdit(tensor="weight", keep={0: torch.tensor([1, 2]), 1: torch.tensor([1])})]
        transaction.apply([*edits, TensorEdit(tensor="bias", keep={0: torch.tensor([1, 2])})])
    assert (module.in_channels, module.out_channels, module.groups) == (2, 2, 2)
    assert module(torch.randn(1, 2, 4, 4)).shape == (1, 2, 2, 2)


def test_a_type_of_a_package_that_need_not_be_there():
    transformers = pytest.importorskip("transformers.pytorch_utils")

    class Mine(transformers.Conv1D):
        pass

    for kind in (transformers.Conv1D, Mine):
        module = kind(6, 5)
        with Transaction(module) as transaction:
            edits = [TensorEdit(tensor="weight", keep={0: torch.arange(2), 1: torch.arange(4)})]
            transaction.apply([*edits, TensorEdit(tensor="bias", keep={0: torch.arange(4)})])
        assert (module.nx, module.nf) == (2, 4)
        assert module(torch.randn(3, 2)).shape == (3, 4)
    assert attributes_of(type("Conv1D", (nn.Module,), {})()) == {}


def make_type(parent=nn.Module):
    class Table(parent):
        def __init__(self):
            nn.Module.__init__(self)
            self.table = nn.Parameter(torch.randn(3, 8, 4))
            self.width, self.four_times, self.sizes, self.other = 8, 32, (3, 8, 4), 8

    return Table


def test_registered_attributes_follow_in_proportion(tmp_path):
    kind = make_type()
    register_attributes(kind, [("table", 1, "width"), ("table", 1, "four_times"), ("table", 1, "sizes")])
    subclass = type("Sub", (kind,), {})
    module = subclass()
    with Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor="table", keep={1: torch.arange(5)})])
    assert (module.width, module.four_times, module.sizes, module.other) == (5, 20, (3, 5, 4), 8)
    assert attributes_of(module) == {"width": 5, "four_times": 20, "sizes": (3, 5, 4)}
    save(tmp_path / "a", module)
    fresh = subclass()
    load(tmp_path / "a", fresh)
    assert attributes_of(fresh) == attributes_of(module)
    assert fresh.table.equal(module.table)


def test_an_attribute_that_would_be_no_whole_number_is_refused():
    kind = make_type()
    register_attributes(kind, [("table", 1, "width")])
    module = kind()
    module.width = 4
    with pytest.raises(ShapeError, match=r"Table\.width = 4"), Transaction(module) as transaction:
        transaction.apply([TensorEdit(tensor="table", keep={1: torch.arange(5)})])
    assert module.table.shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("kind", "rows", "text"),
    [
        (nn.Linear, [("weight", 0, "x")], "Linear has rows already: out_features, in_features"),
        (int, [("weight", 0, "x")], "subclass of nn.Module"),
        (nn.Linear(1, 1), [("weight", 0, "x")], "subclass of nn.Module"),
        (make_type(), [], "no rows"),
        (make_type(), [("table", 0, "a")] * 2, "twice"),
        (make_type(), [("table", -1, "a")], "from 0 on"),
        (make_type(), [("table", "0", "a")], "from 0 on"),
        (make_type(), [("table", "a")], "from 0 on"),
    ],
)
def test_what_cannot_be_registered(kind, rows, text):
    with pytest.raises(ArgumentError, match=text):
        register_attributes(kind, rows)


def test_a_type_is_registered_once():
    kind = make_type()
    register_attributes(kind, [("table", 1, "width")])
    with pytest.raises(ArgumentError, match="has rows already: width"):
        register_attributes(kind, [("table", 0, "other")])
    derived = make_type(nn.Linear)  # in place of its parent's rows
    register_attributes(derived, [("table", 1, "width")])
    assert attributes_of(derived()) == {"width": 8}


class Block(nn.Module):
    """Experts in stacks, and a number of heads that nothing measures."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 12)), nn.Parameter(torch.randn(3, 6, 4))
        self.num_heads, self.expert_dim = 2, 6

    def forward(self, x):
        a, b = torch.einsum("bi,eio->ebo", x, self.up).chunk(2, -1)
        return torch.einsum("ebo,eoi->bi", a * b, self.down)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adafactor, lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_stacked_experts_in_optimizers_and_checkpoints(make, tmp_path):
    net, x = Block(0), torch.randn(7, 4)
    opt = make(net.parameters())
    net(x).square().sum().backward()
    opt.step()
    keep = torch.tensor([0, 1, 5])
    with Transaction(net, [opt]) as transaction:
        up = torch.cat([keep, 6 + keep])
        transaction.apply([TensorEdit(tensor="up", keep={2: up}), TensorEdit(tensor="down", keep={1: keep})])
    net.zero_grad()
    net(x).square().sum().backward()
    opt.step()
    net.num_heads = 1
    save(tmp_path / "a", net, opt)
    fresh = Block(1)
    fresh_opt = make(fresh.parameters())
    load(tmp_path / "a", fresh, fresh_opt)
    assert fresh(x).equal(net(x))
    assert fresh.num_heads == 1
    for one, two in itertools.product([opt], [fresh_opt]):
        for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
            for key, value in one.state[p].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(two.state[q][key])), key
