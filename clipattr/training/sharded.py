"""Training in which every process has some of the latents: the strategy, and checkpoints of all."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed

from clipattr.sae.sharded import gather_rows, is_sliced, own_rows


class ShardedStrategy(DDPStrategy):
    """Processes that all see every row, where DDP has each of them see a part of a batch.

    Gradients are whole then, and nothing is averaged.
    """

    def configure_ddp(self) -> None:
        """Nothing is wrapped; what all have starts from the bits of the first process."""
        assert self.lightning_module is not None, "connected"
        for name, tensor in self.lightning_module.state_dict().items():
            if not is_sliced(name):
                distributed.broadcast(tensor, 0)


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether the latents are divided among the processes, and the rows are not."""
    return isinstance(trainer.strategy, ShardedStrategy)


def n_parts(trainer: L.Trainer) -> int:
    """Into how many parts a batch falls."""
    return 1 if is_sharded(trainer) else trainer.world_size


def gather_checkpoint(checkpoint: dict[str, Any]) -> None:
    """What is saved is what one process alone would save, in memory of the first one's host.

    With Adam that is three times the dictionary: 18 GB for a million latents of width 768.
    """
    _change_sliced(checkpoint, gather_rows)


def slice_checkpoint(checkpoint: dict[str, Any], rank: int, world_size: int) -> None:
    """What one process needs of a checkpoint of all."""
    _change_sliced(checkpoint, lambda whole: own_rows(whole, rank, world_size))


def _change_sliced(checkpoint: dict[str, Any], change: Callable[[Tensor], Tensor | None]) -> None:
    weights = checkpoint["state_dict"]
    weights |= {name: change(value) for name, value in weights.items() if is_sliced(name)}
    for optimizer in checkpoint["optimizer_states"]:
        names = {
            index: name
            for group in optimizer["param_groups"]
            for index, name in zip(group["params"], group["param_names"], strict=True)
        }
        # New dicts: the old ones are the optimiser's own.
        optimizer["state"] = {
            index: {
                key: change(value) if is_sliced(names[index]) and value.dim() else value
                for key, value in state.items()
            }
            for index, state in optimizer["state"].items()
        }
