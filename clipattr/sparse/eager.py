"""The products with torch's own operations: the reference, and what runs on the CPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def top_k(
    pre: Float[Tensor, "row latent"], k: int
) -> tuple[Float[Tensor, "row active"], Int[Tensor, "row active"]]:
    """The k largest of each row, largest first, and where they are; nan counts as the largest."""
    values, indices = pre.topk(k, dim=-1)
    return values, indices


def sum_bags(
    values: Float[Tensor, " pair"],
    index: Int[Tensor, " pair"],
    starts: Int[Tensor, " boundary"],
    matrix: Float[Tensor, "place width"],
    bags: Int[Tensor, " pair"] | None,
) -> Float[Tensor, "bag width"]:
    """For each bag of pairs the sum of value * matrix[index]; `bags` is not needed."""
    return embedding_bag(
        index,
        matrix,
        starts,
        per_sample_weights=values,
        mode="sum",
        include_last_offset=True,
    )


def dot(
    left: Float[Tensor, "bag width"],
    right: Float[Tensor, "place width"],
    index: Int[Tensor, " pair"],
    starts: Int[Tensor, " boundary"],
    bags: Int[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """left[bag] . right[index] of each pair: what autograd of embedding_bag computes.

    Blocked, without a copy of the rows.
    """
    sum_mode, no_padding = 0, -1
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, index, starts[:-1], bags, sum_mode, no_padding
    )
