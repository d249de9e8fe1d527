"""Try a narrower residual stream of a pre-norm transformer in fine-tuning, by one rotation for the whole stream.

    python -m benchmarks.residual_width --data-dir DIR --cache DIR      resumable: what is in the cache is not run again

A small GPT is trained on Tiny Shakespeare and fine-tuned on film reviews (SST-2, its sentences alone). After 5 % of the
fine-tuning the stream is rotated to the principal axes of what the norms read, and its last channels are cut
(residual_rotation.py).
Compared with the dense run, the library's `target=` at the same multiply-adds, both together, and dense runs with
fewer steps. Processor time is that of steps in turn, in one process, medians.
Holds: texts, runs, their table. Elsewhere: the rotation (residual_rotation.py), the network (paper.networks).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apoptosis import Apoptosis
from apoptosis.tools.recipes.networks import num_parameters
from benchmarks import shared
from benchmarks.paper.networks import GPT
from benchmarks.paper.summary import table as markdown
from benchmarks.paper.training import count_macs
from benchmarks.residual_rotation import (
    Batch,
    Run,
    loss_of,
    new_optimizer,
    principal_axes,
    random_axes,
    rotate,
    rotate_optimizer,
)

Draw = Callable[[int], Batch]
TURNS = 25  # steps of every network that are timed, in turn
WARM = 3  # of them that do not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """length: characters of an example. rows: examples of a batch. at: step of the cut. rated: batches that the axes
    are found on, and those that measured second moments are averaged over. held_out: examples."""

    width: int = 128
    heads: int = 4
    depth: int = 4
    hidden: int = 512
    length: int = 64
    rows: int = 16
    pretrain_steps: int = 1500
    pretrain_rate: float = 2e-3
    steps: int = 500
    rate: float = 3e-3
    at: int = 25
    rated: int = 8
    held_out: int = 1024


QUICK = Settings(width=16, heads=2, depth=2, hidden=32, length=16, rows=8, pretrain_steps=30, steps=60, at=3, rated=2,
                 held_out=32)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """keep: share of the stream's channels; None: not rotated. moments: what becomes of the optimizer's ("restart",
    "diagonal" or "measured"). at_once: cut before the first step, with the moments of the pretraining. by_chance: along
    axes drawn by chance. target: the method whose multiply-adds the library is told to reach. time_of: the method whose
    processor time a dense run takes. seeds: run for so many of them at most.
    """

    name: str
    keep: float | None = None
    moments: str = "restart"
    at_once: bool = False
    by_chance: bool = False
    target: str | None = None
    time_of: str | None = None
    seeds: int = 2


METHODS = (
    Method(name="dense"),
    Method(name="rotated, restart", keep=1.0),
    Method(name="rotated, diagonal", keep=1.0, moments="diagonal", seeds=1),
    Method(name="75 %, restart", keep=0.75),
    Method(name="50 %, restart", keep=0.5),
    Method(name="target as 75 %", target="75 %, restart"),
    Method(name="target as 50 %", target="50 %, restart"),
    Method(name="50 %, diagonal", keep=0.5, moments="diagonal"),
    Method(name="75 %, then target as 50 %", keep=0.75, target="50 %, restart"),
    Method(name="rotated, then target as 75 %", keep=1.0, target="75 %, restart"),
    Method(name="rotated, then target as 50 %", keep=1.0, target="50 %, restart"),
    Method(name="rotated by chance, restart", keep=1.0, by_chance=True),
    Method(name="50 %, measured", keep=0.5, moments="measured", seeds=1),
    Method(name="75 %, diagonal", keep=0.75, moments="diagonal", seeds=1),
    Method(name="50 % by chance, restart", keep=0.5, by_chance=True, seeds=1),
    Method(name="50 %, at once, restart", keep=0.5, at_once=True, seeds=1),
    Method(name="50 %, at once, diagonal", keep=0.5, moments="diagonal", at_once=True, seeds=1),
    Method(name="dense, time of 75 %", time_of="75 %, restart"),
    Method(name="dense, time of 50 %", time_of="50 %, restart"),
)


# ---------------------------------------------------------------------- texts and training


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Codes of the characters; vocabulary: how many there are."""

    old: Tensor
    new: Tensor
    held_out: Tensor
    vocabulary: int

    @staticmethod
    def read(folder: Path) -> Texts:
        plays = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        train, dev = (
            "\n".join(line.rpartition("\t")[0] for line in path.read_text(encoding="utf-8").splitlines())
            for path in (folder / "sst2" / "train.tsv", folder / "sst2" / "dev.tsv")
        )
        index = {character: i for i, character in enumerate(sorted(set(plays + train)))}
        old, new, held_out = (torch.tensor([index[c] for c in text if c in index]) for text in (plays, train, dev))
        return Texts(old=old[: int(0.9 * len(old))], new=new, held_out=held_out, vocabulary=len(index))


