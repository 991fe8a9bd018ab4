"""Heads that are not linear in one vector: a hidden layer, and attention over tokens.

Both take raw features: what standardises them in training is folded into the first layer by
`absorb`, which gives the equal head.
"""

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from clipattr.errors import ConfigError
from clipattr.probes.linear import LinearProbe


class MlpProbe(nn.Module):
    """logits = W gelu(V f + a) + b. Starts undecided: W = 0."""

    def __init__(
        self, d_in: int, n_classes: int, *, hidden: int, generator: Generator | None = None
    ) -> None:
        """V is drawn with a variance of 1 / d_in."""
        super().__init__()
        self.hidden = LinearProbe(d_in, hidden)
        self.output = LinearProbe(hidden, n_classes)
        _draw(self.hidden.weight, generator)

    def forward(self, features: Float[Tensor, "*rows embed"]) -> Float[Tensor, "*rows class"]:
        """Logits."""
        return self.output(gelu(self.hidden(features)))


class AttentionProbe(nn.Module):
    """Each head's learned query weighs the tokens; a linear probe reads what they sum up to.

    pooled_h = sum_t softmax_t(q_h . K_h x_t / sqrt(width)) V_h x_t,   logits = W pooled + b
    """

    def __init__(
        self, d_in: int, n_classes: int, *, n_heads: int, generator: Generator | None = None
    ) -> None:
        """Starts undecided, with a query of 0: the mean over the tokens."""
        super().__init__()
        if n_heads < 1 or d_in % n_heads:
            raise ConfigError(f"n_heads={n_heads}: must divide the width of the tokens, {d_in}")
        self.query = nn.Parameter(torch.zeros(n_heads, 1, d_in // n_heads))
        self.keys = LinearProbe(d_in, d_in)
        self.values = LinearProbe(d_in, d_in)
        self.output = LinearProbe(d_in, n_classes)
        _draw(self.keys.weight, generator)
        _draw(self.values.weight, generator)

    def forward(self, tokens: Float[Tensor, "batch token embed"]) -> Float[Tensor, "batch class"]:
        """Logits."""
        n_heads = len(self.query)
        keys, values = (
            each(tokens).unflatten(2, (n_heads, -1)).transpose(1, 2)
            for each in (self.keys, self.values)
        )
        query = self.query.expand(len(tokens), -1, -1, -1)
        pooled = scaled_dot_product_attention(query, keys, values)
        return self.output(pooled.flatten(1))


Head = TypeVar("Head", LinearProbe, MlpProbe, AttentionProbe)


@torch.no_grad()
def absorb(head: Head, shift: Float[Tensor, " embed"], factor: Float[Tensor, " embed"]) -> Head:
    """The head whose logits of x are those that `head` has of (x - shift) * factor."""
    folded = copy.deepcopy(head)
    match folded:
        case LinearProbe():
            first = [folded]
        case MlpProbe():
            first = [folded.hidden]
        case AttentionProbe():
            first = [folded.keys, folded.values]
    for layer in first:
        layer.weight.mul_(factor)
        layer.bias.sub_(layer.weight @ shift)
    return folded


def _draw(weight: nn.Parameter, generator: Generator | None) -> None:
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
