"""ReLU, JumpReLU and Gated: how many latents are active is learned, at a price per latent.

While they train any latent may be active, so these use plain autograd on [rows, latents] and a
dense product where codes are not sparse. The sparse kernels are for a fixed number of latents.
"""

from enum import Enum
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from clipattr.codes import SparseCodes, pack
from clipattr.errors import ConfigError
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relative import relative_error, relative_sum
from clipattr.sae.sae import Sae, SaeOutput

# With a larger share of slots than this the dense products of a step are faster than the sparse
# ones (measured on one core, 256 rows of 768 x 8,192).
SPARSE_SHARE = 1 / 8


class _DenseSae(Sae):
    SETTINGS = {**Sae.SETTINGS, "sparsity": float}

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        sparsity: float,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """`sparsity` is the coefficient lambda of the penalty."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            normalisation=normalisation,
            generator=generator,
        )
        if not sparsity >= 0:
            raise ConfigError(f"{type(self).__name__}(sparsity={sparsity}): must not be negative")
        self.sparsity = sparsity

    def pre_activations(self, inputs: Float[Tensor, "row model"]) -> Float[Tensor, "row latent"]:
        """Z = W_enc u + b_enc."""
        return functional.linear(inputs, self.W_enc, self.encoder_bias)

    def activate(self, pre: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """act(z) of every latent."""
        raise NotImplementedError

    def is_needed(
        self, pre: Float[Tensor, "row latent"], activations: Float[Tensor, "row latent"]
    ) -> Bool[Tensor, "row latent"]:
        """Where there is an activation or, in training, a gradient."""
        return activations > 0

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """All that are active, in as many slots as the fullest row needs."""
        activations = self.activate(pre)
        flat = self.is_needed(pre, activations).flatten().nonzero().flatten()
        indices, is_chosen = pack(flat, len(pre), self.n_latents)
        return SparseCodes(indices, activations.gather(1, indices) * is_chosen, self.n_latents)

    def combine(self, codes: SparseCodes) -> Float[Tensor, "*rows out"]:
        """Sum of a_j v_j, through the dense matrix where codes are not sparse."""
        if codes.indices.shape[-1] <= SPARSE_SHARE * self.n_latents:
            return super().combine(codes)
        return self.in_raw_units(codes.to_dense() @ self.W_dec)


class ReluSae(_DenseSae):
    """ReLU autoencoder with an L1 penalty.

    a = s ReLU(z),   penalty = lambda mean_row sum_j a_j ||v_j|| / sqrt(mean ||x - mean(x)||^2)

    ||v_j|| = 1 in training. The penalty is in units of the spread of the batch, as the error is, so
    that lambda suits any layer. Reference: Bricken et al. 2023, Towards monosemanticity.
    """

    architecture = "relu"

    def activate(self, pre: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """ReLU(z)."""
        return pre.relu()

    def penalty(
        self, target: Float[Tensor, "row out"], output: SaeOutput, spread: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The relative L1, times lambda."""
        return self.sparsity * _relative_l1(self, output, output.pre.relu(), spread)


class GatedSae(_DenseSae):
    """A gate decides which latents are active and a magnitude how much: L1 does not shrink those.

    z = W_enc u + b_enc (gate),   m = exp(r_mag) (W_enc u) + b_mag,   a = s 1[z > 0] ReLU(m)
    penalty = lambda relative L1 of s ReLU(z) + relative error of x_hat(s ReLU(z), frozen decoder)

    The second term trains the gate to be a code by itself. Reference: Rajamanoharan et al. 2024,
    Improving dictionary learning with gated sparse autoencoders, section 3.2.
    """

    architecture = "gated"

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        sparsity: float,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """Gate and magnitude start equal."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            sparsity=sparsity,
            normalisation=normalisation,
            generator=generator,
        )
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    def activate(self, pre: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """1[z > 0] ReLU(m)."""
        magnitude = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
        return magnitude.relu() * (pre > 0)

    def penalty(
        self, target: Float[Tensor, "row out"], output: SaeOutput, spread: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The gate must be sparse, and reconstruct with the decoder as it is."""
        gate = output.pre.relu()
        combined = self.in_raw_units((gate * output.unit) @ self.W_dec.detach())
        recon = combined + self.b_dec.detach()
        error = relative_error(target, recon, spread, self.error_unit(output))
        return self.sparsity * _relative_l1(self, output, gate, spread) + error

    def _fold_rest(self, shift: Tensor) -> dict[str, Tensor]:
        # b_enc is not in m, so the centre must be taken away here as well.
        b_mag = self.b_mag * self.unit - self.r_mag.exp() * shift
        return {"r_mag": self.r_mag, "b_mag": b_mag}


