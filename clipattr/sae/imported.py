"""Forms of SAEs that other toolkits train: needed to import those exactly, not chosen here."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from clipattr.errors import ConfigError
from clipattr.sae import kernels
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relu import GatedSae, JumpReluSae, ReluSae
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.sae.topk import TopKSae

# What SAELens and ViT-Prisma add to the standard deviation.
EPSILON = 1e-5


class SignedTopKSae(TopKSae):
    """TopK without a ReLU: where fewer than k latents are positive, negative ones are active.

    a = s TopK_k(z)

    A negative a_j is an activation like any other: it takes v_j away, and zero is what an edit
    sets it to. So train the authors of Dreyer et al. 2025, Attributing CLIP, and saev.
    """

    architecture = "signed_topk"

    def _activate(self, inputs: Tensor, pre: Tensor, indices: Tensor) -> Tensor:
        """The chosen z with their signs."""
        return kernels.choose(pre, indices, inputs, self.W_enc, self.encoder_bias)


class RowScaledSae(Sae):
    """Reads and reconstructs rows of mean zero and standard deviation one.

    u = (x - mean(x)) / (s + 1e-5),   s = std(x), divided by d - 1
    a_j = s act(z_j),   x_hat = mean(x) + s b_dec + sum_j a_j v_j

    Here `Normalisation.layer_norm` normalises the input alone, and b_dec is the same for all rows.
    `decode` knows the codes and not the row: it gives the sum and b_dec, and `forward` adds what
    the row brings, as of a transcoder's skip.
    """

    def __init__(self, **settings: Any) -> None:
        """As the architecture that it is mixed into."""
        super().__init__(**{"normalisation": Normalisation.layer_norm, **settings})
        if self.normalisation is not Normalisation.layer_norm:
            raise ConfigError(
                f"{type(self).__name__}(normalisation={self.normalisation.value}): must be "
                f"{Normalisation.layer_norm.value}"
            )

    def normalise(
        self, x: Float[Tensor, "*rows model"]
    ) -> tuple[Float[Tensor, "*rows model"], Float[Tensor, "..."]]:
        """U and s of each row."""
        deviation = x - x.mean(-1, keepdim=True)
        unit = deviation.std(-1, keepdim=True)
        return deviation / (unit + EPSILON), unit

    def forward(self, x: Float[Tensor, "*rows model"]) -> SaeOutput:
        """Encode, decode, and put the mean and the scale of each row back."""
        output = super().forward(x)
        own = x.mean(-1, keepdim=True) + (output.unit - 1) * self.b_dec
        return output._replace(recon=output.recon + own, parts=output.parts + own)


class RowScaledTopKSae(RowScaledSae, TopKSae):
    """TopK on rows that are scaled and scaled back."""

    architecture = "row_scaled_topk"


class RowScaledReluSae(RowScaledSae, ReluSae):
    """ReLU on rows that are scaled and scaled back."""

    architecture = "row_scaled_relu"


class RowScaledJumpReluSae(RowScaledSae, JumpReluSae):
    """JumpReLU on rows that are scaled and scaled back."""

    architecture = "row_scaled_jump_relu"


class RowScaledGatedSae(RowScaledSae, GatedSae):
    """Gated on rows that are scaled and scaled back."""

    architecture = "row_scaled_gated"
