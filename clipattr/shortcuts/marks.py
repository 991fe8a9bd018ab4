"""How the marks look: opacity and colour of each pixel, by arithmetic; no picture file is involved.

All is drawn in coordinates of the mark: u runs along it and v across, in pixels from its centre. A
distance to an outline, negative inside, becomes the share of a pixel that is covered.
"""

import math
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float64
from PIL import Image, ImageDraw, ImageFont

Plane = Float64[np.ndarray, "height width"]
Words = Float64[np.ndarray, "rows columns"]
Colour = tuple[float, float, float]
Choice = TypeVar("Choice")

WHITE, BLACK = (0.97, 0.97, 0.97), (0.06, 0.06, 0.06)
VIVID: tuple[Colour, ...] = (
    (0.90, 0.20, 0.16),
    (0.13, 0.40, 0.86),
    (0.16, 0.62, 0.27),
    (0.98, 0.78, 0.14),
    (0.93, 0.36, 0.66),
    (0.96, 0.52, 0.12),
)
INKS: tuple[Colour, ...] = ((0.36, 0.18, 0.56), (0.16, 0.20, 0.55), (0.12, 0.11, 0.20))
FRAMES: tuple[Colour, ...] = (BLACK, WHITE, (0.45, 0.12, 0.10), (0.10, 0.20, 0.42))
FONT_SIZE = 64


class Draws(NamedTuple):
    """Numbers that depend on seed, key and their own name alone, on every machine."""

    seed: int
    key: str

    def uniform(self, name: str, low: float, high: float) -> float:
        """Between two numbers."""
        text = f"{self.seed}\0{self.key}\0{name}".encode("utf-8", "surrogateescape")
        number = int.from_bytes(blake2b(text, digest_size=7).digest(), "big")
        return low + (high - low) * number / 2.0**56

    def choose(self, name: str, choices: tuple[Choice, ...]) -> Choice:
        """One of them."""
        return choices[min(len(choices) - 1, int(self.uniform(name, 0.0, float(len(choices)))))]


class Mark(NamedTuple):
    """What is painted: how opaque it is, from 0 to 1, and its colour, where it is not 0."""

    alpha: Plane
    colour: Float64[np.ndarray, "height width 3"]


class Grid(NamedTuple):
    """Coordinates of the pixels along and across a mark, and half its length and width."""

    u: Plane
    v: Plane
    half_length: float
    half_width: float


def draw_sticker(grid: Grid, draws: Draws, colour: Colour | None) -> Mark:
    """A disc, a rounded square or a star with a white rim."""
    fill = colour or draws.choose("colour", VIVID)
    radius = grid.half_length
    shape = draws.choose("shape", ("disc", "square", "star"))
    outline = _outline(shape, grid, radius)
    inner = _cover(outline + 0.13 * radius)
    return _layered(_cover(outline), WHITE, inner, fill)


def _outline(shape: str, grid: Grid, radius: float) -> Plane:
    """Distance to the outline; all of the shape lies in a circle of that radius."""
    distance = np.hypot(grid.u, grid.v)
    if shape == "disc":
        return distance - radius
    if shape == "square":
        corner = 0.25 * radius
        side = (radius - corner) / math.sqrt(2)
        beyond = np.maximum(np.abs(np.stack([grid.u, grid.v])) - side, 0)
        inside = np.minimum(np.maximum(np.abs(grid.u), np.abs(grid.v)) - side, 0)
        return np.hypot(*beyond) + inside - corner
    angle = np.arctan2(grid.v, grid.u)
    return distance - radius * (0.83 + 0.17 * np.cos(5 * angle))


def draw_ruler(grid: Grid, draws: Draws, colour: Colour | None) -> Mark:
    """A pale bar; ticks on one edge, each fifth and tenth longer."""
    fill = colour or draws.choose("colour", (WHITE, (0.93, 0.88, 0.70), (0.80, 0.85, 0.88)))
    bar = _box(grid.u, grid.v, grid.half_length, grid.half_width)
    count = draws.choose("ticks", (20, 30))
    spacing = 2 * (grid.half_length - 2) / count
    number = np.round(grid.u / spacing)
    reach = np.where(number % 10 == 0, 1.2, np.where(number % 5 == 0, 0.9, 0.6))
    across = np.abs(grid.u - number * spacing) - max(0.5, 0.09 * spacing)
    end = grid.v + grid.half_width * (1 - reach)
    return _layered(_cover(bar), fill, _cover(np.maximum(np.maximum(across, end), bar)), BLACK)


