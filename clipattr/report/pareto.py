"""What a grid of SAEs costs and gives: L0 against FVU, as a table and as a picture."""

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a label with dollar signs is text, not TeX
}
_INK, _MUTED = "#20262e", "#8a94a0"


class SaePoint(NamedTuple):
    """One SAE on the held-out rows."""

    name: str
    l0: float
    fvu: float
    dead_fraction: float
    cosine: float


def find_front(points: Sequence[SaePoint]) -> list[SaePoint]:
    """Those than which none is at least as sparse and faithful, and better in one; by L0."""
    front = [
        point
        for point in points
        if not any(
            other.l0 <= point.l0
            and other.fvu <= point.fvu
            and (other.l0, other.fvu) != (point.l0, point.fvu)
            for other in points
        )
    ]
    return sorted(front, key=lambda point: (point.l0, point.name))


def pareto_table(points: Sequence[SaePoint]) -> str:
    """CSV, one line for each and whether it is on the front."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*SaePoint._fields, "on_front"])
    front = find_front(points)
    for point in points:
        writer.writerow([*point, str(point in front).lower()])
    return file.getvalue()


def pareto_png(points: Sequence[SaePoint]) -> bytes:
    """The same as a picture; both axes are better to the lower left."""
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        front = find_front(points)
        axes.plot([p.l0 for p in front], [p.fvu for p in front], color=_MUTED, linewidth=1.2)
        axes.plot([p.l0 for p in points], [p.fvu for p in points], "o", color=_INK, markersize=5)
        for point in points:
            axes.annotate(
                point.name,
                (point.l0, point.fvu),
                xytext=(5, 4),
                textcoords="offset points",
                color=_INK,
                fontsize=7.5,
            )
        axes.set_xlabel("L0: active latents per row")
        axes.set_ylabel("FVU: fraction of variance unexplained")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(color=_MUTED, alpha=0.3, linewidth=0.7)
        axes.margins(x=0.12, y=0.1)
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
