"""A checkpoint that was written when the modules of the library lay elsewhere still loads, and its run goes on."""

from pathlib import Path

import torch
from torch import nn

from apoptosis import Apoptosis, load

STORED = Path(__file__).with_name("stored") / "earlier_layout.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 32)
        self.out = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.out(torch.relu(self.hidden(self.norm(x))))
        return self.head(x.mean(1))


def test_it_loads_and_the_run_goes_on():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    example = torch.zeros(2, 4, 6)
    apo = Apoptosis(
        model, optimizer, example, total_steps=100, norm_widths="compensated", tolerance=0.2, calibration=1.0, align=4
    )
    extra = load(STORED, model, optimizer, apo)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(extra["inputs"]), extra["outputs"])
    assert apo.ledger().events == extra["events"] == 3
    assert model.hidden.out_features == 8
    assert type(model.attention).__name__ == "ShrunkMultiheadAttention"
    model.train()
    for _ in range(3):
        model(extra["inputs"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        apo.step()
    apo.close()
