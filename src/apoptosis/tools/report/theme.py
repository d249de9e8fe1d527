"""Looks: the palette shared by plots and page, and the page's style sheet.

Holds: colours and CSS. Elsewhere: any content. Colours follow Okabe and Ito's set, which people with
colour-vision deficiencies can tell apart; no meaning rests on colour alone (markers and dashes differ too).
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


def style_sheet() -> str:
    """Return the page's CSS: light and dark by the reader's setting, one column on small screens, fit for print."""
    light = "".join(f"--{name}:{value};" for name, value, _ in VARIABLES.values())
    dark = "".join(f"--{name}:{value};" for name, _, value in VARIABLES.values())
    return (
        f":root{{color-scheme:light dark;--paper:#ffffff;--card:#f7f8fa;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{--paper:#16191e;--card:#1d2128;{dark}}}}}" + _RULES
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:48px 0 12px}
p{margin:0 0 12px;max-width:75ch}
.lead{font-size:1.05rem}
.muted,figcaption,caption,footer{color:var(--muted)}
dl.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(155px,1fr));gap:12px;margin:24px 0 0}
dl.tiles>div{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px}
dl.tiles dt{color:var(--muted);font-size:.85rem}
dl.tiles dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
dl.tiles dd small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
figure{margin:0 0 8px;background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:16px}
figure svg{display:block;width:100%;min-width:600px;height:auto;max-height:440px}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,"DejaVu Sans",sans-serif!important}
figcaption{font-size:.9rem;margin-top:8px}
.missing{background:var(--card);border:1px dashed var(--grid);border-radius:8px;padding:16px;color:var(--muted);
 max-width:none}
.scroll{overflow-x:auto}
.scroll:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
.scroll{margin:0 0 20px}
figure .scroll{margin:0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:50%}
caption{text-align:left;padding:0 0 8px;font-size:.9rem}
th,td{text-align:left;padding:6px 16px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
td.num,th.num{text-align:right}
thead th{color:var(--muted);font-weight:600;white-space:nowrap}
td.long{min-width:28ch;overflow-wrap:anywhere}
code,pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:16px;overflow-x:auto;margin:0}
details{margin:0 0 12px}
summary{cursor:pointer;padding:4px 0}
footer{padding-top:32px;padding-bottom:48px;font-size:.85rem}
@media print{body{background:#fff}figure,dl.tiles>div,pre{break-inside:avoid}}
"""
