"""Zero-shot accuracy per factor of the planted world."""

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.clip import Clip, embed_prompts
from clipattr.errors import DataError
from clipattr.world.prompts import ZEROSHOT, Factors


def zeroshot_accuracy(
    clip: Clip, embeddings: Float[Tensor, "image embed"], factors: list[Factors]
) -> dict[str, float]:
    """Share of images whose nearest prompt (cosine) is that of the true value, per factor.

    `embeddings` are L2-normalised, image i has the factors `factors[i]`.
    """
    accuracy: dict[str, float] = {}
    for name, task in ZEROSHOT.items():
        unknown = {str(row.get(task.field)) for row in factors} - set(task.values)
        if unknown:
            raise DataError(
                f"the JSON field {task.field!r} holds {sorted(unknown)}, allowed are "
                f"{list(task.values)}; this job reads shards of the planted world"
            )
        truth = torch.tensor([task.values.index(str(row[task.field])) for row in factors])
        scores = embeddings @ embed_prompts(clip, list(task.prompts)).T
        accuracy[name] = float((scores.argmax(dim=1).cpu() == truth).double().mean())
    return accuracy
