"""A linear classifier on the normalised image embedding, the simplest head built on CLIP."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional


class LinearProbe(nn.Module):
    """logit_c = w_c . f + beta_c on the feature f = e / ||e||.

    Starts at zero: logistic regression is convex, so the start needs no chance.
    """

    def __init__(self, d_in: int, n_classes: int) -> None:
        """A probe that gives every class the same logit."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_classes, d_in))
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def forward(self, features: Float[Tensor, "*rows embed"]) -> Float[Tensor, "*rows class"]:
        """Logits of L2-normalised embeddings; normalising is left to who makes the features."""
        return functional.linear(features, self.weight, self.bias)


def linear_logits(
    embeddings: Float[Tensor, "*rows embed"],
    weights: Float[Tensor, "class embed"],
    bias: Float[Tensor, " class"],
) -> Float64[Tensor, "*rows class"]:
    """What a fixed linear head says, in float64, where the embeddings are."""
    weights, bias = (each.detach().to(embeddings.device, torch.float64) for each in (weights, bias))
    return embeddings.double() @ weights.T + bias


@torch.no_grad()
def from_columns(
    weight: Float[Tensor, "column feature"], bias: Float[Tensor, " column"], n_classes: int
) -> LinearProbe:
    """A solution as a module; one column of two classes becomes half the logit for each."""
    if len(weight) == 1 and n_classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    probe = LinearProbe(weight.shape[1], n_classes)
    probe.weight.copy_(weight)
    probe.bias.copy_(bias)
    return probe
