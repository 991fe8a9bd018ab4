"""An explanation as a picture: the image, its top latents, and where in the image each of them is.

No pyplot: no global figures.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from clipattr.report.explanation import ExplainedScore

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a prompt with dollar signs is text, not TeX
}
_INK, _MUTED, _FOR, _AGAINST = "#20262e", "#8a94a0", "#b2403a", "#2f6db3"
_COLUMNS = 5
_WIDTH, _HEAD, _MAPS = 8.0, 2.9, 1.85  # inches: of the whole, of the bars, of a row of heatmaps


def explanation_png(
    image: UInt8[Tensor, "3 height width"], scores: Sequence[ExplainedScore]
) -> bytes:
    """One part per score; red speaks for the score, blue against it.

    Args:
        image: as the model sees it: resized and cropped.
        scores: what is drawn, one below the other.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    heights = [_HEAD + _MAPS * _count_map_rows(each) for each in scores]
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(scores), 1, squeeze=False, height_ratios=heights)
        for part, score in zip(parts[:, 0], scores, strict=True):
            _draw_score(part, pixels, score)
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw_score(part: SubFigure, pixels: np.ndarray, score: ExplainedScore) -> None:
    part.suptitle(f"{score.name}: {score.score:.4f}", wrap=True)
    n_rows = _count_map_rows(score)
    if n_rows == 0:
        _draw_head(part, pixels, score)
        return
    heights = [_HEAD, _MAPS * n_rows]
    head, below = part.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_head(head, pixels, score)
    _draw_maps(below, pixels, score, n_rows)


def _draw_head(part: SubFigure, pixels: np.ndarray, score: ExplainedScore) -> None:
    picture, bars = part.subplots(1, 2, width_ratios=[2, 3])
    picture.imshow(pixels)
    picture.set_axis_off()
    _draw_bars(bars, score)


def _draw_maps(part: SubFigure, pixels: np.ndarray, score: ExplainedScore, n_rows: int) -> None:
    """All heatmaps of a score have one scale: white is 0, and colours can be compared."""
    maps = [np.array(each.heatmap) for each in score.latents if each.heatmap is not None]
    largest = max(float(abs(values).max()) for values in maps)
    cells = part.subplots(n_rows, _COLUMNS, squeeze=False).flatten()
    for cell in cells:
        cell.set_axis_off()
    for cell, each, values in zip(cells, score.latents, maps, strict=False):
        _draw_map(cell, pixels, values, largest)
        cell.set_title(f"{each.latent}: {each.part.attribution:+.4f}", fontsize=8)


def _draw_bars(axes: Axes, score: ExplainedScore) -> None:
    """Bars are attributions, dots exact effects."""
    names = [str(each.latent) for each in score.latents] + ["error"]
    parts = [each.part for each in score.latents] + [score.error]
    places = range(len(parts))
    colours = [_FOR if part.attribution > 0 else _AGAINST for part in parts]
    axes.barh(places, [part.attribution for part in parts], color=colours)
    exact = [part.exact for part in parts]
    axes.plot(exact, places, "o", color=_INK, markersize=3.5)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(0, color=_MUTED, linewidth=0.8)
    axes.set_xlabel("bar: attribution to the latent; dot: exact effect")
    axes.locator_params(axis="x", nbins=5)


def _draw_map(axes: Axes, pixels: np.ndarray, values: np.ndarray, largest: float) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(axis=2), cmap="gray", extent=(0, width, height, 0))
    axes.imshow(
        values,
        cmap="RdBu_r",
        vmin=-largest,
        vmax=largest,
        extent=(0, width, height, 0),
        alpha=0.6,
        interpolation="nearest",
    )


def _count_map_rows(score: ExplainedScore) -> int:
    n_maps = sum(each.heatmap is not None for each in score.latents)
    return -(-n_maps // _COLUMNS)
