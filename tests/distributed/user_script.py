"""A user's own loop, the same under every launcher: python user_script.py FOLDER [LAUNCHER]."""

import sys

import torch
from torch import nn

from apoptosis import Apoptosis
from apoptosis.distributed.ranks import checksums
from apoptosis.launch import start_group


def main(folder, launcher="auto"):
    torch.manual_seed(0)
    basis = torch.randn(3, 12)
    x = torch.randn(40 * 64, 3) @ basis
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    net = nn.Sequential(
        nn.Linear(12, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    events = []
    with start_group(launcher, device="cpu", timeout=120) as group:
        model = group.parallel(net.to(group.device), bucket_cap_mb=0.01)  # several buckets, reduced while backward runs
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        apo = Apoptosis(
            model, optimizer, torch.zeros(2, 12), tolerance=0.05, total_steps=80, align=1, calibration=1.0
        )  # fmt: skip
        for step in range(80):
            rows = torch.arange(64)[group.share(64)] + 64 * (step % 40)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if event := apo.step():
                events.append((step, [g["after"] if "after" in g else g for g in event.as_dict()["groups"]]))
        sums = group.ranks.gathered(checksums(net))
        if group.rank == 0:
            found = {"state": net.state_dict(), "events": events, "sums": sums, "size": group.size,
                     "launcher": group.launcher, "kind": type(apo._target.ranks).__name__}  # fmt: skip
            torch.save(found, f"{folder}/found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
