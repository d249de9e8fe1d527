"""Shrink a network that is trained already, and ship it as a file that needs torch alone, without this library."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from apoptosis import shrink_

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(200):
    batch = torch.randint(0, 1400, (100,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
event = shrink_(model, x[:2], [x[:1400]], tolerance=0.05)  # 1. batches: what the network shall still compute well
print(event)
with torch.no_grad():
    expected = model(x[1400:])
print(f"test accuracy {(expected.argmax(1) == y[1400:]).float().mean():.1%}")

folder = Path(tempfile.mkdtemp())
batch = torch.export.Dim("batch")
program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
torch.export.save(program, folder / "small.pt2")  # 2. the network as torch's own format: code and weights in one file
torch.save({"x": x[1400:], "expected": expected}, folder / "check.pt")

reader = """
import sys, torch
network = torch.export.load(sys.argv[1] + "/small.pt2").module()
check = torch.load(sys.argv[1] + "/check.pt")
assert "apoptosis" not in sys.modules
print("largest difference without the library:", (network(check["x"]) - check["expected"]).abs().max().item())
"""
subprocess.run([sys.executable, "-c", reader, str(folder)], check=True)  # 3. anywhere else
