"""What all sparse autoencoders share. Training statistics: `forward` changes none of them."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.sae import kernels
from clipattr.sae.initial import Bias, centre_of, point_at
from clipattr.sae.normalisation import (
    Normalisation,
    bias_of_centred,
    measure_statistics,
    neutral_statistics,
    normalise_layer,
)


class SaeOutput(NamedTuple):
    """One forward pass: codes and recon = x_hat in raw units; `inputs` and `pre` are normalised."""

    codes: SparseCodes
    recon: Float[Tensor, "*rows out"]
    inputs: Float[Tensor, "*rows model"]
    pre: Float[Tensor, "*rows latent"]
    """z of every latent; without a gradient where only chosen latents have one"""
    unit: Float[Tensor, "..."]
    """s, in which a_j = s act(z_j): one number, or one per row"""
    parts: Float[Tensor, "part *rows out"]
    """every reconstruction that the loss asks for; the last one is recon"""


class Sae(nn.Module):
    """Base of all sparse autoencoders; v_j, the rows of W_dec, have unit norm.

    u = normalised x,   z = W_enc u + b_enc,   a = s act(z),   x_hat = sum_j a_j v_j + b_dec

    A subclass says which latents are active (`choose`) and what else is in its loss (`penalty`).
    Whatever the normalisation, a_j and x_hat are in the units of x, so that x - a_j v_j is an edit
    of the model's own activation; optimisation sees inputs of comparable size.
    """

    architecture: ClassVar[str]
    SETTINGS: ClassVar[Mapping[str, type]] = {"d_model": int, "n_latents": int}
    """Arguments of the constructor beside the normalisation; attributes of the same names."""

    input_mean: Tensor
    input_scale: Tensor
    input_spread: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """Draw random unit directions, the same for encoder and decoder."""
        super().__init__()
        if d_model < 1 or n_latents < 1:
            raise ConfigError(
                f"{type(self).__name__}(d_model={d_model}, n_latents={n_latents}): "
                "both must be at least 1"
            )
        self.normalisation = normalisation
        directions = functional.normalize(
            torch.randn(n_latents, d_model, generator=generator), dim=1
        )
        self.W_dec = nn.Parameter(directions)
        # A copy: the encoder starts tied but is its own parameter afterwards.
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        for name, value in neutral_statistics(normalisation, d_model).items():
            self.register_buffer(name, value)

    @property
    def d_model(self) -> int:
        """Width of the site."""
        return self.W_enc.shape[1]

    @property
    def n_latents(self) -> int:
        """Size of the dictionary."""
        return self.W_enc.shape[0]

    @property
    def max_active(self) -> int:
        """How many latents can be active in one row."""
        return self.n_latents

    @property
    def settings(self) -> dict[str, Any]:
        """What the constructor needs to build an SAE of this kind and size."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    @property
    def centre(self) -> Float[Tensor, " model"]:
        """What `Normalisation.scale` subtracts."""
        return self.b_dec

    @property
    def unit(self) -> Float[Tensor, ""]:
        """s, where it is the same for all rows."""
        return self.input_scale if hasattr(self, "input_scale") else self.b_enc.new_ones(())

    @property
    def directions(self) -> Float[Tensor, "latent out"]:
        """v_j in the units of x: W_dec itself unless each dimension was standardised."""
        if self.normalisation is Normalisation.standardise:
            return self.W_dec * self.input_spread
        return self.W_dec

    @torch.no_grad()
    def initialise_from(
        self,
        rows: Float[Tensor, "batch model"],
        *,
        bias: Bias = Bias.mean,
        from_data: bool = False,
    ) -> None:
        """Set b_dec and the statistics of the normalisation; optionally point latents at rows."""
        self._measure(rows)
        self.b_dec.copy_(centre_of(rows, bias))
        inputs, _ = self.normalise(rows.to(self.b_dec.dtype))
        if from_data:
            self.W_dec.copy_(point_at(inputs - inputs.mean(0), self.W_dec))
            self.W_enc.copy_(self.W_dec)
        self._centre_encoder(inputs)

    def _measure(self, rows: Tensor) -> None:
        for name, value in measure_statistics(rows, self.normalisation).items():
            getattr(self, name).copy_(value)

    def _centre_encoder(self, inputs: Tensor) -> None:
        """Where the mean stays in the input, z starts as if it did not."""
        if self.normalisation in (
            Normalisation.none,
            Normalisation.norm,
            Normalisation.layer_norm,
        ):
            self.b_enc.copy_(-self.W_enc @ inputs.mean(0))

    def normalise(
        self, x: Float[Tensor, "*rows model"]
    ) -> tuple[Float[Tensor, "*rows model"], Float[Tensor, "..."]]:
        """The encoder's input u, and the unit s of the activations.

        A centre that is learned has its gradient through `encoder_bias`.
        """
        if self.normalisation is Normalisation.layer_norm:
            return normalise_layer(x)
        centre, divisor = self._affine()
        return (x - centre.detach()) / divisor, self.unit

    @property
    def encoder_bias(self) -> Float[Tensor, " latent"]:
        """b_enc, through which b_dec gets the gradient that it has as the centre of the input."""
        if self.normalisation is not Normalisation.scale:
            return self.b_enc
        return bias_of_centred(self.b_enc, self.centre, self.W_enc, self.input_scale)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """The centre and divisor of u = (x - centre) / divisor."""
        zero, one = self.b_enc.new_zeros(()), self.b_enc.new_ones(())
        match self.normalisation:
            case Normalisation.centre:
                return self.input_mean, one
            case Normalisation.norm:
                return zero, self.input_scale
            case Normalisation.standardise:
                return self.input_mean, self.input_scale * self.input_spread
            case Normalisation.scale:
                return self.centre, self.input_scale
            case _:
                return zero, one

    def encode(self, x: Float[Tensor, "*rows model"]) -> SparseCodes:
        """The active latents of each row, a_j in the units of x."""
        return self._encode(x.reshape(-1, self.d_model))[0].reshape(*x.shape[:-1])

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*rows out"]:
        """The reconstruction sum_j a_j v_j + b_dec."""
        return self.combine(codes) + self.b_dec

    def forward(self, x: Float[Tensor, "*rows model"]) -> SaeOutput:
        """Encode and decode."""
        codes, inputs, pre, unit = self._encode(x.reshape(-1, self.d_model))
        parts = self.reconstruct(codes)
        rows = x.shape[:-1]
        return SaeOutput(
            codes=codes.reshape(*rows),
            recon=parts[-1].reshape(*rows, -1),
            inputs=inputs.reshape(*rows, -1),
            pre=pre.reshape(*rows, -1),
            unit=unit if unit.dim() == 0 else unit.reshape(*rows, 1),
            parts=parts.reshape(len(parts), *rows, -1),
        )

    def _encode(self, rows: Tensor) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
        inputs, unit = self.normalise(rows)
        pre = self.pre_activations(inputs)
        codes = self.choose(inputs, pre)
        return codes._replace(values=codes.values * unit), inputs, pre, unit

    def pre_activations(self, inputs: Float[Tensor, "row model"]) -> Float[Tensor, "row latent"]:
        """Z = W_enc u + b_enc."""
        raise NotImplementedError

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """The active latents and act(z_j), in units of s."""
        raise NotImplementedError

    def choose_dead(
        self, output: SaeOutput, is_dead: Bool[Tensor, " latent"], k: int
    ) -> SparseCodes | None:
        """The k largest dead latents of each row, for AuxK; None where no latent is dead."""
        dead = is_dead.nonzero().squeeze(1)
        if len(dead) == 0:
            return None
        indices = dead[kernels.top_k(output.pre[:, dead], min(k, len(dead)))]
        values = kernels.choose(output.pre, indices, output.inputs, self.W_enc, self.encoder_bias)
        return SparseCodes(indices, values.relu() * output.unit, self.n_latents)

    def combine(self, codes: SparseCodes) -> Float[Tensor, "*rows out"]:
        """Sum of a_j v_j in the units of x, without b_dec."""
        return self.in_raw_units(codes.decode(self.W_dec))

    def in_raw_units(self, combined: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        """A sum of rows of W_dec as the same sum of `directions`."""
        if self.normalisation is Normalisation.standardise:
            return combined * self.input_spread
        return combined

    def reconstruct(self, codes: SparseCodes) -> Float[Tensor, "part row out"]:
        """All that must resemble x; the last part is decode(codes)."""
        return self.decode(codes)[None]

    def part_weights(self) -> tuple[float, ...]:
        """What the error of each part counts in the loss."""
        return (1.0,)

    def penalty(
        self, target: Float[Tensor, "row out"], output: SaeOutput, spread: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """What is minimised beside the error; `spread` is what that is divided by."""
        return target.new_zeros(())

    def error_unit(self, output: SaeOutput) -> Float[Tensor, "..."] | None:
        """By what errors are divided, where the normalisation puts rows or dimensions on a par."""
        match self.normalisation:
            case Normalisation.layer_norm:
                return output.unit
            case Normalisation.standardise:
                return self.input_spread
            case _:
                return None

    def gradient_norm(self) -> Float[Tensor, ""]:
        """Of all parameters together."""
        return get_total_norm([one.grad for one in self.parameters() if one.grad is not None])

    def update_statistics(self, output: SaeOutput) -> tuple[Tensor, ...]:
        """Take in one training step; the buffers that changed, to be averaged over processes."""
        return ()

    @torch.no_grad()
    def fold(self) -> "Sae":
        """An equal SAE, for use, whose encoder takes raw activations: z = W_enc x + b_enc.

        Thresholds are in raw units then, and rows of W_dec that were standardised have a norm that
        is not one. A layer norm is not linear: it stays, and `normalisation` says so.
        """
        if self.normalisation is Normalisation.layer_norm:
            return copy.deepcopy(self)
        centre, divisor = self._affine()
        weights = self.W_enc * (self.unit / divisor)
        shift = weights @ centre.expand(self.d_model)
        # Its own generator: folding must not move the global random state.
        folded = type(self)(
            **self.settings, normalisation=Normalisation.none, generator=Generator()
        )
        folded = folded.to(self.W_enc).train(self.training)
        folded.W_enc.copy_(weights)
        folded.b_enc.copy_(self.b_enc * self.unit - shift)
        folded.W_dec.copy_(self.directions)
        folded.b_dec.copy_(self.b_dec)
        for name, value in self._fold_rest(shift).items():
            getattr(folded, name).copy_(value)
        return folded

    def _fold_rest(self, shift: Tensor) -> dict[str, Tensor]:
        """What else a subclass has, in raw units; `shift` is W_enc times the centre."""
        return {}
