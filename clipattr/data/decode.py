"""The geometry of a model's preprocessing: as the model has it, and part by part."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, ResizeKeepRatio
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from clipattr.data.images import ImageError, Size
from clipattr.data.resize import Side, order_rule, resize_picture
from clipattr.errors import ConfigError

Transform = Callable[[Image.Image], Image.Image]

# open_clip knows no other.
MODES = (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR)


class Geometry:
    """The transforms of a picture that stand before it becomes a tensor.

    Where they are those of open_clip's models (resize, then crop or pad, each or none), their
    parts are known; otherwise there is `exact` alone.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self._transforms = list(transforms)
        parts: list[object] = [
            transform for transform in transforms if not isinstance(transform, MaybeConvertMode)
        ]
        self._resize: Resize | ResizeKeepRatio | None = None
        self._crop: CenterCrop | CenterCropOrPad | None = None
        if parts and _is_known_resize(parts[0]):
            self._resize = parts.pop(0)  # type: ignore[assignment]
        if parts and isinstance(parts[0], (CenterCrop, CenterCropOrPad)):
            self._crop = parts.pop(0)  # type: ignore[assignment]
        self._unknown = parts

    def check_known(self, decode: str) -> None:
        """ConfigError if the geometry, or the order of Pillow's passes, is another."""
        if self._unknown:
            raise ConfigError(
                f"decode={decode!r} does not know how to do {self._unknown[0]}; it does what "
                "open_clip's models have: Resize or ResizeKeepRatio (bicubic or bilinear, without "
                "chance or max_size), then CenterCrop or CenterCropOrPad. Choose decode='exact'"
            )
        order_rule()

    def exact(self, image: Image.Image) -> UInt8[Tensor, "channel height width"]:
        """As the model has it, bit for bit."""
        self.needed(image.size)
        for transform in self._transforms:
            image = transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def fast(self, image: Image.Image) -> UInt8[Tensor, "channel height width"]:
        """The same, at most one grey level off; what is cropped away is not computed."""
        width, height = self.needed(image.size)
        mode = MODES[0] if self._resize is None else self._resize.interpolation
        if self._crop is None:
            return resize_picture(image, Side(height, 0, height), Side(width, 0, width), mode)
        rows, columns = _kept(height, self._crop.size[0]), _kept(width, self._crop.size[1])
        pixels = resize_picture(image, rows, columns, mode)
        is_whole = pixels.shape[1:] == tuple(self._crop.size)
        return pixels if is_whole else self._crop(pixels)  # which pads it

    def needed(self, size: Size) -> Size:
        """The size to which a picture of another is resized.

        Raises:
            ImageError: where nothing would be left of a side.
        """
        if self._resize is None:
            return size
        needed = _resized(self._resize, size)
        if 0 in needed:
            raise ImageError(f"{size[0]} x {size[1]} pixels would be resized to {needed}")
        return needed


def _is_known_resize(transform: object) -> bool:
    if isinstance(transform, Resize):
        return transform.max_size is None and transform.interpolation in MODES
    if isinstance(transform, ResizeKeepRatio):
        by_chance = transform.random_scale_prob > 0 or transform.random_aspect_prob > 0
        return not by_chance and transform.interpolation in MODES
    return False


def _resized(transform: Resize | ResizeKeepRatio, size: Size) -> Size:
    """What the transform makes of width and height."""
    width, height = size
    if isinstance(transform, ResizeKeepRatio):
        ratios = height / transform.size[0], width / transform.size[1]
        ratio = max(ratios) * transform.longest + min(ratios) * (1 - transform.longest)
        return round(width / ratio), round(height / ratio)
    sides = [transform.size] if isinstance(transform.size, int) else list(transform.size)
    if len(sides) == 2:
        return sides[1], sides[0]
    long = int(sides[0] * max(size) / min(size))
    return (sides[0], long) if width <= height else (long, sides[0])


def _kept(size: int, wanted: int) -> Side:
    """What a crop at the centre leaves of a side; the whole of one that is too short."""
    if size <= wanted:
        return Side(size, 0, size)
    return Side(size, round((size - wanted) / 2), wanted)
