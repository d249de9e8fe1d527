"""The blocks that random networks are made of, by the kind of tensor they take; and those that hold other blocks.

Every block is a function (writer, shape) -> shape of `h` afterwards. Tables list the simplest block first. Not here:
how decisions are taken (generator.py).
"""

from __future__ import annotations

from collections.abc import Callable

from families.blocks_basic import activation, aside, dropout, gate, layer, literal, norm, project, scale, shared, views
from families.blocks_images import channel_shuffle, conv_layer, excite, pixels, pool, separable, unet, up
from families.blocks_sequences import attention, cell, feed_forward, position, recurrent, temporal
from families.generator import VOCABULARY, Shape, Writer, moved

Block = Callable[[Writer, Shape], Shape]
MAX_DEPTH = 2


def residual(w: Writer, s: Shape) -> Shape:
    """h + f(h), or f(h) + g(h) with a projection in the second branch."""
    saved = w.name()
    w.line(f"{saved} = h")
    inside = inner(w, s)
    if inside != s:
        project(w, inside, s.channels)
    w.line(w.pick((f"h = h + {saved}", f"h = {saved} + h", f"h += {saved}", f"h = torch.add({saved}, h, alpha=0.5)")))
    return s


def branches(w: Writer, s: Shape) -> Shape:
    """Several branches of one input, concatenated, added or multiplied; perhaps with the input itself (dense)."""
    saved, ends = w.name(), []
    w.line(f"{saved} = h")
    join = w.pick(("cat", "add", "mul", "dense"))
    width, total = w.pick((4, 6)), 0
    for _ in range(w.pick((2, 3))):
        w.line(f"h = {saved}")
        made = inner(w, s)
        if join in ("add", "mul") and made.channels != width:
            made = project(w, made, width)
        ends.append(w.name())
        total += made.channels
        w.line(f"{ends[-1]} = h")
    if join in ("cat", "dense"):
        parts = [*ends, saved] if join == "dense" else ends
        w.line(f"h = torch.cat([{', '.join(parts)}], {s.dim})")
        return moved(s, channels=total + (s.channels if join == "dense" else 0))
    w.line("h = " + (" + " if join == "add" else " * ").join(ends))
    return moved(s, channels=width)


def inner(w: Writer, s: Shape) -> Shape:
    """One or two blocks that keep the size, inside of something."""
    w.depth += 1
    for _ in range(w.pick((1, 2))):
        table = SIZED[s.kind] if w.depth < MAX_DEPTH else SIMPLE[s.kind]
        s = run(w, w.pick(table), s)
    w.depth -= 1
    return s


def to_vector(w: Writer, s: Shape) -> Shape:
    """Flatten or pool."""
    if s.kind == "vector":
        return s
    if s.kind == "image":
        form = w.pick(("mean", "flatten", "max", "view"))
        if form in ("flatten", "view") and s.channels * s.size**2 <= 400:
            w.line("h = h.flatten(1)" if form == "flatten" else "h = h.reshape(h.shape[0], -1)")
            return Shape("vector", s.channels * s.size**2)
        w.line("h = h.amax((2, 3))" if form == "max" else "h = h.mean((2, 3))")
        return Shape("vector", s.channels)
    form = w.pick(("mean", "last", "flatten", "max"))
    lines = {
        "mean": "h = h.mean(1)",
        "last": "h = h[:, -1]",
        "max": "h = h.max(1).values",
        "flatten": "h = h.flatten(1)",
    }
    w.line(lines[form])
    return Shape("vector", s.channels * (s.size if form == "flatten" else 1))


def to_sequence(w: Writer, s: Shape) -> Shape:
    """Patches of an image, or rows of a vector."""
    if s.kind == "image":
        w.line("h = h.flatten(2).transpose(1, 2)")
        return Shape("sequence", s.channels, s.size**2)
    w.line("h = h.unsqueeze(1)")
    return Shape("sequence", s.channels, 1)


ANYWHERE: tuple[Block, ...] = (layer, activation, residual, branches, gate, shared, scale, views, norm, aside, dropout)
RARE: tuple[Block, ...] = (literal,)
SIMPLE: dict[str, tuple[Block, ...]] = {
    kind: (layer, activation, scale, gate, shared, views, norm) for kind in ("vector", "image", "sequence")
}
SIZED: dict[str, tuple[Block, ...]] = {
    "vector": ANYWHERE,
    "image": (*ANYWHERE, separable, excite, channel_shuffle, unet),
    "sequence": (*ANYWHERE, attention, feed_forward, recurrent, cell, position, temporal),
}
FREE: dict[str, tuple[Block, ...]] = {
    "vector": (layer, *ANYWHERE, *RARE),
    "image": (conv_layer, *SIZED["image"], conv_layer, pool, up, pixels, conv_layer, *RARE),
    "sequence": (layer, *SIZED["sequence"], attention, feed_forward, *RARE),
}


def run(w: Writer, chosen: Block, s: Shape) -> Shape:
    """Write one block."""
    w.features.append(chosen.__name__)
    return chosen(w, s)


def begin(w: Writer, given: Shape) -> Shape:
    """From the input to the first channels."""
    if given.kind == "tokens":
        name = w.module(f"nn.Embedding({VOCABULARY}, 8)")
        w.line(f"h = {name}(h)")
        return Shape("sequence", 8, given.size)
    return run(w, conv_layer if given.kind == "image" else layer, given)


def block(w: Writer, s: Shape) -> Shape:
    """Any block that the kind allows, or one that changes the kind."""
    if s.kind == "image" and s.size <= 4 and w.pick((False, False, False, True)):
        return run(w, to_sequence, s)
    return run(w, w.pick(FREE[s.kind]), s)


def end(w: Writer, s: Shape) -> Shape:
    """To the network's output."""
    s = run(w, to_vector, s)
    if w.flag():
        s = run(w, layer, s)
    return project(w, s, 3, plain=True)
