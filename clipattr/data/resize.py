"""PIL's resize of a picture, several times as fast: at most one grey level off, and rarely that.

Each pass is a weighted sum of whole rows, for which torch has a vectorised kernel
(`embedding_bag`); a picture is turned on its side for the other pass. Numbers and order are PIL's:
weights by its formula, in 22 bits, and bytes between the two passes, where what overshoots is cut
off. (torch's own resize of bytes has weights of 16 bits, two levels off at times, and always
starts with the horizontal pass: thirty levels off where PIL starts with the other.)
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import PIL
import torch
from jaxtyping import Float, Int, Int32, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchvision.transforms import InterpolationMode

from clipattr.errors import ConfigError

# A new pixel of 400 -> 1000 stands at one of 5 phases. Where they are few, many sums end in one
# half, and the last bit of the weights decides on which side: such weights are summed in two parts,
# each of them without rounding. With more phases, a sum so close to one half is chance.
FEW_PHASES = 128
# The bits of a weight, and of what is left of it for the second sum.
BITS, FINE_BITS = 22, 7

# Numbers with a fraction that are held at a time; more leave the processor's cache.
CHUNK = 1 << 20

# Height and width, before and after -> whether the vertical pass comes first.
OrderRule = Callable[[int, int, int, int], bool]
# What versions of Pillow do: up to 12.1, up to 12.x, from 13.0.
ORDER_RULES: tuple[OrderRule, ...] = (
    lambda height, width, new_height, new_width: False,
    lambda height, width, new_height, new_width: height > 100 * width and new_height < height,
    lambda height, width, new_height, new_width: (
        height - new_height > 2 * max(0, width - new_width)
    ),
)
# Sizes that tell them apart.
ORDER_PROBES = ((40, 20, 20, 18), (1010, 10, 1005, 5), (1010, 10, 500, 8), (60, 30, 58, 20))


class Side(NamedTuple):
    """A side is made `size` pixels long, of which `n_kept` from `first` on are kept."""

    size: int
    first: int
    n_kept: int


class _Taps(NamedTuple):
    """Of the pixels from `first` to `last`, each new one is a weighted sum; or themselves."""

    first: int
    last: int
    places: Int[Tensor, "new tap"] | None = None
    weights: Float[Tensor, "new tap"] | None = None
    fine: Float[Tensor, "new tap"] | None = None


def resize_picture(
    image: Image.Image, rows: Side, columns: Side, mode: InterpolationMode
) -> UInt8[Tensor, "3 height width"]:
    """A part of a resized picture in RGB, as PIL resizes it.

    Raises:
        ConfigError: where this version of Pillow makes its passes in another order.
    """
    is_vertical_first = order_rule()(image.height, image.width, rows.size, columns.size)
    return _resize(image, rows, columns, mode, is_vertical_first)


@cache
def order_rule() -> OrderRule:
    """Which of the rules the installed Pillow follows: found by resizing noise."""
    for rule in ORDER_RULES:
        if all(_follows(rule, *probe) for probe in ORDER_PROBES):
            return rule
    raise ConfigError(
        f"decode='fast' does not know in which order Pillow {PIL.__version__} resizes rows and "
        "columns. Choose decode='exact' or another version"
    )


def _follows(rule: OrderRule, height: int, width: int, new_height: int, new_width: int) -> bool:
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    image = Image.fromarray(noise)
    theirs = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    ours = _resize(
        image,
        Side(new_height, 0, new_height),
        Side(new_width, 0, new_width),
        InterpolationMode.BICUBIC,
        rule(height, width, new_height, new_width),
    )
    return int(np.abs(theirs.transpose(2, 0, 1).astype(int) - ours.numpy()).max()) <= 1


def _resize(
    image: Image.Image,
    rows: Side,
    columns: Side,
    mode: InterpolationMode,
    is_vertical_first: bool,
) -> UInt8[Tensor, "3 height width"]:
    vertical, horizontal = _taps(image.height, rows, mode), _taps(image.width, columns, mode)
    box = horizontal.first, vertical.first, horizontal.last, vertical.last
    if is_vertical_first:
        between = [_sum_rows(part, vertical) for part in _strips(image, box, is_upright=True)]
        new = _sum_rows(torch.cat(between, dim=1).T, horizontal).T
    else:
        between = [_sum_rows(part, horizontal) for part in _strips(image, box, is_upright=False)]
        new = _sum_rows(torch.cat(between, dim=1).T, vertical)
    colours = new.reshape(-1).view(torch.uint8).view(*new.shape, 4)[..., :3]
    return colours.permute(2, 0, 1).contiguous()


def _strips(
    image: Image.Image, box: tuple[int, int, int, int], *, is_upright: bool
) -> Iterator[Int32[Tensor, "along across"]]:
    """A part of the picture, in strips along which a pass goes: columns, or rows on their side.

    PIL holds four bytes per pixel, which are fast to turn on their side as one number.
    """
    left, top, right, bottom = box
    along, first, last = (bottom - top, left, right) if is_upright else (right - left, top, bottom)
    step = max(1, CHUNK // (4 * along))
    if step >= last - first:  # a crop would be one copy more
        yield _numbers(image, is_upright, top, bottom, left, right)
        return
    for start in range(first, last, step):
        stop = min(start + step, last)
        strip = (start, top, stop, bottom) if is_upright else (left, start, right, stop)
        yield _numbers(image.crop(strip), is_upright)


def _numbers(
    image: Image.Image,
    is_upright: bool,
    top: int = 0,
    bottom: int | None = None,
    left: int = 0,
    right: int | None = None,
) -> Int32[Tensor, "along across"]:
    """A part of a picture, one number per pixel, upright or on its side."""
    content = np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.int32)
    pixels = content.reshape(image.height, image.width)[top:bottom, left:right]
    # A copy, since the bytes are read-only.
    return torch.from_numpy(pixels.copy() if is_upright else pixels.T.copy())


def _sum_rows(pixels: Int32[Tensor, "row column"], taps: _Taps) -> Int32[Tensor, "new column"]:
    """One pass; the four bytes of a pixel are summed each for itself."""
    if taps.places is None:
        return pixels
    parts = []
    for part in pixels.split(max(1, CHUNK // (4 * len(pixels))), dim=1):
        values = part.reshape(-1).view(torch.uint8).view(len(part), -1).float()
        sums = embedding_bag(taps.places, values, mode="sum", per_sample_weights=taps.weights)
        if taps.fine is not None:
            rest = embedding_bag(taps.places, values, mode="sum", per_sample_weights=taps.fine)
            sums.add_(rest.floor_(), alpha=2.0 ** (FINE_BITS - BITS))
        # Halves go up, as in PIL; by way of 16 bits, since torch's cast to bytes is slow.
        parts.append(sums.add_(0.5).to(torch.int16).clamp_(0, 255).to(torch.uint8))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(torch.int32)


@lru_cache(maxsize=4096)
def _taps(length: int, side: Side, mode: InterpolationMode) -> _Taps:
    """PIL's weights: the filter, as wide as a new pixel where those are larger, adds up to 1."""
    if side.size == length:
        return _Taps(side.first, side.first + side.n_kept)
    reach, weigh = (2.0, _bicubic) if mode is InterpolationMode.BICUBIC else (1.0, _bilinear)
    scale = length / side.size
    width = max(scale, 1.0)
    centre = (np.arange(side.first, side.first + side.n_kept) + 0.5) * scale
    first = np.maximum((centre - reach * width + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach * width + 0.5).astype(np.int64), length)
    places = first[:, None] + np.arange((last - first).max())
    weights = weigh(np.abs(places - centre[:, None] + 0.5) / width) * (places < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    units = np.rint(weights * 2**BITS)
    fine = None
    if side.size // math.gcd(side.size, length) <= FEW_PHASES:
        fine = torch.from_numpy((units % 2**FINE_BITS / 2**FINE_BITS).astype(np.float32))
        units -= units % 2**FINE_BITS
    start, stop = int(first.min()), int(last.max())
    return _Taps(
        start,
        stop,
        torch.from_numpy(np.minimum(places, stop - 1) - start),
        torch.from_numpy((units / 2**BITS).astype(np.float32)),
        fine,
    )


def _bilinear(distance: Shaped[np.ndarray, "new tap"]) -> Shaped[np.ndarray, "new tap"]:
    return np.maximum(1 - distance, 0)


def _bicubic(distance: Shaped[np.ndarray, "new tap"]) -> Shaped[np.ndarray, "new tap"]:
    """Keys 1981 with a = -1/2."""
    inner = (1.5 * distance - 2.5) * distance**2 + 1
    outer = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, inner, np.where(distance < 2, outer, 0))
