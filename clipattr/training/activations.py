"""A datamodule over an activation store: what the cache holds, shuffled, from the disk."""

from collections.abc import Callable
from math import gcd, lcm

import lightning as L
import torch
from jaxtyping import Shaped
from torch import Tensor

from clipattr.data import ActivationStore, ActivationStream, Ranks
from clipattr.data.stream import Batch
from clipattr.errors import ConfigError
from clipattr.training.streams import Place, StreamDataModule

LANES = 32
# Images that a message about a batch names.
NAMED = 8


def widen(*columns: Tensor) -> Batch:
    """Numbers of half precision in float32."""
    return tuple(column.float() if column.is_floating_point() else column for column in columns)


def ranks_of(trainer: L.Trainer) -> Ranks:
    """The processes of a trainer, which write a store together."""
    return Ranks(
        trainer.global_rank,
        trainer.world_size,
        trainer.strategy.barrier,
        local_world_size=trainer.num_devices,
    )


class ActivationDataModule(StreamDataModule):
    """Serves `batch_size` rows per step over all devices."""

    def __init__(
        self,
        open_store: Callable[[Ranks], ActivationStore],
        *,
        batch_size: int,
        seed: int,
        n_steps: int,
        fields: tuple[str, ...] = ("x",),
        finish: Callable[..., Batch] = widen,
    ) -> None:
        """Nothing is opened before the training begins.

        Args:
            open_store: opens the store; all processes call it and write what is missing together.
            batch_size: rows of a step, over all devices.
            seed: of the order.
            n_steps: of the training.
            fields: columns of the store; `images` and `tokens` say whose rows they are.
            finish: what the module gets of them, computed where it computes.
        """
        super().__init__()
        self.open_store = open_store
        self.batch_size = batch_size
        self.seed = seed
        self.n_steps = n_steps
        self.fields = fields
        self.finish = finish
        self.store: ActivationStore | None = None

    def setup(self, stage: str) -> None:
        """Open the store, on every process."""
        if self.store is None:
            self.store = self.open_store(ranks_of(self.running_trainer))

    def first_rows(self, n_rows: int) -> tuple[Shaped[Tensor, "row ..."], ...]:
        """Some rows to initialise from, field by field: the first of the store, which are mixed."""
        assert self.store is not None, "after setup"
        found = []
        for name in self.fields:
            found.append(self.store.column(name).empty(min(n_rows, self.store.n_rows)))
            self.store.read_run(name, 0, found[-1])
        return widen(*found)

    def describe_batch(self, t: int) -> str:
        """Of which images its rows are, over all devices, or the broken ones of them."""
        store, stream = self.store, self.stream
        assert store is not None, "after setup"
        assert isinstance(stream, ActivationStream), "after train_dataloader"
        rows = torch.from_numpy(stream.order.rows_of_batch(t, range(stream.order.lanes)))
        is_broken = [
            ~found.isfinite().reshape(len(rows), -1).all(dim=1)
            for found in (store.read(rows, name) for name in self.fields)
        ]
        broken = rows[torch.stack(is_broken).any(dim=0)]
        chosen = broken if len(broken) else rows
        images = sorted(set(store.read(chosen, "images").tolist()))
        names = ", ".join(store.keys[image] for image in images[:NAMED])
        names += f" and {len(images) - NAMED} more" if len(images) > NAMED else ""
        if len(broken):
            # Such rows are not written.
            return (
                f"{len(broken)} of its {len(rows)} rows hold nan or infinity: {store.folder} is "
                f"damaged, delete it to have it written again; rows of {names}"
            )
        return f"its {len(rows)} rows are finite: of {names}; a lower learning rate may help"

    def open_stream(self, place: Place) -> ActivationStream:
        """The rows of this process."""
        assert self.store is not None, "after setup"
        lanes = self._choose_lanes(place.world_size)
        return ActivationStream(
            self.store,
            batch_size=self.batch_size,
            seed=self.seed,
            length=self.n_steps,
            lanes=lanes,
            window=max(self.batch_size, 65_536),
            rank=place.rank,
            world_size=place.world_size,
            fields=self.fields,
            pin_memory=place.pin_memory,
        )

    def _choose_lanes(self, world_size: int) -> int:
        """A resumed run keeps its own; a new one has LANES, or as many as its ranks can share."""
        lanes = gcd(self.batch_size, LANES)
        if self._resumed is not None:
            lanes = int(str(self._resumed["lanes"]))
        elif lanes % world_size:
            lanes = lcm(lanes, world_size)
        if lanes % world_size or self.batch_size % lanes:
            raise ConfigError(
                f"batch_size={self.batch_size} on {world_size} devices: a batch is drawn from "
                f"{lanes} places of the cache, a number which the devices must divide, and which "
                "must divide the batch"
            )
        return lanes

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Half-precision numbers are widened where they are used, not on the way."""
        return self.finish(*batch)
