"""The images and patches in which each latent is most active, without a dense [rows, latents].

A pair (value, id) is packed into one int64: float bits of the value above, the inverted id below.
Comparing the integers compares value first (larger is better), id second (smaller is better).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError, DataError
from clipattr.metrics.best_pairs import (
    EMPTY,
    MAX_ID,
    BestPairs,
    Examples,
    check_ids,
    float_bits,
    pack,
)


def _unpack(keys: Int[Tensor, "latent n"]) -> Examples:
    is_empty = keys == EMPTY
    values = (keys >> 32).int().view(torch.float32).masked_fill(is_empty, 0.0)
    return Examples((MAX_ID - (keys & MAX_ID)).masked_fill(is_empty, -1), values)


class TopExamples(BestPairs):
    """Per latent the n rows of largest activation, ties going to the smaller row id.

    Of a site with tokens, `pool_tokens` makes one activation per image. A row must be given once.
    Activations below 0 are no examples. Cost of an update: a comparison per active pair, and a sort
    of those that may be among the best.
    """

    def update(self, codes: SparseCodes, ids: Int[Tensor, " rows"]) -> None:
        """Take in the codes [rows, active] of the rows named by `ids` (0 to 2^32 - 1)."""
        check_ids(ids)
        keys = pack(float_bits(codes.values), (MAX_ID - ids.long())[:, None])
        is_candidate = (codes.values > 0) & self.is_candidate(codes.indices, keys)
        self.insert(codes.indices[is_candidate], keys[is_candidate])

    def compute(self) -> Examples:
        """Row ids and values, best first."""
        return _unpack(self.best_keys())


class Patches(NamedTuple):
    """The best (image, token) of each latent; -1, -1 and 0 where it has fewer."""

    images: Int[Tensor, "latent n"]
    tokens: Int[Tensor, "latent n"]
    values: Float[Tensor, "latent n"]


class TopPatches(BestPairs):
    """Per latent the n pairs (image, token) of largest activation; ties: the first image and token.

    With `per_image` no image has more than so many of them; with 1 they are the top images by
    maximum, and where in them. All tokens of an image must be given at once.
    """

    def __init__(
        self, *, n_latents: int, n_examples: int, n_tokens: int, per_image: int | None = None
    ) -> None:
        """An empty table, for images of `n_tokens` tokens each."""
        if per_image is not None and per_image < 1:
            raise ConfigError(
                f"{per_image} patches per image are asked for, allowed are 1 and more"
            )
        super().__init__(n_latents=n_latents, n_examples=n_examples)
        self.n_tokens = n_tokens
        self.per_image = per_image

    def update(self, codes: SparseCodes, ids: Int[Tensor, " rows"]) -> None:
        """Take in the codes [rows, *token, active] of the images named by `ids`.

        Tokens are numbered through where they have several axes. Image and token share 32 bits: ids
        end at 2^32 / n_tokens.
        """
        if codes.indices[..., 0].numel() != len(ids) * self.n_tokens:
            raise DataError(
                f"the codes of {len(ids)} images are {tuple(codes.indices.shape)}; "
                f"{self.n_tokens} tokens of each are due"
            )
        check_ids(ids, (MAX_ID + 1) // self.n_tokens - 1)
        flat = codes.reshape(len(ids), self.n_tokens)
        token = torch.arange(self.n_tokens, device=ids.device)
        places = MAX_ID - (ids.long()[:, None] * self.n_tokens + token)
        keys = pack(float_bits(flat.values), places[..., None])
        is_candidate = (flat.values > 0) & self.is_candidate(flat.indices, keys)
        latents, keys = flat.indices[is_candidate], keys[is_candidate]
        if self.per_image is not None and self.per_image < self.n_tokens:
            images = is_candidate.nonzero()[:, 0]
            is_kept = _best_of_groups(images * codes.n_latents + latents, keys, self.per_image)
            latents, keys = latents[is_kept], keys[is_kept]
        self.insert(latents, keys)

    def compute(self) -> Patches:
        """Images, tokens and values, best first."""
        places, values = _unpack(self.best_keys())
        is_empty = places < 0
        tokens = (places % self.n_tokens).masked_fill(is_empty, -1)
        return Patches((places // self.n_tokens).masked_fill(is_empty, -1), tokens, values)


def _best_of_groups(
    groups: Int[Tensor, " pairs"], keys: Int[Tensor, " pairs"], n_best: int
) -> Int[Tensor, " kept"]:
    """Numbers of the pairs that are among the n largest keys of their group."""
    order = keys.argsort(descending=True)
    ordered, by_group = groups[order].sort(stable=True)
    order = order[by_group]
    # The group of the pair n places before is another one: fewer than n of the same precede it.
    is_kept = torch.ones_like(ordered, dtype=torch.bool)
    is_kept[n_best:] = ordered[n_best:] != ordered[:-n_best]
    return order[is_kept]
