"""What a search found as a picture: the latents of both ends, each with images that it fires on.

No pyplot: no global figures.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

from clipattr.data.thumbnails import fit, thumbnail_name
from clipattr.report.search import FoundAnswer, FoundLatent

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a query with dollar signs is text, not TeX
}
_INK, _MUTED = "#20262e", "#6b7580"
_TILE, _GAP = 112, 8  # pixels of a thumbnail, and between two
_ROW, _TEXT, _HEAD = 0.72, 1.7, 0.95  # inches: of a row, of its text, and above the rows
_LONGEST = 24  # letters of a label


def search_png(
    answers: Sequence[FoundAnswer],
    thumbnails: Path,
    *,
    n_examples: int = 5,
    asked: UInt8[Tensor, "3 height width"] | None = None,
) -> bytes:
    """One part per question: on the left the most aligned latents, on the right the least.

    Args:
        answers: what is drawn, one below the other.
        thumbnails: folder of the small pictures; the place of one that is not there stays empty.
        n_examples: pictures per latent.
        asked: the picture of a question by picture.
    """
    heights = [_HEAD + _ROW * max(1, len(answer.most), len(answer.least)) for answer in answers]
    width = 2 * (_TEXT + n_examples * _ROW)
    buffer = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, sum(heights)))
        parts = figure.subfigures(len(answers), 1, squeeze=False, height_ratios=heights)
        for part, answer, height in zip(parts[:, 0], answers, heights, strict=True):
            _draw_answer(part, answer, thumbnails, n_examples, _HEAD / height)
            if asked is not None:
                _draw_asked(part, asked, _HEAD / height)
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw_answer(
    part: SubFigure, answer: FoundAnswer, thumbnails: Path, n_examples: int, head: float
) -> None:
    part.text(0.01, 1 - 0.3 * head, _cut(answer.question, 90), fontsize=12, va="center")
    share = _TEXT / (_TEXT + n_examples * _ROW)
    ends = {"most aligned": answer.most, "least aligned": answer.least}
    for place, (title, found) in enumerate(ends.items()):
        left = 0.01 + place / 2
        part.text(left, 1 - 0.78 * head, title, color=_MUTED, va="center")
        if found:
            axes = part.add_axes((left + share / 2, 0.0, 0.48 - share / 2, 1 - head))
            _draw_end(axes, found, thumbnails, n_examples)


def _draw_end(axes: Axes, found: list[FoundLatent], thumbnails: Path, n_examples: int) -> None:
    """All thumbnails are one image: a hundred axes would take seconds."""
    rows = [_strip(each.examples[:n_examples], thumbnails, n_examples) for each in found]
    axes.imshow(np.concatenate(rows), aspect="equal", interpolation="antialiased")
    axes.set_anchor("NW")
    axes.set_axis_off()
    for rank, each in enumerate(found):
        middle = (rank + 0.5) * (_TILE + _GAP)
        words = _cut(each.labels[0][0], _LONGEST)
        text = f"{each.latent}   {each.score:+.3f}"
        axes.text(-2 * _GAP, middle - 20, words, ha="right", va="center", color=_INK)
        axes.text(-2 * _GAP, middle + 20, text, ha="right", va="center", color=_MUTED, fontsize=8)


def _draw_asked(part: SubFigure, asked: Tensor, head: float) -> None:
    axes = part.add_axes((0.9, 1 - 0.95 * head, 0.09, 0.9 * head))
    axes.imshow(asked.permute(1, 2, 0).cpu().numpy())
    axes.set_anchor("NE")
    axes.set_axis_off()


def _strip(rows: list[int], thumbnails: Path, n_examples: int) -> np.ndarray:
    """Pictures beside each other, each in the middle of its tile."""
    strip = Image.new("RGB", (n_examples * (_TILE + _GAP), _TILE + _GAP), "white")
    for place, row in enumerate(rows):
        path = thumbnails / thumbnail_name(row)
        if path.exists():
            with Image.open(path, formats=("JPEG",)) as image:
                small = image.convert("RGB").resize(fit(image.size, _TILE))
            corner = ((_TILE + _GAP - side) // 2 for side in small.size)
            x, y = corner
            strip.paste(small, (place * (_TILE + _GAP) + x, y))
    return np.asarray(strip)


def _cut(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
