"""What a text head and a probe say of every image, with and without the latents of cues."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from clipattr.callbacks.base import ReadoutCallback
from clipattr.callbacks.head_attribution import Block, HeadAttribution
from clipattr.callbacks.shortcuts_result import ShortcutResult
from clipattr.clip.cut import Rest
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.metrics.per_image import PerImage
from clipattr.probes.linear import linear_logits
from clipattr.shortcuts.amplification import attribution_share, is_among, remove_latents
from clipattr.shortcuts.automatic import HEADS, LatentSums
from clipattr.shortcuts.contrast import check_classes, class_contrasts
from clipattr.spliced import Readout, Spliced


class LinearHead(NamedTuple):
    """Linear on the unit image embedding: logits = embedding @ weights.T + bias."""

    weights: Float[Tensor, "class embed"]
    bias: Float[Tensor, " class"]


class LatentTotals(Metric):
    """`LatentSums` of the images seen: 8 bytes x latents x (5 scores + 2), whatever the images."""

    full_state_update = False
    total: Tensor
    square: Tensor
    cross: Tensor
    fired: Tensor
    energy: Tensor
    n_images: Tensor

    def __init__(self, *, n_scores: int, directions: Float[Tensor, "latent model"]) -> None:
        """No image yet."""
        super().__init__()
        self._squared_lengths = directions.double().square().sum(dim=1)
        n_latents = len(directions)
        for name, axes in (
            ("total", (2, n_scores)),
            ("square", (2, n_scores)),
            ("cross", (n_scores,)),
            ("energy", ()),
        ):
            zeros = torch.zeros(n_latents, *axes, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        fired = torch.zeros(n_latents, dtype=torch.int64)
        self.add_state("fired", fired, dist_reduce_fx="sum")
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: SparseCodes) -> None:
        """Count the images of a batch, and in how many of them each latent fires."""
        images = torch.arange(len(codes.indices), device=codes.indices.device)
        images = images.view(-1, *[1] * (codes.indices.ndim - 1)).expand_as(codes.indices)
        fired = (images * codes.n_latents + codes.indices)[codes.is_active].unique()
        fired %= codes.n_latents
        self.fired.index_add_(0, fired, torch.ones_like(fired))
        squares = codes.values.double().square().flatten()
        self.energy.index_add_(0, codes.indices.flatten(), squares)
        self.n_images += len(codes.indices)

    def add(
        self,
        latents: Int[Tensor, "image slot"],
        values: Float[Tensor, "image slot head score"],
        scores: slice,
    ) -> None:
        """Add attributions [image, slot, head, score] of a batch for some scores; padding is 0."""
        places, rows = latents.flatten(), values.double().flatten(0, 1)
        self.total[:, :, scores].index_add_(0, places, rows)
        self.cross[:, scores].index_add_(0, places, rows.prod(dim=1))
        self.square[:, :, scores].index_add_(0, places, rows.square())

    def compute(self) -> LatentSums:
        """The sums."""
        return LatentSums(
            total=self.total.permute(1, 2, 0),
            square=self.square.permute(1, 2, 0),
            cross=self.cross.T,
            fired=self.fired,
            energy=self.energy * self._squared_lengths.to(self.energy.device),
            n_images=int(self.n_images),
        )


class ShortcutCallback(ReadoutCallback):
    """Fills `result`: logits with and without the latents of each cue, and their attribution.

    Attributions are of scores (`shortcuts.contrast`) and, behind the last block, in closed form.
    At any other site they take, for each batch, one forward pass of the suffix and 2 x scores
    backward ones, unless `attributed` is false. A cue takes one forward pass of the suffix, of the
    images in which it fires.

    Kept until the end: 8 bytes x (1 + cues) x (width of the embedding + heads x scores) for each
    image, and with `automatic` 8 bytes x latents x (5 scores + 2). The result has 8 bytes x
    (1 + cues) x heads x classes for each image.
    """

    def __init__(
        self,
        spliced: Spliced,
        heads: Mapping[str, LinearHead],
        *,
        cues: Mapping[str, Int[Tensor, " _"]],
        automatic: bool = False,
        attributed: bool = True,
    ) -> None:
        """What is compared.

        Args:
            spliced: the model and its SAE.
            heads: of the same classes, by name.
            cues: latents that stand for each cue; of none, removing it changes nothing.
            automatic: sum the attributions of every latent; the heads are "text" and "probe" then.
            attributed: attribute scores; without it the result has logits alone.
        """
        _check_heads(heads, automatic=automatic, attributed=attributed)
        device = spliced.sae.b_dec.device
        self._spliced, self._directions = spliced, spliced.sae.directions.detach()
        self._heads = {
            name: LinearHead(head.weights.double().to(device), head.bias.double().to(device))
            for name, head in heads.items()
        }
        self._cues = {
            name: _check_cue(name, latents, spliced.sae.n_latents).to(device)
            for name, latents in cues.items()
        }
        weights = torch.stack([class_contrasts(*head).weights for head in self._heads.values()])
        _, self._n_scores, self._width = weights.shape
        self._attribution = HeadAttribution(spliced, weights) if attributed else None
        n_attributions = len(heads) * self._n_scores if attributed else 0
        n_columns = (1 + len(cues)) * (self._width + n_attributions)
        self._table = PerImage([str(column) for column in range(n_columns)])
        self._totals = None
        if automatic:
            self._totals = LatentTotals(n_scores=self._n_scores, directions=self._directions)
        self.result: ShortcutResult | None = None
        super().__init__(*(each for each in (self._table, self._totals) if each is not None))

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Embed one batch with and without the cues, and attribute it."""
        unit = self._embed(readout.x, readout.rest)
        embeddings = [unit, *(self._embed_without(readout, unit, cue) for cue in self._cues)]
        columns = embeddings
        if self._attribution is not None:
            columns.append(self._attribute(self._attribution, readout).flatten(1))
        self._table.update(readout.rows, torch.cat(columns, dim=1))

    def _embed(self, x: Float[Tensor, "batch *token model"], rest: Rest) -> Tensor:
        return normalize(self._spliced.cut.suffix(x, rest).double(), dim=-1)

    def _embed_without(self, readout: Readout, unit: Tensor, cue: str) -> Tensor:
        """Only the images in which the cue fires pass the suffix once more."""
        latents, codes = self._cues[cue], readout.codes
        fires = (is_among(codes, latents) & codes.is_active).flatten(1).any(dim=1)
        rows = fires.nonzero().squeeze(1)
        if not len(rows):
            return unit
        x = remove_latents(readout.x[rows], codes.select(rows), self._directions, latents)
        return unit.index_copy(0, rows, self._embed(x, readout.rest.rows(rows)))

    def _attribute(
        self, attribution: HeadAttribution, readout: Readout
    ) -> Float64[Tensor, "batch part head score"]:
        """Sum of |R| over all latents, then sums of R over those of each cue."""
        shape = (len(readout.x), 1 + len(self._cues), len(self._heads), self._n_scores)
        found = torch.zeros(shape, dtype=torch.float64, device=readout.x.device)
        cues = list(self._cues.values())
        for block in attribution.blocks(readout):
            share = attribution_share(block.values, block.latents, cues)
            found[block.images, 0, :, block.scores] = share.total
            found[block.images, 1:, :, block.scores] = share.cue.transpose(0, 1)
            self._add(block)
        if self._totals is not None:
            self._totals.update(readout.codes)
        return found

    def _add(self, block: Block) -> None:
        if self._totals is not None:
            self._totals.add(block.latents, block.values, block.scores)

    def finish(self) -> None:
        """All images, sorted by row; the heads are applied once."""
        rows, table = self._table.compute()
        n_embedded = (1 + len(self._cues)) * self._width
        embeddings = table[:, :n_embedded].unflatten(1, (-1, self._width))
        unit, *without = embeddings.unbind(1)
        of_cues, total = self._unpack(table[:, n_embedded:])
        self.result = ShortcutResult(
            rows=rows,
            embeddings=unit.float(),
            logits={name: linear_logits(unit, *head) for name, head in self._heads.items()},
            without={
                (name, cue): linear_logits(edited, *head)
                for name, head in self._heads.items()
                for cue, edited in zip(self._cues, without, strict=True)
            },
            cue_attribution=of_cues,
            total_attribution=total,
            sums=None if self._totals is None else self._totals.compute(),
        )

    def _unpack(
        self, columns: Float64[Tensor, "image column"]
    ) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
        """What was attributed to each cue, and in total, to each head."""
        if self._attribution is None:
            return {}, {}
        shape = (1 + len(self._cues), len(self._heads), self._n_scores)
        total, *of_cues = columns.unflatten(1, shape).unbind(1)
        numbered = list(enumerate(self._heads))
        by_cue = {
            (name, cue): of_cue[:, number]
            for number, name in numbered
            for cue, of_cue in zip(self._cues, of_cues, strict=True)
        }
        return by_cue, {name: total[:, number] for number, name in numbered}


def _check_heads(heads: Mapping[str, LinearHead], *, automatic: bool, attributed: bool) -> None:
    shapes = {name: tuple(head.weights.shape) for name, head in heads.items()}
    if len(set(shapes.values())) != 1:
        raise ConfigError(f"heads of {shapes} classes and widths: they must be the same")
    check_classes(next(iter(shapes.values()))[0])
    if automatic and (tuple(heads) != HEADS or not attributed):
        raise ConfigError(
            f"heads {list(heads)}, attributed={attributed}: latents are ranked by what is "
            f"attributed to {' and '.join(HEADS)}, in this order"
        )


def _check_cue(name: str, latents: Int[Tensor, " latent"], n_latents: int) -> Tensor:
    outside = latents[(latents < 0) | (latents >= n_latents)]
    if len(outside):
        raise ConfigError(
            f"cue {name!r}: latent {int(outside[0])}, and the SAE has 0 to {n_latents - 1}"
        )
    return latents.long()
