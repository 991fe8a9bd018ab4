"""The only place that knows an SAE sits inside CLIP."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.clip.cut import Cut, Rest
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.sae.sae import Sae
from clipattr.sae.transcoder import Transcoder


class Readout(NamedTuple):
    """One batch, read at the site: x = decode(codes) + error."""

    rows: Int[Tensor, " batch"]
    """position of each image in the evaluated set"""
    x: Float[Tensor, "batch *token model"]
    codes: SparseCodes
    error: Float[Tensor, "batch *token model"]
    """what an edit of the codes leaves alone"""
    recon: Float[Tensor, "batch *token model"]
    """x_hat: decode(codes), and what an SAE that scales rows back adds of the row itself"""
    rest: Rest = Rest()
    """what the suffix needs beside x"""


class Spliced:
    """A cut tower with an SAE at its site; the error term stays, so no edit means no change."""

    def __init__(self, cut: Cut, sae: Sae) -> None:
        if isinstance(sae, Transcoder):
            raise ConfigError(
                f"{cut.site}: a transcoder does not reconstruct the site that it reads, so that it "
                "cannot stand in for x there; splice in an autoencoder"
            )
        self.cut = cut
        self.sae = sae

    @torch.no_grad()
    def read(
        self,
        x: Float[Tensor, "batch *token model"],
        rows: Int[Tensor, " batch"],
        rest: Rest = Rest(),  # noqa: B008  immutable
    ) -> Readout:
        """Codes and error of activations, cached or fresh from the prefix."""
        output = self.sae(x)
        error = x - self.sae.decode(output.codes)
        return Readout(rows, x, output.codes, error, output.recon, rest)

    def embed(
        self,
        codes: SparseCodes,
        error: Float[Tensor, "batch *token model"],
        rest: Rest = Rest(),  # noqa: B008  immutable
    ) -> Float[Tensor, "batch embed"]:
        """Un-normalised embedding of x_hat(codes) + error: the model under an edit of the codes."""
        return self.cut.suffix(self.sae.decode(codes) + error, rest)
