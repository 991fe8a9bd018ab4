"""How the page draws: styles of the methods, points with intervals, figures as inline SVG.

Colours leave here as CSS variables (`var(--ink)` and so on), so one figure is readable on a light
and on a dark page; their values stand in templates/style.css. No pyplot: no global figures.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from clipattr.metrics.intervals import Interval
from clipattr.report.formatting import NOT_DEFINED


class MethodStyle(NamedTuple):
    """How a method is drawn: the CSS variable of its colour, its dash and its line width."""

    role: str
    dash: Literal["solid", "dashed", "dotted", "dashdot"]
    width: float


METHOD_STYLES = {
    "attribution_patching": MethodStyle("attribution-patching", "solid", 3.2),
    "logit_lens": MethodStyle("logit-lens", "solid", 3.2),
    "exact": MethodStyle("ink", "dashed", 1.3),
    "integrated_gradients": MethodStyle("integrated-gradients", "dotted", 1.6),
    "act_times_logit_lens": MethodStyle("act-times-logit-lens", "dashdot", 1.3),
    "energy": MethodStyle("energy", "dashed", 1.2),
    "random": MethodStyle("random", "solid", 1.1),
}
_OTHER_METHOD = MethodStyle("muted", "dotted", 1.2)

_ROLES = ["ink", "muted", "line", "text-head", "probe"]
_ROLES += sorted({style.role for style in METHOD_STYLES.values()} - set(_ROLES))
# Colours that nobody would draw with: each stands for a CSS variable until the SVG is written.
STAND_IN = {role: f"#0102{index + 1:02x}" for index, role in enumerate(_ROLES)}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipattr",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_IN["line"],
    "axes.labelcolor": STAND_IN["muted"],
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a label with dollar signs is text, not TeX
    "xtick.color": STAND_IN["line"],
    "ytick.color": STAND_IN["line"],
    "xtick.labelcolor": STAND_IN["muted"],
    "ytick.labelcolor": STAND_IN["muted"],
    "grid.color": STAND_IN["line"],
    "grid.linewidth": 0.7,
    "text.color": STAND_IN["ink"],
    # Simplified, lines without length are dropped, and with them the dots of `draw_dots`.
    "path.simplify": False,
}


class Point(NamedTuple):
    """A mean with its interval, drawn in the colour of a role."""

    interval: Interval
    role: str
    marker: str


def method_style(name: str) -> MethodStyle:
    """The style of a method; one that is not in the palette is drawn muted and dotted."""
    return METHOD_STYLES.get(name, _OTHER_METHOD)


def forest(
    rows: Sequence[tuple[str, Sequence[Point]]], axis_label: str, reference: float | None, name: str
) -> Markup:
    """Points with intervals, one row per label, from top to bottom."""

    def draw(axes: Axes) -> None:
        if reference is not None:
            axes.axvline(reference, color=STAND_IN["muted"], linewidth=1.0)
        for row, (_, points) in enumerate(rows):
            for index, point in enumerate(points):
                _draw_point(axes, point, row + 0.26 * (index - (len(points) - 1) / 2))
        name_rows(axes, [label for label, _ in rows])
        axes.set_xlabel(axis_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")

    per_row = 0.34 if all(len(points) == 1 for _, points in rows) else 0.62
    labels = ", ".join(label.replace("\n", " ") for label, _ in rows)
    return svg(draw, 0.7 + per_row * len(rows), name, f"{axis_label}, for: {labels}")


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Words instead of numbers on the vertical axis, the first one on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=STAND_IN["ink"])
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)


def _draw_point(axes: Axes, point: Point, height: float) -> None:
    """One mean and its interval; a mean that is not finite is said in words, not left out."""
    color = STAND_IN[point.role]
    mean, low, high = point.interval
    if not math.isfinite(mean):
        middle = axes.get_yaxis_transform()
        axes.text(0.02, height, NOT_DEFINED, color=color, va="center", transform=middle)
        return
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [height, height], color=color, linewidth=2, alpha=0.75)
    axes.plot([mean], [height], color=color, marker=point.marker, markersize=6)


def draw_dots(axes: Axes, x: Sequence[float], y: Sequence[float], role: str) -> None:
    """Many dots in one path, of lines without length with round ends: an eighth of the bytes."""
    places = [place for place in zip(x, y, strict=True) for _ in range(2)]
    path = Path(places, [Path.MOVETO, Path.LINETO] * len(x))
    dots = PathPatch(path, fill=False, edgecolor=STAND_IN[role], linewidth=2.8, capstyle="round")
    dots.set(alpha=0.7, zorder=3)  # above the grid
    axes.add_patch(dots)


def svg(draw: Callable[[Axes], None], height: float, name: str, description: str) -> Markup:
    """Draw on fresh axes and return an SVG element that scales with the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        draw(figure.add_subplot())
        # Without these four the file carries a date and links to vocabularies on the web.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    # Ids must be unique on the page, and matplotlib starts every figure with the same ones.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    # A hundredth of a point cannot be seen, and the rest of the digits is a third of the page.
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    for role, color in STAND_IN.items():
        text = text.replace(color, f"var(--{role})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    head = f'<svg class="chart" role="img" aria-label="{escape(description)}" {view_box.group()}>'
    return Markup(head + text[text.index(">") + 1 :])
