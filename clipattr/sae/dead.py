"""Which latents have stopped firing, counted in rows so that the batch size does not matter."""

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from clipattr.codes import SparseCodes


class FiringHistory(nn.Module):
    """Rows seen since each latent last fired; a buffer, so that a resumed run remembers it.

    Not called from the SAE's forward: only the training step updates it. With several processes
    each counts its own rows, and the element-wise minimum over the ranks of `rows_since_fired` is
    the history of all, provided that every rank passes the same `n_rows`.
    """

    rows_since_fired: Tensor

    def __init__(self, n_latents: int) -> None:
        """Every latent starts as if it had just fired."""
        super().__init__()
        self.register_buffer("rows_since_fired", torch.zeros(n_latents, dtype=torch.int64))

    @torch.no_grad()
    def update(self, codes: SparseCodes, n_rows: int) -> None:
        """Take in one step of `n_rows` rows (over all processes), of which `codes` are given."""
        # Scatter instead of indexing by the mask: its size would have to be known on the host.
        firings = torch.zeros_like(self.rows_since_fired).scatter_add_(
            0, codes.indices.flatten(), codes.is_active.flatten().long()
        )
        self.rows_since_fired.add_(n_rows).masked_fill_(firings > 0, 0)

    def is_dead(self, after: int) -> Bool[Tensor, " latent"]:
        """Latents that have been silent for at least `after` rows."""
        return self.rows_since_fired >= after
