"""A datamodule over rows in memory: activations, embeddings with labels, or decoded images.

Its state is one number, the count of delivered batches. What a batch holds is a pure function of
the seed and that number (`clipattr.data.order`): a resumed run sees what the whole run would have.
"""

from collections.abc import Callable, Iterator

import lightning as L
from torch import Tensor

from clipattr.data.order import rows_of_step
from clipattr.errors import CheckpointError, ConfigError

Rows = tuple[Tensor, ...]


class RowStream:
    """Batches from `start` to `n_steps`. It has a length, so Lightning prefetches none."""

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        seed: int,
        n_steps: int,
        start: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.n_steps = n_steps
        self.delivered = start
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Rows]:
        while self.delivered < self.n_steps:
            chosen = rows_of_step(
                len(self.rows[0]),
                self.batch_size,
                self.seed,
                self.delivered,
                rank=self.rank,
                world_size=self.world_size,
            )
            self.delivered += 1
            yield tuple(tensor[chosen] for tensor in self.rows)


class RowsDataModule(L.LightningDataModule):
    """Serves equally long tensors, `batch_size` rows per step over all devices.

    `load` makes the rows and their fingerprint; it runs once on the first process, which fills the
    cache, and then on every process.
    """

    def __init__(
        self, load: Callable[[], tuple[Rows, str]], *, batch_size: int, seed: int, n_steps: int
    ) -> None:
        super().__init__()
        self.load = load
        self.batch_size = batch_size
        self.seed = seed
        self.n_steps = n_steps
        self.rows: Rows = ()
        self.fingerprint = ""
        self.stream: RowStream | None = None
        self._resumed: dict[str, object] = {}

    def prepare_data(self) -> None:
        """Fill the cache."""
        self._load()

    def setup(self, stage: str) -> None:
        """Hold the rows."""
        self._load()

    def _load(self) -> None:
        if self.rows:
            return
        self.rows, self.fingerprint = self.load()
        if len(self.rows[0]) < self.batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size}, but the shards hold {len(self.rows[0])} rows: "
                "choose a smaller batch or more shards"
            )

    def train_dataloader(self) -> RowStream:
        """The stream from the resumed step on."""
        trainer = self.trainer
        assert trainer is not None
        if self.batch_size % trainer.world_size:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide by {trainer.world_size} devices"
            )
        self.stream = RowStream(
            self.rows,
            batch_size=self.batch_size,
            seed=self.seed,
            n_steps=self.n_steps,
            start=int(str(self._resumed.get("delivered", 0))),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return self.stream

    def state_dict(self) -> dict[str, object]:
        """The position, and what the order depends on."""
        assert self.stream is not None
        return {"delivered": self.stream.delivered} | self._order()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on at the saved position; another order is refused by the name of what differs."""
        for name, value in self._order().items():
            if state_dict[name] != value:
                raise CheckpointError(
                    f"cannot resume: {name} was {state_dict[name]!r} and is {value!r} now"
                )
        self._resumed = state_dict

    def _order(self) -> dict[str, object]:
        return {"seed": self.seed, "batch_size": self.batch_size, "fingerprint": self.fingerprint}
