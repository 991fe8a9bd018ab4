"""What heads are trained by: one label for each row, or several that are true or not."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


def head_losses(
    logits: Float[Tensor, "batch *member class"],
    targets: Int[Tensor, " batch"] | Float[Tensor, "batch class"],
    class_weight: Float[Tensor, " class"] | None = None,
) -> Float[Tensor, "*member"]:
    """Mean loss over the batch, for each head of a grid by itself.

    Cross-entropy for class numbers, averaged with the weight of each row's class; for several
    labels the mean of their binary cross-entropies, in which the weight is that of a positive.
    """
    if targets.is_floating_point():
        wanted = targets.reshape(len(targets), *[1] * (logits.ndim - 2), -1).expand_as(logits)
        losses = binary_cross_entropy_with_logits(
            logits, wanted, pos_weight=class_weight, reduction="none"
        )
        return losses.mean(-1).mean(0)
    # Class by class, row beside row, as a grid makes them: a softmax over few classes is slow
    # where they are neighbours.
    columns = logits.movedim(0, -1).reshape(-1, logits.shape[-1], len(targets))
    labels = targets.expand(len(columns), -1)
    losses = cross_entropy(columns, labels, class_weight, reduction="none")
    total = torch.ones_like(targets) if class_weight is None else class_weight[targets]
    return (losses.sum(1) / total.sum()).view(logits.shape[1:-1])
