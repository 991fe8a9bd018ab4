"""How much the top examples of a latent look alike."""

from jaxtyping import Float, Int
from torch import Tensor

from clipattr.semantics.labels import semantic_mean


def clarity(
    embeddings: Float[Tensor, "image embed"], examples: Int[Tensor, "latent n"]
) -> Float[Tensor, " latent"]:
    """(||mean_n u_n||^2 - 1/n) n / (n - 1) = mean pairwise cosine of the n top examples.

    `examples` are padded with -1; nan for a latent with fewer than two. Linear in n, where the
    pairs would be quadratic. Reference: Dreyer et al. 2025, SemanticLens.
    """
    n_examples = (examples >= 0).sum(1).to(embeddings.dtype)
    mean_squared = semantic_mean(embeddings, examples).square().sum(1)
    # n = 1 would give 0 / 0 up to rounding, that is any number.
    n_examples = n_examples.masked_fill(n_examples < 2, float("nan"))
    return (mean_squared - 1 / n_examples) * n_examples / (n_examples - 1)
