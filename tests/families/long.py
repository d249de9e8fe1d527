"""Many random networks under both oracles: `python -m families.long --networks 2000` with src and tests on the path.

Every seed is one network. Failures are told by message; one of each is cut down to a small network, whose source is
printed: it goes into CASES of regressions.py.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable

from families.generator import Network, generate, numbers, reduce
from families.regressions import OPEN
from families.trial import InvalidNetworkError, check

Check = Callable[[Network, int], None]


def message(network: Network, seed: int, asked: Check) -> str:
    """Why the network fails, "" when it holds or cannot be asked."""
    try:
        asked(network, seed)
    except InvalidNetworkError:
        return ""
    except AssertionError as error:
        return str(error) or "AssertionError"
    return ""


def kind_of(text: str) -> str:
    """A message without names and numbers."""
    return re.sub(r"[\[{(][-\d, .e]*[\])}]|'[^']*'|\d[\d.e-]*", "#", text.partition("\n")[0])[:160]


def run(seeds: Iterable[int], asked: Check = check, budget: int = 150, known: Iterable[str] = ()) -> int:
    """Ask every seed's network; returns the number of kinds of failures that are not known."""
    start, total, open_ones, found = time.perf_counter(), 0, 0, dict[str, list[int]]()
    patterns = tuple(known)
    for seed in seeds:
        total += 1
        text = message(generate(numbers(seed)), seed, asked)
        if text and any(re.search(pattern, text) for pattern in patterns):
            open_ones += 1
        elif text:
            found.setdefault(kind_of(text), []).append(seed)
    for kind, failing in sorted(found.items(), key=lambda item: -len(item[1])):
        seed = failing[0]

        def fails(choices: list[int], kind: str = kind, seed: int = seed) -> bool:
            return kind_of(message(generate(choices), seed, asked)) == kind

        small = generate(reduce(numbers(seed), fails, budget))
        text = message(small, seed, asked)
        sys.stdout.write(f"---- {len(failing)} networks, seeds {failing[:8]}: {text}\n")
        sys.stdout.write(f"given {small.given}, literal {small.literal}, check(network, {seed})\n{small.source}\n")
    failures = sum(map(len, found.values()))
    seconds = time.perf_counter() - start
    sys.stdout.write(
        f"{total} networks, {failures} fail in {len(found)} ways, {open_ones} as open cases do, {seconds:.0f} s\n"
    )
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--budget", type=int, default=150, help="networks tried to cut a failure down")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.exit(min(1, run(range(options.first, options.first + options.networks), budget=options.budget, known=OPEN)))


if __name__ == "__main__":
    main()
