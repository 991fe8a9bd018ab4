"""Charts of why the methods differ: the control, single classes, corrections, exact effects."""

import math
from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from clipattr.metrics.intervals import Interval
from clipattr.report.content import ClassRow, CorrectionResult, ExactResult, MethodResult
from clipattr.report.drawing import (
    STAND_IN,
    Point,
    draw_dots,
    forest,
    method_style,
    name_rows,
    svg,
)


def control_chart(
    methods: Sequence[MethodResult],
    control: Sequence[MethodResult],
    which: Literal["deletion", "insertion"],
) -> Markup:
    """An AUC of every method, of the trained and of the untrained dictionary."""
    column = f"{which}_auc"
    untrained = {method.name: getattr(method, column) for method in control}
    rows = [
        (
            method.label,
            [
                Point(getattr(method, column), method_style(method.name).role, "o"),
                Point(untrained[method.name], "muted", "D"),
            ],
        )
        for method in methods
    ]
    return forest(rows, f"{which} AUC", None, f"control-{which}")


def class_chart(
    classes: Sequence[ClassRow], column: Literal["spearman_exact", "deletion_auc"], axis_label: str
) -> Markup:
    """One dot per class: attribution patching minus logit lens."""
    nothing = float("nan")
    rows = [
        (
            f"{row.name} ({row.n_images})",
            [Point(Interval(getattr(row, column), nothing, nothing), "attribution-patching", "o")],
        )
        for row in classes
    ]
    return forest(rows, axis_label, 0.0, f"classes-{column.replace('_', '-')}")


def parts_chart(corrections: CorrectionResult) -> Markup:
    """Mean absolute size of each correction over that of the lens part."""
    labels = ["lens part", *corrections.sizes]

    def draw(axes: Axes) -> None:
        axes.barh(0, 1.0, height=0.5, color=STAND_IN["logit-lens"])
        for height, (mean, low, high) in enumerate(corrections.sizes.values(), start=1):
            axes.barh(height, mean, height=0.5, color=STAND_IN["attribution-patching"])
            axes.plot([low, high], [height, height], color=STAND_IN["ink"], linewidth=2)
        name_rows(axes, labels)
        axes.set_xlim(left=0)
        axes.set_xlabel("mean size, that of the lens part being 1")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")

    return svg(draw, 2.4, "correction-sizes", f"Mean size of: {', '.join(labels)}")


def steps_chart(corrections: CorrectionResult) -> Markup:
    """Agreement with exact patching, from logit lens to attribution patching part by part."""
    rows = [
        (label, [Point(interval, "attribution-patching", "o")])
        for label, interval in corrections.steps.items()
    ]
    return forest(rows, "Spearman correlation with exact patching", None, "correction-steps")


def scatter_chart(result: ExactResult, number: int) -> Markup:
    """The estimates of one method over the exact effects; on the line both are equal."""
    scatter = result.scatters[number]
    drawn = [value for each in result.scatters for value in (*each.exact, *each.estimate)]
    finite = [value for value in drawn if math.isfinite(value)] or [0.0]
    margin = 0.04 * (max(finite) - min(finite)) or 1.0  # equal limits are no axis
    limits = (min(finite) - margin, max(finite) + margin)

    def draw(axes: Axes) -> None:
        axes.plot(limits, limits, color=STAND_IN["muted"], linewidth=1.0)
        draw_dots(axes, scatter.exact, scatter.estimate, method_style(scatter.name).role)
        # The same for all methods, so that the pictures can be compared.
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        axes.set_xlabel("exact effect of deleting the latent")
        axes.set_ylabel(scatter.label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid()

    name = f"scatter-{scatter.name.replace('_', '-')}"
    return svg(draw, 3.6, name, f"{scatter.label} against the exact effect")
