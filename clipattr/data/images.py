"""Decode images in worker processes; a broken one is reported, never silently replaced."""

import hashlib
import io
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipattr.data.shards import BadSample, Sample
from clipattr.data.transfer import TransferError
from clipattr.errors import DataError

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


class ImageError(Exception):
    """A file that cannot be decoded, and why."""


Edit = Callable[[Image.Image], Image.Image]
Size = tuple[int, int]  # width and height, as PIL has it


class Augment(NamedTuple):
    """A change of pictures before they are resized, by chance, but the same for a key for ever.

    Neither the epoch nor the process that reads a sample has a say: what is drawn for it depends
    on the seed and the key alone.

    Attributes:
        name: says what is done, with its settings.
        change: of a picture in RGB, which it may edit in place. What it raises stops the run.
        seed: of all draws.
    """

    name: str
    change: Callable[[Image.Image, np.random.Generator], Image.Image]
    seed: int

    @property
    def fingerprint(self) -> str:
        """What decides the pictures, for the identity of what is made from them."""
        return f"{self.name} (seed {self.seed})"

    def edit_of(self, key: str) -> Edit:
        """The change of one sample."""
        return partial(_edit, self, key)


def _edit(augment: Augment, key: str, image: Image.Image) -> Image.Image:
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    generator = np.random.Generator(np.random.Philox(key=[augment.seed, number]))
    return augment.change(image, generator)


@runtime_checkable
class Reader(Protocol):
    """Makes pixels of a file, or raises ImageError: `clipattr.data.pixels.Pixels`."""

    def read(
        self, content: bytes, edit: Edit | None = None
    ) -> UInt8[Tensor, "channel height width"]:
        """The pixels; the picture is edited before it is resized."""
        ...


class ImageBatch(NamedTuple):
    """Pixels, the rows of the index and the keys they come from, and the broken samples.

    `fields` holds what functions made of the other fields of the same samples, one row each.
    """

    rows: Int[Tensor, " batch"]
    images: UInt8[Tensor, "batch channel height width"]
    keys: list[str]
    bad: list[BadSample]
    fields: dict[str, Tensor] = {}


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


def decode_image(content: bytes, needed: Callable[[Size], Size] | None = None) -> Image.Image:
    """The first picture of the file in RGB; alpha is dropped, EXIF rotation not applied.

    As open_clip has it, but for two: 16-bit grey keeps its upper byte, as 16-bit colour does (PIL
    would make all but the darkest 0.4 % white), and palettes, CMYK and alpha are converted
    before they are resized. Errors are those of `open_image`.

    A JPEG is decoded at a half, a fourth or an eighth of its size where that is no smaller than
    what `needed` makes of its size.
    """
    with open_image(content) as image:
        if needed is not None:
            image.draft(None, needed(image.size))
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # the same colours, without a warning
        if image.mode == "RGB":
            image.load()
            return image  # a copy would cost as much as a tenth of the decoding
        return image.convert("RGB")


def describe_error(error: Exception) -> str:
    """What one of DECODE_ERRORS says."""
    if isinstance(error, UnidentifiedImageError):  # it names the file: an address in memory here
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) or repr(error)


class ImageDataset(Dataset[tuple[int, str, Tensor | BadSample]]):
    """Item i is the row i, the key and the pixels of sample i, or a BadSample."""

    def __init__(self, samples: Samples, reader: Reader, augment: Augment | None = None) -> None:
        self.samples = samples
        self.reader = reader
        self.augment = augment

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[int, str, Tensor | BadSample]:
        sample = self.samples[row]
        return row, sample.key, read_pixels(sample, self.reader, self.augment)


def read_pixels(
    sample: Sample, reader: Reader, augment: Augment | None = None
) -> UInt8[Tensor, "channel height width"] | BadSample:
    """The pixels of a sample's image, or what is wrong with it."""
    content = read_image(sample)
    if isinstance(content, BadSample):
        return content
    try:
        return reader.read(content, augment.edit_of(sample.key) if augment else None)
    except ImageError as error:
        return undecodable(sample, str(error))


def read_image(sample: Sample) -> bytes | BadSample:
    """The bytes of a sample's image file, or why they cannot be read."""
    name = sample.image_field
    assert name is not None, "`select_usable` lets no sample without an image through"
    try:
        return sample.read(name)
    except TransferError:  # an outage must not leave holes in a cache
        raise
    except (OSError, DataError) as error:
        return BadSample(str(sample.shard), sample.key, f"{name} cannot be read: {error}")


def undecodable(sample: Sample, reason: str) -> BadSample:
    """The report of an image file that is broken."""
    text = f"{sample.image_field} cannot be decoded: {reason}"
    return BadSample(str(sample.shard), sample.key, text)


def collate(items: list[tuple[int, str, Tensor | BadSample]]) -> ImageBatch:
    """Stack the good images of a batch."""
    good = [(row, key, item) for row, key, item in items if isinstance(item, Tensor)]
    empty = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return ImageBatch(
        rows=torch.tensor([row for row, _, _ in good], dtype=torch.int64),
        images=torch.stack([image for _, _, image in good]) if good else empty,
        keys=[key for _, key, _ in good],
        bad=[item for _, _, item in items if isinstance(item, BadSample)],
    )


def default_workers(local_world_size: int = 1) -> int:
    """Decoding processes of each rank: the cores of this machine, less one each that trains."""
    # What the scheduler lets us have, which may be less than the machine has; macOS cannot say.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)


def image_loader(
    samples: Samples,
    reader: Reader,
    *,
    batch_size: int,
    workers: int,
    augment: Augment | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[tuple[int, str, Tensor | BadSample]]:
    """Every sample exactly once over all ranks, in order; a rank may have none."""
    first, last = len(samples) * rank // world_size, len(samples) * (rank + 1) // world_size
    return DataLoader(
        ImageDataset(samples, reader, augment),
        batch_size=batch_size,
        sampler=range(first, last),
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # else each pass draws from the one that training draws from
    )
