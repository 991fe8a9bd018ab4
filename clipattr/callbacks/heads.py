"""Score of every image under two heads, and how much attribution falls on cue latents."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution.closed_form import (
    LastLayerHead,
    build_lens_table,
    class_attributions,
)
from clipattr.callbacks.base import ReadoutCallback
from clipattr.metrics.per_image import PerImage
from clipattr.shortcuts.amplification import attribution_share, remove_latents
from clipattr.spliced import Readout, Spliced


class HeadsCallback(ReadoutCallback):
    """Fills `result`: per image and head the score, sum |R|, and sum R over a cue's latents.

    Columns: `<head>.score`, `<head>.total`, `<head>.<cue>`, `<head>.without_<cue>` (the score when
    the cue's latents are removed). The rows of `weights` are the heads.
    """

    def __init__(
        self,
        spliced: Spliced,
        weights: Float[Tensor, "head embed"],
        bias: Float[Tensor, " head"],
        *,
        names: tuple[str, ...],
        cue_latents: dict[str, Int[Tensor, " cue"]],
    ) -> None:
        self.spliced = spliced
        self.head = LastLayerHead(*spliced.cut.last_layer(), weights)
        self.bias = bias
        self.W_dec = spliced.sae.W_dec.detach()
        self.cue_latents = cue_latents
        self.lens = build_lens_table(self.head, self.W_dec)
        without = [f"without_{cue}" for cue in cue_latents]
        self.columns = tuple(
            f"{name}.{part}"
            for name in names
            for part in ("score", "total", *cue_latents, *without)
        )
        self.table = PerImage(self.columns)
        self.result: dict[str, Float64[Tensor, " image"]] = {}
        super().__init__(self.table)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Closed form of the last layer for all heads at once."""
        attributions = class_attributions(
            self.head, self.lens, readout.x, readout.codes, self.W_dec
        )
        scores = self._score(readout.x)
        without = [
            self._score(remove_latents(readout.x, readout.codes, self.W_dec, latents))
            for latents in self.cue_latents.values()
        ]
        columns: list[Tensor] = []
        for number in range(len(self.head.weights)):
            of_head = attributions[..., number]
            total = torch.where(readout.codes.is_active, of_head, 0).abs().sum(dim=1)
            columns += [scores[:, number], total]
            for latents in self.cue_latents.values():
                columns.append(attribution_share(of_head, readout.codes, latents).cue)
            columns += [edited[:, number] for edited in without]
        self.table.update(readout.rows, torch.stack(columns, dim=1))

    def _score(self, x: Float[Tensor, "batch model"]) -> Float[Tensor, "batch head"]:
        unit = normalize(self.spliced.cut.suffix(x), dim=-1)
        return unit @ self.head.weights.T + self.bias

    def finish(self) -> None:
        """All images, sorted by row."""
        columns = self.table.compute().values.T
        self.result = dict(zip(self.columns, columns, strict=True))
