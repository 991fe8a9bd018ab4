"""Checkpoints that survive a kill at any byte, and the newest one that is whole."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from clipattr.atomic import atomic_file

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to disk, then rename.

    Lightning's own writer stages in TMPDIR and moves: on another file system that is a copy over
    the last good file, and a kill in it leaves none.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Replace `path` in one step."""
        with atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that can be read to its end."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            logger.warning("skipping the damaged checkpoint %s: %s", path, error)
        else:
            return path
    return None
