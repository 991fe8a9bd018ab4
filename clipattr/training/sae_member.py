"""One of the SAEs that a run trains: the dictionary, its history, and how it is trained."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_

from clipattr.errors import ConfigError
from clipattr.sae.averaging import AveragedSae
from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.initial import Bias
from clipattr.sae.losses import SaeLoss, sae_loss
from clipattr.sae.prefixes import NestedTopKSae
from clipattr.sae.relative import Average, alone
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.sae.sharded import ShardedTopKSae
from clipattr.sae.topk import BatchTopKSae, TopKSae


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
        k_start: int | None = None,
        k_steps: int = 0,
        ema: float | None = None,
    ) -> None:
        """No latent is dead at first.

        Args:
            sae: what is trained.
            lr: peak of Adam.
            warmup: steps until then.
            k_aux: dead latents that model the residual.
            aux_coefficient: weight of that.
            dead_after: rows without firing after which a latent is dead.
            bias: where b_dec starts.
            from_data: latents start at rows, and not at random.
            k_start: k of the first step, of an SAE that has a k.
            k_steps: steps in which it falls to the SAE's own, linearly.
            ema: decay of a running mean of the weights, which is what comes out then.
        """
        super().__init__()
        self.sae = sae
        self.history = FiringHistory(sae.n_latents)
        self.lr = lr
        self.warmup = warmup
        self.k_aux = k_aux
        self.aux_coefficient = aux_coefficient
        self.dead_after = dead_after
        if bias not in list(Bias):
            raise ConfigError(f"bias={bias!r}: must be one of {', '.join(map(str, Bias))}")
        self.bias = bias
        self.from_data = from_data
        self.k_start = k_start
        self.k_steps = k_steps
        self.k_end: int | None = None
        if isinstance(sae, TopKSae) and not isinstance(sae, NestedTopKSae):
            self.k_end = sae.k
        if k_start is not None and not (self.k_end and self.k_end <= k_start <= sae.n_latents):
            raise ConfigError(
                f"k_start={k_start} for a {type(sae).__name__} of {sae.n_latents} latents with "
                f"{f'k={self.k_end}' if self.k_end else 'no k'}: it lies between the two"
            )
        _check(lr=lr, k_aux=k_aux, ema=ema)
        if ema is not None and isinstance(sae, BatchTopKSae) and sae.max_active > sae.k:
            raise ConfigError(
                f"ema={ema} for a {type(sae).__name__}: the threshold of its inference is that of "
                "the weights that were trained, and not of their mean; leave ema out"
            )
        self.averaged = None if ema is None else AveragedSae(sae, ema)

    def initialise_from(self, *columns: Float[Tensor, "row _"]) -> None:
        """Mean and scale from the first rows; of a transcoder, from those of both sites."""
        self.sae.initialise_from(*columns, bias=self.bias, from_data=self.from_data)

    def shard(self, rank: int, world_size: int) -> None:
        """Keep the latents of this process; after `initialise_from`, which is for all of them."""
        self.sae = ShardedTopKSae(self.sae, rank, world_size)
        self.history = FiringHistory(self.sae.n_latents)
        if self.averaged is not None:
            self.averaged = AveragedSae(self.sae, self.averaged.decay)

    def gather(self, device: torch.device) -> None:
        """The opposite of `shard`, at the end: the first process has all latents, on the CPU.

        `device` is where the processes exchange tensors.
        """
        sae = self.finish().to(device)
        assert isinstance(sae, ShardedTopKSae), "after shard"
        self.sae, self.averaged = sae.gather() or sae, None

    def anneal(self, step: int) -> None:
        """Set the k of that step."""
        if self.k_start is not None and self.k_end is not None:
            assert isinstance(self.sae, TopKSae), "it has a k"
            share = min(step / max(self.k_steps, 1), 1.0)
            self.sae.k = round(self.k_start + share * (self.k_end - self.k_start))

    def forward(
        self,
        x: Float[Tensor, "batch model"],
        target: Float[Tensor, "batch out"] | None = None,
        *,
        average: Average = alone,
    ) -> SaeStep:
        """One step on raw activations, which changes nothing yet.

        `target` is what a transcoder reconstructs. `average` is the mean over processes, each of
        which has a part of the batch.
        """
        output = self.sae(x)
        is_dead = self.history.is_dead(self.dead_after)
        loss = sae_loss(
            self.sae,
            x if target is None else target,
            output,
            is_dead=is_dead,
            k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
            average=average,
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
        parameters = list(self.sae.parameters())
        norm = self.sae.gradient_norm()
        # Read on the host once, as whether it is finite must be; most gradients are left alone.
        size = norm.item()
        if limit is not None and size > limit:
            clip_grads_with_norm_(parameters, limit, norm)
        return math.isfinite(size)

    def drop_gradient(self) -> None:
        """The optimiser leaves out what has none, moments included."""
        for parameter in self.sae.parameters():
            parameter.grad = None

    def after_step(self) -> None:
        """Unit directions again, and what is averaged."""
        normalise_decoder_(self.sae.W_dec)
        if self.averaged is not None:
            self.averaged.update(self.sae)

    def finish(self) -> Sae:
        """What has been trained, for use."""
        sae = self.sae if self.averaged is None else self.averaged.finish(self.sae)
        if self.k_end is not None:
            assert isinstance(sae, TopKSae), "it has a k"
            sae.k = self.k_end
        return sae.eval()

    def snapshot(self) -> Sae:
        """A frozen copy of what `finish` would give now; training can go on."""
        return copy.deepcopy(self).finish().requires_grad_(False)


def _check(*, lr: float, k_aux: int, ema: float | None) -> None:
    if not lr > 0 or k_aux < 1:
        raise ConfigError(f"lr={lr}, k_aux={k_aux}: both must be greater than 0")
    if ema is not None and not 0 < ema < 1:
        raise ConfigError(f"ema={ema}: must lie between 0 and 1, such as 0.999")


def zero_of(members: Iterable[SaeMember]) -> Float[Tensor, ""]:
    """0, with a gradient of 0 for every parameter; the number itself may be nan."""
    sums = [parameter.sum() for member in members for parameter in member.sae.parameters()]
    return 0.0 * torch.stack(sums).sum()
