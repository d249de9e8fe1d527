"""Blocks of random networks that stand anywhere: one layer, one activation, gates, views, code that does nothing."""

from __future__ import annotations

from families.generator import Shape, Writer, moved

ACTIVATIONS = (
    "nn.Tanh()", "nn.ReLU()", "nn.GELU()", "nn.SiLU()", "nn.Sigmoid()", "nn.LeakyReLU(0.2)", "nn.ReLU(inplace=True)",
    "nn.Softsign()", "nn.ELU()", "nn.PReLU()", "nn.Hardswish()", "nn.Softplus()", "nn.Tanhshrink()",
)  # fmt: skip
FUNCTIONS = ("torch.tanh({})", "F.relu({})", "torch.sigmoid({})", "F.gelu({})", "{}.relu_()", "{} * torch.sigmoid({})")
WIDTHS = (6, 8, 4, 12)


def activation(w: Writer, s: Shape) -> Shape:
    if w.flag():
        w.line("h = " + w.pick(FUNCTIONS).replace("{}", "h"))
    else:
        kind = w.pick(ACTIVATIONS)
        kind = f"nn.PReLU({s.channels})" if kind == "nn.PReLU()" and s.dim == 1 else kind
        w.apply(kind)
    return s


def dropout(w: Writer, s: Shape) -> Shape:
    w.apply(w.pick(("nn.Dropout(0.3)", "nn.Dropout2d(0.3)")) if s.kind == "image" else "nn.Dropout(0.3)")
    return s


def scale(w: Writer, s: Shape) -> Shape:
    """A raw parameter per channel, multiplied or added."""
    tail = ", 1, 1" if s.kind == "image" else ""
    name = w.module(f"nn.Parameter(torch.randn({s.channels}{tail}))")
    w.line(w.pick((f"h = h * {name}", f"h = h + {name}", f"h = {name} * h + 1.0")))
    return s


def project(w: Writer, s: Shape, width: int, *, plain: bool = False) -> Shape:
    """The linear layer of the kind, to a width; the size stays."""
    bias = "" if plain or not w.flag() else ", bias=False"
    if s.kind == "image":
        kernel = 1 if plain else w.pick((1, 3))
        padding = ", padding=1" if kernel == 3 else ""
        w.apply(f"nn.Conv2d({s.channels}, {width}, {kernel}{padding}{bias})")
    else:
        w.apply(f"nn.Linear({s.channels}, {width}{bias})")
    return moved(s, channels=width)


def layer(w: Writer, s: Shape) -> Shape:
    """A linear layer, perhaps a normalisation, an activation."""
    s = project(w, s, w.pick(WIDTHS))
    if w.flag():
        s = norm(w, s)
    return activation(w, s)


def norm(w: Writer, s: Shape) -> Shape:
    c = s.channels
    if s.kind == "sequence":
        w.apply(w.pick((f"nn.LayerNorm({c})", f"nn.RMSNorm({c})")))
        return s
    batch = f"nn.BatchNorm2d({c})" if s.kind == "image" else f"nn.BatchNorm1d({c})"
    plain = batch.replace(")", ", affine=False)")
    others = (f"nn.GroupNorm({2 - c % 2}, {{}})", "nn.GroupNorm(1, {})")
    images = (
        "nn.GroupNorm({}, {})",
        "nn.InstanceNorm2d({})",
        "nn.InstanceNorm2d({}, affine=True)",
        "nn.LocalResponseNorm(3)",
    )
    kinds = (batch, plain, *others, *(images if s.kind == "image" else ("nn.LayerNorm({})",)))
    w.apply(w.pick(kinds).replace("{}", str(c)))
    return s


def gate(w: Writer, s: Shape) -> Shape:
    """Two halves of one layer, or two layers, multiplied."""
    width = w.pick((4, 6))
    form = w.pick(("two", "chunk", "glu", "split", "flip"))
    if form == "two":
        saved, other = w.name(), w.name()
        w.line(f"{saved} = h")
        project(w, s, width)
        w.line(f"{other} = torch.sigmoid(h)")
        w.line(f"h = {saved}")
        project(w, s, width)
        w.line(f"h = h * {other}")
        return moved(s, channels=width)
    project(w, s, 2 * width)
    if form == "glu":
        w.line(f"h = F.glu(h, {s.dim})")
        return moved(s, channels=width)
    a, b = w.name(), w.name()
    cut = f"h.shape[{s.dim}] // 2"
    w.line(f"{a}, {b} = " + (f"h.split({cut}, {s.dim})" if form == "split" else f"h.chunk(2, {s.dim})"))
    w.line(f"h = torch.cat([{b}, {a}], {s.dim})" if form == "flip" else f"h = {a} * torch.tanh({b})")
    return moved(s, channels=2 * width if form == "flip" else width)