def draws(source: Tensor, settings: Settings, seed: int) -> Draw:
    """Return step -> batch of places by chance."""

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step + 10_000)
        starts = torch.randint(len(source) - settings.length - 1, (settings.rows,), generator=generator)
        found = source[starts[:, None] + torch.arange(settings.length + 1)]
        return found[:, :-1], found[:, 1:]

    return draw


def rate_at(step: int, steps: int, peak: float) -> float:
    """Rise over the first twentieth of the run, then fall to 0 on a straight line."""
    rise = max(1, round(0.05 * steps))
    return peak * min((step + 1) / rise, (steps - step) / (steps - rise + 1))


@torch.no_grad()
def held_out_loss(model: nn.Module, source: Tensor, settings: Settings) -> float:
    """Return the loss on the first examples of a text that no step sees, nats per character."""
    number = min(settings.held_out, (len(source) - 1) // settings.length)
    inputs, labels = (source[i : i + number * settings.length].view(number, -1) for i in (0, 1))
    losses = [
        loss_of(model, part).item() * len(part[0]) for part in zip(inputs.split(64), labels.split(64), strict=True)
    ]
    return sum(losses) / number


class Clock:
    """Processor seconds of training: all, and those of what acts on the network. after: called after every step."""

    def __init__(self) -> None:
        self.seconds = self.own_seconds = 0.0
        self.after: Callable[[], object] | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        begun = time.thread_time()
        yield
        taken = time.thread_time() - begun
        self.own_seconds += taken
        self.seconds += taken


def train(run: Run, draw: Draw, span: range, steps: int, peak: float, clock: Clock) -> None:
    """Train the steps of `span` of a run of `steps`."""
    model, optimizer = run
    model.train()
    for step in span:
        begun = time.thread_time()
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, peak)
        optimizer.zero_grad()
        loss_of(model, draw(step)).backward()
        optimizer.step()
        clock.seconds += time.thread_time() - begun
        if clock.after is not None:
            with clock.own():
                clock.after()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One seed's texts, pretrained network and cache."""

    settings: Settings
    texts: Texts
    seed: int
    cache: Path

    def pretrained(self) -> Run:
        """Return the trained GPT and its optimizer, from the cache if it is there."""
        s = self.settings
        path = self.cache / f"pretrained-{self.seed}.pt"
        torch.manual_seed(self.seed)
        model = GPT(self.texts.vocabulary, s.length, width=s.width, heads=s.heads, depth=s.depth, hidden=s.hidden)
        optimizer = new_optimizer(model, s.pretrain_rate)
        if path.exists():
            found = torch.load(path, weights_only=True)
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
            return model, optimizer
        draw = draws(self.texts.old, s, self.seed)
        train((model, optimizer), draw, range(s.pretrain_steps), s.pretrain_steps, s.pretrain_rate, Clock())
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        return model, optimizer

    @property
    def draw(self) -> Draw:
        return draws(self.texts.new, self.settings, 100 + self.seed)

    def macs(self, model: nn.Module) -> int:
        """Return the multiply-adds of an example."""
        return count_macs(model, self.draw(0)[0][:1])

    def held_out(self, model: nn.Module) -> float:
        return held_out_loss(model, self.texts.held_out, self.settings)

    def cut(self, run: Run, method: Method, at: int) -> Run:
        """Return rotated copies of network and optimizer, by the batches around step `at`."""
        s = self.settings
        assert method.keep is not None
        seen = [self.draw(step) for step in range(max(0, at - s.rated), max(at, s.rated))]
        keep = round(method.keep * s.width)
        if method.by_chance:
            axes = random_axes(s.width, keep, self.seed)
        else:
            axes = principal_axes(run[0], [inputs for inputs, _ in seen], keep)
        narrow, moves = rotate(run[0], axes)
        return narrow, rotate_optimizer(run, narrow, moves, method.moments, seen)

    def fine_tune(self, method: Method, steps: int, target: int | None) -> tuple[dict[str, Any], GPT]:
        """Return a run's record and its network. target: multiply-adds that the library is told to reach."""
        s, clock = self.settings, Clock()
        model, optimizer = self.pretrained()
        if not method.at_once or method.moments == "restart":
            optimizer = new_optimizer(model, s.rate)
        record: dict[str, Any] = {"loss_before": self.held_out(model)}
        first = 0
        if method.keep is not None:
            first = 0 if method.at_once else s.at
            train((model, optimizer), self.draw, range(first), steps, s.rate, clock)
            record["loss_uncut"] = self.held_out(model)
            with clock.own():
                model, optimizer = self.cut((model, optimizer), method, first)
            record["loss_cut"] = self.held_out(model)
        if target is not None:
            with clock.own():
                apo = Apoptosis(model, optimizer, self.draw(0)[0][:2], total_steps=steps - first, pretrained=True,
                                target={"macs": target / self.macs(model)}, seed=self.seed)  # fmt: skip
            clock.after = apo.step
        train((model, optimizer), self.draw, range(first, steps), steps, s.rate, clock)
        record |= {"loss": self.held_out(model), "macs": self.macs(model), "parameters": num_parameters(model)}
        return record | {"steps": steps, "seconds": clock.seconds, "own_seconds": clock.own_seconds}, model

    # ------------------------------------------------------------------ all runs of a seed

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the records of all methods by name; those in the cache are not run again."""
        found: dict[str, dict[str, Any]] = {}
        methods = [method for method in METHODS if self.seed < method.seeds]
        for method in (m for m in methods if m.time_of is None):
            target = None if method.target is None else found[method.target]["macs"]
            found[method.name] = self.cached(method, self.settings.steps, target)
        seconds = self.step_seconds(list(found))
        for name, value in seconds.items():
            found[name]["step_seconds"] = value
        for method in (m for m in methods if m.time_of is not None):
            steps = self.fewer_steps(found["dense"], found[str(method.time_of)])
            found[method.name] = self.cached(method, steps, None) | {"step_seconds": seconds["dense"]}
        return found

    def fewer_steps(self, dense: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """Return the steps of a dense run that take as long as another run."""
        s, step = self.settings, dense["step_seconds"]
        taken = other["own_seconds"] + s.at * step + (s.steps - s.at) * other["step_seconds"]
        return min(s.steps, max(s.at + 1, round(taken / step)))

    def cached(self, method: Method, steps: int, target: int | None) -> dict[str, Any]:
        """Return a run's record, from the cache if it is there."""
        record, network = self.place(method.name, "json"), self.place(method.name, "pt")
        if not record.exists():
            found, model = self.fine_tune(method, steps, target)
            torch.save(model, network)
            record.write_text(json.dumps(found), encoding="utf-8")
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"seed {self.seed}, {method.name}: {shown}", flush=True)
        read: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return read

    def step_seconds(self, names: Sequence[str]) -> dict[str, float]:
        """Return the median processor seconds of a training step of every network, in turn."""
        path = self.place("step seconds", "json")
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if set(found) != set(names):
            networks = {name: torch.load(self.place(name, "pt"), weights_only=False) for name in names}
            runs = {name: (model, new_optimizer(model, 0.0)) for name, model in networks.items()}
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(WARM + TURNS):
                for name, run in runs.items():
                    begun = time.thread_time()
                    train(run, self.draw, range(turn, turn + 1), WARM + TURNS, 0.0, Clock())
                    times[name].append(time.thread_time() - begun)
            found = {name: statistics.median(own[WARM:]) for name, own in times.items()}
            path.write_text(json.dumps(found), encoding="utf-8")
        return found

    def place(self, name: str, suffix: str) -> Path:
        plain = "".join(c if c.isalnum() else "-" for c in name)
        return self.cache / f"seed{self.seed}-{plain}.{suffix}"


