"""Endless batches of decoded images for training: which rows they hold depends on t alone.

The dataset's item is the number of a batch, so that a worker process has no state: any number of
them, on any number of ranks, serves the same global batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipattr.data.images import Augment, ImageBatch, Reader, read_pixels
from clipattr.data.index import ShardIndex
from clipattr.data.lanes import LaneOrder
from clipattr.data.order import position_of, rows_of_step
from clipattr.data.shards import BadSample, Sample
from clipattr.data.transfer import TransferError
from clipattr.errors import ConfigError, DataError

FieldFunction = Callable[[Mapping[str, bytes]], Tensor]

# Places of the index that a batch is drawn from, where it is read in windows.
LANES = 32
# How often another row is drawn for a broken sample.
DRAWS = 100
# What a random stream is for; `clipattr.data.lanes` has 0 to 2.
SUBSTITUTE = 3


class ImageStream:
    """Endless shuffled batches, a function of the seed and the batch's number t alone.

    Iterating goes on with batch t and ends when t is a multiple of `length` again, as in
    `clipattr.data.stream.ActivationStream`; t counts the batches that were delivered.

    The rows are a permutation of all, another one in each pass over the index (`rows_of_step`), or
    with a window those of a `LaneOrder` whose blocks are the shards: for disks and networks on
    which reading here and there is slow. What is left over at the end of a pass, n mod batch_size
    rows, differs from pass to pass.

    A batch is always full: a broken sample is reported in `bad`, and another row takes its place.
    """

    def __init__(
        self,
        index: ShardIndex,
        reader: Reader,
        *,
        batch_size: int,
        seed: int,
        length: int,
        window: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: int = 0,
        fields: Mapping[str, FieldFunction] | None = None,
        augment: Augment | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is read before the first batch is asked for.

        Args:
            index: of samples that have an image; at least one batch of them.
            reader: makes pixels of a file.
            batch_size: rows of a global batch; this rank serves an equal part of them.
            seed: of the order.
            length: batches per iteration.
            window: rows among which is shuffled; None: all.
            rank: of this process.
            world_size: the number of processes; it divides batch_size.
            workers: decoding processes.
            start: first batch.
            fields: what makes tensors of the raw fields of a sample, or a ValueError of a bad one.
            augment: change of the pictures.
            pin_memory: put batches where a GPU can fetch them while it computes.
        """
        _check_batch(batch_size, len(index), world_size)
        self.length = length
        self.t = start
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "window": window,
            "index": index.fingerprint,
            "augment": augment.fingerprint if augment else None,
        }
        share = batch_size // world_size
        self._batches = _Batches(
            index,
            reader,
            _Order(index, batch_size, seed, window),
            range(rank * share, (rank + 1) * share),
            fields or {},
            augment,
        )
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[ImageBatch]:
        stop = (self.t // self.length + 1) * self.length
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(self.t, stop),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else it draws from the one that training draws from
        )
        for batch in loader:
            self.t += 1
            yield batch

    def state_dict(self) -> dict[str, int | str | None]:
        """The position, and what the order depends on; the same on every rank."""
        return {"t": self.t, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a saved position; another order is refused by the name of what differs."""
        self.t = position_of(state, self._identity)


def _check_batch(batch_size: int, n_images: int, world_size: int) -> None:
    if batch_size % world_size:
        raise ConfigError(f"batch_size={batch_size} does not divide by {world_size} devices")
    if n_images < batch_size:
        raise ConfigError(
            f"batch_size={batch_size}, but there are {n_images} images: choose a smaller batch or "
            "more data"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Order:
    """The rows of global batch t."""

    def __init__(self, index: ShardIndex, batch_size: int, seed: int, window: int | None) -> None:
        self.n_rows = len(index)
        self.batch_size = batch_size
        self.seed = seed
        self.lanes: LaneOrder | None = None
        if window is not None:
            # Where the shard changes: also right for an index that was put in another order.
            borders = np.flatnonzero(np.diff(index.shard_numbers)) + 1
            self.lanes = LaneOrder(
                np.concatenate([[0], borders, [len(index)]]),
                batch_size=batch_size,
                seed=seed,
                lanes=math.gcd(batch_size, LANES),
                window=window,
            )

    def rows(self, t: int) -> Int64[np.ndarray, " batch"]:
        if self.lanes is not None:
            return self.lanes.rows_of_batch(t, range(self.lanes.lanes))
        return rows_of_step(self.n_rows, self.batch_size, self.seed, t).numpy()

    def substitutes(self, t: int, place: int) -> list[int]:
        """What is tried, one after the other, at a place of a batch whose sample is broken."""
        philox = np.random.Philox(key=[self.seed, t], counter=[0, SUBSTITUTE, place, 0])
        return np.random.Generator(philox).integers(self.n_rows, size=DRAWS).tolist()


class _Read(NamedTuple):
    row: int
    key: str
    image: Tensor
    fields: dict[str, Tensor]


class _Batches(Dataset[ImageBatch]):
    """Item t is this rank's share of batch t."""

    def __init__(
        self,
        index: ShardIndex,
        reader: Reader,
        order: _Order,
        places: range,
        fields: Mapping[str, FieldFunction],
        augment: Augment | None,
    ) -> None:
        self.index = index
        self.reader = reader
        self.order = order
        self.places = places
        self.fields = fields
        self.augment = augment

    def __getitem__(self, t: int) -> ImageBatch:
        rows = self.order.rows(t).tolist()
        bad: list[BadSample] = []
        found = [self._find(t, place, rows[place], bad) for place in self.places]
        return ImageBatch(
            rows=torch.tensor([item.row for item in found], dtype=torch.int64),
            images=torch.stack([item.image for item in found]),
            keys=[item.key for item in found],
            bad=bad,
            fields={
                name: torch.stack([item.fields[name] for item in found]) for name in self.fields
            },
        )

    def _find(self, t: int, place: int, row: int, bad: list[BadSample]) -> _Read:
        """The sample of a row, or of the first good one that is drawn for it."""
        item = self._read(row)
        if isinstance(item, _Read):
            return item
        bad.append(item)
        for substitute in self.order.substitutes(t, place):
            item = self._read(substitute)
            if isinstance(item, _Read):
                return item
            bad.append(item)
        raise DataError(
            f"{DRAWS} samples in a row cannot be used; the last is {item.key!r} in {item.shard}: "
            f"{item.reason}"
        )

    def _read(self, row: int) -> _Read | BadSample:
        sample = self.index.sample(row)
        contents, fields = _Contents(sample), {}
        for name, function in self.fields.items():
            try:
                fields[name] = function(contents)
            except TransferError:
                raise
            except (ValueError, OSError) as error:  # DataError and UnicodeDecodeError among them
                reason = f"{name} cannot be made of its fields: {error}"
                return BadSample(str(sample.shard), sample.key, reason)
        image = read_pixels(sample, self.reader, self.augment)
        if isinstance(image, BadSample):
            return image
        return _Read(row, sample.key, image, fields)


class _Contents(Mapping[str, bytes]):
    """The raw fields of a sample, each read when it is asked for."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def __getitem__(self, name: str) -> bytes:
        return self._sample.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sample.fields)

    def __len__(self) -> int:
        return len(self._sample.fields)
