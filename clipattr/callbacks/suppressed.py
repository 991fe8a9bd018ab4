"""Embeddings of every image while the latents of a cue are suppressed, and the means they go to."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.base import ReadoutCallback
from clipattr.errors import ConfigError
from clipattr.metrics.matrix_sum import MatrixSum
from clipattr.metrics.per_image import PerImage
from clipattr.shortcuts.repair import Suppression, measure_excess
from clipattr.spliced import Readout, Spliced


@torch.no_grad()
def embed_suppressed(
    spliced: Spliced, readout: Readout, suppression: Suppression, strengths: Sequence[float]
) -> Float[Tensor, "strength batch embed"]:
    """Unit embeddings under x - strength sum_{j in s} (a_j - m_j) v_j, as every token has it.

    Runs the suffix once for each strength. A strength of 0 gives the bits of the model.
    """
    excess = measure_excess(readout.codes, spliced.sae.directions, suppression)
    embeddings = [
        spliced.cut.suffix(readout.x - strength * excess, readout.rest) for strength in strengths
    ]
    return normalize(torch.stack(embeddings), dim=-1)


class SuppressedEmbeddings(ReadoutCallback):
    """Fills `result` [strength image embed] and `rows`, in the order of the rows.

    Keeps strengths x images x width numbers of 4 bytes: 0.5 GB for 5 strengths, 50,000 images and
    a width of 512. Retraining needs one strength.
    """

    def __init__(
        self,
        spliced: Spliced,
        latents: Int[Tensor, " cue"],
        means: Float[Tensor, " cue"],
        strengths: Sequence[float],
    ) -> None:
        """The latents to bring to their means (0: to remove them), and how far, each in turn."""
        check_latents(latents, spliced.sae.n_latents)
        if not strengths:
            raise ConfigError("strengths=[]: at least one is needed")
        self._spliced, self._strengths = spliced, list(strengths)
        self._suppression = Suppression(latents, means)
        width = spliced.cut.trunk.d_embed
        names = [
            f"{number}.{column}" for number in range(len(strengths)) for column in range(width)
        ]
        self._table = PerImage(names, torch.float32)
        self.rows: Int[Tensor, " image"] | None = None
        self.result: Float32[Tensor, "strength image embed"] | None = None
        super().__init__(self._table)

    def take(self, readout: Readout) -> None:
        """One pass of the suffix for each strength."""
        found = embed_suppressed(self._spliced, readout, self._suppression, self._strengths)
        self._table.update(readout.rows, found.movedim(0, 1).flatten(1))

    def finish(self) -> None:
        """All images, sorted by row."""
        rows, values = self._table.compute()
        # torchmetrics makes one number of a list of one.
        self.rows = rows.reshape(-1)
        self.result = values.unflatten(1, (len(self._strengths), -1)).movedim(1, 0)


class LatentMeans(ReadoutCallback):
    """Fills `result` [latent]: the mean activation of some latents over all rows and tokens.

    A token at which a latent is silent counts as 0.
    """

    def __init__(self, latents: Int[Tensor, " cue"], n_latents: int) -> None:
        """Nothing has been seen."""
        check_latents(latents, n_latents)
        self._latents = latents
        self._sum = MatrixSum(1, len(latents))
        self.result: Float64[Tensor, " cue"] | None = None
        super().__init__(self._sum)

    def take(self, readout: Readout) -> None:
        """Add the activations of one batch."""
        indices, values = (each.flatten(0, -2) for each in readout.codes[:2])
        latents = self._latents.to(indices.device)
        total = torch.stack([(values.double() * (indices == latent)).sum() for latent in latents])
        self._sum.update(total[None], len(indices))

    def finish(self) -> None:
        """Divide once."""
        # torchmetrics makes one number of a matrix of one.
        self.result = self._sum.compute().reshape(-1)


def check_latents(latents: Int[Tensor, " cue"], n_latents: int) -> None:
    """Raise ConfigError unless these are different latents of a dictionary of that size."""
    found = latents.tolist()
    if not found or len(set(found)) != len(found) or not all(0 <= j < n_latents for j in found):
        raise ConfigError(
            f"latents {found}: at least one, each once, between 0 and {n_latents - 1}"
        )
