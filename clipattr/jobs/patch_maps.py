"""Where in an image a latent is: its activation at each patch, or the patches that made it fire."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.patches import attribute_reads
from clipattr.clip import Cut
from clipattr.clip.class_token import check_class_token, climb, read_tokens
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.sae.sae import Sae
from clipattr.spliced import Spliced


class PatchReads(NamedTuple):
    """What the activation of each latent is made of, in its units; the three add up to it.

    The activation is meant before the non-linearity, s z_j: of a latent that fires the same, but
    where an architecture adds a gate or a magnitude of its own.
    """

    patches: Float[Tensor, "pair patch"]
    other_tokens: Float[Tensor, " pair"]
    """what the class token read from itself and from registers"""
    nothing: Float[Tensor, " pair"]
    """what the latent would be if the class token had read nothing"""


def why_no_maps(cut: Cut) -> str | None:
    """What stands in the way of a map over the patches; None where nothing does."""
    if cut.site.tokens != "cls":
        return None
    try:
        check_class_token(cut)
    except ConfigError as error:
        return str(error)
    return None


def map_reads(
    spliced: Spliced,
    pixels: Float[Tensor, "batch 3 height width"],
    images: Int[Tensor, " pair"],
    latents: Int[Tensor, " pair"],
    *,
    n_points: int = 16,
) -> PatchReads:
    """At a site of the class token: from which patches each pair (image, latent) has its value."""
    cut = spliced.cut
    reads = read_tokens(cut, pixels)
    value = partial(_value, cut, spliced.sae, reads.start[images], latents)
    parts = attribute_reads(value, reads.values, images, n_points=n_points)
    n_prefix = cut.trunk.n_prefix
    before, patches = parts.per_token[:, :n_prefix], parts.per_token[:, n_prefix:]
    return PatchReads(patches, before.sum(dim=1), parts.nothing)


def _value(
    cut: Cut, sae: Sae, start: Tensor, latents: Tensor, totals: Tensor, pairs: Tensor
) -> Tensor:
    x = climb(cut, start[pairs], totals.to(start.dtype))
    inputs, unit = sae.normalise(x.float())
    z = (inputs * sae.W_enc[latents[pairs]]).sum(dim=-1) + sae.b_enc[latents[pairs]]
    return z * unit.reshape(-1)


def map_codes(
    codes: SparseCodes,
    images: Int[Tensor, " pair"],
    latents: Int[Tensor, " pair"],
    n_prefix: int,
) -> Float[Tensor, "pair patch"]:
    """At a site with patches: the activation of each pair (image, latent) at each of them.

    Args:
        codes: of the images, [image, token, active].
        images: row of the codes of each pair.
        latents: latent of each pair.
        n_prefix: how many of the tokens come before the patches.
    """
    indices, values = codes.indices[images, n_prefix:], codes.values[images, n_prefix:]
    return torch.where(indices == latents[:, None, None], values, 0.0).sum(dim=-1)
