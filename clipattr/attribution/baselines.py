"""What attribution is compared with: logit lens, activation energy, a random order.

None of them runs the model on the image. Slots without an active latent get 0, so that nothing is
said about latents that did not fire: a logit lens ranked over all latents is a straw man.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes


@torch.no_grad()
def logit_lens_table(
    direct: Callable[[Tensor], Tensor],
    W_dec: Float[Tensor, "latent model"],
    weights: Float[Tensor, "class embed"],
) -> Float[Tensor, "class latent"]:
    """Cosine of every decoder direction, read out directly, with every row of the head.

        table_cj = cos(E_direct(v_j), w_c)

    `direct` is layer norm then projection, applied to a direction as if it were an activation.
    Both sides are normalised, because the rows of a probe are not unit vectors. Reference:
    nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    embeds = torch.nn.functional.normalize(direct(W_dec), dim=-1)
    return torch.nn.functional.normalize(weights, dim=-1) @ embeds.T


def logit_lens(
    table: Float[Tensor, "class latent"],
    targets: Int[Tensor, " batch"],
    codes: SparseCodes,
) -> Float[Tensor, "batch *site active"]:
    """The table's entry for each image's class and each of its active latents."""
    class_of_slot = targets.reshape(-1, *[1] * (codes.indices.ndim - 1))
    return torch.where(codes.is_active, table[class_of_slot, codes.indices], 0.0)


def act_times_logit_lens(
    table: Float[Tensor, "class latent"],
    targets: Int[Tensor, " batch"],
    codes: SparseCodes,
) -> Float[Tensor, "batch *site active"]:
    """Logit lens weighted by the activation: a_j * table_cj."""
    return codes.values * logit_lens(table, targets, codes)


def energy(
    codes: SparseCodes, W_dec: Float[Tensor, "latent model"]
) -> Float[Tensor, "batch *site active"]:
    """Length of each latent's contribution to the activation: |a_j| |v_j|. Knows no class."""
    return codes.values.abs() * W_dec.norm(dim=1)[codes.indices]


def random_scores(
    codes: SparseCodes, generator: torch.Generator
) -> Float[Tensor, "batch *site active"]:
    """Uniform numbers in [0, 1) on the active slots: ranked, they are a random order."""
    draws = torch.rand(codes.values.shape, generator=generator, device=generator.device)
    return torch.where(codes.is_active, draws.to(codes.values), 0.0)
