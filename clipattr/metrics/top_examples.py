"""The rows in which each latent is most active, found without a dense [rows, latents] tensor.

A pair (value, row id) is packed into one int64: float bits of the value above, the inverted id
below. Comparing the integers then compares value first (larger is better), id second (smaller is
better): a total order, so the result depends on neither batch order nor number of processes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.codes import SparseCodes
from clipattr.errors import DataError

_MAX_ID = 0xFFFFFFFF
_EMPTY = -1


class TopExamplesResult(NamedTuple):
    """Best first; id -1 and value 0 where a latent has fewer examples."""

    ids: Int[Tensor, "latent n"]
    values: Float[Tensor, "latent n"]


def pack(values: Float[Tensor, " pairs"], ids: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """One int64 per pair; values must be positive (their float32 bits then order like numbers)."""
    return (values.float().view(torch.int32).long() << 32) | (_MAX_ID - ids)


def unpack(packed: Int[Tensor, "latent n"]) -> TopExamplesResult:
    """Ids and float32 values of packed pairs."""
    is_empty = packed == _EMPTY
    values = (packed >> 32).int().view(torch.float32).masked_fill(is_empty, 0.0)
    return TopExamplesResult((_MAX_ID - (packed & _MAX_ID)).masked_fill(is_empty, -1), values)


def merge_best(parts: Int[Tensor, "parts latent n"]) -> Int[Tensor, "latent n"]:
    """The best n of the union of several best-n tables."""
    return parts.movedim(0, 1).flatten(1).topk(parts.shape[2], dim=1).values


def insert_best(
    best: Int[Tensor, "latent n"], latents: Int[Tensor, " pairs"], packed: Int[Tensor, " pairs"]
) -> None:
    """Merge (latent, packed) pairs into the table, in place; only rows that occur are touched."""
    n_best = best.shape[1]
    packed, order = packed.sort(descending=True)
    latents, stable_order = latents[order].sort(stable=True)
    packed = packed[stable_order]
    touched, row, sizes = latents.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(latents), device=latents.device) - (sizes.cumsum(0) - sizes)[row]
    is_kept = place < n_best
    candidates = best.new_full((len(touched), n_best), _EMPTY)
    candidates[row[is_kept], place[is_kept]] = packed[is_kept]
    best[touched] = merge_best(torch.stack([best[touched], candidates]))


class TopExamples(Metric):
    """Per latent the n rows of largest activation, ties going to the smaller row id.

    A row must be given once. Cost of an update: a sort of the batch's active pairs.
    """

    full_state_update = False
    best: Tensor

    def __init__(self, *, n_latents: int, n_examples: int) -> None:
        """An empty table."""
        super().__init__()
        best = torch.full((n_latents, n_examples), _EMPTY, dtype=torch.int64)
        self.add_state("best", best, dist_reduce_fx=merge_best)

    def update(self, codes: SparseCodes, ids: Int[Tensor, " rows"]) -> None:
        """Take in the codes [rows, active] of the rows named by `ids` (0 to 2^32 - 1)."""
        if len(ids) and (ids.min() < 0 or ids.max() > _MAX_ID):
            raise DataError(
                f"row ids lie in [{ids.min().item()}, {ids.max().item()}], "
                f"allowed is [0, {_MAX_ID}]"
            )
        is_active = codes.values > 0
        all_ids = ids.long()[:, None].expand_as(codes.indices)
        packed = pack(codes.values.detach()[is_active], all_ids[is_active])
        insert_best(self.best, codes.indices[is_active], packed)

    def compute(self) -> TopExamplesResult:
        """Row ids and values, best first."""
        return unpack(self.best)
