"""Train an image classifier and let it shrink while it trains. Needs scikit-learn, for its handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from apoptosis import Apoptosis

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]

model = nn.Sequential(
    nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(128 * 16, 1024), nn.ReLU(), nn.Linear(1024, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
epochs, batches = 10, len(train_x) // 100
apo = Apoptosis(model, optimizer, train_x[:2], total_steps=epochs * batches)  # 1. say what trains, and how long

for epoch in range(epochs):
    model.train()
    for batch in torch.randperm(len(train_x)).split(100):
        loss = nn.functional.cross_entropy(model(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if event := apo.step():  # 2. one call after every optimizer step
            print(event)
    with torch.no_grad():
        accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean()
    print(f"epoch {epoch}: test accuracy {accuracy:.1%}, {sum(p.numel() for p in model.parameters()):,} parameters")

print(apo.ledger())  # 3. what all events together cost at most
apo.close()
