"""Colours of a study's figures and page, light and dark; curves are after Okabe and Ito, for the colour-blind."""

COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"),
    "surface": ("#ffffff", "#0d1117"),
    "run": ("#0072b2", "#58b0ec"),
    "alarm": ("#c0370a", "#ff8a5c"),
    "curve-1": ("#00729f", "#56b4e9"),
    "curve-2": ("#b85c00", "#e69f00"),
    "curve-3": ("#00805c", "#2fc79a"),
    "curve-4": ("#a8437f", "#e08fbe"),
    "curve-5": ("#6b6a00", "#d6cc3a"),
    "curve-6": ("#5b52c6", "#a79cff"),
}
"""By name: what it is on white, and on a dark page. No two on white are the same, so that each can be found again."""

INK, MUTED, LINE, SURFACE, RUN, ALARM, *CURVES = (light for light, _ in COLOURS.values())
