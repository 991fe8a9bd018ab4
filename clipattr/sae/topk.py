"""The TopK sparse autoencoder. Training statistics live elsewhere: forward changes nothing."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError, DataError
from clipattr.sae.kernels import choose, pre_activations


class SaeOutput(NamedTuple):
    """One forward pass: codes in raw units, recon = x_hat; `inputs` and `pre` are normalised.

    `pre` holds z of every latent and has no gradient: `kernels.choose` gives that of some of them.
    """

    codes: SparseCodes
    recon: Float[Tensor, "*rows model"]
    inputs: Float[Tensor, "*rows model"]
    pre: Float[Tensor, "*rows latent"]


class TopKSae(nn.Module):
    """TopK sparse autoencoder with tied initialisation and unit-norm decoder rows v_j.

    z = W_enc (x - b_dec) / s + b_enc,   a = s ReLU(TopK_k(z)),   x_hat = sum_j a_j v_j + b_dec

    x is the raw activation and s the scalar buffer `input_scale`: optimisation sees unit variance
    whatever the layer, while a_j and x_hat are in the units of x, so that x - a_j v_j is an edit of
    the model's own activation. Reference: Gao et al. 2024, Scaling and evaluating sparse
    autoencoders, sections 2.2-2.3.
    """

    input_scale: Tensor

    def __init__(
        self, *, d_model: int, n_latents: int, k: int, generator: Generator | None = None
    ) -> None:
        """Draw random unit directions; `initialise_from` sets b_dec and the scale from data."""
        super().__init__()
        if d_model < 1 or not 1 <= k <= n_latents:
            raise ConfigError(
                f"TopKSae(d_model={d_model}, n_latents={n_latents}, k={k}): "
                "d_model must be at least 1 and k between 1 and n_latents"
            )
        self.k = k
        directions = functional.normalize(
            torch.randn(n_latents, d_model, generator=generator), dim=1
        )
        self.W_dec = nn.Parameter(directions)
        # A copy: the encoder starts tied but is its own parameter afterwards.
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))

    @property
    def d_model(self) -> int:
        """Width of the site."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_dec.shape[0]

    @torch.no_grad()
    def initialise_from(self, rows: Float[Tensor, "batch model"]) -> None:
        """Set b_dec to the mean of the rows and s to sqrt(mean ||x - mean||^2 / d)."""
        rows = rows.double()
        mean = rows.mean(0)
        scale = ((rows - mean).square().sum(1).mean() / self.d_model).sqrt()
        if not math.isfinite(scale.item()) or scale == 0:
            raise DataError(
                f"the scale of {len(rows)} activation rows is {scale.item()}: "
                "a positive finite spread is needed to normalise the input"
            )
        self.b_dec.copy_(mean)
        self.input_scale.copy_(scale)

    def encode(self, x: Float[Tensor, "*rows model"]) -> SparseCodes:
        """The k largest latents of each row, a_j in the units of x, largest first."""
        return self._encode(x)[0]

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*rows model"]:
        """The reconstruction sum_j a_j v_j + b_dec."""
        return codes.decode(self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "*rows model"]) -> SaeOutput:
        """Encode and decode."""
        codes, inputs, pre = self._encode(x)
        return SaeOutput(codes, self.decode(codes), inputs, pre)

    def _encode(self, x: Float[Tensor, "*rows model"]) -> tuple[SparseCodes, Tensor, Tensor]:
        inputs = (x - self.b_dec) / self.input_scale
        rows = inputs.reshape(-1, self.d_model)
        pre = pre_activations(rows, self.W_enc, self.b_enc)
        indices = pre.topk(self.k, dim=-1).indices
        values = choose(pre, indices, rows, self.W_enc, self.b_enc).relu() * self.input_scale
        shape = (*x.shape[:-1], -1)
        codes = SparseCodes(indices.reshape(shape), values.reshape(shape), self.n_latents)
        return codes, inputs, pre.reshape(shape)
