"""Networks of other kinds: graphs, click prediction, recurrent language models, audio."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from families.family import Family

NODES, VOCABULARY = 6, 30


def graph(rows: int) -> tuple[Tensor, Tensor]:
    """A graph of rows * NODES nodes in batches: features (rows, nodes, 5) and normalised adjacency."""
    edges = (torch.rand(rows, NODES, NODES) < 0.4).float()
    edges = ((edges + edges.transpose(1, 2)) > 0).float() + torch.eye(NODES)
    scale = edges.sum(-1).rsqrt()
    return torch.randn(rows, NODES, 5), scale[:, :, None] * edges * scale[:, None, :]


class GraphLayer(nn.Module):
    """A @ X @ W + b, by plain matrix products with a parameter of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.head = GraphLayer(5, 10), GraphLayer(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.relu(self.layer1(x, adjacency))
        x = F.elu(self.layer2(x, adjacency))
        return self.head(x.mean(1))


class ClickModel(nn.Module):
    """Dense features and embeddings meet in pairwise dot products; a wide linear part is added."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, 8) for _ in range(3))
        self.wide = nn.ModuleList(nn.Embedding(VOCABULARY, 1) for _ in range(3))
        self.top = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, offset=-1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        interactions = products[:, self.pairs[0], self.pairs[1]]
        deep = self.top(torch.cat([x, interactions], dim=1))
        return deep + sum(table(sparse[:, i]) for i, table in enumerate(self.wide))


class WideAndDeep(nn.Module):
    """Concatenated embeddings into a perceptron, plus a linear part."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, 5) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.out = nn.Linear(8 + 4, 1)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        embedded = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        deep = self.deep(torch.cat([dense, *embedded], dim=1))
        return torch.sigmoid(self.out(torch.cat([deep, dense], dim=1)))


def clicks(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.randint(VOCABULARY, (rows, 3))


class LanguageModel(nn.Module):
    """A stacked LSTM between an embedding and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 10, num_layers=2, batch_first=True, dropout=0.1)
        self.decoder = nn.Linear(10, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(tokens))
        return self.decoder(out)


class GatedModel(nn.Module):
    """A bidirectional GRU read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.head(out[:, -1])


class Unrolled(nn.Module):
    """LSTM cells stepped by a loop of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), self.cell.weight_hh.shape[1])
        state = (hidden, hidden)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0])


class AudioEncoder(nn.Module):
    """A stack of strided convolutions over a waveform, one with a norm per channel, then a convolutional position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv1d(1, 10, 10, stride=5, bias=False), nn.GroupNorm(10, 10)
        self.conv1, self.conv2 = nn.Conv1d(10, 12, 3, stride=2, bias=False), nn.Conv1d(12, 12, 2, stride=2, bias=False)
        self.norm, self.project = nn.LayerNorm(12), nn.Linear(12, 8)
        self.positions = nn.Conv1d(8, 8, 4, padding=2, groups=2)
        self.feed, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, wave: Tensor) -> Tensor:
        x = F.gelu(self.norm0(self.conv0(wave[:, None])))
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        x = self.project(self.norm(x.transpose(1, 2)))
        x = x + F.gelu(self.positions(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)
        x = x + self.out(F.gelu(self.feed(x)))
        return self.head(x)


FAMILIES = (
    Family(name="GNN by matmul", build=GraphNetwork, example=graph, groups={"layer1": 4, "layer2": 3}),
    Family(
        name="DLRM, dot interactions",
        build=ClickModel,
        example=clicks,
        groups={"bottom.0": 4, "bottom.2": 3, "top.0": 5, "top.2": 3},
        rows=128,
    ),
    Family(
        name="wide and deep",
        build=WideAndDeep,
        example=lambda rows: (torch.randn(rows, 4), torch.randint(VOCABULARY, (rows, 2))),
        groups={"deep.0": 5, "deep.2": 3, "tables.0": 1, "tables.1": 1},
        rows=128,
    ),
    Family(
        name="LSTM language model",
        build=LanguageModel,
        example=lambda rows: torch.randint(VOCABULARY, (rows, 5)),
        groups={"embed": 2, "lstm": 3, "lstm#2": 3},
    ),
    Family(
        name="GRU, bidirectional",
        build=GatedModel,
        example=lambda rows: torch.randn(rows, 4, 4),
        groups={"gru": 2, "gru#2": 2, "head.0": 3},
    ),
    Family(
        name="LSTM cells",
        build=Unrolled,
        example=lambda rows: torch.randn(rows, 4, 4),
        groups={"cell": 3},
    ),
    Family(
        name="audio encoder",
        build=AudioEncoder,
        example=lambda rows: torch.randn(rows, 80),
        groups={"conv0": 3, "conv1": 4, "feed": 5, "project": 1},
    ),
)
