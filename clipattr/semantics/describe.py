"""Everything that the top examples and the directions say about the latents, in one table."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from clipattr.semantics.clarity import clarity
from clipattr.semantics.directions import direction_map, nearest_directions
from clipattr.semantics.labels import semantic_mean, top_labels
from clipattr.semantics.two_means import two_means


class Semantics(NamedTuple):
    """One row per latent in every column; nan and -1 where a latent has too few examples."""

    n_examples: Int[Tensor, " latent"]
    means: Float[Tensor, "latent embed"]
    """x_tilde_j; alignment with classes and answers to queries are products with it"""
    labels: Int[Tensor, "latent n_labels"]
    """rows of the vocabulary, best first"""
    label_scores: Float[Tensor, "latent n_labels"]
    label_margin: Float[Tensor, " latent"]
    clarity: Float[Tensor, " latent"]
    polysemanticity: Float[Tensor, " latent"]
    clusters: Int[Tensor, "latent n"]
    """which of two heaps each example is in"""
    cluster_sizes: Int[Tensor, "latent 2"]
    nearest_latent: Int[Tensor, " latent"]
    nearest_cosine: Float[Tensor, " latent"]
    """its mean is the redundancy of the dictionary"""
    position: Float[Tensor, "latent 2"]
    """on the map of directions"""
    map_shares: Float[Tensor, "2"]
    """of the variance of the directions that the two axes of the map show"""


def describe_latents(
    *,
    embeddings: Float[Tensor, "image embed"],
    examples: Int[Tensor, "latent n"],
    W_dec: Float[Tensor, "latent model"],
    texts: Float[Tensor, "label embed"],
    empty_text: Float[Tensor, " embed"],
    n_labels: int = 5,
) -> Semantics:
    """The table of a dictionary.

    Args:
        embeddings: of the images, by the semantic scorer.
        examples: the images that activate each latent most, best first, as rows of `embeddings`,
            padded with -1. Usual are 20.
        W_dec: the directions.
        texts: the vocabulary, by the same scorer.
        empty_text: the empty prompt, by the same scorer.
        n_labels: how many labels each latent is given.
    """
    means = semantic_mean(embeddings, examples)
    labels = top_labels(means, texts, empty_text, n=n_labels)
    heaps = two_means(embeddings, examples)
    nearest, plane = nearest_directions(W_dec), direction_map(W_dec)
    return Semantics(
        n_examples=(examples >= 0).sum(1),
        means=means,
        labels=labels.labels,
        label_scores=labels.scores,
        label_margin=labels.margin,
        clarity=clarity(embeddings, examples),
        polysemanticity=heaps.polysemanticity,
        clusters=heaps.clusters,
        cluster_sizes=heaps.sizes,
        nearest_latent=nearest.latent,
        nearest_cosine=nearest.cosine,
        position=plane.positions,
        map_shares=plane.shares,
    )
