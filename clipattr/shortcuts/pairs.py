"""Counterfactual pairs: an image with and without a cue, and a placebo as a control.

A cue is pasted (the image itself is the side without), or a region that holds the cue is removed
(the image itself is the side with it).
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional

from clipattr.errors import DataError
from clipattr.shortcuts.marks import Draws
from clipattr.shortcuts.overlay import Image3, Overlay, blend, draw_overlay, make_placebo

Images = UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
PLACEBO_TRIES = 200


class Fill(Enum):
    """What a removed region is filled with."""

    mean = "mean"
    blur = "blur"


class Pairs(NamedTuple):
    """The same images three times.

    The placebo goes with the side that is the image itself: beside a pasted cue, it is the image
    with a placebo; beside a removed region, the image without another region of its shape.
    """

    keys: list[str]
    without: Images
    with_cue: Images
    placebo: Images


def paste_pairs(images: Images, keys: Sequence[str], overlay: Overlay, *, seed: int = 0) -> Pairs:
    """Each image without and with the overlay. Another batch or order gives the same pairs."""
    _check_keys(images, keys)
    height, width = images.shape[2:]
    with_cue: list[Tensor] = []
    placebo: list[Tensor] = []
    for image, key in zip(images, keys, strict=True):
        layer = draw_overlay(overlay, key=key, seed=seed, height=height, width=width)
        with_cue.append(blend(image, layer))
        placebo.append(blend(image, make_placebo(image, overlay, key=key, seed=seed)))
    return Pairs(list(keys), images, torch.stack(with_cue), torch.stack(placebo))


def region_pairs(
    images: Images,
    keys: Sequence[str],
    regions: Bool[Tensor, "batch height width"],
    *,
    fill: Fill = Fill.blur,
    seed: int = 0,
) -> Pairs:
    """Each image with the region that holds the cue, and without it."""
    _check_keys(images, keys)
    without: list[Tensor] = []
    placebo: list[Tensor] = []
    for image, key, region in zip(images, keys, regions, strict=True):
        without.append(remove_region(image, region, fill, name=key))
        elsewhere = move_region(region, key=key, seed=seed)
        placebo.append(remove_region(image, elsewhere, fill, name=key))
    return Pairs(list(keys), torch.stack(without), images, torch.stack(placebo))


def remove_region(
    image: Image3, region: Bool[Tensor, "height width"], fill: Fill = Fill.blur, *, name: str = ""
) -> Image3:
    """The image with the region filled from its surroundings; all other pixels keep their bits.

    Fill.mean: one colour, the mean of the pixels around the region (up to a tenth of the shorter
    side away). Fill.blur: from the rim inwards, each pixel the mean of its known neighbours, which
    continues slow changes of colour and invents no detail.
    """
    if not region.any():
        return image
    if region.all():
        raise DataError(f"{name}: the region is the whole image, nothing to fill it from is left")
    pixels = image.double()
    filled = _fill_with_mean(pixels, region) if fill is Fill.mean else _fill_inwards(pixels, region)
    if image.dtype == torch.uint8:
        filled = filled.round().clamp(0, 255)
    return torch.where(region, filled.to(image.dtype), image)


def _fill_with_mean(
    pixels: Float[Tensor, "3 height width"], region: Bool[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    reach = max(1, min(region.shape) // 10)
    around = _grow(region, reach) & ~region
    return pixels[:, around].mean(1)[:, None, None].expand_as(pixels)


def _fill_inwards(
    pixels: Float[Tensor, "3 height width"], region: Bool[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """Rings of one pixel; then the inside is evened out, its surroundings held (Laplace)."""
    known = ~region
    filled = torch.where(known, pixels, 0.0)
    while not known.all():
        weight = _sum_around(known[None].double())
        mean = _sum_around(filled) / weight.clamp(min=1)
        ring = ~known & (weight[0] > 0)
        filled = torch.where(ring, mean, filled)
        known = known | ring
    ones = torch.ones_like(filled[:1])
    n_around = _sum_around(ones)
    for _ in range(50):
        filled = torch.where(region, _sum_around(filled) / n_around, filled)
    return filled


def _sum_around(values: Float[Tensor, "c height width"]) -> Float[Tensor, "c height width"]:
    """Over the 3 x 3 pixels around each; beyond the edge there is nothing."""
    return functional.avg_pool2d(values[:, None], 3, stride=1, padding=1)[:, 0] * 9


def _grow(region: Bool[Tensor, "height width"], reach: int) -> Bool[Tensor, "height width"]:
    grown: Float32[Tensor, "1 1 height width"] = functional.max_pool2d(
        region[None, None].float(), 2 * reach + 1, stride=1, padding=reach
    )
    return grown[0, 0] > 0


def move_region(
    region: Bool[Tensor, "height width"], *, key: str, seed: int
) -> Bool[Tensor, "height width"]:
    """The same shape at another place, drawn by seed and key, that shares no pixel with it."""
    rows, columns = (region.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return region
    draws = Draws(seed, f"region\0{key}")
    shape = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    high, wide = (n - side for n, side in zip(region.shape, shape.shape, strict=True))
    for attempt in range(PLACEBO_TRIES):
        top = int(draws.uniform(f"top {attempt}", 0.0, high + 1.0))
        left = int(draws.uniform(f"left {attempt}", 0.0, wide + 1.0))
        moved = torch.zeros_like(region)
        moved[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        if not (moved & region).any():
            return moved
    raise DataError(
        f"{key}: the region covers {region.double().mean().item():.0%} of the image; no place for "
        "a placebo of its shape beside it was found"
    )


def _check_keys(images: Images, keys: Sequence[str]) -> None:
    if len(images) != len(keys):
        raise DataError(f"{len(images)} images and {len(keys)} keys: each image needs its own")
    if images.is_floating_point() and len(images):
        low, high = images.aminmax()
        if low < 0 or high > 1:
            raise DataError(
                f"images lie in [{low:.3g}, {high:.3g}]: must be uint8 or between 0 and 1, as they "
                "are before the model's normalisation"
            )
