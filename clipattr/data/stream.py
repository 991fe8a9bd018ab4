"""Serve the rows of an activation store: shuffled for training, each exactly once for evaluation.

Both read ahead in one thread, in which copies and gathers release the interpreter: no process has
to be started, and no batch has to be sent from one to another.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from clipattr.data.lanes import LaneOrder, Window
from clipattr.data.order import position_of
from clipattr.data.store import ActivationStore

# Batches that wait to be taken. They bridge the time in which the next window is read.
AHEAD = 4

Batch = tuple[Tensor, ...]


class ActivationStream:
    """Endless shuffled batches, a function of the seed and the batch's number t alone.

    Iterating goes on with batch t and ends when t is a multiple of `length` again: an epoch of the
    trainer, whatever the size of the store, also when the stream was resumed inside it. t is the
    number of batches that were delivered; those that were read ahead do not count.

    See `clipattr.data.lanes` for the order, and for what is left over at the end of a pass.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        seed: int,
        length: int,
        lanes: int = 32,
        window: int = 65_536,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        fields: tuple[str, ...] = ("x",),
        pin_memory: bool = False,
    ) -> None:
        """Nothing is read before the first batch is asked for.

        Args:
            store: of at least one batch of rows.
            batch_size: rows of a global batch; this rank serves batch_size / world_size of them.
            seed: of the order.
            length: batches per iteration.
            lanes: places of the store that each batch is drawn from; it divides batch_size, and
                world_size divides it.
            window: rows that all ranks together hold in memory.
            rank: of this process.
            world_size: the number of processes.
            start: first batch.
            fields: columns of a batch, in this order; `images` and `tokens` name its rows.
            pin_memory: put batches where a GPU can fetch them while it computes.
        """
        self.store = store
        self.order = LaneOrder(
            store.starts, batch_size=batch_size, seed=seed, lanes=lanes, window=window
        )
        self.length = length
        self.t = start
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "lanes": lanes,
            "window": window,
            "index": store.index_hash,
        }
        self._lanes = self.order.lanes_of(rank, world_size)
        self._columns = {name: store.column(name) for name in fields}
        self._pin_memory = pin_memory
        self._held: Window | None = None
        self._buffers: Batch = ()
        self._picks = np.zeros((0, 0, 0), dtype=np.int64)
        self._lock = Lock()  # an iteration that was not ended goes on reading ahead beside the next

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.t // self.length + 1) * self.length
        for batch in _read_ahead(self._read, range(self.t, stop)):
            self.t += 1
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what the order depends on; the same on every rank."""
        return {"t": self.t, **self._identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a saved position; another order is refused by the name of what differs."""
        self.t = position_of(state, self._identity)

    def _read(self, t: int) -> Batch:
        with self._lock:
            return self._read_alone(t)

    def _read_alone(self, t: int) -> Batch:
        window = self.order.window_of(t)
        if self._held is None or self._held[:2] != window[:2]:
            self._held = None
            self._hold(window)
            self._held = window
        chosen = torch.from_numpy(self._picks[:, window.step].reshape(-1))
        batch = [
            column.empty(len(chosen), pin_memory=self._pin_memory)
            for column in self._columns.values()
        ]
        for held, rows in zip(self._buffers, batch, strict=True):
            torch.index_select(held, 0, chosen, out=rows)
        return tuple(batch)

    def _hold(self, window: Window) -> None:
        """Read a window of each lane, end to end, and where the steps find their rows in it."""
        size = window.n_steps * self.order.share
        if not self._buffers:  # the first window of an epoch is the largest
            n_rows = len(self._lanes) * self.order.window_steps * self.order.share
            self._buffers = tuple(column.empty(n_rows) for column in self._columns.values())
        picks = []
        for place, lane in enumerate(self._lanes):
            picks.append(place * size + self.order.picks(window, lane))
            position = place * size
            for first, count in self.order.runs(window, lane):
                for name, buffer in zip(self._columns, self._buffers, strict=True):
                    self.store.read_run(name, first, buffer[position : position + count])
                position += count
        self._picks = np.stack(picks)


class EvaluationStream:
    """Every row of the store exactly once over all ranks, in the order of the store.

    The last batch is smaller, and a rank may have none: nothing is repeated or left out to make
    ranks equal. All tokens of an image come from one rank where the store keeps them together.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        fields: tuple[str, ...] = ("x",),
        pin_memory: bool = False,
    ) -> None:
        """As `ActivationStream`, but `batch_size` is that of this rank."""
        self.store = store
        self.batch_size = batch_size
        self.rows = evaluation_rows(store, rank, world_size)
        self._columns = {name: store.column(name) for name in fields}
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self._read, range(len(self)))

    def _read(self, number: int) -> Batch:
        rows = self.rows[number * self.batch_size : (number + 1) * self.batch_size]
        batch = []
        for name, column in self._columns.items():
            out = column.empty(len(rows), pin_memory=self._pin_memory)
            self.store.read_run(name, rows.start, out)
            batch.append(out)
        return tuple(batch)


def evaluation_rows(store: ActivationStore, rank: int, world_size: int) -> range:
    """The rows that a rank evaluates: those of an equal share of the images, in one run."""
    n_images = store.n_rows // store.tokens
    first, last = n_images * rank // world_size, n_images * (rank + 1) // world_size
    return range(first * store.tokens, last * store.tokens)


def _read_ahead(read: Callable[[int], Batch], numbers: range) -> Iterator[Batch]:
    """read(number) for each number, a few ahead of the consumer, in one thread."""
    remaining = iter(numbers)
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        waiting = deque(pool.submit(read, number) for number in islice(remaining, AHEAD))
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(read, number) for number in islice(remaining, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
