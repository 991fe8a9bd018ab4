"""One of the SAEs that a run trains: the dictionary, its history, and how it is trained."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grad_norm_

from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.initial import Bias
from clipattr.sae.losses import SaeLoss, sae_loss
from clipattr.sae.sae import Sae, SaeOutput


class SaeStep(NamedTuple):
    """What one SAE makes of a batch."""

    output: SaeOutput
    loss: SaeLoss
    is_dead: Bool[Tensor, " latent"]


class SaeMember(nn.Module):
    """An SAE with the loss of its architecture plus AuxK, and what its training has to remember."""

    def __init__(
        self,
        sae: Sae,
        *,
        lr: float,
        warmup: int,
        k_aux: int,
        aux_coefficient: float,
        dead_after: int,
        bias: Bias = Bias.mean,
        from_data: bool = False,
    ) -> None:
        """No latent is dead at first."""
        super().__init__()
        self.sae = sae
        self.history = FiringHistory(sae.n_latents)
        self.lr = lr
        self.warmup = warmup
        self.k_aux = k_aux
        self.aux_coefficient = aux_coefficient
        self.dead_after = dead_after
        self.bias = bias
        self.from_data = from_data

    def initialise_from(self, rows: Float[Tensor, "row model"]) -> None:
        """Mean and scale from the first rows."""
        self.sae.initialise_from(rows, bias=self.bias, from_data=self.from_data)

    def forward(self, x: Float[Tensor, "batch model"]) -> SaeStep:
        """One step on raw activations, which changes nothing yet."""
        output = self.sae(x)
        is_dead = self.history.is_dead(self.dead_after)
        loss = sae_loss(
            self.sae,
            x,
            output,
            is_dead=is_dead,
            k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
        )
        return SaeStep(output, loss, is_dead)

    def take_in(self, output: SaeOutput, world_size: int) -> None:
        """Count firings and move the statistics, over all ranks.

        Rows are those of all ranks, and a latent that fired on one of them has fired. All ranks
        start from the same statistics, so the mean of theirs has taken in all their batches.
        """
        self.history.update(output.codes, len(output.recon) * world_size)
        statistics = self.sae.update_statistics(output)
        if world_size > 1:
            distributed.all_reduce(self.history.rows_since_fired, distributed.ReduceOp.MIN)
            for statistic in statistics:
                distributed.all_reduce(statistic)
                statistic.div_(world_size)

    def remove_parallel_gradient(self) -> None:
        """Before clipping, so that the clipped norm is that of the gradient which is used."""
        remove_parallel_gradient_(self.sae.W_dec)

    def clip_gradient(self, limit: float | None) -> bool:
        """Clip its norm; whether there is a finite one."""
        norm = clip_grad_norm_(self.sae.parameters(), math.inf if limit is None else limit)
        return bool(norm.isfinite())

    def drop_gradient(self) -> None:
        """The optimiser leaves out what has none, moments included."""
        for parameter in self.sae.parameters():
            parameter.grad = None

    def normalise_decoder(self) -> None:
        """After the optimiser's step."""
        normalise_decoder_(self.sae.W_dec)


def zero_of(members: Iterable[SaeMember]) -> Float[Tensor, ""]:
    """0, with a gradient of 0 for every parameter; the number itself may be nan."""
    sums = [parameter.sum() for member in members for parameter in member.sae.parameters()]
    return 0.0 * torch.stack(sums).sum()
