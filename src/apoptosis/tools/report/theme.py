"""Looks: the palette shared by plots and page.

Holds: colours. Elsewhere: the style sheet (templates/style.css), any content. Colours follow Okabe and Ito's set, which
people with colour-vision deficiencies can tell apart; no meaning rests on colour alone (markers and dashes differ too).
"""

from __future__ import annotations

INK, MUTED, GRID = "#1f2329", "#5a626d", "#dde1e6"
DENSE_COLOUR, APOPTOSIS_COLOUR = "#c2500a", "#0067a5"
SERIES = ("#0067a5", "#c2500a", "#00805f", "#a85c8e", "#7a6a00", "#2f8fc9", "#6b4fa0", "#4d4d4d")

#: Colour in a plot -> name of the CSS variable that replaces it in the page, light value, dark value.
VARIABLES: dict[str, tuple[str, str, str]] = {
    INK: ("ink", INK, "#e8eaed"),
    MUTED: ("muted", MUTED, "#a4acb8"),
    GRID: ("grid", GRID, "#353b45"),
    SERIES[0]: ("s0", SERIES[0], "#5bb3f0"),
    SERIES[1]: ("s1", SERIES[1], "#f0924e"),
    SERIES[2]: ("s2", SERIES[2], "#3fc79f"),
    SERIES[3]: ("s3", SERIES[3], "#dd94c3"),
    SERIES[4]: ("s4", SERIES[4], "#d6c34a"),
    SERIES[5]: ("s5", SERIES[5], "#9ad4f7"),
    SERIES[6]: ("s6", SERIES[6], "#b9a3ea"),
    SERIES[7]: ("s7", SERIES[7], "#c4c4c4"),
}
