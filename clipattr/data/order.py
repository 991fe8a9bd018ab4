"""Which rows step t trains on: a pure function, so that a resumed run goes on exactly."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.errors import CheckpointError


@lru_cache(maxsize=2)
def _permutation(n_rows: int, seed: int, epoch: int) -> Int[np.ndarray, " row"]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_rows)


def rows_of_step(
    n_rows: int, batch_size: int, seed: int, step: int, *, rank: int = 0, world_size: int = 1
) -> Int[Tensor, " batch"]:
    """The rank's share of global batch `step`.

    An epoch is a permutation of all rows cut into batches; the n_rows mod batch_size rows that are
    left over differ from epoch to epoch. The union over ranks does not depend on their number.
    """
    per_epoch = n_rows // batch_size
    epoch, position = divmod(step, per_epoch)
    share = batch_size // world_size
    start = position * batch_size + rank * share
    # A copy: a view would let a caller that edits its batch edit the epoch.
    return torch.from_numpy(_permutation(n_rows, seed, epoch)[start : start + share].copy())


def position_of(state: Mapping[str, object], identity: Mapping[str, object]) -> int:
    """The number t of a saved stream; another order is refused by the name of what differs."""
    for name, value in identity.items():
        if state.get(name) != value:
            raise CheckpointError(
                f"cannot resume: {name} was {state.get(name)!r} and is {value!r} now"
            )
    return int(str(state["t"]))
