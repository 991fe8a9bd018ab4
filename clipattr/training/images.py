"""A datamodule over image shards: decoded in worker processes, normalised where the model is."""

from collections.abc import Callable

from torch import Tensor

from clipattr.data.images import ImageBatch
from clipattr.data.pixels import Pixels
from clipattr.data.shards import BadSample
from clipattr.training.streams import Place, Stream, StreamDataModule


class ImageDataModule(StreamDataModule):
    """Serves (images, field, ...) of the stream that `open_images` opens in every process.

    What was broken waits in `new_bad` until a `BadSampleLimit` takes it.
    """

    def __init__(
        self,
        open_images: Callable[[Place], Stream[ImageBatch]],
        pixels: Pixels,
        *,
        fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.open_images = open_images
        self.pixels = pixels
        self.fields = fields
        self.new_bad: list[BadSample] = []

    def open_stream(self, place: Place) -> Stream[ImageBatch]:
        """The images of this process."""
        return self.open_images(place)

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Broken samples are noted, and stay on this side."""
        self.new_bad += batch.bad
        return batch

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> tuple[Tensor, ...]:
        """Pixels become numbers on the device: a quarter of the bytes was sent."""
        return self.pixels.normalise(batch.images), *(batch.fields[name] for name in self.fields)
