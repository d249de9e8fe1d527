"""Train with several processes: `torchrun --nproc-per-node 2 examples/several_processes.py`.

Every rank calls the same loop. Statistics are pooled, and all ranks remove the same channels at the same step.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptosis import Apoptosis


def main():
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Linear(20, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-3)
    steps = 400
    apo = Apoptosis(ddp, optimizer, torch.randn(2, 20), total_steps=steps)

    data = torch.Generator().manual_seed(rank)  # every rank has batches of its own
    for _ in range(steps):
        x = torch.randn(64, 20, generator=data)
        with torch.no_grad():
            y = teacher(x).argmax(1)
        loss = nn.functional.cross_entropy(ddp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (event := apo.step()) and rank == 0:
            print(event)

    if rank == 0:
        print(f"loss {loss.item():.3f} on {size} ranks, {sum(p.numel() for p in model.parameters()):,} parameters")
        print(apo.ledger())
    apo.close()


dist.init_process_group("gloo")
main()  # what it made is gone before the group is: torch may hang at exit where DDP outlives its group
dist.destroy_process_group()
