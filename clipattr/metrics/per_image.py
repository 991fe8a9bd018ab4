"""Named numbers of every image, kept so that intervals can resample the images afterwards."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from clipattr.errors import DataError


class PerImageResult(NamedTuple):
    """One row per image, sorted by id; columns in the order of the metric's names."""

    ids: Int[Tensor, " images"]
    values: Float[Tensor, "images column"]


class PerImage(Metric):
    """A table with one row per image, float64 unless said otherwise, gathered over processes.

    Rows are kept flattened: torchmetrics cannot gather a two-dimensional state when one process has
    none.
    """

    full_state_update = False
    ids: list[Tensor]
    values: list[Tensor]

    def __init__(self, names: Sequence[str], dtype: torch.dtype = torch.float64) -> None:
        """An empty table with the given columns."""
        super().__init__()
        self.kept_as = dtype
        if not names or len(set(names)) != len(names):
            raise ValueError(f"column names {list(names)} must be given and differ")
        self.names = tuple(names)
        self.add_state("ids", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, ids: Int[Tensor, " batch"], columns: Float[Tensor, "batch column"]) -> None:
        """Add one row per image."""
        if columns.shape[1] != len(self.names):
            raise ValueError(
                f"{columns.shape[1]} columns given, expected {len(self.names)}: {list(self.names)}"
            )
        self.ids.append(ids.detach().long())
        self.values.append(columns.detach().to(self.kept_as).flatten())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, but a process without rows takes part with the right dtypes.

        torchmetrics would send an empty float32, and the gather of int64 against float32 fails.
        """
        if isinstance(self.ids, list) and not self.ids:
            self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
            self.values.append(torch.empty(0, dtype=self.kept_as, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> PerImageResult:
        """All rows sorted by id; an image that was given twice is an error."""
        if not len(self.ids):
            return PerImageResult(
                torch.empty(0, dtype=torch.int64, device=self.device),
                torch.empty(0, len(self.names), dtype=self.kept_as, device=self.device),
            )
        ids, order = dim_zero_cat(self.ids).sort()
        is_repeated = ids[1:] == ids[:-1]
        if is_repeated.any():
            raise DataError(
                f"{is_repeated.sum().item()} images were given more than once, for example id "
                f"{ids[1:][is_repeated][0].item()}; each image may be evaluated only once"
            )
        return PerImageResult(ids, dim_zero_cat(self.values).reshape(-1, len(self.names))[order])
