"""From tensors of any toolkit to an SAE of this one, which takes raw activations."""

from typing import Any

import torch
from torch import Generator, Tensor

from clipattr.errors import CheckpointError
from clipattr.sae.imported import (
    RowScaledGatedSae,
    RowScaledJumpReluSae,
    RowScaledReluSae,
    RowScaledTopKSae,
)
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relu import GatedSae, JumpReluSae, ReluSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae

# A threshold of zero, as its logarithm.
SMALLEST_THRESHOLD = 1e-30


def sizes(W_dec: Tensor) -> dict[str, Any]:
    """What every constructor needs; the input is not normalised."""
    if W_dec.dim() != 2:
        raise CheckpointError(f"W_dec has shape {tuple(W_dec.shape)}, expected a matrix")
    n_latents, d_model = W_dec.shape
    return {
        "d_model": d_model,
        "n_latents": n_latents,
        "normalisation": Normalisation.none,
        # Its own generator: importing must not move the global random state.
        "generator": Generator(),
    }


def topk(W_dec: Tensor, k: int, *, is_row_scaled: bool = False) -> Sae:
    """TopK with a ReLU."""
    if is_row_scaled:
        return RowScaledTopKSae(**_row_scaled(W_dec), k=k)
    return TopKSae(**sizes(W_dec), k=k)


def relu(W_dec: Tensor, *, is_row_scaled: bool = False) -> Sae:
    """ReLU."""
    if is_row_scaled:
        return RowScaledReluSae(**_row_scaled(W_dec), sparsity=0.0)
    return ReluSae(**sizes(W_dec), sparsity=0.0)


def jump_relu(W_dec: Tensor, *, is_row_scaled: bool = False) -> Sae:
    """JumpReLU; `fill` takes the `threshold` of each latent."""
    if is_row_scaled:
        return RowScaledJumpReluSae(**_row_scaled(W_dec), sparsity=0.0)
    return JumpReluSae(**sizes(W_dec), sparsity=0.0)


def gated(W_dec: Tensor, *, is_row_scaled: bool = False) -> Sae:
    """Gated; `b_enc` is the bias of the gate, and `fill` takes `r_mag` and `b_mag`."""
    if is_row_scaled:
        return RowScaledGatedSae(**_row_scaled(W_dec), sparsity=0.0)
    return GatedSae(**sizes(W_dec), sparsity=0.0)


def _row_scaled(W_dec: Tensor) -> dict[str, Any]:
    return {**sizes(W_dec), "normalisation": Normalisation.layer_norm}


@torch.no_grad()
def fill(
    sae: Sae,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    is_centred: bool,
    lengths: Tensor | None = None,
    **rest: Tensor,
) -> Sae:
    """The SAE with these weights; z = W_enc (x - b_dec) + b_enc where the input is centred.

    With `lengths` codes are that many times as large, and rows of W_dec as much shorter.
    """
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **rest}
    if "threshold" in rest and isinstance(sae, JumpReluSae):
        tensors["log_theta"] = tensors.pop("threshold").clamp_min(SMALLEST_THRESHOLD).log()
    own = sae.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
    if is_centred:
        shift = W_enc @ b_dec
        tensors["b_enc"] = b_enc - shift
        if "b_mag" in rest:  # which is added to W_enc (x - b_dec) as well
            tensors["b_mag"] = rest["b_mag"] - rest["r_mag"].exp() * shift
    if lengths is not None:
        tensors["W_enc"] = W_enc * lengths[:, None]
        tensors["b_enc"] = tensors["b_enc"] * lengths
        tensors["W_dec"] = W_dec / lengths[:, None]
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return sae
