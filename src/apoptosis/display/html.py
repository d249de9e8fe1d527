"""HTML for notebooks: small tables with bars, complete in themselves.

Holds: markup with inline styles, which any notebook shows; colours are half transparent or inherited, so that both dark
and light ones are readable; everything that is text is escaped. Elsewhere: what a record shows (its own module).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

KEPT, GONE, LINE = "#3d8fd1", "rgba(128,128,128,.28)", "rgba(128,128,128,.35)"
_CELL = f"padding:2px 12px 2px 0;border:0;border-bottom:1px solid {LINE};vertical-align:middle;background:none"
_MUTED = "opacity:.75"
#: As `html.escape` does, whose module brings every name of HTML along.
_ENTITIES = (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#x27;"), ("\n", "<br>"))
_MOST = 50  # rows that are shown


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return a value as markup: escaped, unless it is markup; lines stay lines.

    Example:
        >>> text("a<b"), text(Html("<b>x</b>"))
        ('a&lt;b', '<b>x</b>')
    """
    if isinstance(value, Html):
        return value
    shown = str(value).encode(errors="replace").decode()  # half characters (surrogates) have no place on a page
    for plain, entity in _ENTITIES:
        shown = shown.replace(plain, entity)
    return Html(shown)


def bar(part: float, whole: float) -> Html:
    """Return a bar of what is left of a whole; the numbers stand in its alternative text."""
    left = min(100.0, max(0.0, 100.0 * part / whole)) if whole > 0 else 0.0
    if 0 < part < whole:
        left = min(max(left, 2.0), 98.0)
    label = f"{left:.0f} % kept"
    return Html(
        f'<div role="img" aria-label="{label}" title="{label}" style="width:140px;height:10px;border-radius:3px;'
        f'background:{GONE};overflow:hidden"><div style="width:{left:.1f}%;height:10px;background:{KEPT}"></div></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numeric: Iterable[int] = ()) -> Html:
    """Return a table. numeric: columns that align right; beyond fifty rows the rest is counted."""
    right = frozenset(numeric)

    def cells(tag: str, row: Sequence[object], more: str = "") -> str:
        styles = [f"{_CELL};text-align:{'right' if i in right else 'left'}{more}" for i in range(len(row))]
        return "".join(f'<{tag} style="{s}">{text(v)}</{tag}>' for s, v in zip(styles, row, strict=True))

    body = "".join(f'<tr style="background:none">{cells("td", row)}</tr>' for row in rows[:_MOST])
    if len(rows) > _MOST:
        body += (
            f'<tr><td style="{_CELL};text-align:left" colspan="{len(head)}">and {len(rows) - _MOST:,} more</td></tr>'
        )
    top = f"<thead><tr>{cells('th', head, f';font-weight:600;{_MUTED}')}</tr></thead>" if any(head) else ""
    style = (
        "border-collapse:collapse;border:0;margin:6px 0;font-size:13px;font-variant-numeric:tabular-nums;color:inherit"
    )
    return Html(f'<div style="overflow-x:auto"><table style="{style}">{top}<tbody>{body}</tbody></table></div>')


def line(value: object, *, muted: bool = False) -> Html:
    """Return a paragraph of one line or a few."""
    return Html(f'<div style="margin:2px 0;max-width:100ch{f";{_MUTED}" if muted else ""}">{text(value)}</div>')


def folded(summary: str, content: Html) -> Html:
    """Return what opens on a click."""
    return Html(
        f'<details style="margin:4px 0"><summary style="cursor:pointer">{text(summary)}</summary>{content}</details>'
    )


def card(title: object, *parts: Html) -> str:
    """Return a whole result: its title, and what it consists of."""
    head = f'<div style="font-weight:600;margin:2px 0">{text(title)}</div>'
    style = (
        "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:13px;line-height:1.45;color:inherit"
    )
    return f'<div class="apoptosis" style="{style}">{head}{"".join(parts)}</div>'


def widths_table(widths: Sequence[tuple[str, int, int]], *more: tuple[str, Sequence[object]]) -> Html:
    """Return a table of groups: name, channels before and after, a bar. more: further columns (head, cells)."""
    rows = [
        (name, f"{before:,}", f"{after:,}", bar(after, before), *(column[i] for _, column in more))
        for i, (name, before, after) in enumerate(widths)
    ]
    return table(("group", "before", "after", "kept", *(head for head, _ in more)), rows, numeric=(1, 2))
