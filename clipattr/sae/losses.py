"""What a TopK SAE minimises. Both losses are ratios of sums over the batch, without units."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.sae.kernels import choose
from clipattr.sae.topk import SaeOutput, TopKSae


def reconstruction_loss(
    x: Float[Tensor, "batch model"], recon: Float[Tensor, "batch model"]
) -> Float[Tensor, ""]:
    """Sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, the mean being that of the batch.

    A training loss: the mean of the batch is not the mean of the data, so the FVU that is reported
    comes from clipattr.metrics. Reference: Gao et al. 2024, section 2.1 (normalised MSE).
    """
    return _relative_error(x, recon)


def auxk_loss(
    sae: TopKSae,
    x: Float[Tensor, "batch model"],
    output: SaeOutput,
    is_dead: Bool[Tensor, " latent"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """AuxK: the k_aux largest dead latents reconstruct what the live ones left over.

    e = x - x_hat (detached), e_hat = sum over TopK_{k_aux}(z_dead) of a_j v_j,
    loss = sum ||e - e_hat||^2 / sum ||e - mean(e)||^2; zero when no latent is dead.
    Reference: Gao et al. 2024, appendix A.2.
    """
    dead = is_dead.nonzero().squeeze(1)
    if len(dead) == 0:
        return sae.b_enc.sum() * 0.0
    indices = dead[output.pre[:, dead].topk(min(k_aux, len(dead)), dim=-1).indices]
    values = choose(output.pre, indices, output.inputs, sae.W_enc, sae.b_enc)
    codes = SparseCodes(indices, values.relu() * sae.input_scale, sae.n_latents)
    # Detached: the live latents must not learn to leave something over for the dead ones.
    residual = (x - output.recon).detach()
    return _relative_error(residual, codes.decode(sae.W_dec))


def _relative_error(
    target: Float[Tensor, "batch model"], estimate: Float[Tensor, "batch model"]
) -> Float[Tensor, ""]:
    spread = (target - target.mean(0)).square().sum()
    error = (target - estimate).square().sum()
    # Equal rows have no spread; dividing by one keeps the gradient finite there.
    return error / torch.where(spread > 0, spread, 1.0)
