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
from clipattr.spliced import Spliced

# Candidates whose activations in every image are in memory at a time: 4 bytes each.
_CHUNK = 1024


class Flags(NamedTuple):
    """Which rows show something, and of which that is known."""

    has: Bool[Tensor, " row"]
    known: Bool[Tensor, " row"]


class Separating(NamedTuple):
    """Latents that fire more on what is flagged, the best first, and how well they tell it."""

    latents: Int[Tensor, " latent"]
    auroc: Float64[Tensor, " latent"]


def find_separating(
    spliced: Spliced, batches: Iterable[Batch], flags: Mapping[str, Flags], *, at_least: float
) -> dict[str, Separating]:
    """For each flag the latents whose activation separates it with this AUROC or more.

    One pass counts where latents fire, which leaves few that can; a second one ranks those.
    """
    fired = _count_firing(spliced, batches, flags)
    possible = {
        name: (highest_auroc(fired[name], flag) >= at_least).nonzero().flatten()
        for name, flag in flags.items()
    }
    wanted = torch.cat([torch.zeros(0, dtype=torch.int64), *possible.values()]).unique()
    found = {name: [torch.zeros(0, dtype=torch.float64)] for name in flags}
    for part in wanted.split(_CHUNK):
        activations = read_activations_of(
            spliced, batches, part, n_rows=len(next(iter(flags.values())).has)
        )
        for name, flag in flags.items():
            chosen = torch.isin(part, possible[name])
            if chosen.any():
                found[name].append(auroc(activations[flag.known][:, chosen], flag.has[flag.known]))
    return {name: _keep(possible[name], torch.cat(found[name]), at_least) for name in flags}


def _keep(latents: Tensor, areas: Tensor, at_least: float) -> Separating:
    order = areas.argsort(descending=True, stable=True)
    order = order[areas[order] >= at_least]
    return Separating(latents[order], areas[order])


def highest_auroc(fired: Int[Tensor, "state latent"], flag: Flags) -> Float64[Tensor, " latent"]:
    """The AUROC that a latent can reach which fires in so many images without (0), with (1).

    It would be larger in every image with it, where it fires at all: p + (1 - p) (1 - q) / 2.
    """
    n = torch.stack([(flag.known & ~flag.has).sum(), (flag.known & flag.has).sum()])
    q, p = fired.double() / n[:, None].clamp(min=1)
    return p + (1 - p) * (1 - q) / 2


@torch.no_grad()
def _count_firing(
    spliced: Spliced, batches: Iterable[Batch], flags: Mapping[str, Flags]
) -> dict[str, Int[Tensor, "state latent"]]:
    n_latents = spliced.sae.n_latents
    fired = {name: torch.zeros(2, n_latents, dtype=torch.int64) for name in flags}
    for rows, codes in _read(spliced, batches):
        images = torch.arange(len(rows))[:, None].expand_as(codes.indices)
        is_active = codes.is_active
        for name, flag in flags.items():
            for state in (0, 1):
                counted = flag.known[rows] & (flag.has[rows] == bool(state))
                chosen = is_active & counted[images]
                fired[name][state] += torch.bincount(codes.indices[chosen], minlength=n_latents)
    return fired


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
