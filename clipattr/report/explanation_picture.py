"""An explanation as a picture: the image, its top latents, and where in the image each of them is.

No pyplot: no global figures.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from clipattr.report.explanation import ExplainedScore
from clipattr.report.explanation_gallery import WIDTH, Gallery

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a prompt with dollar signs is text, not TeX
}
_INK, _MUTED, _FOR, _AGAINST = "#20262e", "#8a94a0", "#b2403a", "#2f6db3"
_HEAD = 2.9  # inches: the height of the bars


def explanation_png(
    image: UInt8[Tensor, "3 height width"],
    scores: Sequence[ExplainedScore],
    pictures: Mapping[int, np.ndarray] = {},  # noqa: B006  read only
) -> bytes:
    """One part per score; red speaks for the score, blue against it.

    Args:
        image: as the model sees it: resized and cropped.
        scores: what is drawn, one below the other.
        pictures: the example images of the latents, by their row.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    galleries = [Gallery(pixels, each.latents, pictures) for each in scores]
    heights = [_HEAD + gallery.height for gallery in galleries]
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(scores), 1, squeeze=False, height_ratios=heights)
        for part, score, gallery in zip(parts[:, 0], scores, galleries, strict=True):
            _draw_score(part, pixels, score, gallery)
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw_score(
    part: SubFigure, pixels: np.ndarray, score: ExplainedScore, gallery: Gallery
) -> None:
    part.suptitle(f"{score.name}: {score.score:.4f}", wrap=True)
    if not gallery.height:
        _draw_head(part, pixels, score)
        return
    heights = [_HEAD, gallery.height]
    head, below = part.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_head(head, pixels, score)
    gallery.draw(below)


def _draw_head(part: SubFigure, pixels: np.ndarray, score: ExplainedScore) -> None:
    picture, bars = part.subplots(1, 2, width_ratios=[2, 3])
    picture.imshow(pixels)
    picture.set_axis_off()
    _draw_bars(bars, score)


def _draw_bars(axes: Axes, score: ExplainedScore) -> None:
    """Bars are attributions, dots exact effects."""
    names = [each.name for each in score.latents] + ["error"]
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
