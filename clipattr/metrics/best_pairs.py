"""Of a stream of (latent, key) pairs, per latent the n largest keys: the state of all examples.

A key is an int64 that no two pairs of a latent share, so that the order is total and the result
depends on neither the order of the batches nor the number of processes. What a key says is left to
the metric: `pack` puts one number above another.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.errors import DataError

MAX_ID = 0xFFFFFFFF
EMPTY = torch.iinfo(torch.int64).min


class Examples(NamedTuple):
    """Rows of the best examples of each latent, and its activation in them.

    Id -1 and value 0 where a latent has fewer examples.
    """

    ids: Int[Tensor, "latent n"]
    values: Float[Tensor, "latent n"]


def pack(upper: Int[Tensor, "*#pairs"], lower: Int[Tensor, "*#pairs"]) -> Int[Tensor, " *pairs"]:
    """One int64 of two numbers: the upper is compared first, in 32 bits with sign, then the lower.

    The lower one lies in [0, MAX_ID].
    """
    return (upper.long() << 32) | lower


def float_bits(values: Float[Tensor, " *pairs"]) -> Int[Tensor, " *pairs"]:
    """float32 as integers; positive ones are ordered like the numbers."""
    return values.detach().float().view(torch.int32)


def check_ids(ids: Int[Tensor, " rows"], largest: int = MAX_ID) -> None:
    """Raise DataError for row ids that a key has no room for."""
    if len(ids) and (ids.min() < 0 or ids.max() > largest):
        raise DataError(
            f"row ids lie in [{ids.min().item()}, {ids.max().item()}], allowed is [0, {largest}]"
        )


class BestPairs(Metric):
    """A table of 2 n keys per latent, filled from the left and cut to the best n when it is full.

    So a key that comes in is written once and sorted a constant number of times, and most of those
    of a frequent latent are turned away by one comparison with `floor`: all keys at or below it are
    known not to be among the best n.
    """

    full_state_update = False
    keys: Tensor
    filled: Tensor
    floor: Tensor

    def __init__(self, *, n_latents: int, n_examples: int) -> None:
        """An empty table."""
        super().__init__()
        self.n_examples = n_examples
        keys = torch.full((n_latents, 2 * n_examples), EMPTY, dtype=torch.int64)
        self.add_state("keys", keys, dist_reduce_fx=partial(_merge_keys, n_examples))
        filled = torch.zeros(n_latents, dtype=torch.int64)
        self.add_state("filled", filled, dist_reduce_fx=partial(_merge_filled, n_examples))
        self.add_state("floor", keys[:, 0].clone(), dist_reduce_fx="max")

    def is_candidate(self, latents: Int[Tensor, " *pairs"], keys: Int[Tensor, " *pairs"]) -> Tensor:
        """Which pairs may be among the best n, by what is known so far."""
        return keys > self.floor[latents]

    def insert(self, latents: Int[Tensor, " pairs"], keys: Int[Tensor, " pairs"]) -> None:
        """Take in pairs."""
        while True:
            is_candidate = self.is_candidate(latents, keys)
            latents, keys = latents[is_candidate], keys[is_candidate]
            if not len(latents):
                return
            fits = self._fill(latents, keys)
            # A latent may have more pairs than there is room for. With its best ones first, all
            # behind them are turned away when the table is next cut.
            keys, order = keys[~fits].sort(descending=True)
            latents = latents[~fits][order]

    def _fill(self, latents: Tensor, keys: Tensor) -> Tensor:
        """Write the first pairs of each latent into its free places; which ones had one."""
        ordered, order = latents.int().sort(stable=True)
        touched, group, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(ordered), device=ordered.device) - (sizes.cumsum(0) - sizes)[group]
        touched, width = touched.long(), self.keys.shape[1]
        filled = self.filled[touched]
        place = filled[group] + rank
        fits = place < width
        self.keys.view(-1)[(touched[group] * width + place)[fits]] = keys[order[fits]]
        filled = (filled + sizes).clamp(max=width)
        self.filled[touched] = filled
        self._cut(touched[filled == width])
        return torch.empty_like(fits).scatter_(0, order, fits)

    def _cut(self, full: Tensor) -> None:
        if not len(full):
            return
        best = self.keys[full].topk(self.n_examples, dim=1).values
        self.keys[full] = _with_room(best)
        self.filled[full] = self.n_examples
        self.floor[full] = best[:, -1]

    def best_keys(self) -> Int[Tensor, "latent n"]:
        """The largest keys, descending, then EMPTY."""
        return self.keys.topk(self.n_examples, dim=1).values


def _with_room(best: Tensor) -> Tensor:
    return torch.cat([best, torch.full_like(best, EMPTY)], dim=1)


def _merge_keys(n_examples: int, parts: Int[Tensor, "parts latent slot"]) -> Tensor:
    """The table of the union of what several processes have seen."""
    every = parts.movedim(0, 1).flatten(1)
    return _with_room(every.topk(n_examples, dim=1).values)


def _merge_filled(n_examples: int, parts: Int[Tensor, "parts latent"]) -> Tensor:
    return parts.sum(dim=0).clamp(max=n_examples)
