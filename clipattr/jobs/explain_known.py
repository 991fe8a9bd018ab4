"""What is known of the latents that an explanation names: where they come from, what they mean."""

import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipattr.clip import Clip, Tower
from clipattr.config.schema import Explain
from clipattr.data import read_thumbnails
from clipattr.errors import DataError
from clipattr.files import read_sha256
from clipattr.jobs.patch_maps import map_reads, why_no_maps
from clipattr.report.explanation import FiredBy, Known, Meaning
from clipattr.semantics.atlas_files import Atlas, load_atlas
from clipattr.spliced import Spliced

logger = logging.getLogger(__name__)

THUMBNAILS = Path("report") / "thumbs"
Pictures = dict[int, UInt8[np.ndarray, "height width 3"]]


def load_meanings(config: Explain, clip: Clip) -> Atlas | None:
    """The atlas, where one is asked for; one of another model or SAE is refused."""
    if config.atlas is None:
        return None
    model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
    return load_atlas(config.atlas, model, read_sha256(Path(config.sae), "sae"))


def find_known(
    spliced: Spliced,
    tower: Tower,
    image: Float[Tensor, "3 height width"],
    latents: Int[Tensor, " latent"],
    atlas: Atlas | None,
    *,
    n_examples: int,
) -> Known:
    """Of every latent that is shown: the patches that made it fire, and its meaning."""
    meaning = {}
    if atlas is not None:
        meaning = {latent: _meaning(atlas, latent, n_examples) for latent in latents.tolist()}
    obstacle = why_no_maps(spliced.cut)
    if obstacle is not None:
        logger.warning("no heatmaps: %s", obstacle)
    if obstacle is not None or spliced.cut.site.tokens != "cls" or not len(latents):
        return Known(meaning=meaning)
    return Known(_find_patches(spliced, tower, image, latents), meaning)


def load_pictures(config: Explain, atlas: Atlas | None, known: Known) -> Pictures:
    """Thumbnails of all examples, as the pages of the atlas show them."""
    rows = {row for each in known.meaning.values() for row in each.examples}
    if atlas is None or not rows:
        return {}
    folder = Path(str(config.atlas)) / THUMBNAILS
    try:
        return read_thumbnails(folder, sorted(rows), made_from=atlas.origin.images)
    except DataError as error:
        raise DataError(
            f"{error}. examples={config.examples} are asked for; an atlas has pictures of "
            "atlas.shown images per latent. Take fewer (examples=0: none), or make the atlas again"
        ) from error


def _meaning(atlas: Atlas, latent: int, n_examples: int) -> Meaning:
    rows = atlas.tensors.examples[latent, :n_examples].tolist()
    return Meaning(atlas.words_of(latent), [row for row in rows if row >= 0])


def _find_patches(
    spliced: Spliced, tower: Tower, image: Tensor, latents: Tensor
) -> dict[int, FiredBy]:
    reads = map_reads(spliced, image[None], torch.zeros_like(latents), latents)
    grids = reads.patches.unflatten(1, tower.patch_grid()).double().tolist()
    others, nothing = reads.other_tokens.tolist(), reads.nothing.tolist()
    return {
        latent: FiredBy(*parts)
        for latent, *parts in zip(latents.tolist(), grids, others, nothing, strict=True)
    }
