"""A run of the SAE that notes which rows each process really got, to be killed and resumed.

The rows are those of the store beside the run's folder; rows-<process>-<rank>.jsonl in the folder
gets a line per step.
"""

import json
import multiprocessing
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clipattr.config.schema import TrainerConfig
from clipattr.data.store import ActivationStore
from clipattr.sae.topk import TopKSae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.checkpoints import AtomicCheckpointIO, newest_valid
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit

N_ROWS, WIDTH, BATCH = 301, 8, 32


def rows_of_the_store() -> Tensor:
    return torch.randn(N_ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 3 + 10


class Observer(Callback):
    """Looks up every row that the module is given; a line is on its way before the step."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.folder = folder
        self.pause = pause
        self.number_of = {row.numpy().tobytes(): n for n, row in enumerate(rows_of_the_store())}
        self.file: TextIO | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(batch, tuple | list)
        numbers = [self.number_of[row.numpy().tobytes()] for row in batch[0]]
        if self.file is None:
            name = f"rows-{os.getpid()}-{trainer.global_rank}.jsonl"
            self.file = (self.folder / name).open("x")
        self.file.write(json.dumps([trainer.global_step, numbers]) + "\n")
        self.file.flush()
        time.sleep(self.pause)


def train(
    folder: Path,
    rank: int,
    world_size: int,
    port: int,
    *,
    pause: float = 0.0,
    checkpoint_every: int = 5,
    n_steps: int = 40,
    temporary: Path | None = None,
    shard_latents: bool = False,
    dead: tuple[int, ...] = (),
) -> None:
    """One process of the run, told by the environment which one it is, as by torchrun.

    Latents in `dead` are too weak to fire.
    """
    if world_size > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "observed",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
    stage_in(temporary)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = ActivationDataModule(
        lambda _: ActivationStore.open(folder.parent / "store"),
        batch_size=BATCH,
        seed=0,
        n_steps=n_steps,
    )
    sae = TopKSae(d_model=WIDTH, n_latents=24, k=3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_enc[list(dead)] *= 0.01
    member = SaeMember(sae, lr=1e-3, warmup=3, k_aux=4, aux_coefficient=0.1, dead_after=64)
    module = SaeModule({"": member}, n_steps=n_steps)
    settings = TrainerConfig(
        accelerator="cpu",
        progress=False,
        steps=n_steps,
        devices=world_size,
        checkpoint_every=checkpoint_every,
    )
    observer = Observer(folder, pause)
    trainer = build_trainer(settings, folder, callbacks=[observer], shard_latents=shard_latents)
    fit(trainer, module, data, folder)
    module.gather()
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")


def save_for_ever(
    folder: Path, rank: int, world_size: int, port: int, *, temporary: Path | None = None
) -> None:
    """Checkpoints of 8 MB, one step after the other; `saved` gets a byte for each one."""
    stage_in(temporary)
    last = newest_valid(folder)
    step = int(last.stem.removeprefix("step=")) if last else 0
    with (folder / "saved").open("ab", buffering=0) as saved:
        while True:
            step += 1
            content = {"step": step, "x": torch.full((2_000_000,), float(step))}
            AtomicCheckpointIO().save_checkpoint(content, folder / f"step={step}.ckpt")
            saved.write(b".")


def stage_in(temporary: Path | None) -> None:
    """As if the process had been started with this TMPDIR."""
    if temporary is not None:
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None


class Processes:
    """The processes of one start of a run, which come from a server that has imported all."""

    def __init__(
        self, folder: Path, world_size: int, run: Callable[..., None] = train, **options: object
    ) -> None:
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=run, args=(folder, rank, world_size, port), kwargs=options)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def are_running(self) -> bool:
        """Whether any of them is."""
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL."""
        for process in self.processes:
            process.kill()

    def exit_codes(self, seconds: float = 120) -> list[int | None]:
        """When all of them have ended."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        self.kill()  # one that hangs has no exit code
        return codes
