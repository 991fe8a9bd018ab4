"""TopK and BatchTopK: a fixed number of latents is active, in each row or on average."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from clipattr.codes import SparseCodes, pack
from clipattr.errors import ConfigError
from clipattr.sae import kernels
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sae import Sae, SaeOutput

# Weight of the newest batch in the running threshold of BatchTopK, which remembers about twenty.
# The smallest of k * rows values has little noise, while it moves as long as training does.
THRESHOLD_RATE = 0.05


class TopKSae(Sae):
    """TopK sparse autoencoder with tied initialisation and unit-norm decoder rows v_j.

    a = s ReLU(TopK_k(z)),   z and s as in `Sae`

    Gradients run through the chosen latents alone: the cost of a step is one dense product, and k
    latents per row. Reference: Gao et al. 2024, Scaling and evaluating sparse autoencoders,
    sections 2.2-2.3.
    """

    architecture = "topk"
    SETTINGS = {**Sae.SETTINGS, "k": int}

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        k: int,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """Draw random unit directions; `initialise_from` sets b_dec and the scale from data."""
        if not 1 <= k <= n_latents:
            raise ConfigError(
                f"{type(self).__name__}(n_latents={n_latents}, k={k}): "
                "k must be between 1 and n_latents"
            )
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            normalisation=normalisation,
            generator=generator,
        )
        self.k = k

    @property
    def max_active(self) -> int:
        """K of them."""
        return self.k

    def pre_activations(self, inputs: Float[Tensor, "row model"]) -> Float[Tensor, "row latent"]:
        """Z = W_enc u + b_enc without a gradient, to choose from."""
        return kernels.pre_activations(inputs, self.W_enc, self.b_enc)

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """The k largest of each row, largest first."""
        indices = kernels.top_k(pre, self.k)
        return SparseCodes(indices, self._activate(inputs, pre, indices), self.n_latents)

    def _activate(self, inputs: Tensor, pre: Tensor, indices: Tensor) -> Tensor:
        """ReLU(z) of the chosen ones, with their gradient."""
        return kernels.choose(pre, indices, inputs, self.W_enc, self.encoder_bias).relu()


class BatchTopKSae(TopKSae):
    """TopK over the batch: a row may have more than k latents where another has fewer.

    training:   a = s ReLU(TopK_{k rows}(z of the batch))
    inference:  a = s z 1[z > threshold],   so that a row does not depend on its neighbours

    `threshold` is the running mean of the smallest activation that was chosen in a batch, moved by
    `update_statistics` alone.
    Reference: Bussmann, Leask, Nanda 2024, BatchTopK sparse autoencoders.
    """

    architecture = "batch_topk"
    threshold: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        k: int,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """As TopK; the threshold of an untrained one is zero."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            k=k,
            normalisation=normalisation,
            generator=generator,
        )
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def max_active(self) -> int:
        """One row could take all."""
        return self.n_latents

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """The k * rows largest of the batch in training, all above the threshold otherwise."""
        if self.training:
            flat = pre.flatten().topk(self.k * len(pre), sorted=False).indices.sort().values
        else:
            flat = (pre > self.threshold).flatten().nonzero().flatten()
        indices, is_chosen = pack(flat, len(pre), self.n_latents)
        values = self._activate(inputs, pre, indices) * is_chosen
        return SparseCodes(indices, values, self.n_latents)

    @torch.no_grad()
    def update_statistics(self, output: SaeOutput) -> tuple[Tensor, ...]:
        """Move the threshold towards the smallest z that was chosen; the first one is taken."""
        activations = output.codes.values / output.unit
        smallest = activations.where(activations > 0, torch.inf).min()
        moved = torch.lerp(self.threshold, smallest.to(self.threshold), THRESHOLD_RATE)
        moved = torch.where(self.threshold > 0, moved, smallest.to(self.threshold))
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
        return (self.threshold,)

    def _fold_rest(self, shift: Tensor) -> dict[str, Tensor]:
        return {"threshold": self.threshold * self.unit}
