"""Decode images in worker processes; a broken one is reported, never silently replaced."""

import io
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipattr.data.shards import BadSample, Sample

Preprocess = Callable[[Image.Image], Float[Tensor, "channel height width"]]
# What PIL raises for damaged or oversized files, each seen in the wild.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageBatch(NamedTuple):
    """Preprocessed images, the rows of the index they come from, and the broken samples."""

    rows: Int[Tensor, " batch"]
    images: Float[Tensor, "batch channel height width"]
    bad: list[BadSample]


class ImageDataset(Dataset[tuple[int, Tensor | BadSample]]):
    """Item i is the preprocessed image of sample i, or a BadSample."""

    def __init__(self, samples: list[Sample], preprocess: Preprocess) -> None:
        self.samples = samples
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[int, Tensor | BadSample]:
        sample = self.samples[row]
        name = sample.image_field
        assert name is not None, "keep_complete lets no sample without an image through"
        try:
            with Image.open(io.BytesIO(sample.read(name))) as image:
                return row, self.preprocess(image.convert("RGB"))
        except DECODE_ERRORS as error:
            # PIL would name its file, which is an address in memory here.
            is_unknown = isinstance(error, UnidentifiedImageError)
            found = "no known image format" if is_unknown else error
            reason = f"{name} cannot be decoded: {found}"
            return row, BadSample(str(sample.shard), sample.key, reason)


def collate(items: list[tuple[int, Tensor | BadSample]]) -> ImageBatch:
    """Stack the good images of a batch."""
    good = [(row, item) for row, item in items if isinstance(item, Tensor)]
    return ImageBatch(
        rows=torch.tensor([row for row, _ in good], dtype=torch.int64),
        images=torch.stack([image for _, image in good]) if good else torch.zeros(0, 3, 1, 1),
        bad=[item for _, item in items if isinstance(item, BadSample)],
    )


def image_loader(
    samples: list[Sample], preprocess: Preprocess, *, batch_size: int, workers: int
) -> DataLoader[tuple[int, Tensor | BadSample]]:
    """Every sample exactly once, in order."""
    return DataLoader(
        ImageDataset(samples, preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
