"""The job on shortcuts, on a small planted world: the planted cue, its placebo, and repairs."""

import csv
import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.inputs import ReadConfig
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.data import ShardIndex, build_index, find_shards, load_features
from clipattr.data.shards import read_json, read_label
from clipattr.jobs.model import FrozenClip, SiteTokens, read_activations
from clipattr.main import run_script
from clipattr.probes import (
    LinearProbe,
    LogisticProbe,
    MlpProbe,
    ProbeRecord,
    load_probe,
    save_probe,
)
from clipattr.probes.files import load_head
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.shortcuts.repair import find_erasure
from clipattr.shortcuts.suppression_files import FEATURE, load_suppression
from clipattr.world.factors import Sticker
from clipattr.world.prompts import TASK_CLASSES
from clipattr.world.sampling import Split
from clipattr.world.shards import write_split

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "shortcuts.yaml"
SIZES = {Split.task_train: 500, Split.task_test: 400, Split.task_pairs: 30}
SCORE = "cracked rather than intact"


class World:
    """Shards, a probe that learned the shortcut, and an SAE with a latent for each sticker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for split, n_images in SIZES.items():
            write_split(folder / split.name, split, n_images, seed=0, shard_size=500)
        self.clip = load_clip("planted-world")
        self.model = {"name": "planted-world", "weights_sha256": self.clip.weights_sha256}
        self.cut = image_tower(self.clip.model).cut(Site(-1))
        samples = build_index(find_shards(str(folder / "task_train")), cache=None)
        x = self.read(samples)
        labels = torch.tensor([read_label(one, "cls", TASK_CLASSES) for one in samples])
        flags = {
            sticker.name: torch.tensor(
                [bool(read_json(one)[f"has_{sticker.name}"]) for one in samples]
            )
            for sticker in Sticker
        }
        save_sae(
            plant_sae(x, labels, flags),
            folder / "sae",
            SaeRecord(self.cut.site.to_json(), self.model, "data"),
        )
        self.save_probe("probe", x, labels)
        record = ProbeRecord(list(TASK_CLASSES), self.model, "cls", "data")
        save_probe(MlpProbe(64, 2, hidden=3), folder / "mlp", record)

    def read(self, samples: ShardIndex) -> Tensor:
        frozen = FrozenClip(self.clip, SiteTokens(self.cut, 1, None))
        settings = ReadConfig(cache=str(self.folder / "cache"), workers=0)
        return load_features(read_activations(frozen, samples, settings, progress=False)).x

    def save_probe(self, name: str, x: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            features = normalize(self.cut.suffix(x), dim=-1)
        probe = LinearProbe(features.shape[1], 2).requires_grad_(False)
        fitted = LogisticProbe(C=1.0).fit(features, labels)
        probe.weight[1].copy_(torch.as_tensor(fitted.coef_[0]))
        probe.bias[1].copy_(torch.as_tensor(fitted.intercept_[0]))
        record = ProbeRecord(list(TASK_CLASSES), self.model, "cls", "data")
        save_probe(probe, self.folder / name, record)

    def run(self, *overrides: str) -> int:
        words = {
            "name": "run",
            "runs": str(self.folder / "runs"),
            "sae": str(self.folder / "sae"),
            "atlas": "null",
            "probe": str(self.folder / "probe"),
            "data.shards": str(self.folder / "task_test"),
            "pairs.shards": str(self.folder / "task_pairs"),
            "repair.shards": str(self.folder / "task_train"),
            "data.cache": str(self.folder / "cache"),
            "data.workers": "0",
            "shortcuts.resamples": "200",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments])

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("runs", *parts)

    def metrics(self, name: str = "run") -> dict:
        return json.loads(self.path(name, "metrics.json").read_text())

    def table(self, file: str, name: str = "run") -> list[dict[str, str]]:
        return list(csv.DictReader(self.path(name, file).read_text().splitlines()))


def plant_sae(x: Tensor, labels: Tensor, flags: dict[str, Tensor]) -> TopKSae:
    """Latents 0 and 1 read a sticker each, with the least variance, and write its direction."""
    generator = torch.Generator().manual_seed(0)
    sae = TopKSae(d_model=x.shape[1], n_latents=32, k=8, generator=generator).requires_grad_(False)
    sae.initialise_from(x, from_data=True)
    for latent, has_cue in enumerate(flags.values()):
        found = find_erasure(x, labels, has_cue)
        length = found.remove.norm()
        read, along = found.read * length, (x.double() - found.mean) @ found.read * length
        low, high = along[~has_cue].mean(), along[has_cue].mean()
        sae.W_dec[latent] = (found.remove / length).float()
        sae.W_enc[latent] = read.float()
        start = low + 0.1 * (high - low)
        offset = read @ (sae.b_dec.double() - found.mean) - start
        sae.b_enc[latent] = float(offset / sae.unit)
    return sae


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    assert made.run() == 0
    return made


def test_the_planted_cue_is_amplified_and_the_control_is_not(world: World):
    cues = world.metrics()["cues"]
    assert cues["tag"]["latents"] == [0]
    assert cues["seal"]["latents"] == [1]
    for measure in ("pairs", "removal"):
        tag, seal = (cues[name]["effects"][measure][SCORE] for name in ("tag", "seal"))
        assert tag["excess"]["low"] > 0.2
        assert tag["amplification"]["low"] > 2
        assert seal["excess"]["low"] < 0.1 * tag["excess"]["low"]
        placebo = cues["tag"]["effects"]["placebo of the removal"][SCORE]
        assert placebo["is_placebo"]
        assert abs(placebo["excess"]["mean"]) < 0.1 * tag["excess"]["mean"]
    # Scene by scene: between different scenes the difference would vary by more than a deviation.
    pairs = cues["tag"]["effects"]["pairs"][SCORE]["probe"]
    assert pairs["high"] - pairs["low"] < 0.3
    shares = cues["tag"]["shares"][SCORE]
    assert shares["probe"]["low"] > 3 * shares["text"]["high"]


def test_without_a_name_the_planted_latent_comes_first(world: World):
    found = world.metrics()["amplified"]
    first = found["latents"]["0"]
    assert first["rank"] == 1
    assert first["is_significant"]
    assert first["cues"] == ["tag"]
    others = [each["excess"]["high"] for name, each in found["latents"].items() if name != "0"]
    assert first["excess"]["low"] > 3 * max(others)
    rows = world.table("amplified.csv")
    assert [row["rank"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert rows[0]["latent"] == "0"


def test_repairs_bring_the_worst_group_back(world: World):
    tag = world.metrics()["cues"]["tag"]
    before = tag["quality"]["probe"]
    good = {
        name
        for name, each in tag["repairs"].items()
        if each["restored"] >= 0.8 and each["accuracy"] >= before["accuracy"] - 0.02
    }
    assert good & {"suppress", "retrain"}
    assert good & {"project", "dfr"}
    assert tag["repairs"].keys() == {
        "suppress",
        "project",
        "retrain",
        "dfr",
        "balanced",
        "group_dro",
    }
    reached = tag["repairs"]["suppress"]
    reference = tag["quality"]["text"]["worst_group"]
    restored = (reached["worst_group"] - before["worst_group"]) / (
        reference - before["worst_group"]
    )
    assert reached["restored"] == pytest.approx(restored)
    effect = tag["effects"]["pairs"][SCORE]["probe"]["mean"]
    assert abs(reached["effect"]["mean"]) < 0.5 * effect
    assert tag["curves"]["suppress"]["0.0"]["accuracy"] == pytest.approx(before["accuracy"])
    assert tag["curves"]["suppress"]["1.0"]["worst_group"] == reached["worst_group"]


def test_repaired_probes_can_be_loaded(world: World):
    folder = world.path("run", "repaired", "tag")
    probe, record = load_probe(folder / "project", world.model)
    assert record.class_names == list(TASK_CLASSES)
    assert not torch.equal(probe.weight, load_probe(world.folder / "probe")[0].weight)
    suppression, found = load_suppression(folder / "suppress", world.model)
    assert found.site == world.cut.site.to_json()
    assert suppression.latents.tolist() == [0]
    assert found.cue == "tag"
    _, record = load_head(folder / "suppress", world.model)
    assert record.feature == FEATURE


def test_groups_are_a_plain_count(world: World):
    samples = build_index(find_shards(str(world.folder / "task_test")), cache=None)
    probe, _ = load_probe(world.folder / "probe")
    with torch.no_grad():
        logits = probe(normalize(world.cut.suffix(world.read(samples)), dim=-1))
    right: dict[tuple[str, str], list[bool]] = {}
    for number, row in enumerate(logits):
        sample = samples[number]
        label = read_label(sample, "cls", TASK_CLASSES)
        state = str(bool(read_json(sample)["has_tag"]))
        right.setdefault((TASK_CLASSES[label], state), []).append(int(row.argmax()) == label)
    assert world.metrics()["cues"]["tag"]["source"] == "metadata"
    rows = [row for row in world.table("groups.csv") if row["cue"] == "tag"]
    found = {(row["label"], row["has_cue"]): row for row in rows if row["head"] == "probe"}
    assert found.keys() == right.keys()
    for group, hits in right.items():
        assert int(found[group]["images"]) == len(hits)
        assert float(found[group]["accuracy_mean"]) == pytest.approx(sum(hits) / len(hits))
    worst = min(sum(hits) / len(hits) for hits in right.values())
    assert world.metrics()["cues"]["tag"]["quality"]["probe"]["worst_group"] == pytest.approx(worst)


def test_the_page_shows_the_pairs_and_the_groups(world: World):
    page = world.path("run", "report", "index.html").read_text()
    assert "The probe leans on" in page
    assert "task_pairs-0000000-none" in page
    # Six pairs of two, and six examples of each of four groups, of two cues; ten of each latent.
    assert page.count("data:image/png") > 2 * (6 * 2 + 4 * 6)


def test_a_finished_run_is_not_done_again(world: World):
    before = world.path("run", "metrics.json").stat().st_mtime_ns
    assert world.run() == 0
    assert world.path("run", "metrics.json").stat().st_mtime_ns == before


def test_without_an_sae_pairs_prompts_groups_and_some_repairs_are_left(world: World):
    cue = "{name: tag, field: 'json:stickers=tag', prompt: a shape with a tag, pair: tag}"
    ink = "{name: ink, overlay: ink}"
    options = ("pairs.images=20", "repair.methods=[suppress, retrain, project]")
    assert world.run("name=none", "sae=null", f"cues=[{cue}, {ink}]", *options) == 0
    found, whole = world.metrics("none")["cues"], world.metrics()["cues"]
    assert "amplified" not in world.metrics("none")
    pairs, same = (
        each["tag"]["effects"]["pairs"][SCORE]["probe"]["mean"] for each in (found, whole)
    )
    assert pairs == pytest.approx(same, rel=1e-4)
    assert found["tag"]["effects"].keys() == {"pairs", "direction"}
    assert found["tag"]["repairs"].keys() == {"project"}
    assert found["ink"]["effects"].keys() == {"pairs", "placebo of the pairs"}
    assert found["ink"]["effects"]["pairs"][SCORE]["n"] == 20
    assert found["ink"]["source"] == "pairs"
    assert found["ink"]["repairs"].keys() == {"project"}
    sides = [
        each["images"] for states in found["ink"]["groups"].values() for each in states.values()
    ]
    assert sum(sides) == 2 * 20


def test_what_is_given_as_latents_alone_has_inferred_groups(world: World):
    options = ("name=latents", "cues=[{name: suspect, latents: [0]}]", "repair.methods=[suppress]")
    samples = build_index(find_shards(str(world.folder / "task_test")), cache=None)
    labels = torch.tensor([read_label(one, "cls", TASK_CLASSES) for one in samples])
    world.save_probe("reference", world.read(samples), labels)
    reference = f"repair.reference={world.folder / 'reference'}"
    assert world.run(*options, reference, "shortcuts.automatic=false") == 0
    found = world.metrics("latents")["cues"]["suspect"]
    assert any("inferred from its latents" in warning for warning in found["warnings"])
    assert found["source"] == "latents"
    assert found["repairs"]["suppress"]["restored"] > 0.6
    assert found["repairs"]["suppress"]["restored"] != pytest.approx(
        (found["repairs"]["suppress"]["worst_group"] - found["quality"]["probe"]["worst_group"])
        / (found["quality"]["text"]["worst_group"] - found["quality"]["probe"]["worst_group"])
    )
    # At its mean, a latent cannot be taken out any more: there is nothing to measure.
    assert found["repairs"]["suppress"]["effect"]["mean"] is None
    assert "amplified" not in world.metrics("latents")


def test_a_scene_that_lacks_a_state_is_left_out_and_counted(world: World):
    folder = world.folder / "fewer"
    folder.mkdir()
    with (
        tarfile.open(world.folder / "task_pairs" / "000000.tar") as old,
        tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old:
            if not member.name.startswith("task_pairs-0000003-tag."):
                new.addfile(member, old.extractfile(member))
    assert world.run("name=fewer", f"pairs.shards={folder}", "sae=null", "repair.shards=null") == 0
    found, whole = world.metrics("fewer")["cues"], world.metrics()["cues"]
    n_pairs = {name: found[name]["effects"]["pairs"][SCORE]["n"] for name in ("tag", "seal")}
    assert n_pairs == {"tag": 29, "seal": 30}
    assert found["tag"]["warnings"] == ["1 of 30 scenes lack a picture and are left out"]
    seal, same = (
        each["seal"]["effects"]["pairs"][SCORE]["probe"]["mean"] for each in (found, whole)
    )
    assert seal == pytest.approx(same, rel=1e-4)


def test_a_copy_of_a_pair_is_not_learned_from(world: World, capsys: pytest.CaptureFixture[str]):
    shards = world.folder / "task_pairs"
    pairs = "cues=[{name: tag, pair: tag}]"
    assert world.run("name=wrong", pairs, f"repair.shards={shards}") == 2
    error = capsys.readouterr().err
    assert f"pairs.shards={shards}: both have" in error
    copied = world.folder / "copied-pairs"
    copied.mkdir()
    (copied / "other.tar").write_bytes(next(shards.glob("*.tar")).read_bytes())
    assert world.run("name=wrong", pairs, f"repair.shards={copied}") == 2
    assert "the image task_pairs-0000000-none is in both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cues=[{name: a/b, prompt: x}]"], "without slashes"),
        (["cues=[{name: x}]"], "says nowhere how the cue is known"),
        (["cues=[{name: x, pair: tag, overlay: ink}]"], "overlay and pairs"),
        (["cues=[{name: x, prompt: a}, {name: x, prompt: b}]"], "stands there twice"),
        (["cues=[]", "sae=null"], "nothing to look for"),
        (["cues=[{name: x, latents: [32]}]"], "those of .* are 0 to 31"),
        (["cues=[{name: x, latents: [1, 1]}]"], "each at most once"),
        (["cues=[{name: x, pair: stamp}]"], "'x': 0 pairs in pairs.shards"),
        (["cues=[{name: x, field: 'json:nothing'}]"], "has no field 'nothing'"),
        (["cues=[{name: x, region: mask.png}]"], "has the field 'mask.png'; there are"),
        (["prompts=[a shape]"], "name one prompt for each"),
        (["pairs.state=json:nothing"], "has no key 'nothing', as pairs.scene"),
        (["pairs.shards=null"], "pairs.shards=null; say where"),
        (["shortcuts.cue_auroc=0.5"], "which is chance"),
        (["shortcuts.shuffled=19"], "shuffled=19: must be at least 20"),
        (["probe=FOLDER/mlp"], "is a MlpProbe of embedding"),
        (["repair.reference=FOLDER/mlp"], "is a MlpProbe of embedding"),
    ],
)
def test_mistakes_are_named(
    world: World, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    filled = [one.replace("FOLDER", str(world.folder)) for one in overrides]
    assert world.run("name=wrong", *filled) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not world.path("wrong").exists()


def test_what_is_learned_from_is_not_evaluated(world: World, capsys: pytest.CaptureFixture[str]):
    shards = world.folder / "task_test"
    assert world.run("name=wrong", f"repair.shards={shards}") == 2
    assert "both have" in capsys.readouterr().err
    copied = world.folder / "copied"
    copied.mkdir()
    (copied / "other.tar").write_bytes(next(shards.glob("*.tar")).read_bytes())
    assert world.run("name=wrong", f"repair.shards={copied}") == 2
    assert "the image task_test-0000000 is in both" in capsys.readouterr().err
