"""Attribution of the scores of several heads to the latents of each image, at any site.

Behind the last block in closed form: one gather for all heads and scores. Elsewhere by gradients:
the suffix runs forward once and backward once for each head and score.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import LastLayerHead, build_lens_table, class_attributions, merge_tokens
from clipattr.attribution.gradients import project_on_decoder
from clipattr.codes import SparseCodes
from clipattr.spliced import Readout, Spliced

# Attributions that exist at a time (32 MB as float64): memory, not the result.
_ENTRIES = 2**22


class Block(NamedTuple):
    """Attributions of some images of a batch for some scores."""

    images: Int[Tensor, " image"]
    scores: slice
    latents: Int[Tensor, "image slot"]
    """of each image, each once, and padding"""
    values: Float[Tensor, "image slot head score"]
    """0 in padding; tokens are summed"""


class HeadAttribution:
    """Attribution patching of rows of weights on the unit embedding, a batch at a time."""

    def __init__(self, spliced: Spliced, weights: Float[Tensor, "head score embed"]) -> None:
        self._spliced = spliced
        self._weights = weights.float()
        self._directions = spliced.sae.directions.detach()
        self._head = None
        if spliced.cut.has_last_layer:
            rows = self._weights.flatten(0, 1)
            self._head = LastLayerHead(*spliced.cut.last_layer(), rows)
            self._lens = build_lens_table(self._head, self._directions)

    def blocks(self, readout: Readout) -> Iterator[Block]:
        """All images and scores of a batch, each once."""
        if self._head is None:
            yield from self._by_gradients(readout)
        else:
            yield from self._in_closed_form(self._head, readout)

    def _in_closed_form(self, head: LastLayerHead, readout: Readout) -> Iterator[Block]:
        shape = self._weights.shape[:2]
        codes = readout.codes
        n_rows = max(1, _ENTRIES // (codes.indices.shape[1] * len(head.weights)))
        for rows in torch.arange(len(readout.x), device=readout.x.device).split(n_rows):
            part = codes.select(rows)
            found = class_attributions(head, self._lens, readout.x[rows], part, self._directions)
            yield Block(rows, slice(None), part.indices, found.unflatten(-1, shape))

    def _by_gradients(self, readout: Readout) -> Iterator[Block]:
        n_heads, n_scores = self._weights.shape[:2]
        codes, merged = readout.codes, merge_tokens(readout.codes)
        rows = torch.arange(len(readout.x), device=readout.x.device)
        with torch.enable_grad():
            leaf = readout.x.detach().clone().requires_grad_()
            embedding = self._spliced.cut.suffix(leaf, readout.rest).float()
            sums = (normalize(embedding, dim=-1) @ self._weights.flatten(0, 1).T).sum(dim=0)
            totals = sums.unbind()
        for score in range(n_scores):
            found = [
                merged.sum_over_tokens(
                    self._attribute(totals[head * n_scores + score], leaf, codes)
                )
                for head in range(n_heads)
            ]
            values = torch.stack(found, dim=-1)[..., None]
            yield Block(rows, slice(score, score + 1), merged.codes.indices, values)

    def _attribute(self, total: Tensor, leaf: Tensor, codes: SparseCodes) -> Tensor:
        """R_j = a_j (v_j . dy/dx) at every token, of the sum of a score over the batch."""
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        return codes.values * project_on_decoder(gradient, codes, self._directions)
