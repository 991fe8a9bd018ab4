"""Which tokens of an image are kept: a function of its key alone.

The same ones are drawn in every order, batch, set of shards and process.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Int, UInt64
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw_tokens(keys: Sequence[str], n_tokens: int, n_drawn: int) -> Int[Tensor, "image drawn"]:
    """For each image `n_drawn` of the numbers below `n_tokens`, without replacement, ascending.

    Every token has a hash of the key and its number; those with the smallest are drawn. Whoever
    draws fewer tokens gets some of those of whoever draws more.
    """
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    digests = b"".join(blake2b(key, digest_size=8).digest() for key in encoded)
    streams = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    steps = np.arange(1, n_tokens + 1, dtype=np.uint64) * GOLDEN
    smallest = np.argsort(_mix(streams[:, None] + steps), axis=1, kind="stable")[:, :n_drawn]
    return torch.from_numpy(np.sort(smallest, axis=1))


def _mix(numbers: UInt64[np.ndarray, "image token"]) -> UInt64[np.ndarray, "image token"]:
    """splitmix64, a bijection of 64-bit integers (Steele, Lea and Flood 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
