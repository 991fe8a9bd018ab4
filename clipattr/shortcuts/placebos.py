"""Placebo latents: others that are about as large a change as those of a cue."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.errors import DataError

# Sets that are drawn for each one that is wanted, before it is said that there are no more.
_TRIES = 100
# Share of the energy of a cue's latents that a placebo has at least, where there are so many.
_LEAST = 0.5


def draw_placebos(
    energy: Float[Tensor, " latent"],
    cue: Int[Tensor, " cue"],
    is_excluded: Bool[Tensor, " latent"],
    *,
    n_draws: int,
    seed: int,
) -> list[Int[Tensor, " drawn"]]:
    """Sets of other latents that carry about as much energy as those of the cue; no set twice.

    For each latent of the cue one is drawn of the `n_draws` nearest on a logarithmic scale, none
    twice in a set and none that never fires. Where these carry less than half the energy, because
    the cue's are among the largest, more of the same are added until they do. A small dictionary
    gives fewer sets.
    """
    energy, cue = energy.double().cpu(), cue.cpu()
    is_allowed = (energy > 0) & ~is_excluded.cpu()
    is_allowed[cue] = False
    n_allowed = int(is_allowed.sum())
    if n_allowed < len(cue):
        raise DataError(
            f"a placebo of {len(cue)} latents: {n_allowed} of {len(energy)} fire and are "
            "neither of the cue nor excluded"
        )
    allowed = is_allowed.nonzero().flatten()
    n_near = min(n_draws + len(cue) - 1, n_allowed)
    near = [_nearest(energy, int(one), allowed)[:n_near] for one in cue]
    generator = torch.Generator().manual_seed(seed)
    found: dict[frozenset[int], Tensor] = {}
    for _ in range(_TRIES * n_draws):
        drawn = _draw(near, energy, _LEAST * float(energy[cue].sum()), generator)
        found.setdefault(frozenset(drawn), torch.tensor(drawn))
        if len(found) == n_draws:
            break
    return list(found.values())


def count_unlike(
    energy: Float[Tensor, " latent"], cue: Int[Tensor, " cue"], draws: Sequence[Int[Tensor, " _"]]
) -> int:
    """Draws with less than half, or more than twice, the energy of the cue's latents."""
    of_cue = energy[cue].double().sum()
    ratios = [energy[one].double().sum() / of_cue for one in draws]
    return sum(not 0.5 <= float(each) <= 2 for each in ratios)


def _nearest(
    energy: Float[Tensor, " latent"], latent: int, allowed: Int[Tensor, " allowed"]
) -> list[int]:
    tiny = torch.finfo(torch.float64).tiny
    distance = (energy[allowed].log() - energy[latent].clamp(min=tiny).log()).abs()
    return allowed[distance.argsort(stable=True)].tolist()


def _draw(
    near: list[list[int]],
    energy: Float[Tensor, " latent"],
    least: float,
    generator: torch.Generator,
) -> list[int]:
    """One of each list, and more of any; each list is at least as long as there are lists."""
    chosen: list[int] = []
    for each in near:
        chosen.append(_pick([one for one in each if one not in chosen], generator))
    left = [one for one in dict.fromkeys(sum(near, [])) if one not in chosen]
    while left and float(energy[chosen].sum()) < least:
        chosen.append(_pick(left, generator))
        left.remove(chosen[-1])
    return chosen


def _pick(latents: list[int], generator: torch.Generator) -> int:
    return latents[int(torch.randint(len(latents), (1,), generator=generator))]