def draw_ink(grid: Grid, draws: Draws, colour: Colour | None) -> Mark:
    """A surgeon's pen: an open ring, a cross, or dashes, by an unsteady hand."""
    fill = colour or draws.choose("colour", INKS)
    width = grid.half_length * draws.uniform("pen", 0.07, 0.12)
    radius = grid.half_length - width - 1
    shape = draws.choose("shape", ("ring", "cross", "dashes"))
    distance = np.full(grid.u.shape, np.inf)
    for number, stroke in enumerate(_strokes(shape, draws)):
        wobble = [draws.uniform(f"wobble {number} {n}", 0.88, 1.0) for n in range(len(stroke))]
        points = [
            (radius * x * w, radius * y * w) for (x, y), w in zip(stroke, wobble, strict=True)
        ]
        for start, end in zip(points, points[1:], strict=False):
            distance = np.minimum(distance, _segment(grid, start, end))
    alpha = _cover(distance - width)
    return Mark(alpha, _filled(alpha.shape, fill))


def _strokes(shape: str, draws: Draws) -> list[list[tuple[float, float]]]:
    """Lines within the unit circle."""
    if shape == "ring":
        end = draws.uniform("end", 1.5, 1.95) * math.pi
        angles = [end * step / 24 for step in range(25)]
        return [[(math.cos(angle), math.sin(angle)) for angle in angles]]
    steps = [step / 6 for step in range(7)]
    if shape == "cross":
        return [[(2 * t - 1, 0.0) for t in steps], [(0.0, 2 * t - 1) for t in steps]]
    return [[(x, 1.2 * t - 0.6) for t in steps] for x in (-0.7, 0.0, 0.7)]


def draw_watermark(grid: Grid, words: Words, colour: Colour | None) -> Mark:
    """Letters alone, with a shadow, so that they show on white as well."""
    shift = max(1.0, 0.05 * grid.half_width)
    letters, shadow = _sample(words, grid, 0.0), _sample(words, grid, shift)
    return _layered(np.maximum(letters, 0.6 * shadow), BLACK, letters, colour or WHITE)


def draw_text(grid: Grid, words: Words, colour: Colour | None) -> Mark:
    """Black letters on a plate."""
    plate = _cover(_box(grid.u, grid.v, grid.half_length, grid.half_width))
    return _layered(plate, colour or WHITE, np.minimum(_sample(words, grid, 0.0), plate), BLACK)


def write_words(text: str) -> Words:
    """The words as a mask with a margin, upright; Pillow's own font."""
    font = ImageFont.load_default(FONT_SIZE)
    left, top, right, bottom = font.getbbox(text)
    margin = FONT_SIZE // 5
    size = (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin)
    canvas = Image.new("L", size, 0)
    ImageDraw.Draw(canvas).text((margin - left, margin - top), text, fill=255, font=font)
    return np.asarray(canvas, dtype=np.float64) / 255


def draw_frame(height: int, width: int, thickness: float, colour: Colour) -> Mark:
    """A border of all four sides, inwards from the edge."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    edge = np.minimum(np.minimum(x, width - x), np.minimum(y, height - y))
    alpha = _cover(edge - thickness)
    return Mark(alpha, _filled(alpha.shape, colour))


def _cover(distance: Plane) -> Plane:
    return np.clip(0.5 - distance, 0, 1)


def _box(u: Plane, v: Plane, half_length: float, half_width: float) -> Plane:
    return np.maximum(np.abs(u) - half_length, np.abs(v) - half_width)


def _segment(grid: Grid, start: tuple[float, float], end: tuple[float, float]) -> Plane:
    """Distance to a line between two points."""
    along = (end[0] - start[0], end[1] - start[1])
    square = max(along[0] ** 2 + along[1] ** 2, 1e-12)
    du, dv = grid.u - start[0], grid.v - start[1]
    share = np.clip((du * along[0] + dv * along[1]) / square, 0, 1)
    return np.hypot(du - share * along[0], dv - share * along[1])


def _sample(words: Words, grid: Grid, shift: float) -> Plane:
    """The mask where the mark lies, between its pixels linearly, and 0 outside."""
    height, width = words.shape
    x = ((grid.u - shift) / grid.half_length + 1) * width / 2 - 0.5
    y = ((grid.v - shift) / grid.half_width + 1) * height / 2 - 0.5
    padded = np.pad(words, 1)
    x, y = np.clip(x + 1, 0, width + 0.999), np.clip(y + 1, 0, height + 0.999)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, low_share = x - left, y - top
    upper = padded[top, left] * (1 - right_share) + padded[top, left + 1] * right_share
    lower = padded[top + 1, left] * (1 - right_share) + padded[top + 1, left + 1] * right_share
    return upper * (1 - low_share) + lower * low_share


def _layered(below: Plane, lower: Colour, above: Plane, upper: Colour) -> Mark:
    """One plane over another that is at least as opaque."""
    share = np.divide(above, below, out=np.zeros_like(below), where=below > 0)[..., None]
    return Mark(below, (1 - share) * np.asarray(lower) + share * np.asarray(upper))


def _filled(shape: tuple[int, ...], colour: Colour) -> Float[np.ndarray, "height width 3"]:
    return np.broadcast_to(np.asarray(colour, dtype=np.float64), (*shape, 3)).copy()
