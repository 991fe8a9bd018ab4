"""The job finetune: what it saves, from where it starts, a kill, two processes, refusals."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from clipattr.clip import load_clip, text_head
from clipattr.config.schema import TRAIN_JOBS
from clipattr.jobs import finetune as job
from clipattr.main import run_script
from clipattr.probes.files import ProbeRecord, load_probe, save_probe
from clipattr.probes.linear import LinearProbe
from clipattr.training.trainer import build_trainer
from tests.tars import write_shard
from tests.test_training import KillAt, KilledError
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
N_IMAGES, CLASSES = 32, ["star", "red star"]
WEIGHTS = "open_clip_model.safetensors"
LEARN = ("visual.transformer.resblocks.1.", "visual.ln_post.", "visual.proj")


def picture_of(number: int, label: int) -> bytes:
    """Noise, in class 1 with more red and in class 0 with more blue."""
    pixels = np.random.default_rng(number).integers(0, 156, (32, 32, 3), dtype=np.uint8)
    pixels[:, :, 2 * (1 - label)] += 99
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, first: int = 0, n_images: int = N_IMAGES) -> Path:
    """A fourth of them is of class 1."""
    folder.mkdir(parents=True)
    rows = [
        {
            "__key__": f"{n:06d}",
            "png": picture_of(n, int(n % 4 == 0)),
            "cls": str(int(n % 4 == 0)).encode(),
            "json": json.dumps({"kind": CLASSES[int(n % 4 == 0)]}).encode(),
        }
        for n in range(first, first + n_images)
    ]
    write_shard(folder / "000000.tar", rows)
    return folder


class Place:
    """A model, images and runs in a folder of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.model = save_tiny_clip(folder / "tiny")
        self.shards = write_images(folder / "shards")
        self.config = folder / "finetune.yaml"
        self.config.write_text(
            f"""job: finetune
name: tuned
runs: {self.runs}
model: {{name: '{self.model}'}}
finetune: {{classes: {CLASSES}, lr: 0.001, head_lr: 0.05, warmup: 2}}
data: {{shards: {self.shards}, cache: {folder / "cache"}, batch_size: 8, workers: 0}}
trainer: {{steps: 10, accelerator: cpu, progress: false, checkpoint_every: 4}}
"""
        )

    def train(self, *options: str) -> int:
        return run_script("train.py", TRAIN_JOBS, [str(self.config), *options])

    def run(self, name: str = "tuned") -> Path:
        return self.runs / name

    def weights(self, name: str = "tuned") -> dict[str, torch.Tensor]:
        return load_file(self.run(name) / "model" / WEIGHTS) | load_file(
            self.run(name) / "probe.safetensors"
        )


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_it_learns_and_saves_what_other_jobs_load(place):
    held_out = write_images(place.folder / "held_out", first=1000)
    options = ["trainer.steps=60", "trainer.log_every=1", f"held_out={held_out}"]
    assert place.train(*options, "finetune.class_weight=balanced", "finetune.label=json:kind") == 0
    before = load_clip(place.model)
    after = load_clip(f"local-dir:{place.run() / 'model'}")
    assert after.weights_sha256 != before.weights_sha256
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name]) != name.startswith(LEARN), name
    model = {"name": "any", "weights_sha256": after.weights_sha256}
    probe, record = load_probe(place.run(), expected_model=model)
    assert record.class_names == CLASSES
    assert record.model["name"] == f"local-dir:{place.run() / 'model'}"
    assert record.label_field == "json:kind"

    n_right = 0
    for number in range(1000, 1000 + N_IMAGES):
        label = int(number % 4 == 0)
        image = after.preprocess(Image.open(io.BytesIO(picture_of(number, label))))[None]
        n_right += int(probe(normalize(after.encode_image(image), dim=-1)).argmax() == label)
    metrics = json.loads((place.run() / "metrics.json").read_text())
    assert metrics["held_out"]["accuracy"] == n_right / N_IMAGES > 0.9
    assert metrics["train"] == {"steps": 60, "n_images": N_IMAGES}
    assert record.metrics == metrics["held_out"]
    curve = (place.run() / "curves" / "metrics.csv").read_text().splitlines()
    column = curve[0].split(",").index("train/loss")
    losses = [float(line.split(",")[column]) for line in curve[1:]]
    # At zero every image has ln 2, times 2 for one of 8 and 2 / 3 for one of 24 images of 32.
    possible = [np.log(2) * (2 * n + 2 / 3 * (8 - n)) / 8 for n in range(9)]
    assert min(abs(losses[0] - value) for value in possible) < 1e-6
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])


