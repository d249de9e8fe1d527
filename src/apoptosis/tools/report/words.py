"""Numbers and names as words for plots and page.

Holds: formatting. Elsewhere: layout.
"""

from __future__ import annotations

METRIC_WORDS = {"accuracy": "accuracy", "auc": "AUC", "r2": "R²"}


def short_number(value: float) -> str:
    """Four significant digits with a magnitude letter.

    Example:
        >>> [short_number(v) for v in (0, 0.5, 12345, 2.9e6, 3e9, 0.00012, -7)]
        ['0', '0.5', '12.35k', '2.9M', '3G', '0.00012', '-7']
    """
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


def exact_number(value: float) -> str:
    """Return a number as the log has it: whole ones grouped by thousands, others to six significant digits.

    Example:
        >>> exact_number(2913290.0), exact_number(0.98651), exact_number(1.5e-7)
        ('2,913,290', '0.98651', '1.5e-07')
    """
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def times(ratio: float) -> str:
    """Return a ratio as "2.41x".

    Example:
        >>> times(2.414), times(31.2)
        ('2.41x', '31.2x')
    """
    return f"{ratio:.3g}x"


def metric_value(name: str, value: float) -> str:
    """Return an accuracy in per cent, anything else with four decimals.

    Example:
        >>> metric_value("accuracy", 0.98651), metric_value("auc", 0.78125)
        ('98.65 %', '0.7812')
    """
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
