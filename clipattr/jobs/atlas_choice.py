"""Which of the many pairs of a class and a latent the pages of the atlas show."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


def moved_classes(
    mean_attribution: Float[Tensor, "class latent"], *, n_raised: int
) -> Iterator[list[int]]:
    """Of each latent the classes that it raises most, then half as many that it lowers most."""
    n_classes, n_latents = mean_attribution.shape
    raised = mean_attribution.topk(min(n_raised, n_classes), dim=0)
    n_lowered = min((n_raised + 1) // 2, n_classes)
    lowered = mean_attribution.topk(n_lowered, dim=0, largest=False)
    for latent in range(n_latents):
        up, down = raised.values[:, latent] > 0, lowered.values[:, latent] < 0
        yield [*raised.indices[up, latent].tolist(), *lowered.indices[down, latent].tolist()]


class ShownLatents(NamedTuple):
    """The latents on the page of a class."""

    unexpected: Sequence[int]
    others: Sequence[int]
    n_more: int
    """unexpected ones that are not shown"""


def latents_of_class(
    mean_attribution: Float[Tensor, " latent"], unexpected: Sequence[int], *, n_each: int
) -> ShownLatents:
    """The first of the unexpected latents, and of the others those that drive the class most."""
    others = mean_attribution.clone()
    others[list(unexpected)] = 0
    strongest = others.topk(min(n_each, len(others)))
    driving = strongest.indices[strongest.values > 0].tolist()
    return ShownLatents(unexpected[:n_each], driving, max(0, len(unexpected) - n_each))
