"""Train on a table with a held-out probe, so that the loss of accuracy has a limit that holds with confidence."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from apoptosis import Apoptosis

torch.manual_seed(0)
table, labels = load_breast_cancer(return_X_y=True)
x = torch.tensor(table, dtype=torch.float32)
y = torch.tensor(labels)
order = torch.randperm(len(x))
train, probe, test = order[:300], order[300:450], order[450:]
x = (x - x[train].mean(0)) / x[train].std(0)

model = nn.Sequential(nn.Linear(30, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
epochs = 40
apo = Apoptosis(
    model,
    optimizer,
    x[:2],
    total_steps=epochs * 5,
    probe=(x[probe], y[probe]),  # never trained on: what removals may cost is measured here
    budget=0.2,  # all removals together may change at most this share of the predictions, with confidence 95 %
)

for _ in range(epochs):
    for batch in train[torch.randperm(len(train))].chunk(5):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():
            print(event)

with torch.no_grad():
    print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.1%}")
print(apo.ledger())
apo.close()
