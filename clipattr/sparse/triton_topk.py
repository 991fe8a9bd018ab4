"""Exact top-k of wide rows in two readings of the row, the second of which the cache serves.

1. The largest of each of GROUPS interleaved groups. The k-th largest of these is at most the k-th
   largest of the row, and with several groups per chosen number hardly less.
2. All that is not less goes to a short list, in order. Where it does not fit (many equal numbers,
   or the largest all in few groups), the k-th largest is found by bisection over the whole row.
   Of what equals it k suffice, so the list holds them.

A second kernel sorts the lists. Numbers are compared as 32-bit integers of the same order.
Floor: one reading of the row from memory.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipattr.sparse import eager

# The list has room for 2 k; a sort of more than 2048 does not fit into the registers.
MAX_K = 1024
MIN_GROUPS, BLOCK = 1024, 1024


class Sizes(NamedTuple):
    """What depends on k: powers of two, and warps for eight numbers of each thread."""

    capacity: int
    groups: int

    @property
    def list_warps(self) -> int:
        """Of `list_candidates`."""
        return self.groups // 256

    @property
    def sort_warps(self) -> int:
        """Of `sort_candidates`."""
        return max(1, self.capacity // 256)


def sizes_for(k: int) -> Sizes:
    """Room for all above the bound and k that equal it, and four groups for each chosen number."""
    capacity = triton.next_power_of_2(2 * k)
    return Sizes(capacity, max(MIN_GROUPS, 2 * capacity))


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `eager.top_k`; of equal numbers the first. In float64 and for large k it is eager's."""
    if k > MAX_K or pre.dtype == torch.float64:
        return eager.top_k(pre, k)
    pre = pre.contiguous()
    n_rows, n_latents = pre.shape
    sizes = sizes_for(k)
    lists = torch.empty(n_rows, sizes.capacity, dtype=torch.int64, device=pre.device)
    lengths = torch.empty(n_rows, dtype=torch.int32, device=pre.device)
    values = torch.empty(n_rows, k, dtype=pre.dtype, device=pre.device)
    indices = torch.empty(n_rows, k, dtype=torch.int64, device=pre.device)
    if n_rows > 0:
        list_candidates[(n_rows,)](
            pre,
            lists,
            lengths,
            n_latents,
            k,
            sizes.groups,
            BLOCK,
            sizes.capacity,
            num_warps=sizes.list_warps,  # pyright: ignore[reportCallIssue]  of the launch
        )
        sort_candidates[(n_rows,)](
            lists,
            lengths,
            values,
            indices,
            k,
            sizes.capacity,
            num_warps=sizes.sort_warps,  # pyright: ignore[reportCallIssue]  of the launch
        )
    return values, indices


@triton.jit
@no_type_check
def list_candidates(
    pre,
    lists,
    lengths,
    n_latents,
    k,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """At least the k largest of a row, as (key, latent) in one number, and how many they are."""
    row = tl.program_id(0).to(tl.int64)
    numbers = pre + row * n_latents
    found = lists + row * CAPACITY
    group = tl.arange(0, GROUPS)
    largest = tl.full([GROUPS], float("-inf"), tl.float32)
    for start in range(0, n_latents, GROUPS):
        latent = start + group
        z = tl.load(numbers + latent, mask=latent < n_latents, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, z, propagate_nan=tl.PropagateNan.ALL)
    keys = _keys(largest)
    low, high = tl.min(keys).to(tl.int64), tl.max(keys).to(tl.int64)
    top = high
    # A lower bound is enough, and this one is within the 16th halving of the best.
    for _ in range(16):
        middle = (low + high + 1) >> 1
        is_enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    length = _list(numbers, found, n_latents, k, low, BLOCK, CAPACITY)
    if length > CAPACITY:
        low = _kth_largest(numbers, n_latents, k, low, top, BLOCK)
        length = _list(numbers, found, n_latents, k, low, BLOCK, CAPACITY)
    tl.store(lengths + row, length)


@triton.jit
@no_type_check
def sort_candidates(lists, lengths, values, indices, k, CAPACITY: tl.constexpr):
    """The first k of a list, largest first, and of equal ones the lowest latent first."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CAPACITY)
    is_listed = place < tl.load(lengths + row)
    nothing = -(2**63)
    listed = tl.load(lists + row * CAPACITY + place, mask=is_listed, other=nothing)
    listed = tl.sort(listed, descending=True)
    key = (listed >> 32).to(tl.int32)
    latent = 0xFFFFFFFF - (listed & 0xFFFFFFFF)
    z = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(values + row * k + place, z.to(values.dtype.element_ty), mask=place < k)
    tl.store(indices + row * k + place, latent, mask=place < k)


@triton.jit
@no_type_check
def _keys(z):
    """Integers in the order of the numbers: -0 is 0, and nan comes after everything."""
    z = tl.where(z == 0, 0.0, z)
    bits = z.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(z != z, 0x7FFFFFFF, key)


@triton.jit
@no_type_check
def _list(numbers, found, n_latents, k, low, BLOCK: tl.constexpr, CAPACITY: tl.constexpr):
    """List what is above `low` and the first k that equal it; how many they are."""
    n_above = 0
    n_equal = 0
    for start in range(0, n_latents, BLOCK):
        latent = start + tl.arange(0, BLOCK)
        is_there = latent < n_latents
        key = _keys(tl.load(numbers + latent, mask=is_there, other=0.0).to(tl.float32))
        is_above = (key > low) & is_there
        is_equal = (key == low) & is_there
        # Both counts in one running sum: a block has fewer than 2^16.
        counts = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16))
        above = n_above + (counts & 0xFFFF)
        equal = n_equal + (counts >> 16)
        place = above + tl.minimum(equal, k) - 1
        is_kept = (is_above | (is_equal & (equal <= k))) & (place < CAPACITY)
        entry = (key.to(tl.int64) << 32) | (0xFFFFFFFF - latent.to(tl.int64))
        tl.store(found + place, entry, mask=is_kept)
        n_above += tl.sum(is_above.to(tl.int32))
        n_equal += tl.sum(is_equal.to(tl.int32))
    return n_above + tl.minimum(n_equal, k)


@triton.jit
@no_type_check
def _kth_largest(numbers, n_latents, k, low, high, BLOCK: tl.constexpr):
    """The k-th largest key of the row, which is in [low, high]."""
    while low < high:
        middle = (low + high + 1) >> 1
        count = 0
        for start in range(0, n_latents, BLOCK):
            latent = start + tl.arange(0, BLOCK)
            is_there = latent < n_latents
            key = _keys(tl.load(numbers + latent, mask=is_there, other=0.0).to(tl.float32))
            count += tl.sum(((key >= middle) & is_there).to(tl.int32))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle - 1)
    return low
