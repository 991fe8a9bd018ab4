"""Which latents tell images with a cue from the others; there is no [image, latent] matrix."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.codes import SparseCodes, pool_tokens
from clipattr.metrics.ranks import auroc
from clipattr.shortcuts.cues import Cue
from clipattr.spliced import Spliced

# Candidates whose activations in every image are in memory at a time: 4 bytes each.
_CHUNK = 1024


# Images of a label, with and without the cue, from which it has a say in what tells them apart.
FEWEST = 10


class Separating(NamedTuple):
    """Latents that fire more on what is flagged, the best first, and how well they tell it."""

    latents: Int[Tensor, " latent"]
    auroc: Float64[Tensor, " latent"]


class Strata(NamedTuple):
    """Labels that occur often enough with and without something; other rows have no say."""

    place: Int[Tensor, " row"]
    """number of the label among these; -1 for rows that are left out"""
    has: Bool[Tensor, " row"]
    counts: Int[Tensor, "stratum 2"]
    """rows without and with it"""

    @property
    def weights(self) -> Float64[Tensor, " stratum"]:
        """In proportion to without x with / (without + with), the sum is 1 (van Elteren 1960)."""
        weights = 1 / (1 / self.counts.double()).sum(dim=1)
        return weights / weights.sum()


def stratify(flags: Cue, labels: Int[Tensor, " row"] | None) -> Strata:
    """By label; all rows together where that is None."""
    labels = torch.zeros_like(flags.has, dtype=torch.int64) if labels is None else labels.long()
    side = 2 * labels + flags.has.long()
    n_labels = int(labels.max()) + 1 if len(labels) else 0
    counts = torch.bincount(side[flags.known], minlength=2 * n_labels).view(n_labels, 2)
    is_used = (counts >= FEWEST).all(dim=1)
    place = torch.where(is_used, is_used.cumsum(0) - 1, -1)
    return Strata(torch.where(flags.known, place[labels], -1), flags.has, counts[is_used])


def find_separating(
    spliced: Spliced, batches: Iterable[Batch], strata: Mapping[str, Strata], *, at_least: float
) -> dict[str, Separating]:
    """For each cue the latents whose activation separates it with this AUROC or more.

    The AUROC is taken within each label and averaged: where a cue goes with a label, a latent of
    the label would separate all images, and knows nothing of the cue. One pass counts where latents
    fire, which leaves few that can; a second one ranks those. Each has one stratum or more.
    """
    fired = count_firing(spliced, batches, strata)
    possible = {
        name: (highest_auroc(fired[name], each) >= at_least).nonzero().flatten()
        for name, each in strata.items()
    }
    wanted = torch.cat([torch.zeros(0, dtype=torch.int64), *possible.values()]).unique()
    found = {name: [torch.zeros(0, dtype=torch.float64)] for name in strata}
    for part in wanted.split(_CHUNK):
        activations = read_activations_of(
            spliced, batches, part, n_rows=len(next(iter(strata.values())).has)
        )
        for name, each in strata.items():
            chosen = torch.isin(part, possible[name])
            if chosen.any():
                found[name].append(auroc_within(activations[:, chosen], each))
    return {name: _keep(possible[name], torch.cat(found[name]), at_least) for name in strata}


def auroc_within(
    activations: Float[Tensor, "row latent"], strata: Strata
) -> Float64[Tensor, " latent"]:
    """Mean over the labels of the AUROC among the rows of each."""
    areas = [
        auroc(activations[members], strata.has[members])
        for members in (strata.place == number for number in range(len(strata.counts)))
    ]
    return strata.weights @ torch.stack(areas)


def _keep(latents: Tensor, areas: Tensor, at_least: float) -> Separating:
    order = areas.argsort(descending=True, stable=True)
    order = order[areas[order] >= at_least]
    return Separating(latents[order], areas[order])


def highest_auroc(
    fired: Int[Tensor, "stratum 2 latent"], strata: Strata
) -> Float64[Tensor, " latent"]:
    """The AUROC that a latent can reach which fires in so many images without (0), with (1).

    It would be larger in every image with it, where it fires at all: p + (1 - p) (1 - q) / 2.
    """
    q, p = (fired.double() / strata.counts[..., None]).unbind(dim=1)
    return strata.weights @ (p + (1 - p) * (1 - q) / 2)


@torch.no_grad()
def count_firing(
    spliced: Spliced, batches: Iterable[Batch], strata: Mapping[str, Strata]
) -> dict[str, Int[Tensor, "stratum 2 latent"]]:
    """Rows of each label in which latents are active, without and with the cue, for each cue."""
    n_latents = spliced.sae.n_latents
    fired = {
        name: torch.zeros(2 * len(each.counts), n_latents, dtype=torch.int32)
        for name, each in strata.items()
    }
    for rows, codes in _read(spliced, batches):
        is_active = codes.is_active
        for name, each in strata.items():
            side = (2 * each.place[rows] + each.has[rows])[:, None].expand_as(codes.indices)
            chosen = is_active & (each.place[rows] >= 0)[:, None]
            one = torch.ones(int(chosen.sum()), dtype=torch.int32)
            where = (side[chosen], codes.indices[chosen])
            fired[name].index_put_(where, one, accumulate=True)
    return {name: each.view(-1, 2, n_latents) for name, each in fired.items()}


@torch.no_grad()
def read_activations_of(
    spliced: Spliced, batches: Iterable[Batch], latents: Int[Tensor, " chosen"], *, n_rows: int
) -> Float[Tensor, "row chosen"]:
    """The largest activation of some latents in each image; 0 for a row that is in no batch."""
    place = torch.full((spliced.sae.n_latents,), len(latents))
    place[latents.cpu()] = torch.arange(len(latents))
    found = torch.zeros(n_rows, len(latents))
    for rows, codes in _read(spliced, batches):
        # The last column takes what was not asked for.
        dense = torch.zeros(len(rows), len(latents) + 1)
        slots = torch.where(codes.is_active, place[codes.indices], len(latents))
        dense.scatter_(1, slots, codes.values.float())
        found[rows] = dense[:, :-1]
    return found


def _read(spliced: Spliced, batches: Iterable[Batch]) -> Iterable[tuple[Tensor, SparseCodes]]:
    """Row numbers, and one activation per image and latent, on the CPU."""
    device = spliced.sae.b_dec.device
    for x, rows, _ in batches:
        codes = pool_tokens(spliced.sae.encode(move_data_to_device(x, device)), "max")
        yield rows.cpu(), SparseCodes(codes.indices.cpu(), codes.values.cpu(), codes.n_latents)
