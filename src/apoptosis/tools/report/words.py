"""Numbers and names as words for plots and page.

Holds: formatting. Elsewhere: layout.
"""

from __future__ import annotations

from apoptosis.display.text import plain

METRIC_WORDS = {"accuracy": "accuracy", "auc": "AUC", "r2": "R²"}


def rounded(value: float) -> str:
    """Return a whole number grouped by thousands, any other to three significant digits; the log has all of them.

    Example:
        >>> rounded(2913290.0), rounded(0.98651), rounded(1.5e-7), rounded(1234.5)
        ('2,913,290', '0.987', '1.5e-07', '1,234')
    """
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else plain(value)


def times(ratio: float) -> str:
    """Return a ratio as "2.41x".

    Example:
        >>> times(2.414), times(31.2)
        ('2.41x', '31.2x')
    """
    return f"{ratio:.3g}x"


def metric_value(name: str, value: float) -> str:
    """Return an accuracy in per cent, anything else with four decimals: one of ten thousand examples shows.

    Example:
        >>> metric_value("accuracy", 0.98651), metric_value("auc", 0.78125)
        ('98.65 %', '0.7812')
    """
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
