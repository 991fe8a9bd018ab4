"""A datamodule over rows in memory: features that no store holds as they are read."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from clipattr.data import Ranks
from clipattr.data.order import position_of, rows_of_step
from clipattr.data.stream import Batch
from clipattr.errors import ConfigError
from clipattr.training.activations import ranks_of, widen
from clipattr.training.streams import Place, StreamDataModule


class MemoryStream:
    """Endless shuffled batches, a function of the seed and the batch's number t alone."""

    def __init__(
        self,
        columns: Batch,
        *,
        batch_size: int,
        seed: int,
        length: int,
        identity: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Nothing is copied.

        Args:
            columns: of equal length, the parts of a batch.
            batch_size: rows of a global batch; this rank serves batch_size / world_size of them.
            seed: of the order.
            length: batches per iteration.
            identity: says what the rows are; a run that is resumed must have the same.
            rank: of this process.
            world_size: the number of processes.
        """
        n_rows = len(columns[0])
        if n_rows < batch_size:
            raise ConfigError(
                f"batch_size={batch_size}, but there are {n_rows} rows: choose a smaller batch or "
                "more data"
            )
        self.length = length
        self.t = 0
        self._columns = columns
        self._place = (n_rows, batch_size, seed)
        self._rank, self._world_size = rank, world_size
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "n_rows": n_rows,
            "rows": identity,
        }

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.t // self.length + 1) * self.length
        for step in range(self.t, stop):
            rows = rows_of_step(*self._place, step, rank=self._rank, world_size=self._world_size)
            self.t = step + 1
            yield tuple(column[rows] for column in self._columns)

    def state_dict(self) -> dict[str, object]:
        """The position, and what the order depends on; the same on every rank."""
        return {"t": self.t, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a saved position; another order is refused by the name of what differs."""
        self.t = position_of(state, self._identity)


class MemoryDataModule(StreamDataModule):
    """Serves `batch_size` rows per step over all devices; every process has all rows."""

    def __init__(
        self,
        load: Callable[[Ranks], tuple[Tensor, ...]],
        *,
        batch_size: int,
        seed: int,
        n_steps: int,
        identity: str,
        finish: Callable[..., object] = widen,
    ) -> None:
        """Nothing is loaded before the training begins.

        Args:
            load: gives the columns; all processes call it and compute what is missing together.
            batch_size: rows of a step, over all devices.
            seed: of the order.
            n_steps: of the training.
            identity: as that of the stream.
            finish: what the module gets of a batch, computed where it computes.
        """
        super().__init__()
        self.load = load
        self.batch_size = batch_size
        self.seed = seed
        self.n_steps = n_steps
        self.identity = identity
        self.finish = finish
        self.columns: tuple[Tensor, ...] = ()

    def setup(self, stage: str) -> None:
        """Load the rows, on every process."""
        if not self.columns:
            self.columns = self.load(ranks_of(self.running_trainer))

    def open_stream(self, place: Place) -> MemoryStream:
        """The rows of this process."""
        return MemoryStream(
            self.columns,
            batch_size=self.batch_size,
            seed=self.seed,
            length=self.n_steps,
            identity=self.identity,
            rank=place.rank,
            world_size=place.world_size,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> object:
        """Rows become features where they are used, not on the way."""
        return self.finish(*batch)
