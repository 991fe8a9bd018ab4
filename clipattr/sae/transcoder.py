"""Transcoder: what goes in at one site is explained by what comes out at another."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional

from clipattr.errors import ConfigError, DataError
from clipattr.sae.initial import Bias, centre_of, point_at
from clipattr.sae.normalisation import Normalisation, measure_statistics
from clipattr.sae.sae import SaeOutput
from clipattr.sae.topk import TopKSae


class Transcoder(TopKSae):
    """TopK latents that read the input x of a layer and write its output y.

    a = s ReLU(TopK_k(W_enc u + b_enc)),   y_hat = sum_j a_j v_j + b_dec [+ s W_skip u]

    u = normalised x, and s = `output_scale`, the scale of y: codes are in the units of y. What the
    skip carries is linear in x and no code, so `decode` leaves it out.
    Reference: Dunefsky, Chlenski, Nanda 2024, Transcoders find interpretable LLM feature circuits;
    the skip: Paulo, Shabalin, Belrose 2025, Transcoders beat sparse autoencoders.
    """

    architecture = "transcoder"
    SETTINGS = {**TopKSae.SETTINGS, "d_out": int, "skip": bool}
    output_scale: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        d_out: int,
        n_latents: int,
        k: int,
        skip: bool = False,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """Encoder and decoder directions are drawn apart; the skip starts at zero."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            k=k,
            normalisation=normalisation,
            generator=generator,
        )
        if d_out < 1:
            raise ConfigError(f"Transcoder(d_out={d_out}): must be at least 1")
        directions = torch.randn(n_latents, d_out, generator=generator)
        self.W_dec = nn.Parameter(functional.normalize(directions, dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_model)) if skip else None
        # b_dec is the centre of y; that of x is needed beside it.
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("output_scale", torch.ones(()))

    @property
    def d_out(self) -> int:
        """Width of the site that is written."""
        return self.W_dec.shape[1]

    @property
    def skip(self) -> bool:
        """Whether there is a linear path beside the latents."""
        return self.W_skip is not None

    @property
    def centre(self) -> Float[Tensor, " model"]:
        """The mean of x."""
        return self.input_mean

    @property
    def unit(self) -> Float[Tensor, ""]:
        """The scale of y."""
        return self.output_scale

    @property
    def directions(self) -> Float[Tensor, "latent out"]:
        """v_j; the normalisation is that of the input."""
        return self.W_dec

    @torch.no_grad()
    def initialise_from(
        self,
        rows: Float[Tensor, "batch model"],
        targets: Float[Tensor, "target out"] | None = None,
        *,
        bias: Bias = Bias.mean,
        from_data: bool = False,
    ) -> None:
        """Statistics of x from `rows`, b_dec and the scale of y from `targets`, row by row."""
        if targets is None or len(targets) != len(rows):
            raise DataError(
                f"Transcoder.initialise_from: {len(rows)} rows of the input site and "
                f"{'none' if targets is None else len(targets)} of the output site; "
                "one target per row is needed"
            )
        self.input_mean.copy_(centre_of(rows, bias))
        self._measure(rows)
        scale = measure_statistics(targets, Normalisation.scale)["input_scale"]
        self.output_scale.copy_(scale)
        self.b_dec.copy_(centre_of(targets, bias))
        inputs, _ = self.normalise(rows.to(self.b_dec.dtype))
        if from_data:
            self.W_enc.copy_(point_at(inputs - inputs.mean(0), self.W_enc))
            self.W_dec.copy_(point_at(targets - self.b_dec, self.W_dec))
        self._centre_encoder(inputs)

    def normalise(
        self, x: Float[Tensor, "*rows model"]
    ) -> tuple[Float[Tensor, "*rows model"], Float[Tensor, "..."]]:
        """The encoder's input u, and the unit of the output."""
        return super().normalise(x)[0], self.output_scale

    def forward(self, x: Float[Tensor, "*rows model"]) -> SaeOutput:
        """Encode, decode, and add what skips the latents."""
        output = super().forward(x)
        if self.W_skip is None:
            return output
        skipped = self.output_scale * functional.linear(output.inputs, self.W_skip)
        return output._replace(recon=output.recon + skipped, parts=output.parts + skipped)

    def in_raw_units(self, combined: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        """They are: the normalisation is that of the input."""
        return combined

    def error_unit(self, output: SaeOutput) -> Float[Tensor, "..."] | None:
        """None, for the same reason."""
        return None

    def _fold_rest(self, shift: Tensor) -> dict[str, Tensor]:
        if self.W_skip is None:
            return {}
        centre, divisor = self._affine()
        weights = self.W_skip * (self.output_scale / divisor)
        return {"W_skip": weights, "b_dec": self.b_dec - weights @ centre.expand(self.d_model)}
