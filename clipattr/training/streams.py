"""The part of a datamodule that is the same for rows of a store and for images of shards.

Its state is the number of delivered batches and what their order depends on. A resumed run sees
what the whole run would have seen, on any number of devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import lightning as L

from clipattr.training.sharded import is_sharded, n_parts

Batch = TypeVar("Batch", covariant=True)


class Place(NamedTuple):
    """Where a stream is read: the process, and whether a GPU fetches its batches."""

    rank: int
    world_size: int
    local_world_size: int
    pin_memory: bool


@runtime_checkable
class Stream(Protocol[Batch]):
    """Batches without end, of which an iteration gives the next `len(stream)`."""

    t: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> Mapping[str, object]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, object]) -> None: ...  # noqa: D102


class Batches(Generic[Batch]):
    """The batches of a stream and nothing else.

    A loader with a state would have it saved by Lightning as well, and dropped in some cases.
    """

    def __init__(self, stream: Stream[Batch]) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.stream)


class StreamDataModule(L.LightningDataModule, ABC):
    """Serves the batches of `open_stream`, which a subclass gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: Stream[Any] | None = None
        self._resumed: dict[str, object] | None = None

    @abstractmethod
    def open_stream(self, place: Place) -> Stream[Any]:
        """The stream of this process, at its beginning."""

    def train_dataloader(self) -> Batches[Any]:
        """The stream, from the resumed step on."""
        trainer = self.running_trainer
        place = Place(
            rank=0 if is_sharded(trainer) else trainer.global_rank,
            world_size=n_parts(trainer),
            local_world_size=trainer.num_devices,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        self.stream = self.open_stream(place)
        if self._resumed is not None:
            self.stream.load_state_dict(self._resumed)
        return Batches(self.stream)

    def state_dict(self) -> dict[str, object]:
        """The position, and what the order depends on."""
        assert self.stream is not None, "after train_dataloader"
        return dict(self.stream.state_dict())

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on at the saved position; the stream refuses another order."""
        self._resumed = state_dict

    @property
    def running_trainer(self) -> L.Trainer:
        """The trainer that this belongs to."""
        assert self.trainer is not None, "inside a trainer"
        return self.trainer
