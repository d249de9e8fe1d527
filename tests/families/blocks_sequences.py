"""Blocks of random networks for sequences: attention, recurrences, feed-forward blocks, positions."""

from __future__ import annotations

from families.generator import Shape, Writer, moved


def attention(w: Writer, s: Shape) -> Shape:
    """Attention over positions, by hand, by the function, by the module; queries may come from elsewhere."""
    c = s.channels
    n, size = w.pick(((1, 6), (2, 4), (3, 4)))
    width = n * size
    form = w.pick(("hand", "function", "module", "packed", "multiquery", "cross"))
    saved = w.name()
    w.line(f"{saved} = h")
    if form == "module":
        w.apply(f"nn.Linear({c}, {width})")
        name = w.module(f"nn.MultiheadAttention({width}, {n}, batch_first=True)")
        w.line(f"h = {name}(h, h, h, need_weights={w.pick(('False', 'True'))})[0]")
    else:
        _by_hand(w, c, n, width, form)
    w.apply(f"nn.Linear({width}, {c})")
    if w.flag():
        w.line(f"h = h + {saved}")
    return s


def _by_hand(w: Writer, c: int, n: int, width: int, form: str) -> None:
    bias = w.pick(("", ", bias=False"))
    q, k, v = w.name(), w.name(), w.name()
    keys = width // n if form == "multiquery" else width
    if form == "packed":
        w.apply(f"nn.Linear({c}, {3 * width}{bias})")
        w.line(f"{q}, {k}, {v} = h.chunk(3, -1)")
    else:
        for name, size in ((q, width), (k, keys), (v, keys)):
            w.line(f"{name} = {w.module(f'nn.Linear({c}, {size}{bias})')}(h)")
    if form == "cross":
        memory = w.module(f"nn.Parameter(torch.randn(3, {c}))")
        w.line(f"{k} = {w.module(f'nn.Linear({c}, {width})')}({memory}).expand(len(h), -1, -1)")
        w.line(f"{v} = {w.module(f'nn.Linear({c}, {width})')}({memory}).expand(len(h), -1, -1)")
    heads = w.number(n, ("num_heads", "n_heads", "heads", "nhead"))
    for name in (q, k, v):
        rows = 1 if form == "multiquery" and name != q else heads
        w.line(f"{name} = {name}.unflatten(-1, ({rows}, -1)).transpose(1, 2)")
    if form == "function":
        w.line(f"h = F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={w.pick((False, True))})")
    else:
        divisor = w.pick(("2.0", f"{q}.shape[-1] ** 0.5"))
        w.line(f"h = ({q} @ {k}.transpose(-2, -1) / {divisor}).softmax(-1) @ {v}")
    w.line("h = h.transpose(1, 2).flatten(2)")


def recurrent(w: Writer, s: Shape) -> Shape:
    width = w.pick((6, 4))
    kind = w.pick(("RNN", "LSTM", "GRU"))
    extra, factor = w.pick((("", 1), (", num_layers=2", 1), (", bidirectional=True", 2), (", bias=False", 1)))
    if kind == "LSTM" and w.flag():
        extra, factor, out = extra + ", proj_size=3", factor, 3
    else:
        out = width
    w.line(f"h = {w.module(f'nn.{kind}({s.channels}, {width}, batch_first=True{extra})')}(h)[0]")
    return moved(s, channels=out * factor)


def cell(w: Writer, s: Shape) -> Shape:
    """A recurrence written out over the positions."""
    width, kind = w.pick((6, 4)), w.pick(("GRUCell", "RNNCell", "LSTMCell"))
    name, state, outs = w.module(f"nn.{kind}({s.channels}, {width})"), w.name(), w.name()
    w.line(f"{state}, {outs} = None, []")
    w.line("for step in h.unbind(1):")
    w.line(f"    {state} = {name}(step, {state})")
    w.line(f"    {outs}.append({state}{'[0]' if kind == 'LSTMCell' else ''})")
    w.line(f"h = torch.stack({outs}, 1)")
    return moved(s, channels=width)


def feed_forward(w: Writer, s: Shape) -> Shape:
    """The block of a transformer, plain or gated, normalised before."""
    saved, c = w.name(), s.channels
    w.line(f"{saved} = h")
    w.apply(w.pick(("nn.Identity()", f"nn.LayerNorm({c})", f"nn.RMSNorm({c})")))
    if w.flag():
        gated = w.name()
        w.line(f"{gated} = F.silu({w.module(f'nn.Linear({c}, 12)')}(h))")
        w.line(f"h = {gated} * {w.module(f'nn.Linear({c}, 12)')}(h)")
        w.apply(f"nn.Linear(12, {c})")
    else:
        w.apply(f"nn.Sequential(nn.Linear({c}, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, {c}))")
    w.line(f"h = h + {saved}")
    return s


def position(w: Writer, s: Shape) -> Shape:
    """A table of positions, a parameter or a buffer's worth of numbers."""
    name = w.module(
        w.pick((f"nn.Parameter(torch.randn({s.size}, {s.channels}))", f"nn.Embedding({s.size}, {s.channels})"))
    )
    w.line(f"h = h + {name}" if "Parameter" in w.init[-1] else f"h = h + {name}(torch.arange(h.shape[1]))")
    return s


def temporal(w: Writer, s: Shape) -> Shape:
    """Convolve over positions, or mix them."""
    form, width = w.pick(("conv", "depthwise", "mix", "cumulative")), w.pick((6, 8))
    if form == "mix":
        w.line("h = h.transpose(1, 2)")
        w.apply(f"nn.Linear({s.size}, {s.size})")
        w.line("h = h.transpose(1, 2)")
        return s
    if form == "cumulative":
        w.line("h = h.cumsum(1) / 3")
        return s
    groups = f", groups={s.channels}" if form == "depthwise" else ""
    width = s.channels if groups else width
    w.line("h = h.transpose(1, 2)")
    w.apply(f"nn.Conv1d({s.channels}, {width}, 3, padding=1{groups})")
    w.line("h = h.transpose(1, 2)")
    return moved(s, channels=width)
