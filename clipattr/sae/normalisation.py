"""What is done to an activation before the encoder sees it, and the statistics that it needs."""

import math
from enum import Enum
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipattr.errors import DataError


class Normalisation(Enum):
    """u = normalised x, the encoder's input; b_dec, codes and recon stay in the units of x.

    Each pre-activation is read in units of s: a_j = s act(z_j).
    """

    none = "none"
    """u = x, s = 1"""
    centre = "centre"
    """u = x - mean, s = 1"""
    norm = "norm"
    """u = x / s, s = mean ||x||"""
    layer_norm = "layer_norm"
    """u = (x - mean(x)) / s, s = std(x), of each row by itself; cannot be folded"""
    standardise = "standardise"
    """u_i = (x_i - mean_i) / std_i, s = sqrt(mean std^2); so are the loss and v_j"""
    scale = "scale"
    """u = (x - b_dec) / s, s = sqrt(mean ||x - mean||^2 / d), b_dec being learned"""


_MEAN, _SCALE, _SPREAD = "input_mean", "input_scale", "input_spread"
_STATISTICS = {
    Normalisation.none: (),
    Normalisation.centre: (_MEAN,),
    Normalisation.norm: (_SCALE,),
    Normalisation.layer_norm: (),
    Normalisation.standardise: (_MEAN, _SCALE, _SPREAD),
    Normalisation.scale: (_SCALE,),
}


def neutral_statistics(how: Normalisation, d_model: int) -> dict[str, Tensor]:
    """The statistics by name, as they are before any data was seen."""
    neutral = {
        _MEAN: torch.zeros(d_model),
        _SCALE: torch.ones(()),
        _SPREAD: torch.ones(d_model),
    }
    return {name: neutral[name] for name in _STATISTICS[how]}


def measure_statistics(
    rows: Float[Tensor, "batch model"], how: Normalisation
) -> dict[str, Float[Tensor, "..."]]:
    """The statistics by name, in float64.

    `input_spread` is std_i / s: its mean square is one, so that s is the scale of x.
    """
    rows = rows.double()
    mean = rows.mean(0)
    squares = (rows - mean).square()
    scale = (squares.sum(1).mean() / rows.shape[1]).sqrt()
    if not math.isfinite(scale.item()) or scale == 0:
        raise DataError(
            f"the scale of {len(rows)} activation rows is {scale.item()}: "
            "a positive finite spread is needed to normalise the input"
        )
    spread = squares.mean(0).sqrt() / scale
    measured = {
        _MEAN: mean,
        _SCALE: rows.norm(dim=1).mean() if how is Normalisation.norm else scale,
        # A constant dimension has nothing to be divided by.
        _SPREAD: spread.where(spread > 0, 1.0),
    }
    return {name: measured[name] for name in _STATISTICS[how]}


def normalise_layer(
    x: Float[Tensor, "*rows model"],
) -> tuple[Float[Tensor, "*rows model"], Float[Tensor, "*rows 1"]]:
    """(x - mean(x)) / std(x) of each row, and std(x)."""
    deviation = x - x.mean(-1, keepdim=True)
    scale = deviation.square().mean(-1, keepdim=True).sqrt()
    scale = scale.where(scale > 0, 1.0)
    return deviation / scale, scale


def bias_of_centred(
    b_enc: Float[Tensor, " latent"],
    centre: Float[Tensor, " model"],
    W_enc: Float[Tensor, "latent model"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, " latent"]:
    """b_enc, with the gradient that z = W_enc (x - centre) / scale + b_enc has for the centre.

    One product of a vector and W_enc: without it the gradient of all inputs would be needed, which
    is rows times as much.
    """
    return cast(Tensor, _BiasOfCentred.apply(b_enc, centre, W_enc, scale))


class _BiasOfCentred(Function):
    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, centre: Tensor, W_enc: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc, scale)
        return b_enc.view_as(b_enc)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        W_enc, scale = ctx.saved_tensors
        for_bias, for_centre, _, _ = ctx.needs_input_grad
        return (
            gradient if for_bias else None,
            -(gradient @ W_enc) / scale if for_centre else None,
            None,
            None,
        )
