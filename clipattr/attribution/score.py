"""The scalar that is explained, as a function of the activation at the site.

Both heads of clipattr are one formula: the text head has unit rows and bias 0, a linear probe on
the normalised embedding has whatever it learned. "Cat rather than dog" is a row of its own, because
the score is linear in the row: see `contrast`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class ImageRows(Protocol):
    """What a suffix needs beside x, one row per image; see `clipattr.clip.cut.Rest`."""

    def rows(self, index: Int[Tensor, " row"]) -> "ImageRows":
        """Those of the images in `index`, for several edits of one image."""
        ...


@dataclass(frozen=True)
class HeadScore:
    """Score of a linear head on the normalised embedding: y = <e / |e|, w_c> + b_c.

    `targets` is the class c each image is explained for. With text embeddings as rows of `weights`
    and no bias this is the cosine of zero-shot classification, with the weight and bias of a linear
    probe its logit. The embedding is e = suffix(x), or suffix(x, rest) where x alone does not
    decide it; the rest is a constant of each image.
    """

    suffix: Callable[..., Tensor]
    weights: Float[Tensor, "class embed"]
    targets: Int[Tensor, " batch"]
    bias: Float[Tensor, " class"] | None = None
    rest: ImageRows | None = None

    def __call__(
        self, x: Float[Tensor, "rows *site model"], images: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Score every row for the target of its image."""
        rest = () if self.rest is None else (self.rest.rows(images),)
        embedding = self.suffix(x, *rest)
        dtype = torch.promote_types(embedding.dtype, self.weights.dtype)
        unit = torch.nn.functional.normalize(embedding.to(dtype), dim=-1)
        target = self.targets[images]
        score = (unit * self.weights[target]).sum(dim=-1)
        return score if self.bias is None else score + self.bias[target]


class Contrast(NamedTuple):
    """Rows and biases of a head whose class i is `one[i]` rather than `other[i]`."""

    weights: Float[Tensor, "pair embed"]
    bias: Float[Tensor, " pair"] | None


def contrast(
    weights: Float[Tensor, "class embed"],
    bias: Float[Tensor, " class"] | None,
    one: Int[Tensor, " pair"],
    other: Int[Tensor, " pair"],
) -> Contrast:
    """Why one class rather than another: y = y_one - y_other, as classes of a head."""
    shift = None if bias is None else bias[one] - bias[other]
    return Contrast(weights[one] - weights[other], shift)


def clean_scores(score: Score, x: Float[Tensor, "batch *site model"]) -> Float[Tensor, " batch"]:
    """Score of the activations as they are, one row per image: y(x).

    Give it `at_reference(x, codes, W_dec)` for the score with every latent deleted.
    """
    return score(x, torch.arange(x.shape[0], device=x.device))
