"""Cues that are pasted onto an image: stickers, rulers, ink, watermarks, frames, words.

What is drawn, and where, is a function of (settings, seed, key of the sample) and the size of the
image: the same pairs come out on every machine, in any order and any number of processes. Nothing
reaches over the edge. Every overlay has a placebo of the same area at the same place that shows
nothing new: what was there, blurred. An effect of the cue that its placebo has as well is an effect
of what was covered.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clipattr.errors import ConfigError, DataError
from clipattr.shortcuts.marks import (
    FRAMES,
    Colour,
    Draws,
    Grid,
    Mark,
    Words,
    draw_frame,
    draw_ink,
    draw_ruler,
    draw_sticker,
    draw_text,
    draw_watermark,
    write_words,
)

Image3 = UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"]
MIN_SIDE = 16
MAX_LETTERS = 40
RULER_ASPECT = 0.16


class Kind(Enum):
    """What is pasted."""

    sticker = "sticker"
    ruler = "ruler"
    ink = "ink"
    watermark = "watermark"
    frame = "frame"
    text = "text"


class Look(NamedTuple):
    """Defaults of a kind: its size and the largest, its opacity, and how far it is turned."""

    size: float
    max_size: float
    opacity: float
    max_angle: float


# Any size up to the largest fits at any angle: half the diagonal of the mark is at most half of the
# shorter side of the image.
LOOKS = {
    Kind.sticker: Look(0.28, 0.9, 1.0, 180.0),
    Kind.ruler: Look(0.85, 0.95, 1.0, 180.0),
    Kind.ink: Look(0.5, 0.9, 0.85, 180.0),
    Kind.watermark: Look(0.65, 0.7, 0.55, 30.0),
    Kind.frame: Look(0.07, 0.25, 1.0, 0.0),
    Kind.text: Look(0.5, 0.7, 1.0, 10.0),
}


@dataclass(frozen=True)
class Overlay:
    """Settings of a cue.

    Attributes:
        kind: what is pasted.
        size: its length, of a frame its thickness, as a share of the shorter side of the image;
            None: as usual for the kind.
        opacity: from 0 to 1; None: as usual for the kind.
        text: what a watermark or a text says.
        colour: red, green and blue from 0 to 1; None: drawn for each sample.
        jitter: each sample's size is drawn from size x [1 - jitter, 1].
    """

    kind: Kind
    size: float | None = None
    opacity: float | None = None
    text: str = "SAMPLE"
    colour: Colour | None = None
    jitter: float = 0.2

    @property
    def look(self) -> Look:
        """The settings, with what the kind has by default."""
        usual = LOOKS[self.kind]
        size = usual.size if self.size is None else self.size
        opacity = usual.opacity if self.opacity is None else self.opacity
        return usual._replace(size=size, opacity=opacity)

    def check(self) -> None:
        """Raise ConfigError for what cannot be pasted."""
        look = self.look
        if not 0.02 <= look.size <= look.max_size:
            raise ConfigError(
                f"size={look.size} of a {self.kind.value}: allowed are 0.02 to {look.max_size}, as "
                "a share of the shorter side of the image"
            )
        if not 0 < look.opacity <= 1:
            raise ConfigError(f"opacity={look.opacity}: allowed is more than 0, and at most 1")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter={self.jitter}: allowed is 0, and less than 1")
        if not self.text.strip() or len(self.text) > MAX_LETTERS or not self.text.isprintable():
            raise ConfigError(f"text={self.text!r}: allowed are 1 to {MAX_LETTERS} letters")
        if self.colour is not None and not all(0 <= part <= 1 for part in self.colour):
            raise ConfigError(f"colour={self.colour}: allowed are three numbers from 0 to 1")


class Layer(NamedTuple):
    """What is laid over an image, with numbers from 0 to 1; `centre` is (x, y) in pixels."""

    alpha: Float32[Tensor, "height width"]
    colour: Float32[Tensor, "3 height width"]
    centre: tuple[float, float]
    opacity: float

    @property
    def area(self) -> float:
        """Pixels that are covered, a half-covered one counting half."""
        return self.alpha.double().sum().item() / self.opacity


def draw_overlay(overlay: Overlay, *, key: str, seed: int, height: int, width: int) -> Layer:
    """The layer of one sample."""
    overlay.check()
    shorter = min(height, width)
    if shorter < MIN_SIDE:
        raise DataError(f"{key}: {width} x {height} pixels; an overlay needs {MIN_SIDE} at least")
    look = overlay.look
    draws = Draws(seed, f"{overlay.kind.value}\0{key}")
    size = look.size * (1 - overlay.jitter * draws.uniform("size", 0.0, 1.0)) * shorter
    if overlay.kind is Kind.frame:
        colour = overlay.colour or draws.choose("colour", FRAMES)
        mark = draw_frame(height, width, size, colour)
        return _as_layer(mark, (width / 2, height / 2), look.opacity)
    words = write_words(overlay.text) if overlay.kind in (Kind.watermark, Kind.text) else None
    angle = math.radians(draws.uniform("angle", -look.max_angle, look.max_angle))
    half_length, half_width = _halves(overlay.kind, size, words)
    x = _place(
        draws.uniform("x", 0.0, 1.0), _reach(overlay.kind, half_length, half_width, angle), width
    )
    turned = angle + math.pi / 2
    y = _place(
        draws.uniform("y", 0.0, 1.0), _reach(overlay.kind, half_length, half_width, turned), height
    )
    grid = _make_grid(height, width, (x, y), angle, (half_length, half_width))
    return _as_layer(_draw(overlay, grid, draws, words), (x, y), look.opacity)


def _draw(overlay: Overlay, grid: Grid, draws: Draws, words: Words | None) -> Mark:
    match overlay.kind:
        case Kind.sticker:
            return draw_sticker(grid, draws, overlay.colour)
        case Kind.ruler:
            return draw_ruler(grid, draws, overlay.colour)
        case Kind.ink:
            return draw_ink(grid, draws, overlay.colour)
    assert words is not None
    if overlay.kind is Kind.watermark:
        return draw_watermark(grid, words, overlay.colour)
    return draw_text(grid, words, overlay.colour)


def _halves(kind: Kind, size: float, words: Words | None) -> tuple[float, float]:
    """Half of length and width; the longer one is half of the size."""
    if words is not None:
        high, wide = words.shape
        return size / 2 * wide / max(high, wide), size / 2 * high / max(high, wide)
    return size / 2, size / 2 * (RULER_ASPECT if kind is Kind.ruler else 1)


def _reach(kind: Kind, half_length: float, half_width: float, angle: float) -> float:
    """How far it goes from its centre to the right, and one pixel more for its soft edge."""
    if kind in (Kind.sticker, Kind.ink):
        return half_length + 1
    return half_length * abs(math.cos(angle)) + half_width * abs(math.sin(angle)) + 1


def _place(share: float, reach: float, side: int) -> float:
    """A centre from which nothing reaches over an edge."""
    room = side - 2 * reach
    return side / 2 if room < 0 else reach + share * room


def _make_grid(
    height: int, width: int, centre: tuple[float, float], angle: float, halves: tuple[float, float]
) -> Grid:
    y, x = np.mgrid[0:height, 0:width] + 0.5
    dx, dy = x - centre[0], y - centre[1]
    cos, sin = math.cos(angle), math.sin(angle)
    return Grid(dx * cos + dy * sin, dy * cos - dx * sin, *halves)


def _as_layer(mark: Mark, centre: tuple[float, float], opacity: float) -> Layer:
    alpha = torch.from_numpy(mark.alpha * opacity).float()
    colour = torch.from_numpy(mark.colour).permute(2, 0, 1).float().contiguous()
    return Layer(alpha, colour, centre, opacity)


def make_placebo(image: Image3, overlay: Overlay, *, key: str, seed: int) -> Layer:
    """The control: a square of the overlay's area at its place, which shows the blurred image.

    The placebo of a frame is a blurred frame: a square of that area would hide the object.
    """
    height, width = image.shape[1:]
    cue = draw_overlay(overlay, key=key, seed=seed, height=height, width=width)
    if overlay.kind is Kind.frame:
        thickness = overlay.look.size * min(height, width)
        return cue._replace(colour=_blur(_as_float(image), thickness))
    side = math.sqrt(cue.area)
    low_x, low_y = (
        min(max(middle - side / 2, 0.0), length - side)
        for middle, length in zip(cue.centre, (width, height), strict=True)
    )
    across, down = (_coverage(low, side, n) for low, n in ((low_x, width), (low_y, height)))
    alpha = (down[:, None] * across[None, :] * cue.opacity).float()
    centre = (low_x + side / 2, low_y + side / 2)
    return Layer(alpha, _blur(_as_float(image), side / 2), centre, cue.opacity)


def _coverage(low: float, side: float, length: int) -> Float[Tensor, " pixels"]:
    """How much of each pixel of a line lies between low and low + side: it sums to side."""
    pixels = torch.arange(length, dtype=torch.float64)
    return ((pixels + 1).clamp(max=low + side) - pixels.clamp(min=low)).clamp(0, 1)


def _blur(
    image: Float32[Tensor, "3 height width"], sigma: float
) -> Float32[Tensor, "3 height width"]:
    """Gaussian; beyond the edge, the image goes on as at its edge."""
    reach = math.ceil(3 * sigma)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = functional.pad(image[:, None], (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return functional.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0].clamp(0, 1)


def blend(image: Image3, layer: Layer) -> Image3:
    """Image x (1 - alpha) + colour x alpha; a pixel with alpha 0 keeps its bits."""
    mixed = torch.lerp(_as_float(image), layer.colour, layer.alpha)
    if image.dtype == torch.uint8:
        return torch.where(layer.alpha > 0, (mixed * 255).round().byte(), image)
    return torch.where(layer.alpha > 0, mixed.to(image.dtype), image)


def _as_float(image: Image3) -> Float32[Tensor, "3 height width"]:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def paste_overlay(image: Image3, overlay: Overlay, *, key: str, seed: int) -> Image3:
    """The image with the cue; bytes, or numbers from 0 to 1 (not normalised for a model)."""
    height, width = image.shape[1:]
    return blend(image, draw_overlay(overlay, key=key, seed=seed, height=height, width=width))


def paste_on_picture(picture: Image.Image, overlay: Overlay, *, key: str, seed: int) -> Image.Image:
    """The same for a picture of Pillow, in RGB."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    pasted = paste_overlay(pixels.contiguous(), overlay, key=key, seed=seed)
    return Image.fromarray(pasted.permute(1, 2, 0).contiguous().numpy())
