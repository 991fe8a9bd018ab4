"""Decode images in worker processes; a broken one is reported, never silently replaced."""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipattr.data.shards import BadSample, Sample
from clipattr.errors import DataError

Preprocess = Callable[[Image.Image], Float[Tensor, "channel height width"]]
# Whatever the field is called, nothing else is opened: PIL would hand PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP")
# The size from which PIL warns of a bomb: 268 MB of pixels from a file of a few kB.
MAX_PIXELS = 89_478_485
# A strip of 2 x 20000 pixels, whose short side is made 224, would become one of 224 x 2240000.
MAX_ASPECT = 500
# What PIL's plugins raise: found by decoding a million files that were damaged on purpose.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    AssertionError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@runtime_checkable
class Samples(Protocol):
    """A list of samples, or a `ShardIndex`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample: ...


class ImageBatch(NamedTuple):
    """Preprocessed images, the rows of the index they come from, and the broken samples."""

    rows: Int[Tensor, " batch"]
    images: Float[Tensor, "batch channel height width"]
    bad: list[BadSample]


def open_image(content: bytes) -> Image.Image:
    """The picture as PIL opens it: its header is read, no pixel is decoded.

    Raises:
        ValueError: for a picture that would need too much memory.
        OSError: and the others of DECODE_ERRORS, for a damaged file or another format.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        image.close()
        raise ValueError(
            f"{width} x {height} pixels; allowed are {MAX_PIXELS} in all, and "
            f"{MAX_ASPECT} times as many on one side as on the other"
        )
    return image


def decode_image(content: bytes) -> Image.Image:
    """The first picture of the file in RGB; alpha is dropped, EXIF rotation not applied.

    As open_clip has it, but for two: 16-bit grey keeps its upper byte, as 16-bit colour does (PIL
    would make all but the darkest 0.4 % white), and palettes and pictures with alpha are converted
    before they are resized. Errors are those of `open_image`.
    """
    with open_image(content) as image:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # the same colours, without a warning
        return image.convert("RGB")


def describe_error(error: Exception) -> str:
    """What one of DECODE_ERRORS says."""
    if isinstance(error, UnidentifiedImageError):  # it names the file: an address in memory here
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) or repr(error)


class ImageDataset(Dataset[tuple[int, Tensor | BadSample]]):
    """Item i is the preprocessed image of sample i, or a BadSample."""

    def __init__(self, samples: Samples, preprocess: Preprocess) -> None:
        self.samples = samples
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadSample]:
        sample = self.samples[row]
        name = sample.image_field
        assert name is not None, "`select_usable` lets no sample without an image through"
        try:
            content = sample.read(name)
        except (OSError, DataError) as error:
            return row, BadSample(str(sample.shard), sample.key, f"{name} cannot be read: {error}")
        try:
            image = decode_image(content)
        except DECODE_ERRORS as error:
            reason = f"{name} cannot be decoded: {describe_error(error)}"
            return row, BadSample(str(sample.shard), sample.key, reason)
        return row, self.preprocess(image)


def collate(items: list[tuple[int, Tensor | BadSample]]) -> ImageBatch:
    """Stack the good images of a batch."""
    good = [(row, item) for row, item in items if isinstance(item, Tensor)]
    return ImageBatch(
        rows=torch.tensor([row for row, _ in good], dtype=torch.int64),
        images=torch.stack([image for _, image in good]) if good else torch.zeros(0, 3, 1, 1),
        bad=[item for _, item in items if isinstance(item, BadSample)],
    )


def image_loader(
    samples: Samples, preprocess: Preprocess, *, batch_size: int, workers: int
) -> DataLoader[tuple[int, Tensor | BadSample]]:
    """Every sample exactly once, in order."""
    return DataLoader(
        ImageDataset(samples, preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
