"""A datamodule over an activation store: what the cache holds, shuffled, from the disk.

Its state is the number of delivered batches and what their order depends on. A resumed run sees
what the whole run would have seen, on any number of devices.
"""

from collections.abc import Callable, Iterator
from math import gcd

import lightning as L
from jaxtyping import Float
from torch import Tensor

from clipattr.data import ActivationStore, ActivationStream, Ranks
from clipattr.data.stream import Batch
from clipattr.errors import ConfigError

LANES = 32


class Batches:
    """The batches of a stream and nothing else.

    A loader with a state would have it saved by Lightning as well, and dropped in some cases.
    """

    def __init__(self, stream: ActivationStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.stream)


class ActivationDataModule(L.LightningDataModule):
    """Serves `batch_size` rows per step over all devices.

    `open_store` opens the store; all processes call it and write together what is missing.
    """

    def __init__(
        self,
        open_store: Callable[[Ranks], ActivationStore],
        *,
        batch_size: int,
        seed: int,
        n_steps: int,
    ) -> None:
        super().__init__()
        self.open_store = open_store
        self.batch_size = batch_size
        self.seed = seed
        self.n_steps = n_steps
        self.store: ActivationStore | None = None
        self.stream: ActivationStream | None = None
        self._resumed: dict[str, object] | None = None

    def setup(self, stage: str) -> None:
        """Open the store, on every process."""
        if self.store is None:
            trainer = self._trainer
            ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
            self.store = self.open_store(ranks)

    def first_rows(self, n_rows: int) -> Float[Tensor, "row width"]:
        """Some rows to initialise from: the first of the store, which are mixed."""
        assert self.store is not None, "after setup"
        rows = self.store.column("x").empty(min(n_rows, self.store.n_rows))
        self.store.read_run("x", 0, rows)
        return rows.float()

    def train_dataloader(self) -> Batches:
        """The stream, from the resumed step on."""
        trainer, store = self._trainer, self.store
        assert store is not None, "after setup"
        lanes = gcd(self.batch_size, LANES)
        if lanes % trainer.world_size:
            raise ConfigError(
                f"batch_size={self.batch_size} on {trainer.world_size} devices: a batch is drawn "
                f"from {lanes} places of the cache, which must divide by the number of devices"
            )
        self.stream = ActivationStream(
            store,
            batch_size=self.batch_size,
            seed=self.seed,
            length=self.n_steps,
            lanes=lanes,
            window=max(self.batch_size, 65_536),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        if self._resumed is not None:
            self.stream.load_state_dict(self._resumed)
        return Batches(self.stream)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Half-precision numbers are widened where they are used, not on the way."""
        return tuple(column.float() for column in batch)

    def state_dict(self) -> dict[str, object]:
        """The position, and what the order depends on."""
        assert self.stream is not None, "after train_dataloader"
        return dict(self.stream.state_dict())

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on at the saved position; the stream refuses another order."""
        self._resumed = state_dict

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "inside a trainer"
        return self.trainer
