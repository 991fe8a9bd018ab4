"""Charts of the page: effects of a cue and of latents, and what repairs trade."""

import math
import textwrap
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clipattr.report.drawing import STAND_IN, MethodStyle, Point, forest, svg
from clipattr.report.formatting import is_defined
from clipattr.report.shortcuts.claims import headline_effect
from clipattr.report.shortcuts.content import (
    AmplifiedLatent,
    CueResult,
    Curve,
    CurvePoint,
    EffectRow,
)

AXIS = "effect (standard deviations)"
_MOST_ROWS = 12
"""of a chart of effects; the table has them all"""
_LABEL_WIDTH = 26
_LABEL_LINES = 3

# One line, dash and marker for each repair; colours are those of the page's methods.
CURVE_STYLES = [
    MethodStyle("attribution-patching", "solid", 2.0),
    MethodStyle("logit-lens", "dashed", 2.0),
    MethodStyle("integrated-gradients", "dotted", 2.4),
    MethodStyle("energy", "solid", 1.4),
    MethodStyle("act-times-logit-lens", "dashed", 1.4),
    MethodStyle("random", "dotted", 1.6),
]
_MARKERS = "osD^vP"


def effects_chart(cue: CueResult, number: int) -> Markup:
    """Text head and probe, a row for each effect; placebos are grey."""
    rows = [(_label(row, cue), _points(row)) for row in charted_effects(cue)]
    return forest(rows, AXIS, 0.0, f"cue-{number}-effects")


def charted_effects(cue: CueResult) -> list[EffectRow]:
    """All effects, or those of the scores with the largest excess where they are too many."""
    if len(cue.effects) <= _MOST_ROWS:
        return cue.effects
    head = headline_effect(cue) or cue.effects[0]
    ranked = sorted(
        (row for row in cue.effects if row.measure == head.measure),
        key=lambda row: -row.excess.mean if is_defined(row.excess) else math.inf,
    )
    n_scores = max(1, _MOST_ROWS // len({row.measure for row in cue.effects}))
    scores = {row.score for row in ranked[:n_scores]}
    return [row for row in cue.effects if row.score in scores][:_MOST_ROWS]


def _label(row: EffectRow, cue: CueResult) -> str:
    """The measure, with the score where there is more than one."""
    several = len({each.score for each in cue.effects}) > 1
    return wrapped(f"{row.measure}: {row.score}" if several else row.measure)


def _points(row: EffectRow) -> list[Point]:
    roles = ("muted", "muted") if row.is_placebo else ("text-head", "probe")
    return [Point(row.text, roles[0], "o"), Point(row.probe, roles[1], "D")]


def wrapped(text: str) -> str:
    """At most three short lines: a label that is too long leaves no room for what it labels."""
    lines = textwrap.wrap(text, _LABEL_WIDTH, max_lines=_LABEL_LINES, placeholder=" ...")
    return "\n".join(lines)


def latents_chart(latents: Sequence[AmplifiedLatent]) -> Markup:
    """Effects of taking out the first amplified latents; the score where there is more than one."""
    several = len({row.score for row in latents}) > 1
    rows = [
        (
            wrapped(f"latent {row.latent}: {row.score}" if several else f"latent {row.latent}"),
            [Point(row.text, "text-head", "o"), Point(row.probe, "probe", "D")],
        )
        for row in latents[:_MOST_ROWS]
    ]
    return forest(rows, AXIS, 0.0, "amplified-latents")


def drawn_curves(curves: Sequence[Curve]) -> list[tuple[Curve, MethodStyle, list[CurvePoint]]]:
    """Each curve with its style and those of its points that are numbers, if there are any."""
    drawn = []
    for index, curve in enumerate(curves):
        points = [each for each in curve.points if math.isfinite(each.average + each.worst_group)]
        if points:
            drawn.append((curve, CURVE_STYLES[index % len(CURVE_STYLES)], points))
    return drawn


def trade_chart(curves: Sequence[Curve], number: int) -> Markup:
    """Average accuracy against that of the worst group, a line for each repair from its start."""
    drawn = drawn_curves(curves)

    def draw(axes: Axes) -> None:
        for index, (_, style, points) in enumerate(drawn):
            color = STAND_IN[style.role]
            places = [(point.average, point.worst_group) for point in points]
            x, y = zip(*places, strict=True)
            axes.plot(x, y, color=color, linestyle=style.dash, linewidth=style.width)
            marker = _MARKERS[index % len(_MARKERS)]
            axes.plot(x[:-1], y[:-1], ".", color=color, markersize=5)
            axes.plot(x[-1:], y[-1:], marker, color=color, markersize=7)
        _mark_start(axes, [point for _, _, points in drawn for point in points])
        axes.set_xlabel("average accuracy (%)")
        axes.set_ylabel("accuracy on the worst group (%)")
        _in_per_cent(axes)
        axes.grid()
        axes.margins(0.08)

    names = ", ".join(wrapped(curve.name).replace("\n", " ") for curve, _, _ in drawn)
    return svg(draw, 3.2, f"cue-{number}-trade", f"Average against worst group, by: {names}")


def _mark_start(axes: Axes, points: Sequence[CurvePoint]) -> None:
    """A ring where nothing is repaired yet; that is one place for all curves."""
    start = next((point for point in points if point.strength == 0), None)
    if start is None:
        return
    style = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.8}
    ink = STAND_IN["ink"]
    axes.plot([start.average], [start.worst_group], "o", markeredgecolor=ink, **style)


def _in_per_cent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
