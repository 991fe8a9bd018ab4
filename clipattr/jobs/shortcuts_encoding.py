"""Pixels as states at the site of the SAE, and states as unit embeddings."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.base import Batch
from clipattr.clip.cut import Rest
from clipattr.config.schema import Shortcuts
from clipattr.data.pixels import Pixels
from clipattr.jobs.shortcuts_inputs import Audited


@torch.no_grad()
def encode(config: Shortcuts, audited: Audited, reader: Pixels, images: Tensor) -> list[Batch]:
    """States at the site, or embeddings where there is no SAE."""
    clip, size = audited.clip, config.data.batch_size
    found: list[Batch] = []
    for start in range(0, len(images), size):
        pixels = reader.normalise(images[start : start + size].to(clip.device))
        rows = torch.arange(start, start + len(pixels))
        if audited.spliced is None:
            found.append((clip.encode_image(pixels).float(), rows, Rest()))
            continue
        state = audited.spliced.cut.prefix(pixels)
        found.append((state.x.float(), rows, state.rest))
    return found


@torch.no_grad()
def embed_states(
    audited: Audited, batches: Iterable[Batch], n_rows: int
) -> Float[Tensor, "row embed"]:
    """Unit embeddings on the CPU; 0 for a row that is in no batch."""
    device = audited.clip.device
    found = torch.zeros(n_rows, audited.clip.d_embed)
    for x, rows, rest in batches:
        embedding = x
        if audited.spliced is not None:
            embedding = audited.spliced.cut.suffix(x.to(device), rest)
        found[rows.cpu()] = normalize(embedding.float(), dim=-1).cpu()
    return found
