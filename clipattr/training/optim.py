"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor of the peak rate: linear up over `warmup` steps, then half a cosine to zero."""
    return lambda step: min(
        (step + 1) / max(warmup, 1), 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def warmup_hold_decay(warmup: int, steps: int, decay_share: float = 0.2) -> Callable[[int], float]:
    """Factor of the peak rate: linear up, constant, linear to zero over the last share of steps."""
    return lambda step: min(
        (step + 1) / max(warmup, 1), 1.0, (steps - step) / max(decay_share * steps, 1)
    )


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Weight decay on matrices only: not on biases, norms, scalars and position embeddings."""
    matrices, others = [], []
    for name, parameter in parameters:
        is_matrix = parameter.ndim > 1 and "positional" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def with_schedule(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float] | list[Callable[[int], float]]
) -> OptimizerLRSchedulerConfig:
    """What configure_optimizers returns: the schedule moves with every optimiser step.

    `factor` is one for all parameter groups, or one for each.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return OptimizerLRSchedulerConfig(
        optimizer=optimizer, lr_scheduler={"scheduler": schedule, "interval": "step"}
    )
