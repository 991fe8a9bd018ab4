"""Training on image shards: exact resume, broken samples over ranks, through the real job."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import load_file

from clipattr.clip.loading import build_clip
from clipattr.config.schema import TRAIN_JOBS, TrainerConfig
from clipattr.data.image_stream import ImageStream
from clipattr.data.index import ShardIndex, build_index
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError
from clipattr.main import run_script
from clipattr.training.bad_samples import BadSampleLimit
from clipattr.training.clip_module import ClipModule
from clipattr.training.images import ImageDataModule
from clipattr.training.trainer import build_trainer, fit
from tests.tars import write_shard
from tests.test_training import KillAt, KilledError
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
N_IMAGES, BATCH, N_STEPS = 22, 4, 14
BROKEN = "000007"
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def png_of(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(
    folder: Path, *, broken: str | None = None, without_caption: str | None = None
) -> Path:
    """Two shards; what a caption says is in the vocabulary of the tiny model."""
    rows = [
        {"__key__": f"{n:06d}", "png": png_of(n), "txt": b"a red star" if n % 2 else b"a star"}
        for n in range(N_IMAGES)
    ]
    for row in rows:
        if row["__key__"] == broken:
            row["png"] = b"no picture"
        if row["__key__"] == without_caption:
            del row["txt"]
    folder.mkdir(parents=True)
    write_shard(folder / "000000.tar", rows[:13])
    write_shard(folder / "000001.tar", rows[13:])
    return folder


def architecture_in(folder: Path) -> str:
    if not (folder / "tiny").exists():
        save_tiny_clip(folder / "tiny")
    return str(folder / "tiny")


class Record(Callback):
    """The first numbers of every batch that the module gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[float]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.global_step, batch[0].flatten(1)[:, :2].flatten().tolist()))


def train(
    folder: Path,
    index: ShardIndex,
    *,
    workers: int = 0,
    kill_at: int | None = None,
    max_bad_fraction: float = 0.0,
) -> tuple[Record, dict[str, torch.Tensor]]:
    """A small CLIP on the images; `folder` is its run."""
    torch.manual_seed(0)
    model, preprocess, tokenizer = build_clip(architecture_in(folder.parent))
    pixels = Pixels(preprocess)

    def caption(sample):
        return tokenizer([sample["txt"].decode()])[0]

    data = ImageDataModule(
        lambda place: ImageStream(
            index,
            pixels,
            batch_size=BATCH,
            seed=3,
            length=N_STEPS,
            workers=workers,
            fields={"caption": caption},
        ),
        pixels,
        fields=("caption",),
    )
    limit = BadSampleLimit(
        data,
        folder,
        max_bad_fraction=max_bad_fraction,
        n_images=len(index),
        batch_size=BATCH,
    )
    record = Record()
    settings = TrainerConfig(steps=N_STEPS, checkpoint_every=3, progress=False, accelerator="cpu")
    callbacks = [limit, record] + ([] if kill_at is None else [KillAt(kill_at)])
    module = ClipModule(model, lr=1e-3, weight_decay=0.1, warmup=2, n_steps=N_STEPS)
    fit(build_trainer(settings, folder, callbacks=callbacks), module, data, folder)
    return record, module.state_dict()


def test_resumed_run_sees_the_same_images_and_ends_with_the_same_bits(tmp_path):
    """With another number of workers, across the end of an epoch (5 batches)."""
    index = build_index(sorted(write_images(tmp_path / "shards").glob("*.tar")), cache=None)
    whole, weights = train(tmp_path / "whole", index)
    with pytest.raises(KilledError):
        train(tmp_path / "killed", index, kill_at=8)
    resumed, again = train(tmp_path / "killed", index, workers=2)
    assert [step for step, _ in resumed.seen] == list(range(6, N_STEPS))
    assert resumed.seen == whole.seen[6:]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_images_are_normalised_once(tmp_path):
    index = build_index(sorted(write_images(tmp_path / "shards").glob("*.tar")), cache=None)
    record, _ = train(tmp_path / "run", index)
    _, preprocess, _ = build_clip(architecture_in(tmp_path))
    known = {
        tuple(preprocess(Image.open(io.BytesIO(png_of(n)))).flatten()[:2].tolist())
        for n in range(N_IMAGES)
    }
    pairs = [
        tuple(numbers[place : place + 2])
        for _, numbers in record.seen
        for place in range(0, 2 * BATCH, 2)
    ]
    assert set(pairs) <= known
    first_epoch = Counter(pairs[: 5 * BATCH])
    assert max(first_epoch.values()) == 1


