"""What the tests of training loops share."""

import torch


def finish(net, apo, events, optimizer=None):
    """Shapes agree everywhere and training can go on."""
    assert events
    assert apo.ledger().parameters[1] == sum(p.numel() for p in net.parameters()) < apo.ledger().parameters[0]
    if optimizer is not None:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.dim():
                    assert value.shape == parameter.shape


def loop(runs, net, optimizer, apo, step_fn, steps=None):
    events = []
    net.train()
    for step in range(runs.STEPS if steps is None else steps):
        if event := step_fn(step):
            events.append(event)
    return events
