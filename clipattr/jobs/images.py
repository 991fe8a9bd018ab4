"""Images for training: of shards that are indexed, or streamed because they are too many."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clipattr.config.choices import Mode
from clipattr.config.inputs import TrainingImagesConfig
from clipattr.data.image_stream import ImageStream
from clipattr.data.images import ImageBatch
from clipattr.data.pixels import Pixels
from clipattr.data.streaming import StreamedImages
from clipattr.errors import ConfigError
from clipattr.jobs.shards import count_workers, find_images, locate_shards
from clipattr.training.bad_samples import BadSampleLimit
from clipattr.training.images import ImageDataModule
from clipattr.training.streams import Place, Stream

Fields = Mapping[str, Callable[[Mapping[str, bytes]], Tensor]]
SHUFFLED_PER_WORKER = 5000


class TrainingImages(NamedTuple):
    """The datamodule, its limit on broken samples, and what is known of the data beforehand."""

    data: ImageDataModule
    limit: BadSampleLimit
    n_images: int | None
    fingerprint: str | None


def open_training_images(
    settings: TrainingImagesConfig,
    pixels: Pixels,
    fields: Fields,
    *,
    needed: tuple[str, ...],
    folder: Path,
    seed: int,
    n_steps: int,
    progress: bool,
) -> TrainingImages:
    """The images of a config, in the mode that it asks for.

    Args:
        settings: the shards, and how they are read.
        pixels: the model's preprocessing.
        fields: what else of a sample a batch has, as functions of its raw bytes.
        needed: fields that a sample must have.
        folder: of the run, where broken samples are listed.
        seed: of the order.
        n_steps: of the training.
        progress: show a bar while the shards are indexed.
    """
    n_images, fingerprint, bad = None, None, []
    if settings.mode is Mode.indexed:
        index, bad = find_images(settings.shards, settings, needed, progress=progress)
        n_images, fingerprint = len(index), index.fingerprint
        _check_batch(settings, n_images)
        stream = partial(ImageStream, index, window=settings.shuffle)
    else:
        shards = locate_shards(settings.shards, settings)
        shuffle = settings.shuffle or SHUFFLED_PER_WORKER
        stream = partial(StreamedImages, shards, shuffle=shuffle)

    def open_images(place: Place) -> Stream[ImageBatch]:
        return stream(
            reader=pixels,
            batch_size=settings.batch_size,
            seed=seed,
            length=n_steps,
            rank=place.rank,
            world_size=place.world_size,
            workers=count_workers(settings, place.local_world_size),
            fields=fields,
            pin_memory=place.pin_memory,
        )

    data = ImageDataModule(open_images, pixels, fields=tuple(fields))
    limit = BadSampleLimit(
        data,
        folder,
        max_bad_fraction=settings.max_bad_fraction,
        n_images=None if n_images is None else n_images + len(bad),
        known=bad,
        batch_size=settings.batch_size,
    )
    return TrainingImages(data, limit, n_images, fingerprint)


def _check_batch(settings: TrainingImagesConfig, n_images: int) -> None:
    if n_images < settings.batch_size:
        raise ConfigError(
            f"data.batch_size={settings.batch_size}: data.shards={settings.shards} has {n_images} "
            "usable images; choose a smaller batch"
        )
