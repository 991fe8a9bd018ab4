"""Gradients of the whole loss of every architecture, against dense float64 autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipattr.sae import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    NestedTopKSae,
    ReluSae,
    Transcoder,
)
from clipattr.sae.losses import auxk_loss, sae_loss
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.prefixes import LevelWeights
from clipattr.sae.relu import L0
from clipattr.sae.sae import Sae
from tests.saes import ALL, N_LATENTS, K, small_rows, small_sae, target_of

K_AUX, AUX = 2, 0.7
IS_DEAD = torch.arange(N_LATENTS) % 4 == 1


def top(z: Tensor, count: int) -> Tensor:
    """Which entries of each row are among its largest."""
    return z >= z.sort(dim=1, descending=True).values[:, count - 1 : count]


def straight_through(value: Tensor, slope: Tensor, theta: Tensor) -> Tensor:
    """`value`, with the given derivative with respect to theta."""
    return value.detach() + slope.detach() * (theta - theta.detach())


def jump_parts(sae: JumpReluSae, z: Tensor) -> tuple[Tensor, Tensor]:
    """z H(z - theta) and H(z - theta) with the published pseudo-derivatives."""
    theta = sae.log_theta.exp()
    step = (z > theta).double()
    kernel = ((z - theta).abs() < sae.bandwidth / 2).double()
    activation = z * step + straight_through(
        torch.zeros_like(z), -theta / sae.bandwidth * kernel, theta
    )
    return activation, straight_through(step, -kernel / sae.bandwidth, theta)


def plain_normalise(sae: Sae, x: Tensor) -> tuple[Tensor, Any, Any]:
    """u, s, and what errors are divided by."""
    match sae.normalisation:
        case Normalisation.layer_norm:
            unit = x.std(1, correction=0, keepdim=True)
            return (x - x.mean(1, keepdim=True)) / unit, unit, unit
        case Normalisation.standardise:
            s, spread = sae.input_scale, sae.input_spread
            return (x - sae.input_mean) / (s * spread), s, spread
        case _:
            centre = sae.input_mean if isinstance(sae, Transcoder) else sae.b_dec
            return (x - centre) / sae.input_scale, sae.input_scale, 1.0


def activations(sae: Sae, u: Tensor, z: Tensor) -> Tensor:
    """act(z), dense."""
    if isinstance(sae, ReluSae):
        return z.relu()
    if isinstance(sae, GatedSae):
        magnitude = (u @ (sae.r_mag.exp()[:, None] * sae.W_enc).T + sae.b_mag).relu()
        return magnitude * (z > 0)
    if isinstance(sae, JumpReluSae):
        return jump_parts(sae, z)[0]
    if isinstance(sae, BatchTopKSae) and getattr(sae, "over_batch", True):
        return z.relu() * top(z.reshape(1, -1), K * len(z)).reshape(z.shape)
    return z.relu() * top(z, max(sae.ks) if isinstance(sae, NestedTopKSae) else K)


def relative(target: Tensor, estimate: Tensor, divisor: Any) -> Tensor:
    error = ((target - estimate) / divisor).square().sum()
    return error / ((target - target.mean(0)) / divisor).square().sum()


def parts_of(sae: Sae, z: Tensor, a: Tensor) -> list[tuple[float, Tensor]]:
    """Weight and dense codes of all that must reconstruct."""
    if isinstance(sae, MatryoshkaSae):
        ends = [math.floor(sum(sae.fractions[: i + 1]) * N_LATENTS + 0.5) for i in range(4)]
        ends = ends[: len(sae.fractions)]
        place = torch.arange(N_LATENTS)
        return [(1 / len(ends), a * (place < end)) for end in ends]
    if isinstance(sae, NestedTopKSae):
        weights = [3, 2, 1] if sae.weights is LevelWeights.reverse else [1, 1, 1]
        levels = zip(weights, sae.ks, strict=True)
        return [(weight / sum(weights), a * top(z, k)) for weight, k in levels]
    return [(1.0, a)]


def plain_penalty(sae: Sae, target: Tensor, z: Tensor, unit: Any, divisor: Any) -> Any:
    rms = ((target - target.mean(0)) / divisor).square().sum(1).mean().sqrt()
    # A layer norm's unit cancels: errors are divided by it.
    unit_of_l1 = 1.0 if sae.normalisation is Normalisation.layer_norm else unit
    gate = z.relu()
    if isinstance(sae, ReluSae):
        return sae.sparsity * (unit_of_l1 * gate).sum(1).mean() / rms
    if isinstance(sae, GatedSae):
        spread = divisor if sae.normalisation is Normalisation.standardise else 1.0
        frozen = spread * ((unit * gate) @ sae.W_dec.detach()) + sae.b_dec.detach()
        l1 = sae.sparsity * (unit_of_l1 * gate).sum(1).mean() / rms
        return l1 + relative(target, frozen, divisor)
    if isinstance(sae, JumpReluSae):
        activation, step = jump_parts(sae, z)
        count = (4 * activation).tanh() if sae.l0 is L0.tanh else step
        return sae.sparsity * count.sum(1).mean()
    return 0.0


def dense_loss(sae: Sae, x: Tensor, target: Tensor) -> Tensor:
    """The loss as the papers write it, on matrices of rows x latents."""
    u, unit, divisor = plain_normalise(sae, x)
    spread = divisor if sae.normalisation is Normalisation.standardise else 1.0
    skipped: Any = 0.0
    if isinstance(sae, Transcoder):
        unit, divisor, spread = sae.output_scale, 1.0, 1.0
        if sae.W_skip is not None:
            skipped = unit * u @ sae.W_skip.T
    z = u @ sae.W_enc.T + sae.b_enc
    a = activations(sae, u, z)

    def decode(code: Tensor) -> Tensor:
        return spread * ((unit * code) @ sae.W_dec)

    recons = [(w, decode(code) + sae.b_dec + skipped) for w, code in parts_of(sae, z, a)]
    loss = sum(weight * relative(target, recon, divisor) for weight, recon in recons)
    residual = (target - recons[-1][1]).detach()
    dead = z.where(IS_DEAD, -torch.inf)
    revived = decode(torch.where(top(dead, K_AUX), z, 0.0).relu())
    auxiliary = relative(residual, revived, divisor)
    return loss + plain_penalty(sae, target, z, unit, divisor) + AUX * auxiliary


def gradients(sae: Sae, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in sae.named_parameters()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "normalisation", [Normalisation.scale, Normalisation.standardise, Normalisation.layer_norm]
)
def test_gradients_of_the_loss_equal_dense_autograd(name: str, normalisation: Normalisation):
    sae = small_sae(name, normalisation).train()
    x, target = small_rows(), target_of(sae)
    found = sae_loss(sae, target, sae(x), is_dead=IS_DEAD, k_aux=K_AUX, aux_coefficient=AUX)
    expected = dense_loss(sae, x, target)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(sae, found.total), gradients(sae, expected)
    for parameter, wanted in theirs.items():
        assert wanted.norm() > 1e-6, parameter
        torch.testing.assert_close(ours[parameter], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_auxk_reaches_dead_latents_alone(name: str):
    sae = small_sae(name)
    output = sae(small_rows())
    auxk_loss(sae, target_of(sae), output, IS_DEAD, k_aux=8).backward()
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        assert parameter.grad is not None
        size = parameter.grad.abs().reshape(N_LATENTS, -1).sum(1)
        assert (size[IS_DEAD] > 0).all()
        assert (size[~IS_DEAD] == 0).all()


def test_terms_add_up():
    sae = small_sae("relu")
    x = small_rows()
    loss = sae_loss(sae, x, sae(x), is_dead=IS_DEAD, k_aux=2, aux_coefficient=0.25)
    expected = loss.reconstruction + loss.penalty + 0.25 * loss.auxiliary
    assert loss.total.item() == pytest.approx(expected.item())
    assert min(loss.reconstruction, loss.penalty, loss.auxiliary) > 0
