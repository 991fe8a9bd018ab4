"""Charts of the page's tables: curves, columns of the faithfulness table, cues, ranks."""

import math
from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clipattr.metrics.intervals import Interval
from clipattr.report.claims import lowers
from clipattr.report.content import CueResult, MethodResult, ScorecardRow
from clipattr.report.drawing import STAND_IN, Point, forest, method_style, name_rows, svg

# Of a normal distribution, within which 95 % lie.
_Z = 1.96


def curves_chart(
    methods: Sequence[MethodResult], which: Literal["deletion", "insertion"]
) -> Markup:
    """Mean score against the number of latents deleted or inserted, one line per method."""

    def draw(axes: Axes) -> None:
        # Thick lines first, so that a thin one which coincides stays visible on top.
        for method in sorted(methods, key=lambda one: -method_style(one.name).width):
            curve: list[float] = getattr(method, f"{which}_curve")
            errors: list[float] = getattr(method, f"{which}_error")
            style = method_style(method.name)
            axes.plot(
                range(len(curve)),
                [value if math.isfinite(value) else math.nan for value in curve],
                color=STAND_IN[style.role],
                linestyle=style.dash,
                linewidth=style.width,
                solid_capstyle="round",
            )
            _draw_band(axes, curve, errors, STAND_IN[style.role])
        axes.set_xlabel("latents deleted" if which == "deletion" else "latents inserted")
        axes.set_ylabel("mean score")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        axes.margins(x=0.02)

    names = ", ".join(method.label for method in methods)
    return svg(draw, 2.9, f"{which}-curves", f"{which.title()} curves of: {names}")


def _draw_band(axes: Axes, curve: list[float], errors: list[float], color: str) -> None:
    """Within it lies the mean with a probability of 95 %, for each step alone."""
    bounds = [
        (mean - _Z * error, mean + _Z * error) if math.isfinite(mean + error) else (math.nan,) * 2
        for mean, error in zip(curve, errors, strict=True)
    ]
    low, high = zip(*bounds, strict=True)
    axes.fill_between(range(len(curve)), low, high, color=color, alpha=0.2, linewidth=0)


def method_chart(methods: Sequence[MethodResult], column: str, axis_label: str) -> Markup:
    """One column of the faithfulness table with its intervals, one row per method."""
    rows = [(method.label, [_point(method, getattr(method, column))]) for method in methods]
    return forest(rows, axis_label, None, f"methods-{column.replace('_', '-')}")


def difference_chart(methods: Sequence[MethodResult], column: str, axis_label: str) -> Markup:
    """The same minus that of logit lens, images paired."""
    rows = [
        (method.label, [_point(method, method.minus_logit_lens[column])])
        for method in methods
        if method.minus_logit_lens
    ]
    return forest(rows, axis_label, 0.0, f"difference-{column.replace('_', '-')}")


def _point(method: MethodResult, interval: Interval) -> Point:
    return Point(interval, method_style(method.name).role, "o")


def cue_chart(cues: Sequence[CueResult]) -> Markup:
    """Effect of each cue on the text head and on the probe, with intervals."""
    rows = [
        (
            f"{cue.cue}\n({'planted' if cue.planted else 'control'})",
            [Point(cue.effect_text, "text-head", "o"), Point(cue.effect_probe, "probe", "D")],
        )
        for cue in cues
    ]
    return forest(rows, "change of the score (standard deviations)", 0.0, "cue-effects")


def rank_chart(rows: Sequence[ScorecardRow]) -> Markup:
    """Rank of each responsible latent by both methods, a line between them; the top is left.

    A star marks what was not learned; a latent that lowers the score belongs on the right.
    """

    def draw(axes: Axes) -> None:
        for height, row in enumerate(rows):
            ends = [row.rank_attribution, row.rank_logit_lens]
            roles = ["attribution-patching", "logit-lens"] if row.learned else ["muted", "muted"]
            axes.plot(ends, [height, height], color=STAND_IN["line"], linewidth=2.5, zorder=1)
            for rank, role, marker in zip(ends, roles, ("o", "D"), strict=True):
                # A little apart, so that equal ranks do not cover each other.
                place = height + (0.12 if marker == "D" else -0.12)
                alpha = 1.0 if row.learned else 0.55
                axes.plot([rank], [place], marker, color=STAND_IN[role], alpha=alpha, zorder=2)
        axes.set_xscale("log")
        axes.set_xlim(0.8, 1.25 * max(row.n_latents for row in rows))
        axes.xaxis.set_major_formatter(lambda rank, _: f"{rank:g}")
        axes.set_xlabel("rank of the responsible latent (1 is the top)")
        axes.grid(axis="x")
        name_rows(axes, [_title(row) for row in rows])

    names = ", ".join(row.title for row in rows)
    return svg(draw, 0.7 + 0.4 * len(rows), "ranks", f"Ranks by both methods, of: {names}")


def _title(row: ScorecardRow) -> str:
    mark = "" if row.learned else " *"
    if row.learned and lowers(row):
        mark = " (lowers)"
    return row.title.replace(": ", ":\n", 1) + mark
