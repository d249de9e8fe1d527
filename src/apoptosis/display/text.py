"""Numbers, names and bars as plain text.

Holds: formatting in ASCII, so that every terminal and log file can show it. Elsewhere: markup (html.py).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_LABEL = 40


def short_number(value: float, digits: int = 3) -> str:
    """Three significant digits with a magnitude letter; whole numbers below 10,000 in full.

    Example:
        >>> [short_number(v) for v in (0, 0.5, 12345, 2.9e6, 3e9, 0.00012, -7, 1024)]
        ['0', '0.5', '12.3k', '2.9M', '3G', '0.00012', '-7', '1024']
    """
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{plain(value / (1e3 if letter == 'k' else limit), digits)}{letter}"
    return f"{int(value)}" if float(value).is_integer() else plain(value, digits)


def plain(value: float, digits: int = 3) -> str:
    """Return a number to so many significant digits, without an exponent where that is readable.

    Example:
        >>> plain(0.98651), plain(1234.5), plain(1.5e-7), plain(2)
        ('0.987', '1234', '1.5e-07', '2')
    """
    if 10**digits <= abs(value) < 1e15:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in per cent.

    Example:
        >>> share(373_650, 483_186), share(1, 3000), share(1, 0)
        ('77.3 %', '0.0333 %', '-')
    """
    return f"{plain(100 * part / whole)} %" if whole > 0 else "-"


def bar(part: float, whole: float, length: int = 20) -> str:
    """Return a bar that is full where nothing is gone; what is left is never shown as nothing, nor as all.

    Example:
        >>> bar(1, 2, 8), bar(8, 8, 8), bar(1, 1000, 8), bar(999, 1000, 8), bar(0, 8, 8)
        ('####....', '########', '#.......', '#######.', '........')
    """
    filled = round(length * part / whole) if whole > 0 else 0
    if 0 < part < whole:
        filled = min(max(filled, 1), length - 1)
    return "#" * filled + "." * (length - filled)


def shortened(name: str, most: int) -> str:
    """Return a name in at most so many characters, its end, by which names differ.

    Example:
        >>> shortened("encoder.layer.11.output", 12), shortened("fc", 12)
        ('...11.output', 'fc')
    """
    return name if len(name) <= most else "..." + name[len(name) - most + 3 :]


def columns(rows: Sequence[Sequence[str]], numeric: frozenset[int] = frozenset()) -> list[str]:
    """Return rows as lines whose columns are aligned; numeric: columns that align right.

    Example:
        >>> columns([("fc1", "8"), ("a", "16")], frozenset({1}))
        ['fc1   8', 'a    16']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    sides = [">" if i in numeric else "<" for i in range(len(widths))]
    return ["  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def shown_name(name: str) -> str:
    r"""Return a name as a plot can show it: in one line, not too long, without characters that are none.

    Example:
        >>> shown_name("fc"), shown_name("_stem"), shown_name("two\nlines"), len(shown_name("x" * 500))
        ('fc', ' _stem', 'two lines', 40)
    """
    import unicodedata  # which nothing but plots needs

    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cs", "Cn", "Co") else c for c in name)
    shown = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in shown).split())
    shown = shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 3]}..."
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels with an underscore out
