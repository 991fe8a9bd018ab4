"""The latents of an explanation as pictures: where each is in the image, and what it is elsewhere.

Two kinds of heatmap: the attribution of the latent at each patch (red speaks for the score, blue
against it; one scale for all latents of a score), and, where the class token is read, the patches
that made the latent fire (orange) or held it back (purple), which says nothing of the score; there
each latent has its own scale.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from clipattr.report.explanation import Grid, LatentPart

WIDTH = 8.0  # inches
_TITLE, _CAPTION = 0.3, 0.35
_CELLS = 10  # in a row of maps and examples
_MAPS = 5  # in a row where there are no examples
_SPACE = 0.25  # between two latents, in cells
_FOR_SCORE, _FIRED = "RdBu_r", "PuOr_r"


class Gallery:
    """Its height has to be known before it is drawn; 0 where there is nothing to draw."""

    def __init__(
        self,
        pixels: np.ndarray,
        latents: Sequence[LatentPart],
        pictures: Mapping[int, np.ndarray],
    ) -> None:
        self._pixels = pixels
        self._latents = latents
        self._pictures = pictures
        self._has_map = any(_map_of(each) is not None for each in latents)
        n_examples = max((len(_examples_of(each)) for each in latents), default=0)
        self._n_cells = self._has_map + n_examples
        width = _CELLS if n_examples else _MAPS
        self._per_row = width // self._n_cells if self._n_cells else 0
        self._n_rows = -(-len(latents) // self._per_row) if self._per_row else 0
        self._largest = max(
            (float(np.abs(each.heatmap).max()) for each in latents if each.heatmap is not None),
            default=0.0,
        )

    @property
    def height(self) -> float:
        """In inches."""
        if not self._n_rows:
            return 0.0
        cell = WIDTH / (self._per_row * (self._n_cells + _SPACE))
        return self._n_rows * (cell + _TITLE) + _CAPTION

    def draw(self, part: SubFigure) -> None:
        """A heatmap and examples of each latent, row by row."""
        widths = ([1.0] * self._n_cells + [_SPACE]) * self._per_row
        cells = part.subplots(self._n_rows, len(widths), squeeze=False, width_ratios=widths)
        for cell in cells.flatten():
            cell.set_axis_off()
        blocks = cells.reshape(self._n_rows * self._per_row, self._n_cells + 1)
        for block, each in zip(blocks, self._latents, strict=False):
            self._draw_latent(block, each)
        part.supxlabel(self._caption(), fontsize=8)

    def _draw_latent(self, cells: np.ndarray, latent: LatentPart) -> None:
        title = f"{latent.name}: {latent.part.attribution:+.4f}"
        cells[0].set_title(title, fontsize=8, loc="left")
        if self._has_map:
            self._draw_map(cells[0], latent)
        for cell, row in zip(cells[int(self._has_map) :], _examples_of(latent), strict=False):
            cell.imshow(self._pictures[row])

    def _draw_map(self, axes: Axes, latent: LatentPart) -> None:
        values = np.array(_map_of(latent))
        is_attribution = latent.heatmap is not None
        largest = self._largest if is_attribution else float(np.abs(values).max())
        height, width = self._pixels.shape[:2]
        extent = (0, width, height, 0)
        axes.imshow(self._pixels.mean(axis=2), cmap="gray", extent=extent)
        axes.imshow(
            values,
            cmap=_FOR_SCORE if is_attribution else _FIRED,
            vmin=-largest,
            vmax=largest,
            extent=extent,
            alpha=0.6,
            interpolation="nearest",
        )

    def _caption(self) -> str:
        parts = []
        if any(each.heatmap is not None for each in self._latents):
            parts.append("maps: attribution at each patch, red for the score, blue against it")
        elif self._has_map:
            parts.append(
                "maps: patches that made the latent fire (orange) or held it back (purple), "
                "not what it does to the score"
            )
        if self._n_cells > self._has_map:
            parts.append("images: those it fires on most")
        return "\n".join(parts)


def _map_of(latent: LatentPart) -> Grid | None:
    if latent.heatmap is not None:
        return latent.heatmap
    return None if latent.fired_by is None else latent.fired_by.patches


def _examples_of(latent: LatentPart) -> Sequence[int]:
    return latent.meaning.examples if latent.meaning else []
