"""Sums over bags of rows, and dot products with them, as Triton kernels.

A program sums one bag for WIDTH columns, several pairs at a time so that enough loads are under
way. Bags go first and columns second: while one block of columns is worked on, that part of the
matrix stays in the second-level cache. Sums are in float32 (float64 of float64), in an order that
depends on nothing but the bags: no atomics, the same bits every time.

Floor: values and indices once, the matrix once, the result once; what the rows cost beyond that is
traffic of the cache, pairs * width * element size.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS, DOT_PAIRS, MAX_WIDTH = 8, 16, 256
# Pairs that one program adds up, where bags may be long.
CHUNK = 256


def sum_bags(
    values: Tensor, index: Tensor, starts: Tensor, matrix: Tensor, bags: Tensor | None
) -> Tensor:
    """As `eager.sum_bags`, in the precision of `values`.

    `bags`, the bag of each pair, is given where one may be long. Beyond its first CHUNK pairs such
    a bag is summed in chunks by programs of their own, and the sums are added in order. Chunks are
    cut at multiples of CHUNK: two bags cannot both have such a rest in one, so the number of chunks
    and what belongs to them is known without asking the device.
    """
    n_bags, width = len(starts) - 1, matrix.shape[1]
    values, index, matrix = values.contiguous(), index.contiguous(), matrix.contiguous()
    total = torch.empty(n_bags, width, dtype=values.dtype, device=values.device)
    block = _block(width)
    n_blocks = triton.cdiv(width, block)
    n_chunks = 0 if bags is None else triton.cdiv(len(index), CHUNK)
    sums = torch.empty(n_chunks, width, dtype=_sum_dtype(matrix), device=values.device)
    if n_chunks > 0:
        sum_chunks[(n_chunks, n_blocks)](
            values, index, starts, bags, matrix, sums, width, PAIRS, block, CHUNK
        )
    if n_bags > 0:
        sum_heads[(n_bags, n_blocks)](
            values, index, starts, matrix, sums, total, width, PAIRS, block, CHUNK, n_chunks > 0
        )
    return total


def dot(left: Tensor, right: Tensor, index: Tensor, starts: Tensor, bags: Tensor) -> Tensor:
    """As `eager.dot`, in the precision of `left`; `bags` is not needed."""
    left, right, index = left.contiguous(), right.contiguous(), index.contiguous()
    products = torch.empty(len(index), dtype=left.dtype, device=left.device)
    width = left.shape[1]
    if len(left) > 0:
        dot_pairs[(len(left),)](
            left, right, index, starts, products, width, DOT_PAIRS, _block(width)
        )
    return products


def _block(width: int) -> int:
    return min(MAX_WIDTH, triton.next_power_of_2(width))


def _sum_dtype(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


@triton.jit
@no_type_check
def sum_heads(
    values,
    index,
    starts,
    matrix,
    sums,
    total,
    width,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
):
    """A whole bag, or its first CHUNK pairs and then the sums of the other chunks."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_there = column < width
    begin = tl.load(starts + bag)
    end = tl.load(starts + bag + 1)
    head = tl.minimum(end, begin + CHUNK) if HAS_CHUNKS else end
    added = _sum_pairs(values, index, matrix, begin, head, column, width, sums, PAIRS, WIDTH)
    if HAS_CHUNKS:
        behind = tl.where(head < end, (end + CHUNK - 1) // CHUNK, 0)
        for chunk in range(head // CHUNK, behind):
            added += tl.load(sums + chunk * width + column, mask=is_there, other=0.0)
    tl.store(total + bag * width + column, added.to(total.dtype.element_ty), mask=is_there)


@triton.jit
@no_type_check
def sum_chunks(
    values,
    index,
    starts,
    bags,
    matrix,
    sums,
    width,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What lies in one chunk of the rest of a long bag, if there is any."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    # Whoever has a rest in this chunk has more than CHUNK pairs before it: also its first one.
    bag = tl.load(bags + chunk * CHUNK).to(tl.int64)
    begin = tl.maximum(chunk * CHUNK, tl.load(starts + bag) + CHUNK)
    end = tl.minimum((chunk + 1) * CHUNK, tl.load(starts + bag + 1))
    if begin < end:
        added = _sum_pairs(values, index, matrix, begin, end, column, width, sums, PAIRS, WIDTH)
        tl.store(sums + chunk * width + column, added, mask=column < width)


@triton.jit
@no_type_check
def dot_pairs(
    left,
    right,
    index,
    starts,
    products,
    width,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """left[bag] . right[index] of all pairs of one bag."""
    bag = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + bag)
    end = tl.load(starts + bag + 1)
    DTYPE: tl.constexpr = tl.float64 if right.dtype.element_ty == tl.float64 else tl.float32
    for first in range(begin, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        is_pair = pair < end
        place = tl.load(index + pair, mask=is_pair, other=0).to(tl.int64)
        added = tl.zeros([PAIRS, WIDTH], DTYPE)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            is_there = column < width
            mine = tl.load(left + bag * width + column, mask=is_there, other=0.0).to(DTYPE)
            theirs = tl.load(
                right + place[:, None] * width + column[None, :],
                mask=is_pair[:, None] & is_there[None, :],
                other=0.0,
            )
            added += mine[None, :] * theirs.to(DTYPE)
        product = tl.sum(added, axis=1)
        tl.store(products + pair, product.to(products.dtype.element_ty), mask=is_pair)


@triton.jit
@no_type_check
def _sum_pairs(
    values,
    index,
    matrix,
    begin,
    end,
    column,
    width,
    sums,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum of value * matrix[index] over the pairs from begin to end, in the precision of sums."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    is_there = column < width
    added = tl.zeros([PAIRS, WIDTH], DTYPE)
    for first in range(begin, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        is_pair = pair < end
        value = tl.load(values + pair, mask=is_pair, other=0.0).to(DTYPE)
        place = tl.load(index + pair, mask=is_pair, other=0).to(tl.int64)
        row = tl.load(
            matrix + place[:, None] * width + column[None, :],
            mask=is_pair[:, None] & is_there[None, :],
            other=0.0,
        )
        added += value[:, None] * row.to(DTYPE)
    return tl.sum(added, axis=0)
