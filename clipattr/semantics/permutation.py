"""The null of unexpected reliance: who fired is drawn by lot in each image.

In every image the names of the latents are shuffled. How many fire, how strongly, and what each of
them does to the scores stays as it was; that a latent is the same one in all images is lost. What
is still found is what chance finds.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.codes import SparseCodes

# splitmix64 (Steele, Lea and Flood 2014), whose factors are written as signed numbers.
_STEP = -0x61C8864680B583EB
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_SHIFTS = (30, 27, 31)


def shuffle_latents(codes: SparseCodes, images: Int[Tensor, " batch"], seed: int) -> SparseCodes:
    """Codes [batch, *token, active] with new names for the latents of each image.

    Of image i latent j becomes (f_i j + s_i) modulo the size of the dictionary, with a factor that
    has no divisor in common with it: a permutation, drawn by a hash of (seed, i), the same for all
    tokens of an image and whatever the batch.
    """
    n_latents = codes.n_latents
    factors = _coprime_to(n_latents).to(images.device)
    key = _seed_key(seed)
    drawn = _hash(2 * images.long() ^ key)
    factor = factors[drawn % len(factors)]
    start = _hash((2 * images.long() + 1) ^ key) % n_latents
    axes = (len(images), *[1] * (codes.indices.ndim - 1))
    # int64 holds the product of two indices of a dictionary below 2^31.
    names = (codes.indices.long() * factor.view(axes) + start.view(axes)) % n_latents
    return SparseCodes(names, codes.values, n_latents)


def _seed_key(seed: int) -> int:
    """63 well mixed bits of a seed of any size, so that seeds do not meet other images' numbers."""
    return int(_hash(torch.tensor([seed % 2**62]))[0])


def _coprime_to(n: int, at_most: int = 4096) -> Int[Tensor, " factor"]:
    """Numbers below n without a common divisor, spread over its range."""
    stride = max(1, n // (2 * at_most))
    found = [number for number in range(1, max(2, n), stride) if math.gcd(number, n) == 1]
    return torch.tensor(found)


def _hash(numbers: Int[Tensor, " *n"]) -> Int[Tensor, " *n"]:
    """64 well mixed bits of each, as a non-negative number."""
    x = numbers * _STEP
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        # The shift of a signed number drags its sign along; the mask takes it away again.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x & (2**63 - 1)
