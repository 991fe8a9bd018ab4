"""What the class token reads from every token, block by block, and what becomes of it.

    m_l = x_l + [sum_s r_ls] W_O + b_O,   x_{l+1} = m_l + MLP(m_l)

r_ls is what the heads of the class token read from token s in block l: attention weight x value,
heads side by side. `climb` computes the class token from these alone. With all of them it is the
model's; without those of a patch it is what the class token would be had it not read that patch,
while attention weights and all other tokens stay as they are.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.clip.attention import n_heads
from clipattr.clip.blocks import Block
from clipattr.clip.cut import Cut, Inputs
from clipattr.errors import ConfigError


class Reads(NamedTuple):
    """Everything that the class token of each image is made of."""

    start: Float[Tensor, "batch model"]
    """the class token before the first block"""
    values: Float[Tensor, "batch layer token heads"]
    """r_ls; the class token itself comes first, registers second, then the patches"""


def check_class_token(cut: Cut) -> None:
    """Raise ConfigError unless x at the site is made of what the class token has read."""
    site = cut.site
    if site.tokens != "cls" or cut.trunk.reads_text:
        raise ConfigError(f"{site}: only an image's class token reads from patches: tokens=cls")
    if site.stream == "embedding" and not cut.trunk.pools_cls:
        raise ConfigError(
            f"{site}: this tower pools all patches, there is no class token to follow"
        )
    if site.stream == "residual_before" and site.layer == 0:
        raise ConfigError(f"{site}: before the first block the class token has read nothing")
    for block in _blocks_to(cut):
        n_heads(block.attention)


@torch.no_grad()
def read_tokens(cut: Cut, images: Inputs) -> Reads:
    """One pass of the tower up to the site."""
    check_class_token(cut)
    blocks, contexts = _blocks_to(cut), cut.trunk.contexts(images)
    x = cut.trunk.embed(images)
    start, values = x[:, 0].clone(), []
    for number, (block, context) in enumerate(zip(blocks, contexts, strict=False)):
        if number:
            x = blocks[number - 1].run(x, contexts[number - 1])
        values.append(block.read_by_class(x, context))
    return Reads(start, torch.stack(values, dim=1))


def _blocks_to(cut: Cut) -> list[Block]:
    """The blocks in which the class token reads before the site."""
    return cut.trunk.blocks[: cut.site.layer + (cut.site.stream != "residual_before")]


def climb(
    cut: Cut,
    start: Float[Tensor, "row model"],
    totals: Float[Tensor, "row layer heads"],
) -> Float[Tensor, "row width"]:
    """X at the site, from what the class token read in each block, summed over the tokens.

    The cost is that of one token, without attention; differentiable in `totals`.
    """
    x = start[:, None]
    for number, block in enumerate(cut.trunk.blocks[: cut.site.layer]):
        middle = x + block.from_heads(block.finish_reading(totals[:, number, None], x))
        x = middle + block.run_mlp(middle)
    if cut.site.stream != "residual_before":
        x = _last_block(cut, x, totals[:, cut.site.layer, None])
    return x[:, 0]


def _last_block(cut: Cut, x: Tensor, total: Tensor) -> Tensor:
    block, stream = cut.block, cut.site.stream
    heads = block.finish_reading(total, x)
    if stream == "heads":
        return heads
    attention = block.from_heads(heads)
    middle = x + attention
    match stream:
        case "attention":
            return attention
        case "residual_middle":
            return middle
        case "neurons":
            return block.neurons(middle)
        case "mlp":
            return block.run_mlp(middle)
    x = middle + block.run_mlp(middle)
    return cut.trunk.head_of_cls(x[:, 0])[:, None] if stream == "embedding" else x