class L0(Enum):
    """What stands for the number of active latents in the loss."""

    step = "step"
    """1[z > theta], with a straight-through gradient for theta alone"""
    tanh = "tanh"
    """tanh(4 act(z)), which pushes activations as well"""


class JumpReluSae(_DenseSae):
    """JumpReLU: a latent is active above a threshold of its own, which is learned.

    a = s z 1[z > theta],   penalty = lambda mean_row sum_j 1[z_j > theta_j]

    The jump has no gradient, so that of its expectation is estimated within a bandwidth b:
    d act(z) / d theta = -theta / b rect((z - theta) / b),   d 1[z > theta] / d theta the same
    without theta, rect(t) = 1[|t| < 1/2]. The parameter is log(theta): thresholds stay positive,
    and a step changes small and large ones by the same factor.
    Reference: Rajamanoharan et al. 2024, Jumping ahead, sections 3-4; the tanh penalty: Conerly et
    al. 2025, Dictionary learning optimization techniques.
    """

    architecture = "jump_relu"
    SETTINGS = {**_DenseSae.SETTINGS, "bandwidth": float, "l0": L0}

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        sparsity: float,
        bandwidth: float = 0.03,
        l0: L0 = L0.step,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """Thresholds start at the bandwidth, in units of s: 0.001 sqrt(768) as published."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            sparsity=sparsity,
            normalisation=normalisation,
            generator=generator,
        )
        if not bandwidth > 0:
            raise ConfigError(f"JumpReluSae(bandwidth={bandwidth}): must be positive")
        self.bandwidth = bandwidth
        self.l0 = l0
        self.log_theta = nn.Parameter(torch.full((n_latents,), bandwidth).log())

    def activate(self, pre: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """Z 1[z > theta]."""
        return cast(Tensor, _JumpRelu.apply(pre, self.log_theta.exp(), self.bandwidth))

    def is_needed(
        self, pre: Float[Tensor, "row latent"], activations: Float[Tensor, "row latent"]
    ) -> Bool[Tensor, "row latent"]:
        """In training also those just below the threshold: they move it."""
        if self.training:
            return pre > self.log_theta.exp() - self.bandwidth / 2
        return activations > 0

    def penalty(
        self, target: Float[Tensor, "row out"], output: SaeOutput, spread: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The L0, times lambda."""
        if self.l0 is L0.tanh:
            count = (4 * self.activate(output.pre)).tanh()
        else:
            count = cast(Tensor, _Step.apply(output.pre, self.log_theta.exp(), self.bandwidth))
        return self.sparsity * count.sum(1).mean()

    def _fold_rest(self, shift: Tensor) -> dict[str, Tensor]:
        return {"log_theta": self.log_theta + self.unit.log()}


class _JumpRelu(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        z, theta = ctx.saved_tensors
        near = _is_near(z, theta, ctx.bandwidth)
        for_theta = -theta / ctx.bandwidth * (gradient * near).sum(0)
        return gradient * (z > theta), for_theta, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(theta.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        z, theta = ctx.saved_tensors
        near = _is_near(z, theta, ctx.bandwidth)
        return None, -(gradient * near).sum(0) / ctx.bandwidth, None


def _is_near(z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return (z - theta).abs() < bandwidth / 2


def _relative_l1(sae: Sae, output: SaeOutput, activations: Tensor, spread: Tensor) -> Tensor:
    """Of activations in units of s, which are non-negative."""
    # By a layer norm's s the error of each row is divided as well.
    is_layer_norm = sae.normalisation is Normalisation.layer_norm
    values = activations if is_layer_norm else activations * output.unit
    return relative_sum(values, spread)
