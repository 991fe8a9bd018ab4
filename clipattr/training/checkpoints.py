"""Checkpoints that survive a kill at any byte, and the newest one that is whole."""

import logging
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from clipattr.atomic import atomic_file
from clipattr.errors import CheckpointError

logger = logging.getLogger(__name__)

# Checkpoints of a run that are kept: the second is for the case that the newest gets damaged.
KEPT = 2

# What zipfile and torch.load raise for a file of which some bits are others.
DAMAGE = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to disk, then rename; superseded ones of the run go after it.

    Lightning's own writer stages in TMPDIR and moves: on another file system that is a copy over
    the last good file, and a kill in it leaves none. ModelCheckpoint removes what it wrote itself,
    but no checkpoint of a signal and none that a run was resumed from.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Replace `path` in one step."""
        path = Path(path)
        with atomic_file(path) as file:
            torch.save(checkpoint, file)
        _remove_superseded(path)


class SameStart(Callback):
    """All processes go on from the same step, or none does: each looks for checkpoints itself."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise CheckpointError where a process found another checkpoint than the first one."""
        first = trainer.strategy.broadcast(trainer.global_step)
        if trainer.global_step != first:
            raise CheckpointError(
                f"process {trainer.global_rank} goes on from step {trainer.global_step}, the first "
                f"one from step {first}: they see different checkpoints in the run's folder, which "
                "must be the same shared folder for all of them"
            )


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint in the folder whose checksums fit and that can be loaded."""
    for path in _newest_first(folder):
        try:
            _check_whole(path)
        except DAMAGE as error:
            logger.warning("skipping the damaged checkpoint %s: %s", path, error)
        else:
            return path
    return None


def _check_whole(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        damaged = archive.testzip()
        # It takes what is marked as a folder for one, and leaves that tensor's memory as it was.
        marked = [member.filename for member in archive.infolist() if member.external_attr]
    if damaged or marked:
        raise zipfile.BadZipFile(f"{damaged or marked[0]} is not what was written")
    torch.load(path, map_location="cpu", weights_only=True)


def _remove_superseded(newest: Path) -> None:
    """Keep the one just written and those before it; a later one was too damaged to resume from."""
    others = [path for path in _newest_first(newest.parent) if path != newest]
    before = [path for path in others if -1 < _step_of(path) <= _step_of(newest)]
    later = [path for path in others if _step_of(path) > _step_of(newest) > -1]
    for path in [*later, *before[KEPT - 1 :]]:
        path.unlink(missing_ok=True)


def _newest_first(folder: Path) -> list[Path]:
    """By the step in the name: times are lost in a copy, and differ between machines."""
    paths = folder.glob("*.ckpt")
    return sorted(paths, key=lambda path: (_step_of(path), path.stat().st_mtime), reverse=True)


def _step_of(path: Path) -> int:
    step = re.match(r"step=(\d+)", path.name)
    return int(step[1]) if step else -1
