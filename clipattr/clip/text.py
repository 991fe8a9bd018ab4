"""Prompts as heads: L2-normalised text embeddings."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.clip.loading import Clip


def embed_prompts(
    clip: Clip, prompts: list[str], *, batch_size: int = 256
) -> Float[Tensor, "prompt embed"]:
    """One unit-norm row per prompt; the cosine with an image embedding is a row's score."""
    encode_text = cast(Callable[..., Tensor], clip.model.encode_text)
    rows: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            tokens = clip.tokenizer(prompts[start : start + batch_size]).to(clip.device)
            rows.append(encode_text(tokens, normalize=True))
    return torch.cat(rows)
