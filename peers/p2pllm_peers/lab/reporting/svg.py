"""SVG for a page: text stays text, and colours are the page's own, so that they follow its light or dark.

What lives here: the style of all charts, and turning a figure into an svg element. What does not: the charts
(`plots`), and the colours themselves (the page's style sheet). matplotlib is only there with the extra `lab`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = [f"#0102{number:02x}" for number in range(7)]
"""Stand-ins, as matplotlib knows no variables of CSS; `inline` puts these in their place."""
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(SERIES, 1)
}
BLUE, VERMILION, GREEN, PINK, SKY, AMBER, GREY = SERIES
WIDE, NARROW = 860.0, 360.0
"""Widths that charts are drawn for, in units that are about one pixel of the page each."""
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "p2pllm",
    "font.size": 13,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that every machine measures text alike
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def inline(figure: Figure, prefix: str) -> str:
    """The figure as an svg element without a size of its own, whose ids are unique in a page."""
    FigureCanvasSVG(figure)  # which measures text as it will be drawn
    layout, file = figure.get_layout_engine(), io.StringIO()
    if layout is not None:  # savefig would draw everything once more for it
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    needless = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
    svg = needless.sub("", text[text.index("<svg") :])
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)  # hundredths of a pixel are enough
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return re.sub("|".join(VARIABLES), lambda found: f"var(--{VARIABLES[found.group()]})", svg)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart of so many units (see WIDE) on the page's own background."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def legend_above(figure: Figure, handles: Sequence[Any], width: float) -> None:
    """A legend outside the axes, which covers no data; `width` is that of the figure."""
    columns = len(handles) if width == WIDE else 3
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.2)
