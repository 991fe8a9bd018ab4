"""What a latent means, in the embedding space of a semantic scorer: labels and class alignment.

A latent without any example has no meaning: its rows are nan, its best label is -1.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class BestLabel(NamedTuple):
    """argmax_t s_j(t) and its value for each latent."""

    label: Int[Tensor, " latent"]
    score: Float[Tensor, " latent"]


def semantic_mean(
    embeddings: Float[Tensor, "image embed"], examples: Int[Tensor, "latent n"]
) -> Float[Tensor, "latent embed"]:
    """x_tilde_j: mean of the L2-normalised embeddings of the latent's top examples.

    `examples` are row numbers into `embeddings`, padded with -1. Normalised first, because
    otherwise a few images with a long embedding would decide. Reference: Dreyer et al. 2025,
    SemanticLens.
    """
    is_example = (examples >= 0).to(embeddings.dtype)
    # 0 / 0 = nan for a latent without examples, on purpose.
    weights = is_example / is_example.sum(1, keepdim=True)
    # embedding_bag never builds [latent, n, embed], which is gigabytes for a real dictionary.
    return functional.embedding_bag(
        examples.clamp_min(0),
        functional.normalize(embeddings, dim=1),
        per_sample_weights=weights,
        mode="sum",
    )


def label_scores(
    means: Float[Tensor, "latent embed"],
    texts: Float[Tensor, "label embed"],
    empty_text: Float[Tensor, " embed"],
) -> Float[Tensor, "latent label"]:
    """s_j(t) = cos(x_tilde_j, t) - cos(x_tilde_j, t_empty).

    The empty prompt is subtracted because every text shares its direction (the modality gap).
    """
    means = functional.normalize(means, dim=1)
    to_texts = means @ functional.normalize(texts, dim=1).T
    to_empty = means @ functional.normalize(empty_text, dim=0)
    return to_texts - to_empty[:, None]


def best_label(scores: Float[Tensor, "latent label"]) -> BestLabel:
    """The label with the highest score; label -1 and score nan for a latent without examples."""
    score, label = scores.max(1)
    return BestLabel(label.masked_fill(score.isnan(), -1), score)


def alignment(
    means: Float[Tensor, "latent embed"],
    class_texts: Float[Tensor, "class embed"],
    empty_text: Float[Tensor, " embed"],
) -> Float[Tensor, "latent class"]:
    """Alignment of latent j with class c, s_j(t_c): low for a latent that has no business there."""
    return label_scores(means, class_texts, empty_text)
