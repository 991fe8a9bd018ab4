"""Checkpoints: damage is found wherever it is, superseded ones and left-overs go."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import create_autospec

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from clipattr import atomic
from clipattr.atomic import atomic_file, sweep_temporary, write_text
from clipattr.errors import CheckpointError, Stopped
from clipattr.sae.topk import TopKSae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.checkpoints import AtomicCheckpointIO, SameStart, newest_valid
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.test_training import N_STEPS, activations, settings


def save(folder: Path, *steps: int | str) -> None:
    for step in steps:
        AtomicCheckpointIO().save_checkpoint({"step": step}, folder / f"step={step}.ckpt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Temporary files


def test_writers_of_equal_names_do_not_meet(tmp_path, monkeypatch):
    """Containers on two machines: both called localhost, both process 1."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "a.txt"
    with atomic_file(path) as first, atomic_file(path) as second:
        assert len(list(tmp_path.glob(".a.txt.tmp-localhost-1-*"))) == 2
        first.write(b"first" * 1000)
        second.write(b"second")
    assert path.read_bytes() == b"first" * 1000
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("host", ["../../etc", "a/b c", "", "long" * 30])
def test_the_name_of_a_machine_is_no_path(tmp_path, monkeypatch, host):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    path = tmp_path / ("n" * 180)
    with atomic_file(path) as file:
        file.write(b"x")
        assert len(list(tmp_path.glob(".n*.tmp-*"))) == 1
    assert names(tmp_path) == [path.name]


def test_left_overs_of_killed_writers_are_swept(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    here, hour = atomic._host(), time.time() - atomic.STALE_SECONDS
    ages = {
        f".a.ckpt.tmp-{here}-{int(gone.stdout)}-0a": (time.time(), "swept"),
        f".a.ckpt.tmp-{here}-{os.getpid()}-0a": (time.time(), "kept"),
        f".b.ckpt.tmp-another{here}-{int(gone.stdout)}-0a": (time.time(), "kept"),
        f".c.ckpt.tmp-another{here}-{os.getpid()}-0a": (hour - 60, "swept"),
        ".d.ckpt.tmp-17": (hour + 60, "kept"),
        f".d.ckpt.tmp-{here}-{10**20}-0a": (hour + 60, "kept"),
        ".e.ckpt.tmp-17": (hour - 60, "swept"),
        "f.ckpt": (hour - 60, "kept"),
    }
    for name, (age, _) in ages.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (age, age))
    sweep_temporary(tmp_path)
    assert names(tmp_path) == sorted(name for name, (_, end) in ages.items() if end == "kept")
    sweep_temporary(tmp_path / "absent")


# Which are kept


def test_two_are_kept_whoever_wrote_them(tmp_path):
    write_text(tmp_path / "mine.ckpt", "of the user")
    save(tmp_path, 5, 7, 10, "10-v1", 11)
    assert names(tmp_path) == ["mine.ckpt", "step=10-v1.ckpt", "step=11.ckpt"]


def test_a_damaged_later_one_takes_no_place(tmp_path):
    """The run went on from step 10, because step 30 could not be read."""
    save(tmp_path, 5, 10)
    (tmp_path / "step=30.ckpt").write_bytes(b"half")
    save(tmp_path, 15)
    assert names(tmp_path) == ["step=10.ckpt", "step=15.ckpt"]


def test_the_newest_is_that_of_the_largest_step(tmp_path):
    """Whatever the times are: a copied folder has others."""
    save(tmp_path, 90, 100)
    os.utime(tmp_path / "step=100.ckpt", (1, 1))
    assert newest_valid(tmp_path) == tmp_path / "step=100.ckpt"


class SignalAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, *callbacks: Callback) -> None:
    rows = activations()
    data = ActivationDataModule(
        lambda _: store_of(rows, folder / "store"), batch_size=32, seed=0, n_steps=N_STEPS
    )
    sae = TopKSae(d_model=8, n_latents=24, k=3, generator=torch.Generator().manual_seed(1))
    member = SaeMember(sae, lr=1e-2, warmup=3, k_aux=4, aux_coefficient=0.1, dead_after=64)
    module = SaeModule({"": member}, n_steps=N_STEPS)
    fit(build_trainer(settings(), folder, callbacks=list(callbacks)), module, data, folder)


def test_checkpoints_of_signals_do_not_pile_up(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (3, 7, 13):
        with pytest.raises(Stopped, match=f"after step {step + 1} of {N_STEPS}"):
            train(tmp_path, SignalAt(step))
        assert f"step={step + 1}.ckpt" in names(folder)
        assert len(names(folder)) <= 2
    left = folder / f".step=14.ckpt.tmp-{atomic._host()}-999999999-0a"
    left.write_bytes(b"half")
    train(tmp_path)
    assert names(folder) == ["step=15.ckpt", "step=20.ckpt"]


# Damage


def content(step: int) -> dict[str, object]:
    return {
        "state_dict": {f"w{n}": torch.full((40,), float(step)) for n in range(4)},
        "loops": {"fit": {"batch": step, "name": "text"}},
        "step": step,
    }


def equal(found: object, wanted: object) -> bool:
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        return found.keys() == wanted.keys() and all(equal(found[k], wanted[k]) for k in wanted)
    return found == wanted


def damaged(whole: bytes, generator: torch.Generator) -> list[bytes]:
    """Cut anywhere, and with a bit or a page that is another."""
    files = [whole[:size] for size in range(0, len(whole), 37)]
    for place in torch.randint(len(whole), (400,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        zeros = bytes(min(512, len(whole) - place))
        files += [bytes(flipped), whole[:place] + zeros + whole[place + len(zeros) :]]
    return files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_damage_is_resumed_from(tmp_path):
    """A file with damage is passed over, unless the damage is between what is read."""
    io, newest = AtomicCheckpointIO(), tmp_path / "step=2.ckpt"
    io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    io.save_checkpoint(content(2), newest)
    n_skipped = 0
    for file in damaged(newest.read_bytes(), torch.Generator().manual_seed(0)):
        newest.write_bytes(file)
        found = newest_valid(tmp_path)
        assert found is not None
        assert equal(torch.load(found, weights_only=True), content(2 if found == newest else 1))
        n_skipped += found != newest
    assert n_skipped > 500


def test_processes_that_see_different_checkpoints_stop():
    trainer = create_autospec(L.Trainer, instance=True)
    trainer.global_step, trainer.global_rank = 10, 1
    trainer.strategy.broadcast = lambda _: 15
    with pytest.raises(CheckpointError, match="process 1 goes on from step 10, the first one from"):
        SameStart().on_train_start(trainer, L.LightningModule())
    trainer.global_step = 15
    SameStart().on_train_start(trainer, L.LightningModule())