def shared(w: Writer, s: Shape) -> Shape:
    """One module called two or three times, or one weight used by hand."""
    s = project(w, s, w.pick((6, 4)))
    if s.kind != "image" and w.flag():
        weight = w.module(f"nn.Parameter(torch.randn({s.channels}, 8) / 3)")
        w.line(f"h = torch.tanh(h @ {weight})")
        w.line(f"h = F.linear(h, {weight})" if w.flag() else f"h = h @ {weight}.t()")
        return s
    name = w.module(
        f"nn.Conv2d({s.channels}, {s.channels}, 1)" if s.kind == "image" else f"nn.Linear({s.channels}, {s.channels})"
    )
    for _ in range(w.pick((2, 3))):
        w.line(f"h = torch.tanh({name}(h))")
    return s


def aside(w: Writer, s: Shape) -> Shape:
    """Dead code, an unused module, an auxiliary output, a detached statistic."""
    form = w.pick(("dead", "unused", "auxiliary", "training", "statistic"))
    linear = f"nn.Conv2d({s.channels}, 5, 1)" if s.kind == "image" else f"nn.Linear({s.channels}, 5)"
    name = w.module(linear)
    if form == "dead":
        w.line(f"_ = torch.tanh({name}(h)) * 2")
    elif form == "auxiliary":
        out = w.name()
        w.line(f"{out} = {name}(h)")
        w.outputs.append(out)
    elif form == "training":
        w.line(f"h = h + 0.0 * {name}(h).mean() if self.training else h")
    elif form == "statistic":
        w.line(f"h = h + 0.1 * {name}(h).detach().mean()")
    return s


def literal(w: Writer, s: Shape) -> Shape:
    """Channels picked by numbers that are written in the forward pass."""
    w.literal = True
    front = ":, " if s.dim == 1 else "..., "
    s = project(w, s, 8)
    form = w.pick(("slice", "stride", "roll", "index", "narrow", "view"))
    lines = {
        "slice": f"h = h[{front}:4] * h[{front}4:8]",
        "stride": f"h = h[{front}::2] + h[{front}1::2]",
        "roll": f"h = h + h.roll(1, {s.dim})",
        "index": f"h = h[{front}[0, 2, 5, 7]]",
        "narrow": f"h = h.narrow({s.dim}, 2, 4)",
        "view": f"h = h.unflatten({s.dim}, (2, 4)).sum({1 if s.dim == 1 else -2})",
    }
    w.line(lines[form])
    return moved(s, channels=8 if form == "roll" else 4)


def views(w: Writer, s: Shape) -> Shape:
    """Data movement that keeps the tensor's shape."""
    s = project(w, s, 8)
    d, last = s.dim, "1" if s.dim == 1 else "-1"
    first, second = (1, 2) if s.dim == 1 else (-2, -1)
    forms = {
        "contiguous": "h = h.transpose(0, 1).contiguous().transpose(0, 1)",
        "shuffle": f"h = h.unflatten({d}, (2, -1)).transpose({first}, {second}).flatten({first}, {second})",
        "flip": f"h = h.flip({last})",
        "squeeze": f"h = h.unsqueeze({last}).squeeze({last})",
        "parts": f"h = torch.cat(h.chunk(2, {d})[::-1], {d})",
        "stack": f"h = torch.stack([h, -h], {d}).flatten({first}, {second})",
        "expand": "h = h.unsqueeze(0).expand(2, *h.shape).mean(0)",
        "inplace": f"h = h.clone(); h.select({last}, 0).mul_(2.0)",
    }
    form = w.pick(tuple(forms))
    if form == "inplace":
        w.literal = True
    for line in forms[form].split("; "):
        w.line(line)
    return moved(s, channels=16) if form == "stack" else s
