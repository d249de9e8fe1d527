"""Blocks of random networks for images: every kind of convolution, pooling, shuffles, squeeze and excite, skips."""

from __future__ import annotations

from families.blocks_basic import activation, norm, project
from families.generator import Shape, Writer, moved


def convolution(w: Writer, s: Shape) -> Shape:
    """One convolution of any kind; the size may change."""
    form = w.pick(
        ("plain", "strided", "grouped", "depthwise", "dilated", "transposed", "valid", "reflect", "separable")
    )
    c, width = s.channels, w.pick((8, 4, 12))
    bias = ", bias=False" if w.flag() else ""
    if form == "grouped" and c % 2 == 0:
        w.apply(f"nn.Conv2d({c}, {width}, 3, padding=1, groups=2{bias})")
    elif form == "depthwise":
        width = c * w.pick((1, 2))
        w.apply(f"nn.Conv2d({c}, {width}, 3, padding=1, groups={c}{bias})")
    elif form == "separable":
        w.apply(f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c}, bias=False)")
        w.apply(f"nn.Conv2d({c}, {width}, 1{bias})")
    elif form == "dilated":
        w.apply(f"nn.Conv2d({c}, {width}, 3, padding=2, dilation=2{bias})")
    elif form == "transposed" and s.size <= 6:
        w.apply(f"nn.ConvTranspose2d({c}, {width}, 2, stride=2{bias})")
        return moved(s, channels=width, size=2 * s.size)
    elif form == "strided" and s.size >= 4:
        w.apply(f"nn.Conv2d({c}, {width}, 3, stride=2, padding=1{bias})")
        return moved(s, channels=width, size=(s.size + 1) // 2)
    elif form == "valid" and s.size >= 5:
        w.apply(f"nn.Conv2d({c}, {width}, 3{bias})")
        return moved(s, channels=width, size=s.size - 2)
    elif form == "reflect" and s.size >= 2:
        mode = w.pick(("reflect", "circular", "replicate"))
        w.apply(f"nn.Conv2d({c}, {width}, 3, padding=1, padding_mode='{mode}'{bias})")
    else:
        w.apply(f"nn.Conv2d({c}, {width}, 3, padding=1{bias})")
    return moved(s, channels=width)


def conv_layer(w: Writer, s: Shape) -> Shape:
    s = convolution(w, s)
    if w.flag():
        s = norm(w, s)
    return activation(w, s)


def separable(w: Writer, s: Shape) -> Shape:
    """An inverted residual: widen, depthwise, narrow."""
    saved, wide = w.name(), 2 * s.channels
    w.line(f"{saved} = h")
    w.apply(f"nn.Sequential(nn.Conv2d({s.channels}, {wide}, 1, bias=False), nn.BatchNorm2d({wide}), nn.ReLU6())")
    w.apply(f"nn.Sequential(nn.Conv2d({wide}, {wide}, 3, padding=1, groups={wide}), nn.Hardswish())")
    if w.flag():
        excite(w, moved(s, channels=wide))
    w.apply(f"nn.Conv2d({wide}, {s.channels}, 1)")
    w.line(f"h = h + {saved}")
    return s


def excite(w: Writer, s: Shape) -> Shape:
    """Squeeze and excite, by convolutions or by linear layers."""
    c, saved = s.channels, w.name()
    w.line(f"{saved} = h")
    if w.flag():
        w.line("h = h.mean((2, 3))")
        w.apply(f"nn.Sequential(nn.Linear({c}, 4), nn.ReLU(), nn.Linear(4, {c}), nn.Sigmoid())")
        w.line(f"h = {saved} * h[:, :, None, None]")
    else:
        w.line("h = F.adaptive_avg_pool2d(h, 1)")
        w.apply(f"nn.Sequential(nn.Conv2d({c}, 4, 1), nn.SiLU(), nn.Conv2d(4, {c}, 1), nn.Hardsigmoid())")
        w.line(f"h = h * {saved}")
    return s


def pool(w: Writer, s: Shape) -> Shape:
    if s.size < 4:
        return up(w, s)
    kind = w.pick(("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", "nn.AvgPool2d(3, 2, 1)", "nn.LPPool2d(2, 2)"))
    w.apply(kind)
    return moved(s, size=(s.size + 1) // 2 if "3, 2" in kind else s.size // 2)


def up(w: Writer, s: Shape) -> Shape:
    if s.size > 6:
        return pool(w, s)
    w.apply(w.pick(("nn.Upsample(scale_factor=2)", "nn.Upsample(scale_factor=2, mode='bilinear')", "nn.ZeroPad2d(1)")))
    return moved(s, size=s.size + 2 if "ZeroPad" in w.init[-1] else 2 * s.size)


def pixels(w: Writer, s: Shape) -> Shape:
    """Channels become positions, or positions channels."""
    if s.size % 2 or s.size > 6 or w.flag():
        s = project(w, s, 16, plain=True)
        w.apply("nn.PixelShuffle(2)")
        return moved(s, channels=4, size=2 * s.size)
    s = project(w, s, 4)
    w.apply("nn.PixelUnshuffle(2)")
    return moved(s, channels=16, size=s.size // 2)


def channel_shuffle(w: Writer, s: Shape) -> Shape:
    s = project(w, s, 8)
    if w.flag():
        w.apply("nn.ChannelShuffle(2)")
    else:
        rows = w.number(4, ("num_groups", "n_groups"))
        w.line(f"h = h.unflatten(1, ({rows}, -1)).transpose(1, 2).flatten(1, 2)")
    if w.flag():
        w.apply("nn.Conv2d(8, 8, 3, padding=1, groups=2)")
    return s


def unet(w: Writer, s: Shape) -> Shape:
    """Down, up again, and the skip beside it."""
    saved = w.name()
    w.line(f"{saved} = h")
    down = f"nn.Conv2d({s.channels}, 8, 3, stride=2, padding=1)"
    w.apply(f"nn.Sequential({down}, nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2))")
    w.line(f"h = torch.cat([h[:, :, :{saved}.shape[2], :{saved}.shape[3]], {saved}], 1)")
    return moved(s, channels=6 + s.channels)
