"""The only place that knows an SAE sits inside CLIP."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.clip.cut import Cut
from clipattr.codes import SparseCodes
from clipattr.sae.sae import Sae


class Readout(NamedTuple):
    """One batch, read at the site: x = x_hat(codes) + error."""

    rows: Int[Tensor, " batch"]
    """position of each image in the evaluated set"""
    x: Float[Tensor, "batch model"]
    codes: SparseCodes
    error: Float[Tensor, "batch model"]


class Spliced:
    """A cut tower with an SAE at its site; the error term stays, so no edit means no change."""

    def __init__(self, cut: Cut, sae: Sae) -> None:
        self.cut = cut
        self.sae = sae

    @torch.no_grad()
    def read(self, x: Float[Tensor, "batch model"], rows: Int[Tensor, " batch"]) -> Readout:
        """Codes and error of cached activations."""
        codes = self.sae.encode(x)
        return Readout(rows, x, codes, x - self.sae.decode(codes))

    def embed(
        self, codes: SparseCodes, error: Float[Tensor, "batch model"]
    ) -> Float[Tensor, "batch embed"]:
        """Un-normalised embedding of x_hat(codes) + error: the model under an edit of the codes."""
        return self.cut.suffix(self.sae.decode(codes) + error)
