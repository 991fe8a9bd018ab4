"""How often the latents of an SAE fire: a table of all of them, and a picture."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INK, _MUTED = "#20262e", "#8a94a0"


def latent_table(
    firing_counts: Sequence[int],
    means: Sequence[float],
    largest: Sequence[float],
    n_rows: int,
) -> str:
    """CSV, one line per latent; the activations of a dead one are left empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["latent", "firing_count", "frequency", "mean_active", "max"])
    for latent, (count, *activations) in enumerate(zip(firing_counts, means, largest, strict=True)):
        numbers = [f"{value:.6g}" for value in activations] if count else ["", ""]
        writer.writerow([latent, count, f"{count / n_rows:.6g}", *numbers])
    return file.getvalue()


def frequency_png(counts: Sequence[int], edges: Sequence[float], dead: int, n_rows: int) -> bytes:
    """Latents by their firing frequency, those that never fired in a bar of their own.

    Args:
        counts: latents between an edge and the next.
        edges: frequencies, one more than there are counts, in equal steps of their logarithm.
        dead: latents that never fired.
        n_rows: over which the frequencies were measured; nothing can fire less often than once.
    """
    places = np.log10(edges)
    width = places[1] - places[0]
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(places[:-1], counts, width=width, align="edge", color=_INK, linewidth=0)
        of_dead = places[0] - 3 * width
        axes.bar([of_dead], [dead], width=width, color=_MUTED, linewidth=0)
        axes.axvline(-np.log10(n_rows), color=_MUTED, linewidth=1.0, linestyle="dotted")
        whole = [place for place in places if abs(place - round(place)) < width / 2]
        axes.set_xticks(
            [of_dead, *whole], ["never", *(f"$10^{{{round(place)}}}$" for place in whole)]
        )
        axes.set_xlabel(f"share of {n_rows:,} rows in which a latent fires (dotted: one row)")
        axes.set_ylabel("latents")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=_MUTED, alpha=0.3, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