def test_a_broken_sample_stops_the_run_or_is_listed_once(tmp_path):
    folder = write_images(tmp_path / "shards", broken=BROKEN)
    index = build_index(sorted(folder.glob("*.tar")), cache=None)
    with pytest.raises(DataError, match=f"1 of 22 samples .*'{BROKEN}'.*max_bad_fraction=0.0"):
        train(tmp_path / "strict", index)
    record, _ = train(tmp_path / "lenient", index, max_bad_fraction=0.1)
    assert len(record.seen) == N_STEPS
    lines = (tmp_path / "lenient" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [BROKEN]
    reason = "png cannot be decoded: it is none of JPEG, PNG, WEBP"
    assert json.loads(lines[0])["reason"] == reason


def write_config(tmp_path: Path, shards: Path) -> Path:
    config = tmp_path / "clip.yaml"
    config.write_text(
        f"""job: train_clip
name: clip
runs: {tmp_path / "runs"}
clip: {{architecture: {architecture_in(tmp_path)}}}
data: {{shards: {shards}, cache: {tmp_path / "cache"}, batch_size: 4, workers: 1}}
trainer: {{steps: 12, accelerator: cpu, progress: false, checkpoint_every: 4}}
"""
    )
    return config


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_the_job_trains_in_both_modes(tmp_path, mode):
    config = write_config(tmp_path, write_images(tmp_path / "shards"))
    options = [str(config), f"data.mode={mode}", "data.shuffle=8", "data.workers=0"]
    assert run_script("train.py", TRAIN_JOBS, options) == 0
    run = tmp_path / "runs" / "clip"
    assert load_file(run / "model" / "open_clip_model.safetensors")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train"] == {"steps": 12, "n_images": 22 if mode == "indexed" else None}
    assert not (run / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_samples_that_lack_a_field_are_listed_with_the_others(tmp_path, mode):
    shards = write_images(tmp_path / "shards", broken=BROKEN, without_caption="000003")
    options = [str(write_config(tmp_path, shards)), f"data.mode={mode}", "data.workers=0"]
    assert run_script("train.py", TRAIN_JOBS, [*options, "data.max_bad_fraction=0.1"]) == 0
    lines = (tmp_path / "runs" / "clip" / "bad_samples.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}
    assert sorted(reasons) == ["000003", BROKEN]
    assert "txt" in reasons["000003"]


def test_broken_samples_of_both_kinds_are_limited_together(tmp_path, capsys):
    """Each alone is below the limit of 1.1 samples."""
    shards = write_images(tmp_path / "shards", broken=BROKEN, without_caption="000003")
    options = [str(write_config(tmp_path, shards)), "data.workers=0", "data.max_bad_fraction=0.05"]
    assert run_script("train.py", TRAIN_JOBS, options) == 2
    assert "2 of 22 samples cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_two_processes_count_broken_samples_together(tmp_path, fraction):
    """The rank that does not meet it stops as well, and the list names it once."""
    config = write_config(tmp_path, write_images(tmp_path / "shards", broken=BROKEN))
    command = [sys.executable, "train.py", str(config), "trainer.devices=2"]
    command.append(f"data.max_bad_fraction={fraction}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    run = tmp_path / "runs" / "clip"
    lines = (run / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [BROKEN]
    if fraction:
        assert done.returncode == 0, done.stderr[-2000:]
        assert (run / "model").exists()
    else:
        assert done.returncode != 0
        assert f"1 of 22 samples cannot be used; the first is '{BROKEN}'" in done.stderr
