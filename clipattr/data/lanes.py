"""Which rows of a store global batch t holds: a pure function of t, the seed and three sizes.

An epoch is `steps_per_epoch` batches. Its blocks are permuted and laid on a circle, which starts
somewhere in one of them. The first steps_per_epoch * batch_size rows from there are cut into lanes
of equal length; each batch takes the next batch_size / lanes rows of every lane. Inside a lane the
rows are permuted within windows, so that a reader holds one window per lane and reads it in long
runs. The rows that are left over, fewer than a batch, are others in every epoch.

Rank r serves the lanes [r lanes / world_size, (r + 1) lanes / world_size): the ranks partition the
lanes, so their batches together are the same for any number of ranks.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from clipattr.errors import ConfigError

# What a random stream is for: numpy's Philox takes (seed, epoch) as key and the rest as counter.
BLOCKS, START, WINDOW = 0, 1, 2


class Window(NamedTuple):
    """The steps that read the same rows of a lane, and where the batch is among them."""

    epoch: int
    number: int
    n_steps: int
    step: int


class _Circle(NamedTuple):
    """The blocks of an epoch: stored row = first_rows[i] + (position - starts[i])."""

    epoch: int
    starts: Int[np.ndarray, " border"]
    first_rows: Int[np.ndarray, " block"]
    start: int


class LaneOrder:
    """The order of the rows of a store whose blocks begin at `starts` (with the end).

    `window` is the number of rows that all lanes together hold at a time.
    """

    def __init__(
        self,
        starts: Int[np.ndarray, " border"],
        *,
        batch_size: int,
        seed: int,
        lanes: int,
        window: int,
    ) -> None:
        if batch_size % lanes:
            raise ConfigError(f"batch_size={batch_size} does not divide by lanes={lanes}")
        if window < batch_size:
            raise ConfigError(f"window={window}, but it must hold batch_size={batch_size} rows")
        self.starts = starts
        self.n_rows = int(starts[-1])
        if self.n_rows < batch_size:
            raise ConfigError(
                f"batch_size={batch_size}, but there are {self.n_rows} rows: choose a smaller "
                "batch or more data"
            )
        self.seed = seed
        self.lanes = lanes
        self.share = batch_size // lanes
        self.steps_per_epoch = self.n_rows // batch_size
        self.window_steps = min(window // batch_size, self.steps_per_epoch)
        self._circle = _Circle(-1, starts, starts, 0)

    def window_of(self, t: int) -> Window:
        """The window that batch t comes from."""
        epoch, step = divmod(t, self.steps_per_epoch)
        number, step = divmod(step, self.window_steps)
        left = self.steps_per_epoch - number * self.window_steps
        return Window(epoch, number, min(self.window_steps, left), step)

    def runs(self, window: Window, lane: int) -> list[tuple[int, int]]:
        """(first row, number of rows) of the stored rows that a window of a lane holds."""
        circle = self._circle_of(window.epoch)
        first = lane * self.steps_per_epoch + window.number * self.window_steps
        position = (circle.start + first * self.share) % self.n_rows
        left = window.n_steps * self.share
        runs: list[tuple[int, int]] = []
        block = int(np.searchsorted(circle.starts, position, side="right")) - 1
        while left:
            inside = position - int(circle.starts[block])
            count = min(left, int(circle.starts[block + 1]) - position)
            runs.append((int(circle.first_rows[block]) + inside, count))
            left -= count
            block = (block + 1) % len(circle.first_rows)
            position = int(circle.starts[block])
        return runs

    def picks(self, window: Window, lane: int) -> Int[np.ndarray, "step share"]:
        """Which rows of its runs, end to end, a lane gives to each step of a window."""
        generator = self._generator(window.epoch, WINDOW, lane, window.number)
        return generator.permutation(window.n_steps * self.share).reshape(-1, self.share)

    def rows_of_batch(self, t: int, lanes: range) -> Int[np.ndarray, " row"]:
        """The stored rows of batch t that come from some lanes."""
        window, rows = self.window_of(t), []
        for lane in lanes:
            runs = self.runs(window, lane)
            held = np.concatenate([np.arange(first, first + count) for first, count in runs])
            rows.append(held[self.picks(window, lane)[window.step]])
        return np.concatenate(rows)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank serves."""
        if self.lanes % world_size:
            raise ConfigError(f"lanes={self.lanes} does not divide by {world_size} devices")
        return range(self.lanes * rank // world_size, self.lanes * (rank + 1) // world_size)

    def _circle_of(self, epoch: int) -> _Circle:
        circle = self._circle
        if circle.epoch != epoch:
            blocks = self._generator(epoch, BLOCKS).permutation(len(self.starts) - 1)
            starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[blocks])])
            start = int(self._generator(epoch, START).integers(self.n_rows))
            circle = self._circle = _Circle(epoch, starts, self.starts[blocks], start)
        return circle

    def _generator(self, epoch: int, use: int, *place: int) -> np.random.Generator:
        counter = [0, use, *place, *[0] * (2 - len(place))]
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=counter))
