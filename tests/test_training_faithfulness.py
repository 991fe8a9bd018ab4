"""Faithfulness while an SAE trains: the right numbers, and a training that does not notice."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.callbacks import HeldOut, TrainingFaithfulness, measure_faithfulness
from clipattr.clip import load_clip
from clipattr.config.choices import Method
from clipattr.config.load import load_config
from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS
from clipattr.errors import ConfigError
from clipattr.main import run_script
from clipattr.sae import BatchTopKSae, TopKSae
from clipattr.training import fit_sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.test_demo import ROOT, Demo
from tests.test_faithfulness import LAST, N_IMAGES, TOKENS, Case, build, measure
from tests.test_training import N_STEPS, KillAt, KilledError, settings
from tests.tiny import save_tiny_clip

EVERY, CURVE = 8, 5
NUMBERS = ("deletion_auc", "insertion_auc", "spearman_exact")
METHODS = (Method.attribution_patching, Method.logit_lens)
CLASSES = ["star", "moon", "red fish", "boat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


def held_out_of(case: Case, batch: int = 4) -> HeldOut:
    parts = torch.arange(N_IMAGES).split(batch)
    batches = [(case.state.x[one], one, case.state.rest.rows(one)) for one in parts]
    return HeldOut(case.spliced.cut, batches, case.weights, case.targets, case.bias)


@pytest.mark.parametrize("site", [LAST, TOKENS])
def test_the_numbers_are_those_of_the_table(clip, tmp_path: Path, site):
    case = build(clip, site)
    found = measure_faithfulness(case.spliced.sae, held_out_of(case), n_steps=CURVE)
    table = measure(case, tmp_path, batch=9)
    for method in METHODS:
        for name in NUMBERS:
            expected = getattr(table.results[method], name).mean
            assert found[f"{method.name}/{name}"] == pytest.approx(expected, rel=1e-5)
    rows = case.state.x.reshape(-1, case.state.x.shape[-1]).double()
    error = (rows - case.spliced.sae(rows.float()).recon).square().sum()
    assert found["fvu"] == pytest.approx(float(error / (rows - rows.mean(0)).square().sum()))
    assert len(found) == 1 + len(METHODS) * len(NUMBERS)


@pytest.mark.parametrize("value", [float("nan"), 1e30, -1e9])
def test_an_sae_that_is_broken_has_numbers(clip, value: float):
    """nan, overflowing, and with nothing that fires: a training must not die of a measurement."""
    case = build(clip, LAST, "relu")
    with torch.no_grad():
        case.spliced.sae.b_enc.fill_(value)
    found = measure_faithfulness(case.spliced.sae, held_out_of(case), n_steps=CURVE)
    assert math.isnan(found["fvu"]) == math.isnan(value)
    if value == -1e9:
        assert found["attribution_patching/deletion_auc"] == pytest.approx(1)
        assert math.isnan(found["attribution_patching/spearman_exact"])


def members() -> dict[str, SaeMember]:
    how = {"lr": 1e-2, "warmup": 3, "k_aux": 4, "aux_coefficient": 0.1, "dead_after": 64}
    options = {"d_model": 32, "n_latents": 24, "k": 3}
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    return {
        "mean": SaeMember(TopKSae(**options, generator=generators[0]), ema=0.9, **how),
        "falls": SaeMember(
            TopKSae(**options, generator=generators[1]), k_start=6, k_steps=20, **how
        ),
        "batch": SaeMember(BatchTopKSae(**options, generator=generators[2]), **how),
    }


class RandomState(TrainingFaithfulness):
    """Notes whether a measurement moved the random state, or opened more than once."""

    has_moved = False

    def on_train_batch_end(self, *arguments, **keywords) -> None:
        before = torch.random.get_rng_state()
        super().on_train_batch_end(*arguments, **keywords)
        self.has_moved |= not torch.equal(before, torch.random.get_rng_state())


def train(folder: Path, held_out: HeldOut | None, kill_at: int | None = None) -> SaeModule:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 1
    data = ActivationDataModule(
        lambda _: store_of(x, folder / "store"), batch_size=32, seed=0, n_steps=N_STEPS
    )
    module = SaeModule(members(), n_steps=N_STEPS)
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    if held_out is not None:

        def opened(trainer) -> HeldOut:
            torch.rand(3)  # as a loader does
            return held_out

        callbacks.append(RandomState(opened, every=EVERY, n_steps=CURVE))
    torch.manual_seed(3)
    fit(build_trainer(settings(), folder, callbacks=callbacks), module, data, folder)
    if held_out is not None:
        assert not callbacks[-1].has_moved
    module.random = torch.rand(1)
    return module


def curves(folder: Path) -> Iterator[dict[str, float]]:
    """The measurements, in the order of the starts and steps."""
    for path in sorted(folder.glob("curves*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                found = {
                    name: float(value) for name, value in row.items() if "val/" in name and value
                }
                if found:
                    yield {"step": float(row["step"]), **found}


def states(module: SaeModule) -> dict[str, Tensor]:
    return {**module.state_dict(), "random": module.random}


def test_training_does_not_notice_and_resumes(clip, tmp_path: Path):
    held_out = held_out_of(build(clip, LAST))
    module = train(tmp_path / "with", held_out)
    without = states(train(tmp_path / "without", None))
    for name, value in states(module).items():
        assert torch.equal(value, without[name]), name
    assert module.training
    assert all(one.sae.training for one in module.by_name.values())
    found = list(curves(tmp_path / "with"))
    assert [row.pop("step") for row in found] == [EVERY - 1, 2 * EVERY - 1, 3 * EVERY - 1]
    assert found[0] != found[1]
    # The last of them is that of what is saved: of the mean, of k at its end, of the threshold.
    for name, member in module.by_name.items():
        last = measure_faithfulness(member.finish(), held_out, n_steps=CURVE)
        for key, value in last.items():
            assert found[2][f"{name}/val/{key}"] == pytest.approx(value, rel=1e-12)
    assert len(found[2]) == 3 * len(last)
    # A kill between two checkpoints; the second start has the measurements behind its own.
    with pytest.raises(KilledError):
        train(tmp_path / "killed", held_out, kill_at=19)
    again = train(tmp_path / "killed", held_out)
    for name, value in again.state_dict().items():
        assert torch.equal(value, without[name]), name
    resumed = [row for row in curves(tmp_path / "killed") if row.pop("step") == 3 * EVERY - 1]
    assert resumed == found[2:]


def test_fit_sae_can_be_watched(clip):
    held_out = held_out_of(build(clip, LAST))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 1
    options = {"k": 3, "n_latents": 24, "batch_size": 32, "steps": 20, "ema": 0.9}
    seen: dict[int, dict[str, float]] = {}

    def look(step: int, sae) -> None:
        seen[step] = measure_faithfulness(sae, held_out)

    watched = fit_sae(x, **options, watch=look, watch_every=5)
    for name, value in fit_sae(x, **options).state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert list(seen) == [5, 10, 15, 20]
    assert seen[20] == measure_faithfulness(watched, held_out) != seen[15]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["faithfulness.every=40"], "faithfulness.every=40 with trainer.steps=30"),
        (["faithfulness.every=0"], "faithfulness.every=0: must be greater"),
        (["faithfulness.images=0"], "faithfulness.images=0: must be greater"),
        (["faithfulness.classes=[]"], "faithfulness.classes=[]: name at least two"),
        (["trainer.shard_latents=true", "trainer.devices=2"], "no process has the whole"),
        (
            ["sae.architecture=transcoder", "target.stream=mlp", "site.stream=residual_middle"],
            "does not reconstruct the site",
        ),
    ],
)
def test_what_cannot_work_is_said(overrides: list[str], words: str):
    given = ["faithfulness.classes=[a,b]", "faithfulness.every=10", "trainer.steps=30"]
    names = {one.split("=")[0] for one in overrides}
    arguments = [*(one for one in given if one.split("=")[0] not in names), *overrides]
    with pytest.raises(ConfigError) as caught:
        load_config([str(ROOT / "configs" / "demo" / "sae.yaml"), *arguments], TRAIN_JOBS)
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    made = Demo(tmp_path_factory.mktemp("demo"))
    assert made.run("world") == 0
    return made


OPTIONS = (
    f"faithfulness.classes={json.dumps(CLASSES)}",
    "faithfulness.every=10",
    "faithfulness.images=25",
    "faithfulness.steps=4",
)


def evaluate(demo: Demo, name: str) -> dict[str, dict[str, dict[str, float]]]:
    """The table of evaluate_attribution for the saved SAE, on the same held-out images."""
    arguments = {
        "name": f"demo/table-{name}",
        "runs": demo.runs,
        "sae": demo.runs / "demo" / name,
        "model.name": demo.model,
        "data.shards": demo.runs / "world" / "val",
        "data.cache": demo.runs / "cache",
        "data.workers": 0,
        "zeroshot.classes": json.dumps(CLASSES),
        "zeroshot.templates": "simple",
        "evaluation.images": 25,
        "evaluation.steps": 4,
        "evaluation.methods": "[attribution_patching,logit_lens]",
        "evaluation.resamples": 2,
        "evaluation.overlap_top": 2,
        "evaluation.control": "false",
        "trainer.accelerator": "cpu",
        "trainer.progress": "false",
    }
    words = [f"{key}={value}" for key, value in arguments.items()]
    config = str(ROOT / "configs" / "evaluate" / "attribution.yaml")
    assert run_script("evaluate.py", EVALUATE_JOBS, [config, *words]) == 0
    return demo.read(f"table-{name}", "metrics.json")["faithfulness"]


def check_last(demo: Demo, name: str) -> None:
    rows = list(curves(demo.runs / "demo" / name))
    assert [row["step"] for row in rows] == [9, 19, 29]
    for method, numbers in evaluate(demo, name).items():
        for number in NUMBERS:
            value = numbers[number]["mean"]
            value = math.nan if value is None else value
            expected = pytest.approx(value, rel=1e-5, nan_ok=True)
            assert rows[-1][f"val/{method}/{number}"] == expected


def test_the_job_inside_the_tower_ends_with_the_table_of_the_saved_sae(demo: Demo):
    """Trained on three drawn tokens of an image, measured on whole images."""
    site = ("site.layer=0", "site.tokens=all", "site.tokens_per_image=3")
    assert demo.run("sae", "name=demo/inside", *site, *OPTIONS) == 0
    check_last(demo, "inside")


def test_two_processes_share_the_images_of_a_measurement(demo: Demo):
    arguments = demo.arguments("sae", "name=demo/two", "trainer.devices=2", *OPTIONS)
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    check_last(demo, "two")
    fvu = demo.read("two", "metrics.json")["sae"]["fvu"]
    last = list(curves(demo.runs / "demo" / "two"))[-1]["val/fvu"]
    assert last == pytest.approx(fvu, rel=0.5)
