"""What every tower of open_clip can do: input to tokens, blocks, tokens to embedding.

Every method calls the model's own modules in the model's own order; nothing is copied or hooked.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipattr.clip.attention import Context
from clipattr.clip.blocks import Block, take_apart

Tokens = Float[Tensor, "batch token model"]


class NormLinear(NamedTuple):
    """What stands between the pooled token and the embedding: a norm and a linear layer."""

    norm: nn.LayerNorm
    projection: Float[Tensor, "model embed"]
    bias: Float[Tensor, " embed"] | None


class Trunk(ABC):
    """One tower: what differs between its families."""

    reads_text: bool
    """inputs are token ids, on which mask and pooling depend"""
    blocks: list[Block]
    d_model: int
    """width of the residual stream"""
    d_embed: int
    """width of the embedding"""
    n_prefix: int
    """tokens in front of the patches: class token and registers"""
    has_cls: bool
    """one token can be read as `cls`"""
    pools_cls: bool
    """the embedding depends on the `cls` token after the last block alone"""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    def trim(self, inputs: Tensor) -> Tensor:
        """The inputs without what no embedding of the batch depends on."""
        return inputs

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tokens:
        """Input to the first block."""

    @abstractmethod
    def contexts(self, inputs: Tensor | None) -> list[Context]:
        """What each block reads beside the residual stream."""

    @abstractmethod
    def head(self, x: Tokens, inputs: Tensor | None) -> Float[Tensor, "batch embed"]:
        """From the output of the last block to the un-normalised embedding."""

    def head_of_cls(self, x: Float[Tensor, "batch model"]) -> Float[Tensor, "batch embed"]:
        """The head where it reads the `cls` token alone (`pools_cls`)."""
        return self.head(x[:, None], None)

    def take_cls(self, x: Tensor, inputs: Tensor | None) -> Float[Tensor, "batch width"]:
        """The `cls` token: the first one of an image."""
        return x[:, 0].clone()  # a view would keep all tokens alive

    def place_cls(self, cls: Tensor, x: Tensor, inputs: Tensor | None) -> Tensor:
        """All tokens with another `cls` token."""
        return torch.cat([cls[:, None], x[:, 1:]], dim=1)

    @abstractmethod
    def norm_linear(self) -> NormLinear | None:
        """The head as a norm and a linear layer; None where it is something else."""


def take_all_apart(modules: Iterable[nn.Module]) -> list[Block]:
    """All blocks, or none where one of them is not known."""
    blocks = [take_apart(module) for module in modules]
    return [] if None in blocks else blocks  # type: ignore[return-value]
