"""Take a cue away from a classifier: from the activations, or from what a linear head reads.

    suppress    x - t sum_{j in s} (a_j - m_j) v_j      latents to their means, or to 0 with m = 0
    erase       e - d (r . (e - m)),  r . d = 1         of the unit embedding e; no unit afterwards

t is the strength of the edit: 0 changes nothing. Because what is erased is not brought to unit
length again, the erasure is affine, and folding it into a linear head is exact: the repaired head
is an ordinary one that reads the same feature.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import DataError

# Variances below this share of the largest are rounding.
_RANK_TOLERANCE = 1e-10
# Accuracy that must have been lost before a share of it can be restored.
_LEAST_LOST = 0.01


class Suppression(NamedTuple):
    """Latents of a cue, each once, and the activations that they are brought to."""

    latents: Int[Tensor, " cue"]
    means: Float[Tensor, " cue"]


class Erasure(NamedTuple):
    """The edit e - d (r . (e - m)): what r reads of the cue is taken out along d."""

    read: Float64[Tensor, " embed"]
    remove: Float64[Tensor, " embed"]
    mean: Float64[Tensor, " embed"]
    """stays where it is, so that the head's bias still fits"""


class FoldedHead(NamedTuple):
    """A linear head that sees e as the head before saw the erased e."""

    weights: Float64[Tensor, "class embed"]
    bias: Float64[Tensor, " class"]


def measure_excess(
    codes: SparseCodes, directions: Float[Tensor, "latent model"], suppression: Suppression
) -> Float[Tensor, "*rows model"]:
    """What a suppression of strength 1 takes away: sum_{j in s} (a_j - m_j) v_j.

    A latent that is silent has a_j = 0 and is brought to its mean like the others. Error term and
    all other latents stay. `directions` are v_j in the units of x (`Sae.directions`).
    """
    latents = suppression.latents.to(codes.indices.device)
    is_chosen = torch.isin(codes.indices, latents)
    present = codes._replace(values=codes.values * is_chosen).decode(directions)
    return present - suppression.means.to(directions) @ directions[latents]


def find_erasure(
    embeddings: Float[Tensor, "image embed"],
    labels: Int[Tensor, " image"],
    has_cue: Bool[Tensor, " image"],
) -> Erasure:
    """The least change after which no linear head tells images with the cue from those without.

    Least-squares concept erasure (LEACE, Belrose et al. 2023) of one flag z, on rows weighted so
    that every group of label x cue counts the same:

        d = cov(e, z),   r = C^+ d / (d . C^+ d),   C = cov(e), shrunk

    Of all r with r . d = 1, which all make the two means equal, this one changes e least. It is
    found for embeddings to come as well: the sample covariance of hardly more images than
    dimensions is nearly singular by chance, and r would follow the chance. C is therefore the
    covariance as Ledoit and Wolf (2004) shrink it towards a sphere, the less the more images there
    are; shrunk all the way r lies along d, an orthogonal projection. Weighting
    is what keeps the label: where the cue goes with it, erasing the cue of unweighted rows erases
    the label as well. d is along the difference of the means with and without, averaged over
    labels; a label that occurs on one side alone says nothing about the cue and is left out.
    """
    weights = _balance(labels, has_cue)
    rows = embeddings.double()
    mean = weights @ rows
    centred = rows - mean
    difference = (weights * (has_cue.double() - 0.5)) @ centred
    covariance = shrink_covariance(centred, weights)
    inverse = torch.linalg.pinv(covariance, rtol=_RANK_TOLERANCE, hermitian=True)
    read = inverse @ difference
    along = float(read @ difference)
    if not along > 0:
        raise DataError(
            "the images with the cue have the same mean embedding as those without, within every "
            "label: there is no direction to erase"
        )
    return Erasure(read / along, difference, mean)


def shrink_covariance(
    centred: Float64[Tensor, "image embed"], weights: Float64[Tensor, " image"]
) -> Float64[Tensor, "embed embed"]:
    """(1 - s) C + s mu I of weighted rows with mean 0, the weights with the sum 1.

        C = sum w e e^T,   mu = tr C / d,   s = min(1, sum w^2 |e e^T - C|^2 / |C - mu I|^2)

    s is the expected squared error of C over its distance from the sphere. Reference, with
    w = 1/n: Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance
    matrices.
    """
    covariance = (centred * weights[:, None]).T @ centred
    sphere = torch.eye(len(covariance), dtype=covariance.dtype) * covariance.diagonal().mean()
    distance = (covariance - sphere).square().sum()
    fourth = centred.square().sum(dim=1).square()
    along = ((centred @ covariance) * centred).sum(dim=1)
    error = weights.square() @ (fourth - 2 * along + covariance.square().sum())
    shrinkage = 1.0 if distance <= error else float(error / distance)
    return covariance.lerp(sphere, shrinkage)


def direction_erasure(
    direction: Float[Tensor, " embed"], embeddings: Float[Tensor, "image embed"]
) -> Erasure:
    """Orthogonal projection along a direction of any length, to its mean over the embeddings."""
    unit = direction.double()
    length = float(unit.norm())
    if not 0 < length < math.inf:
        raise DataError(f"the direction of the cue has length {length}: nothing to erase")
    return Erasure(unit / length, unit / length, embeddings.double().mean(dim=0))


def fold_erasure(
    weights: Float[Tensor, "class embed"], bias: Float[Tensor, " class"], erasure: Erasure
) -> FoldedHead:
    """The head whose logits of e are those that the given head has of the erased e.

    w' = w - (w . d) r,   b' = b + (w . d) (r . m)
    """
    weights = weights.double()
    amounts = weights @ erasure.remove
    return FoldedHead(
        weights - amounts[:, None] * erasure.read,
        bias.double() + amounts * (erasure.read @ erasure.mean),
    )


def restored_share(before: float, repaired: float, reference: float) -> float:
    """(repaired - before) / (reference - before): how much of what was lost is back.

    nan where the reference is not at least one percentage point better than before: a share of
    hardly anything says nothing.
    """
    lost = reference - before
    return (repaired - before) / lost if lost >= _LEAST_LOST else math.nan


def _balance(
    labels: Int[Tensor, " image"], has_cue: Bool[Tensor, " image"]
) -> Float64[Tensor, " image"]:
    """Weights with the sum 1, the same total for every group of the labels that have both."""
    _, place = labels.unique(return_inverse=True)
    groups = place * 2 + has_cue.long()
    counts = torch.bincount(groups, minlength=2 * (int(place.max()) + 1) if len(place) else 2)
    is_complete = (counts.view(-1, 2) > 0).all(dim=1)
    if not bool(is_complete.any()):
        raise DataError(
            f"no label of the {len(labels)} images occurs with and without the cue: what belongs "
            "to the cue cannot be told from what belongs to the label"
        )
    weights = torch.where(is_complete[place], 1 / counts[groups].double(), 0.0)
    return weights / weights.sum()