# ---------------------------------------------------------------------- the page


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of docs/research.md; times are means over seeds, losses those of every seed."""
    result = results.get("residual-width")
    if result is None:
        return "No results are committed yet; `python -m benchmarks.residual_width` makes them."
    runs = result["runs"]
    rows = []
    for name in runs[0]["methods"]:
        pairs = [(run["methods"][name], run["methods"]["dense"]) for run in runs if name in run["methods"]]
        own = [record for record, _ in pairs]
        share, step = (statistics.mean(a[key] / b[key] for a, b in pairs) for key in ("macs", "step_seconds"))
        steps, seconds = (statistics.mean(record[key] for record in own) for key in ("steps", "own_seconds"))
        at_cut = ", ".join(f"{r['loss_cut'] - r['loss_uncut']:+.3f}" for r in own if "loss_cut" in r)
        apart = ", ".join(f"{a['loss'] - b['loss']:+.4f}" for a, b in pairs)
        loss = ", ".join(f"{record['loss']:.4f}" for record in own)
        rows.append((name, f"{steps:.0f}", f"{share:.2f}", f"{step:.2f}", f"{seconds:.1f} s" if seconds else "", at_cut,
                     loss, "" if name == "dense" else apart))  # fmt: skip
    head = ("run", "steps", "multiply-adds", "processor time of a step", "cut or events", "loss at the cut",
            "loss at the end, by seed", "against dense")  # fmt: skip
    return markdown(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = shared.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds tinyshakespeare/ and sst2/")
    parser.add_argument("--cache", type=Path, default=Path("runs/residual-width"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny network; its figures say nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = QUICK if given.quick else Settings()
    given.cache.mkdir(parents=True, exist_ok=True)
    texts = Texts.read(given.data_dir)
    runs = [
        {"seed": seed, "methods": Bench(settings=settings, texts=texts, seed=seed, cache=given.cache).records()}
        for seed in range(given.seeds)
    ]
    found = shared.result("residual-width", seed=0, settings=asdict(settings), runs=runs)
    print(table({"residual-width": found}))
    if given.json is not None:
        shared.write(given.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
