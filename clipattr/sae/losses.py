"""What is minimised: one function for all architectures."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from clipattr.sae.relative import Average, alone, relative_error, spread_of
from clipattr.sae.sae import Sae, SaeOutput


class SaeLoss(NamedTuple):
    """total = reconstruction + penalty + aux_coefficient * auxiliary."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    """relative error; of prefixes and nested choices, the weighted mean of theirs"""
    penalty: Float[Tensor, ""]
    """what the architecture asks for beside it, with its coefficient"""
    auxiliary: Float[Tensor, ""]
    """AuxK, without its coefficient"""


def sae_loss(
    sae: Sae,
    x: Float[Tensor, "batch out"],
    output: SaeOutput,
    *,
    is_dead: Bool[Tensor, " latent"],
    k_aux: int,
    aux_coefficient: float,
    average: Average = alone,
) -> SaeLoss:
    """The loss of one batch; `x` is what is reconstructed, for a transcoder the output site.

    Of several processes with a part of the batch each, the mean of theirs is the loss of the whole
    batch, if `average` is the mean over them.
    """
    spread = spread_of(x, sae.error_unit(output), average)
    reconstruction = reconstruction_loss(sae, x, output, spread)
    penalty = sae.penalty(x, output, spread)
    auxiliary = auxk_loss(sae, x, output, is_dead, k_aux, average)
    total = reconstruction + penalty + aux_coefficient * auxiliary
    return SaeLoss(total, reconstruction, penalty, auxiliary)


def reconstruction_loss(
    sae: Sae, x: Float[Tensor, "batch out"], output: SaeOutput, spread: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Weighted mean of the relative errors of all parts, the mean predictor having 1."""
    weights = sae.part_weights()
    unit = sae.error_unit(output)
    errors = [
        weight * relative_error(x, part, spread, unit)
        for weight, part in zip(weights, output.parts, strict=True)
    ]
    return sum(errors[1:], errors[0]) / sum(weights)


def auxk_loss(
    sae: Sae,
    x: Float[Tensor, "batch out"],
    output: SaeOutput,
    is_dead: Bool[Tensor, " latent"],
    k_aux: int,
    average: Average = alone,
) -> Float[Tensor, ""]:
    """AuxK: the k_aux largest dead latents reconstruct what the live ones left over.

    e = x - x_hat (detached), e_hat = sum over TopK_{k_aux}(z_dead) of a_j v_j,
    loss = sum ||e - e_hat||^2 / sum ||e - mean(e)||^2; zero when no latent is dead.
    Reference: Gao et al. 2024, appendix A.2.
    """
    codes = sae.choose_dead(output, is_dead, k_aux)
    if codes is None:
        return sae.b_enc.sum() * 0.0
    # Detached: the live latents must not learn to leave something over for the dead ones.
    residual = (x - output.recon).detach()
    unit = sae.error_unit(output)
    spread = spread_of(residual, unit, average)
    return relative_error(residual, sae.combine(codes), spread, unit)
