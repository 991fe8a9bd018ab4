"""The scalar that is explained, as a function of the activation at the site.

Both heads of clipattr are one formula: the text head has unit rows and bias 0, a linear probe on
the normalised embedding has whatever it learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable  # so that jaxtyping can check signatures that take a score
class Score(Protocol):
    """One number per row of `x`; row r belongs to image `images[r]` of the batch.

    Rows and images differ because exact patching repeats an image once per latent, and each image
    has its own target. Rows must not influence each other.
    """

    def __call__(
        self, x: Float[Tensor, "rows *site model"], images: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Score every row."""
        ...


@dataclass(frozen=True)
class HeadScore:
    """Score of a linear head on the normalised embedding: y = <e / |e|, w_c> + b_c, e = suffix(x).

    `targets` is the class c each image is explained for. With text embeddings as rows of `weights`
    and no bias this is the cosine of zero-shot classification, with the weight and bias of a linear
    probe its logit.
    """

    suffix: Callable[[Tensor], Tensor]
    weights: Float[Tensor, "class embed"]
    targets: Int[Tensor, " batch"]
    bias: Float[Tensor, " class"] | None = None

    def __call__(
        self, x: Float[Tensor, "rows *site model"], images: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Score every row for the target of its image."""
        unit = torch.nn.functional.normalize(self.suffix(x), dim=-1)
        target = self.targets[images]
        score = (unit * self.weights[target]).sum(dim=-1)
        return score if self.bias is None else score + self.bias[target]


def clean_scores(score: Score, x: Float[Tensor, "batch *site model"]) -> Float[Tensor, " batch"]:
    """Score of the activations as they are, one row per image: y(x).

    Give it `x - codes.decode(W_dec)` for y(rest), the score with every latent deleted.
    """
    return score(x, torch.arange(x.shape[0], device=x.device))
