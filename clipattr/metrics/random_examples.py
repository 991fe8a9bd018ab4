"""A uniform sample of the images in which each latent fires, and its strata by activation.

The largest activations of a latent are often its clearest and least typical ones; what it stands
for is seen over its whole range. The sample is drawn by a hash of (seed, image), so it depends on
neither the order of the images nor the number of processes, and latents that fire in the same
images show the same ones: a gallery needs fewer pictures.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.metrics.best_pairs import (
    EMPTY,
    MAX_ID,
    BestPairs,
    Examples,
    check_ids,
    float_bits,
    pack,
)

# lowbias32 (Wellons 2018): shifts and odd factors of a bijection of 32-bit integers.
_SHIFTS = (16, 15, 16)
_FACTORS = (0x7FEB352D, 0x846CA68B)
_SIGN = 0x80000000


class RandomExamples(BestPairs):
    """Per latent a uniform sample without replacement of n of the images in which it fires.

    They are those of the smallest hash. The hash is a bijection, so that a key has room for the
    activation and the image is recovered from the hash.
    """

    def __init__(self, *, n_latents: int, n_examples: int, seed: int = 0) -> None:
        """An empty sample."""
        super().__init__(n_latents=n_latents, n_examples=n_examples)
        self.seed = seed

    def update(self, codes: SparseCodes, ids: Int[Tensor, " rows"]) -> None:
        """Take in the codes [rows, active] of the rows named by `ids`, each given once."""
        check_ids(ids)
        rank = (_SIGN - 1 - shuffle(ids, self.seed))[:, None]
        keys = pack(rank, float_bits(codes.values).long() & MAX_ID)
        is_candidate = codes.is_active & self.is_candidate(codes.indices, keys)
        self.insert(codes.indices[is_candidate], keys[is_candidate])

    def compute(self) -> Examples:
        """The sample by activation, largest first; ties: the smaller id."""
        keys = self.best_keys()
        is_empty = keys == EMPTY
        ids = unshuffle(_SIGN - 1 - (keys >> 32), self.seed)
        values = keys.int().view(torch.float32)
        ids, by_id = ids.masked_fill(is_empty, MAX_ID + 1).sort(dim=1)
        values = values.masked_fill(is_empty, -torch.inf).gather(1, by_id)
        values, order = values.sort(dim=1, descending=True, stable=True)
        is_empty = is_empty.gather(1, by_id.gather(1, order))
        return Examples(
            ids.gather(1, order).masked_fill(is_empty, -1), values.masked_fill(is_empty, 0.0)
        )


def strata(sample: Examples, quantiles: int | Sequence[float]) -> Examples:
    """Of each latent's sample the examples at the quantiles of its activation, largest first.

    Args:
        sample: of `RandomExamples`, largest first.
        quantiles: from 1, the largest, to 0, the smallest: each names the nearest example. A number
            n stands for n that are equally far apart; a latent with fewer examples shows each once.
    """
    n_latents = len(sample.ids)
    n_known = (sample.ids >= 0).sum(dim=1, keepdim=True)
    last = (n_known - 1).clamp(min=0)
    if isinstance(quantiles, int):
        if quantiles < 1:
            raise ConfigError(f"{quantiles} strata are asked for, allowed are 1 and more")
        steps = torch.arange(quantiles, device=last.device).expand(n_latents, -1)
        divisor = max(quantiles - 1, 1)
        spread = (steps * last + divisor // 2) // divisor
        places = torch.where(n_known > quantiles, spread, steps)
    else:
        places = (last * (1 - _check(quantiles).to(last.device))).round().long()
    is_known = places < n_known
    places = places.clamp(max=sample.ids.shape[1] - 1)
    ids = sample.ids.gather(1, places).masked_fill(~is_known, -1)
    return Examples(ids, sample.values.gather(1, places).masked_fill(~is_known, 0.0))


def _check(quantiles: Sequence[float]) -> Float64[Tensor, " quantile"]:
    if not quantiles or not all(0 <= quantile <= 1 for quantile in quantiles):
        raise ConfigError(f"quantiles are {list(quantiles)}, each must lie in [0, 1]")
    return torch.tensor(quantiles, dtype=torch.float64)


def shuffle(ids: Int[Tensor, " rows"], seed: int) -> Int[Tensor, " rows"]:
    """Another number in [0, 2^32) for each id: a permutation that the seed chooses."""
    for number in _round_keys(seed):
        ids = _mix(ids.long() ^ number, _FACTORS, _SHIFTS)
    return ids


def unshuffle(numbers: Int[Tensor, " *n"], seed: int) -> Int[Tensor, " *n"]:
    """The ids of which `shuffle` made the numbers."""
    inverse = [pow(factor, -1, 1 << 32) for factor in reversed(_FACTORS)]
    for number in reversed(_round_keys(seed)):
        numbers = _mix(numbers, inverse, _SHIFTS[::-1], is_inverse=True) ^ number
    return numbers


def _mix(
    x: Tensor, factors: Sequence[int], shifts: Sequence[int], *, is_inverse: bool = False
) -> Tensor:
    for shift, factor in zip(shifts, (*factors, 1), strict=True):
        shifted = x ^ (x >> shift)
        # A shift by 15 leaves two bits to be undone.
        shifted = shifted ^ (x >> 2 * shift) if is_inverse else shifted
        # The product wraps around modulo 2^64, which keeps its lower 32 bits.
        x = shifted * factor & MAX_ID
    return x


def _round_keys(seed: int) -> list[int]:
    """Two 32-bit keys: with one, the sample of another seed would be that of other ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MAX_ID + 1, (2,), generator=generator).tolist()
