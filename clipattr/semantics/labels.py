"""What a latent means, in the embedding space of a semantic scorer: labels and class alignment.

A latent without any example has no meaning: its rows are nan, its best label is -1.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clipattr.errors import ConfigError

# Latents x labels that are scored at a time: 32 MB, of which the best are kept.
_LATENTS, _LABELS = 1024, 8192


class BestLabel(NamedTuple):
    """argmax_t s_j(t) and its value for each latent."""

    label: Int[Tensor, " latent"]
    score: Float[Tensor, " latent"]


class TopLabels(NamedTuple):
    """The n labels of highest s_j(t) of each latent, best first; -1 and nan without examples."""

    labels: Int[Tensor, "latent n"]
    scores: Float[Tensor, "latent n"]
    margin: Float[Tensor, " latent"]
    """the best score minus the second: how much the first label is to be preferred"""


def semantic_mean(
    embeddings: Float[Tensor, "image embed"], examples: Int[Tensor, "latent n"]
) -> Float[Tensor, "latent embed"]:
    """x_tilde_j: mean of the L2-normalised embeddings of the latent's top examples.

    `examples` are row numbers into `embeddings`, padded with -1. Normalised first, because
    otherwise a few images with a long embedding would decide. Reference: Dreyer et al. 2025,
    SemanticLens.
    """
    return mean_of_examples(functional.normalize(embeddings, dim=1), examples)


def mean_of_examples(
    rows: Float[Tensor, "image width"], examples: Int[Tensor, "latent n"]
) -> Float[Tensor, "latent width"]:
    """Mean of some rows for each latent, padded with -1; nan for a latent without any."""
    is_example = (examples >= 0).to(rows.dtype)
    # 0 / 0 = nan for a latent without examples, on purpose.
    weights = is_example / is_example.sum(1, keepdim=True)
    # Padding reads a row that is read anyway: another may be nan, and 0 nan is nan.
    examples = examples.where(examples >= 0, examples[:, :1].clamp_min(0))
    # embedding_bag never builds [latent, n, width], which is gigabytes for a real dictionary.
    return functional.embedding_bag(examples, rows, per_sample_weights=weights, mode="sum")


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


def top_labels(
    means: Float[Tensor, "latent embed"],
    texts: Float[Tensor, "label embed"],
    empty_text: Float[Tensor, " embed"],
    *,
    n: int = 5,
) -> TopLabels:
    """The n best labels of every latent, of a vocabulary too large for `label_scores`.

    The same numbers; no tensor of all latents x all labels is made.
    """
    if not 1 <= n <= len(texts) or len(texts) < 2:
        raise ConfigError(
            f"{n} labels of a vocabulary of {len(texts)}: ask for 1 or more, and have at least as "
            "many words and no fewer than two"
        )
    means = functional.normalize(means, dim=1)
    texts = functional.normalize(texts, dim=1)
    blocks = [_best_labels(block, texts, max(n, 2)) for block in means.split(_LATENTS)]
    cosines, labels = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    scores = cosines - (means @ functional.normalize(empty_text, dim=0))[:, None]
    labels = labels.masked_fill(scores.isnan(), -1)
    return TopLabels(labels[:, :n], scores[:, :n], scores[:, 0] - scores[:, 1])


def _best_labels(
    means: Float[Tensor, "latent embed"], texts: Float[Tensor, "label embed"], n: int
) -> tuple[Float[Tensor, "latent n"], Int[Tensor, "latent n"]]:
    """The n largest cosines and whose they are; a running best over blocks of the vocabulary."""
    best, labels = means.new_empty(len(means), 0), torch.empty(len(means), 0, dtype=torch.int64)
    labels = labels.to(means.device)
    for start in range(0, len(texts), _LABELS):
        cosines = means @ texts[start : start + _LABELS].T
        found, places = cosines.topk(min(n, cosines.shape[1]), dim=1)
        best = torch.cat([best, found], dim=1)
        labels = torch.cat([labels, places + start], dim=1)
        best, kept = best.topk(min(n, best.shape[1]), dim=1)
        labels = labels.gather(1, kept)
    return best, labels


def alignment(
    means: Float[Tensor, "latent embed"],
    class_texts: Float[Tensor, "class embed"],
    empty_text: Float[Tensor, " embed"],
) -> Float[Tensor, "latent class"]:
    """Alignment of latent j with class c, s_j(t_c): low for a latent that has no business there."""
    return label_scores(means, class_texts, empty_text)
