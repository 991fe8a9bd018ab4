"""What effects are measured on: the score of a class against that of the others.

A score that moves for all classes alike says nothing of a prediction, and cosines do. So

    score_c = y_c - mean over the other classes of y

and of two classes, where one is minus the other, the second rather than the first alone. Both are
linear in the logits: the score of a head is itself a row of weights and a bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.errors import ConfigError, DataError


class ScoreRows(NamedTuple):
    """A head's scores: score = embedding @ weights.T + bias."""

    weights: Float[Tensor, "score embed"]
    bias: Float[Tensor, " score"]


def class_contrasts(
    weights: Float[Tensor, "class embed"], bias: Float[Tensor, " class"]
) -> ScoreRows:
    """The scores of a linear head, as rows."""
    return ScoreRows(contrast_logits(weights.T).T, contrast_logits(bias))


def contrast_logits(logits: Float[Tensor, "*rows class"]) -> Float[Tensor, "*rows score"]:
    """The same scores of what the head has said: one for two classes, else one for each."""
    n_classes = logits.shape[-1]
    check_classes(n_classes)
    if n_classes == 2:
        return logits[..., 1:] - logits[..., :1]
    return (n_classes * logits - logits.sum(dim=-1, keepdim=True)) / (n_classes - 1)


def score_names(classes: Sequence[str]) -> tuple[str, ...]:
    """What each score says, in words."""
    check_classes(len(classes))
    if len(classes) == 2:
        return (f"{classes[1]} rather than {classes[0]}",)
    return tuple(f"{name} rather than the others" for name in classes)


def check_classes(n_classes: int) -> None:
    """Raise ConfigError where there is nothing to be rather than."""
    if n_classes < 2:
        raise ConfigError(
            f"a head of {n_classes} classes: a score is one class rather than the others, which "
            "takes at least 2"
        )


def remove_direction(
    embeddings: Float[Tensor, "image embed"], direction: Float[Tensor, " embed"], mean: float
) -> Float[Tensor, "image embed"]:
    """Unit rows of which none says more of the direction d than another before they are unit.

        e - (e . d - mean) d,  divided by its length

    Args:
        embeddings: unit rows.
        direction: of any length but 0.
        mean: what is said instead, for example the mean of e . d over the images.
    """
    length = direction.norm()
    if not length > 0:
        raise DataError(f"a direction of length {length.item()} cannot be removed")
    unit = direction.to(embeddings.dtype) / length.to(embeddings.dtype)
    along = embeddings @ unit - mean
    return normalize(embeddings - torch.outer(along, unit), dim=-1)
