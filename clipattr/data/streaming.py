"""Endless batches of sets that are too large to index: shards are read from end to end.

What the index finds beforehand is met on the way here (`clipattr.data.sequential`), and is told in
the batch that it would have been in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipattr.data.images import ImageBatch, ImageError, Reader
from clipattr.data.order import position_of
from clipattr.data.remote import Shard
from clipattr.data.sequential import RawSample, mix, read_shards
from clipattr.data.shards import IMAGE_FIELDS, BadSample
from clipattr.errors import ConfigError, DataError

# From here on it is no accident: the set cannot be read.
MAX_BAD_IN_A_ROW = 20_000
# What a random stream is for.
SHARDS, SAMPLES = 0, 1


class StreamedImages:
    """Endless shuffled batches of sets too large to index, equal in form to `ImageStream`.

    Every worker of every rank reads all shards, in an order of its own that is another one in each
    pass, and draws from a buffer of samples. So every rank always has full batches, however many
    shards there are, and each sample comes once in a worker's pass: about equally often.

    From start 0, the batches are a function of the seed and of the numbers of ranks and workers. A
    resumed run is approximate: at batch t it begins anew, with an order that is drawn for t, so
    what was read already may come again before the rest.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        reader: Reader,
        *,
        batch_size: int,
        seed: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle: int = 5000,
        fields: Mapping[str, Callable[[Mapping[str, bytes]], Tensor]] | None = None,
        start: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is read before the first batch is asked for.

        Args:
            shards: at least one.
            reader: makes pixels of a file.
            batch_size: images of a global batch; this rank serves an equal part of them.
            seed: of the order.
            length: batches per iteration.
            rank: of this process.
            world_size: the number of processes; it divides batch_size.
            workers: decoding processes of this rank.
            shuffle: samples, not decoded, that each worker holds and draws from.
            fields: by name, what makes a tensor of the raw fields of a sample; a sample is broken
                when it raises ValueError, or KeyError for a field that it lacks.
            start: first batch.
            pin_memory: put batches where a GPU can fetch them while it computes.
        """
        if batch_size % world_size:
            raise ConfigError(f"batch_size={batch_size} does not divide by {world_size} devices")
        if not shards:
            raise DataError("there are no shards to read")
        self.length = length
        self.t = start
        self._identity = {"seed": seed, "batch_size": batch_size}
        self._source = _Source(tuple(shards), reader, dict(fields or {}), max(shuffle, 1))
        self._place = (rank, batch_size // world_size)
        self._workers = workers
        self._pin_memory = pin_memory
        self._running: Iterator[ImageBatch | DataError] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[ImageBatch]:
        stop = (self.t // self.length + 1) * self.length
        # An iteration goes on where the one before ended: with the buffers that are filled.
        if self._running is None:
            self._running = iter(self._loader())
        while self.t < stop:
            batch = next(self._running)
            if isinstance(batch, DataError):
                self._running = None  # ends the workers: beside a traceback they would linger
                raise batch
            self.t += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, and what the order depends on; the same on every rank."""
        return {"t": self.t, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a saved position; another order is refused by the name of what differs."""
        self.t = position_of(state, self._identity)
        self._running = None

    def _loader(self) -> DataLoader[ImageBatch | DataError]:
        rank, share = self._place
        return DataLoader(
            _Batches(self._source, share, (self._identity["seed"], self.t, rank)),
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else it draws from the one that training draws from
        )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Source(NamedTuple):
    shards: tuple[Shard, ...]
    reader: Reader
    functions: dict[str, Callable[[Mapping[str, bytes]], Tensor]]
    shuffle: int


class _Read(NamedTuple):
    key: str
    image: Tensor
    fields: dict[str, Tensor]


class _Batches(IterableDataset[ImageBatch | DataError]):
    """The batches of one worker without end, or the error after which there are none.

    Torch would wrap an error that is raised in a worker into its traceback.
    """

    def __init__(self, source: _Source, share: int, seeds: tuple[int, ...]) -> None:
        self.source = source
        self.share = share
        self.seeds = seeds

    def __iter__(self) -> Iterator[ImageBatch | DataError]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        shard_order, sample_order = (
            np.random.Generator(np.random.Philox(np.random.SeedSequence([*self.seeds, worker, n])))
            for n in (SHARDS, SAMPLES)
        )
        samples = read_shards(self.source.shards, shard_order)
        try:
            yield from self._batch(mix(samples, self.source.shuffle, sample_order))
        except DataError as error:
            yield error

    def _batch(self, samples: Iterator[RawSample | BadSample]) -> Iterator[ImageBatch]:
        good: list[_Read] = []
        bad: list[BadSample] = []
        n_bad_in_a_row = 0
        for sample in samples:
            item = sample if isinstance(sample, BadSample) else _read(sample, self.source)
            if isinstance(item, BadSample):
                bad.append(item)
                n_bad_in_a_row += 1
                if n_bad_in_a_row == MAX_BAD_IN_A_ROW:
                    raise DataError(
                        f"{n_bad_in_a_row} samples in a row cannot be used; the last is "
                        f"{item.key!r} in {item.shard}: {item.reason}"
                    )
                continue
            n_bad_in_a_row = 0
            good.append(item)
            if len(good) == self.share:
                yield _stack(good, bad)
                good, bad = [], []


def _read(sample: RawSample, source: _Source) -> _Read | BadSample:
    name = next((name for name in IMAGE_FIELDS if name in sample.fields), None)
    if name is None:
        has = ", ".join(sorted(sample.fields))
        reason = f"lacks image ({', '.join(IMAGE_FIELDS)}); has {has}"
        return BadSample(sample.shard, sample.key, reason)
    fields: dict[str, Tensor] = {}
    for made, function in source.functions.items():
        try:
            fields[made] = function(sample.fields)
        except KeyError as error:
            return BadSample(sample.shard, sample.key, f"{made}: there is no {error}")
        except ValueError as error:  # DataError and UnicodeDecodeError among them
            reason = f"{made} cannot be made of its fields: {error}"
            return BadSample(sample.shard, sample.key, reason)
    try:
        image = source.reader.read(sample.fields[name])
    except ImageError as error:
        return BadSample(sample.shard, sample.key, f"{name} cannot be decoded: {error}")
    return _Read(sample.key, image, fields)


def _stack(good: list[_Read], bad: list[BadSample]) -> ImageBatch:
    return ImageBatch(
        rows=torch.full((len(good),), -1),
        images=torch.stack([item.image for item in good]),
        keys=[item.key for item in good],
        bad=bad,
        fields={name: torch.stack([i.fields[name] for i in good]) for name in good[0].fields},
    )
