"""Images without some latents, for many sets of latents in one pass."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.shortcuts.amplification import is_among, remove_latents
from clipattr.spliced import Readout, Spliced


class Removed(NamedTuple):
    """The images in which any of the latents fires, without them; the others are as they were."""

    samples: Int[Tensor, " fired"]
    embeddings: Float[Tensor, "fired embed"]
    """unit rows"""


@torch.no_grad()
def remove_each(
    audited: Audited, images: ImageSet, latents: Mapping[str, Int[Tensor, " latent"]]
) -> dict[str, Removed]:
    """One pass of the suffix for each set, over the images in which it fires.

    `ShortcutCallback` does the same for cues, and attributes: here no gradient is needed, and what
    is kept grows with the images that change, 8 bytes x width of the embedding each.
    """
    if audited.spliced is None or not latents:
        return {}
    spliced, device = audited.spliced, audited.clip.device
    parts: dict[str, list[Removed]] = {name: [] for name in latents}
    for batch in images.batches:
        readout = spliced.read(*move_data_to_device(batch, device))
        for name, each in latents.items():
            parts[name].append(_remove(spliced, readout, each.to(device)))
    return {
        name: Removed(*(torch.cat(column) for column in zip(*found, strict=True)))
        for name, found in parts.items()
    }


@torch.no_grad()
def change_each(
    audited: Audited,
    images: ImageSet,
    n_images: int,
    latents: Mapping[tuple[str, int], Int[Tensor, " latent"]],
) -> dict[tuple[str, int], Float[Tensor, " embed"]]:
    """Mean over the images of the unit embedding minus the one without each set of latents.

    All that a mean effect on a linear head takes, and as little to keep for a thousand sets as for
    one. A pass of the suffix for each set, as in `remove_each`, and one for the images themselves.
    """
    if audited.spliced is None or not latents:
        return {}
    spliced, device = audited.spliced, audited.clip.device
    sums = {name: _nothing(spliced).sum(dim=0) for name in latents}
    for batch in images.batches:
        readout = spliced.read(*move_data_to_device(batch, device))
        before = normalize(spliced.cut.suffix(readout.x, readout.rest).double(), dim=-1).cpu()
        place = {row: number for number, row in enumerate(readout.rows.tolist())}
        for name, each in latents.items():
            samples, without = _remove(spliced, readout, each.to(device))
            changed = before[[place[row] for row in samples.tolist()]] - without
            sums[name] += changed.sum(dim=0)
    return {name: each / n_images for name, each in sums.items()}


def _remove(spliced: Spliced, readout: Readout, latents: Int[Tensor, " latent"]) -> Removed:
    codes = readout.codes
    fires = (is_among(codes, latents) & codes.is_active).flatten(1).any(dim=1).nonzero().flatten()
    if not len(fires):
        return Removed(torch.zeros(0, dtype=torch.int64), _nothing(spliced))
    x = remove_latents(readout.x[fires], codes.select(fires), spliced.sae.directions, latents)
    embeddings = spliced.cut.suffix(x, readout.rest.rows(fires))
    return Removed(readout.rows[fires].cpu(), normalize(embeddings.double(), dim=-1).cpu())


def _nothing(spliced: Spliced) -> Tensor:
    return torch.zeros(0, spliced.cut.trunk.d_embed, dtype=torch.float64)