def test_a_killed_run_ends_with_the_bits_of_a_whole_one(place, monkeypatch):
    assert place.train("name=whole") == 0

    def build_and_kill(settings, folder, *, callbacks):
        return build_trainer(settings, folder, callbacks=[*callbacks, KillAt(6)])

    with monkeypatch.context() as patched:
        patched.setattr(job, "build_trainer", build_and_kill)
        with pytest.raises(KilledError):
            place.train()
    (checkpoint,) = (place.run() / "checkpoints").glob("*.ckpt")
    assert checkpoint.name == "step=4.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    frozen = load_clip(place.model).model.state_dict()
    n_learned = sum(name.startswith(LEARN) for name in frozen)
    assert len(saved) == n_learned + 2
    assert not (place.run() / "probe.json").exists()
    assert place.train() == 0
    whole, again = place.weights("whole"), place.weights()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_it_learns_from_streamed_images_in_bf16(place):
    assert place.train("data.mode=streaming", "trainer.precision=bf16") == 0
    metrics = json.loads((place.run() / "metrics.json").read_text())
    assert metrics["train"] == {"steps": 10, "n_images": None}
    assert {value.dtype for value in place.weights().values()} == {torch.float32}


def test_the_start_of_the_line_is_the_zero_shot_model(place):
    assert place.train("finetune.init=text", "finetune.wise_ft=0") == 0
    before, after = load_clip(place.model), load_clip(f"local-dir:{place.run() / 'model'}")
    assert after.weights_sha256 == before.weights_sha256
    head = text_head(before, CLASSES)
    probe, _ = load_probe(place.run())
    torch.testing.assert_close(probe.weight.data, before.logit_scale * head.weights)


def save_start(place: Place, classes: list[str], model: str) -> Path:
    clip = load_clip(model)
    probe = LinearProbe(clip.d_embed, 2)
    torch.nn.init.normal_(probe.weight)
    description = {"name": model, "weights_sha256": clip.weights_sha256}
    save_probe(probe, place.folder / "start", ProbeRecord(classes, description, "cls", "none"))
    return place.folder / "start"


def test_the_head_starts_from_a_probe(place):
    start = save_start(place, CLASSES, place.model)
    options = ["finetune.head_lr=1e-9", "finetune.blocks=2", "finetune.weight_decay=0"]
    assert place.train(f"finetune.start={start}", *options) == 0
    expected = load_file(start / "probe.safetensors")
    for name, value in load_file(place.run() / "probe.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_a_start_that_does_not_fit(place, capsys):
    start = save_start(place, CLASSES[::-1], place.model)
    assert place.train(f"finetune.start={start}") == 2
    assert "must be the same in the same order" in capsys.readouterr().err
    start = save_start(place, CLASSES, save_tiny_clip(place.folder / "other", seed=1))
    assert place.train(f"finetune.start={start}") == 2
    assert "belongs to model" in capsys.readouterr().err
    assert not place.run().exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["finetune.blocks=3"], "has 2 blocks, allowed are 0 to 2"),
        (["finetune.blocks=-1"], "finetune.blocks=-1: must be 0 or greater"),
        (["finetune.wise_ft=1.5"], "must be between 0 and 1"),
        (["finetune.wise_ft=0.5"], "use finetune.init=text or finetune.start=FOLDER"),
        (["finetune.init=text", "finetune.start=shards"], "leave out the other"),
        (["finetune.start=nowhere"], "finetune.start='nowhere': nowhere does not exist"),
        (["model.precision=bf16"], "weights learn in fp32"),
        (["finetune.class_weight=balanced", "data.mode=streaming"], "needs data.mode=indexed"),
        (["trainer.devices=3"], "does not divide by trainer.devices=3"),
        (["finetune.label=kind"], "must be cls or json:<key>"),
        (["finetune.label=json:colour"], "its JSON has no key 'colour'"),
        (["finetune.classes=[star, nut]", "finetune.label=json:kind"], "'red star'; allowed are 0"),
        (
            ["finetune.classes=[star, red star, nut]", "finetune.class_weight=balanced"],
            "has no image of the classes nut",
        ),
    ],
)
def test_what_cannot_work(place, capsys, options, message):
    assert place.train(*options) == 2
    assert message in capsys.readouterr().err
    assert not (place.run() / "model").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(place):
    weights = {}
    for devices in (1, 2):
        name = f"on-{devices}"
        command = [sys.executable, "train.py", str(place.config), f"name={name}"]
        command += [f"trainer.devices={devices}", "finetune.class_weight=balanced"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        weights[devices] = place.weights(name)
    for name, value in weights[1].items():
        other = weights[2][name]
        if name.endswith("in_proj_bias"):
            # No softmax depends on the bias of keys: its gradient is rounding, which Adam enlarges.
            value, other = (torch.cat(torch.tensor_split(each, 3)[::2]) for each in (value, other))
        difference = (value - other).norm() / value.norm().clamp(min=1e-6)
        assert difference < 1e-5, name
