"""Accuracy by group, a group being one label with one state of the cue."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.errors import DataError


class GroupCounts(NamedTuple):
    """Numerators and denominators of the group accuracies; those of several parts add up."""

    correct: Int[Tensor, "label cue"]
    total: Int[Tensor, "label cue"]

    @property
    def accuracy(self) -> Float[Tensor, "label cue"]:
        """Share of correct predictions in each group; nan for an empty group."""
        return self.correct.double() / self.total.double()

    @property
    def average_accuracy(self) -> float:
        """Share of correct predictions over all images."""
        return self.correct.sum().item() / self.total.sum().item()

    @property
    def worst_group(self) -> tuple[int, int]:
        """(label, cue) of the lowest accuracy among groups with images; the first one on a tie."""
        accuracy = self.accuracy.nan_to_num(nan=float("inf")).flatten()
        label, cue = divmod(int(accuracy.argmin()), self.total.shape[1])
        return label, cue

    @property
    def worst_group_accuracy(self) -> float:
        """Lowest accuracy among groups with images (Sagawa et al. 2020, group DRO)."""
        return self.accuracy[self.worst_group].item()

    @property
    def gap(self) -> float:
        """Average accuracy - worst-group accuracy."""
        return self.average_accuracy - self.worst_group_accuracy


def count_groups(
    *,
    predictions: Int[Tensor, " images"],
    labels: Int[Tensor, " images"],
    cues: Int[Tensor, " images"],
    n_labels: int,
    n_cues: int,
) -> GroupCounts:
    """Correct predictions and images of each (label x cue) group."""
    if len(labels) == 0:
        raise DataError("no images: group accuracies need at least one")
    for name, values, size in (("labels", labels, n_labels), ("cues", cues, n_cues)):
        if values.min() < 0 or values.max() >= size:
            raise DataError(
                f"{name} lie in [{values.min().item()}, {values.max().item()}], "
                f"allowed is [0, {size - 1}]"
            )
    groups = labels.long() * n_cues + cues.long()
    correct = groups[predictions == labels]
    shape = (n_labels, n_cues)
    return GroupCounts(
        torch.bincount(correct, minlength=n_labels * n_cues).reshape(shape),
        torch.bincount(groups, minlength=n_labels * n_cues).reshape(shape),
    )
