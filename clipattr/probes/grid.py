"""Many linear probes that share each row: their logits are one product."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipattr.errors import ConfigError
from clipattr.probes.linear import LinearProbe
from clipattr.probes.selection import score


class ProbeGrid(nn.Module):
    """Probes of one shape; no parameter is in two of them, so each trains as if it were alone."""

    def __init__(self, members: Sequence[LinearProbe]) -> None:
        """`members` may start anywhere: at zero, or at a text head."""
        super().__init__()
        shapes = {tuple(one.weight.shape) for one in members}
        if len(shapes) != 1:
            raise ConfigError(f"a grid of probes of the shapes {sorted(shapes)}: one is allowed")
        self.members = nn.ModuleList(members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def probes(self) -> list[LinearProbe]:
        """The members."""
        return [one for one in self.members if isinstance(one, LinearProbe)]

    def forward(
        self, features: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch member class"]:
        """Logits of all members."""
        weight = torch.cat([one.weight for one in self.probes])
        bias = torch.cat([one.bias for one in self.probes])
        columns = torch.addmm(bias[:, None], weight, features.T)
        return columns.view(len(self), -1, len(features)).permute(2, 0, 1)


class GridScores:
    """Collects predictions of the members on validation rows."""

    def __init__(self) -> None:
        """No rows yet."""
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._groups: list[Tensor] = []

    def update(
        self,
        logits: Float[Tensor, "batch member class"],
        labels: Int[Tensor, " batch"],
        groups: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Take in a batch; a member that is not finite any more predicts nothing."""
        is_finite = logits.isfinite().all(dim=2)
        self._predicted.append(torch.where(is_finite, logits.argmax(dim=2), -1).cpu())
        self._labels.append(labels.cpu())
        if groups is not None:
            self._groups.append(groups.cpu())

    def scores(self, criterion: str = "accuracy") -> list[float]:
        """Of each member: what `selection.best` chooses by."""
        labels = torch.cat(self._labels)
        groups = torch.cat(self._groups) if self._groups else None
        columns = torch.cat(self._predicted).unbind(1)
        return [score(predicted, labels, criterion, groups) for predicted in columns]
