"""Words as the scorer of an atlas reads them, to be compared with the means of its latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from clipattr.clip import Clip, load_clip, text_head
from clipattr.errors import CheckpointError
from clipattr.jobs.model import choose_device
from clipattr.semantics.atlas_files import STEM, Atlas


class Words(NamedTuple):
    """Texts, and what all texts share."""

    rows: Float[Tensor, "text embed"]
    reference: Float[Tensor, " embed"]
    """the mean of the vocabulary, in the same prompts"""


def load_scorer(folder: str, atlas: Atlas, accelerator: str) -> Clip:
    """The one by which the atlas was made, and no other: embeddings of two have nothing in common.

    Raises:
        CheckpointError: when its name stands for other weights by now.
    """
    wanted = atlas.origin.scorer
    scorer = load_clip(
        str(wanted["name"]),
        pretrained=wanted["pretrained"],
        precision=str(wanted["precision"]),
        device=choose_device(accelerator),
    )
    if scorer.weights_sha256 != wanted["weights_sha256"]:
        raise CheckpointError(
            f"{folder}/{STEM}.json: the scorer {wanted['name']} ({wanted['precision']}) had "
            f"the weights {wanted['weights_sha256']}, and has {scorer.weights_sha256} now; bring "
            "the weights back, or make the atlas again"
        )
    return scorer


def embed_words(
    scorer: Clip,
    atlas: Atlas,
    texts: Sequence[str],
    *,
    templates: Sequence[str],
    cache: Path,
    progress: bool,
) -> Words:
    """Beside the vocabulary in the same prompts, which the atlas left in the cache."""
    vocabulary = text_head(
        scorer, atlas.origin.words, templates=templates, cache=cache, progress=progress
    )
    rows = text_head(scorer, texts, templates=templates).weights.cpu()
    return Words(rows, vocabulary.weights.mean(dim=0).cpu())
