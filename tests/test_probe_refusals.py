"""The job train_probe: a typo destroys nothing; what would choose or tell nothing is refused."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from clipattr.clip import Clip, Tower
from clipattr.config.schema import TRAIN_JOBS
from clipattr.jobs import probe_features
from clipattr.main import run_script
from clipattr.shortcuts.inferred import infer_cue
from tests.probe_images import Setup, Split
from tests.tars import write_shard
from tests.test_probe_job import codes_of

MADE = ("probe.json", "probe.safetensors", "path.csv", "metrics.json", "manifest.json")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("refusals"))


def train(setup: Setup, name: str, *words: str, cache: str = "cache") -> int:
    return run_script("train.py", TRAIN_JOBS, setup.words(name, *words, cache=cache))


def write_some(setup: Setup, name: str, split: Split, rows: list[int]) -> Path:
    folder = setup.folder / name
    if not folder.exists():
        folder.mkdir()
        write_shard(folder / "0.tar", [split._sample(row) for row in rows])
    return folder


def rows_of(split: Split, label: int, cue: bool | None = None) -> list[int]:
    is_it = split.labels == label
    if cue is not None:
        is_it &= split.cue == cue
    return is_it.nonzero().squeeze(1).tolist()


LBFGS = "probe.solver=lbfgs"
GROUPS = [LBFGS, "probe.groups=json:cue", "probe.C=[1]"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe.groups_latents=[999]", "sae=SAE"], "has 24 latents, 0 to 23"),
        (["probe.batch_size=1000"], "has 90 usable images; choose a smaller batch"),
        (
            ["probe.head=attention", "probe.n_heads=5"]
            + ["probe.features=[site]", "site.layer=0", "site.tokens=spatial"],
            "n_heads=5: must divide the width of the tokens, 32",
        ),
        ([LBFGS, "validation=SOME", "probe.label=json:wrong"], "has no key 'wrong'"),
        (["data.shards=ONE"], "all rows have the label 0; data.shards: nothing to learn"),
        ([LBFGS, "validation=ONE"], "all rows have the label 0; validation: nothing to choose"),
        (["validation=SINGLE"], "holds 1 usable image(s), at least 2; validation"),
        ([*GROUPS, "probe.method=balanced", "data.shards=NO_3"], "of the 4 groups: group 3 has 0"),
        ([*GROUPS, "probe.method=group_dro", "data.shards=NO_2"], "4 groups: group 2 has 0"),
        (
            [LBFGS, "probe.C=[1e9]", "probe.method=jtt", "probe.groups=json:cue", "validation=SOME"]
            + ["data.shards=EASY"],
            "the first model gets all",
        ),
    ],
)
def test_a_typo_leaves_finished_results(
    setup: Setup, words: list[str], message: str, capsys: pytest.CaptureFixture
):
    training = setup.training
    groups = [rows_of(training, *one) for one in ((0, False), (0, True), (1, False), (1, True))]
    places = {
        "SAE": setup.folder / "sae-cls",
        "SOME": setup.validation.folder,
        "ONE": write_some(setup, "one", setup.validation, rows_of(setup.validation, 0)),
        "SINGLE": write_some(setup, "single", setup.validation, [0]),
        "NO_3": write_some(setup, "no3", training, groups[0] + groups[1] + groups[2]),
        "NO_2": write_some(setup, "no2", training, groups[0] + groups[1] + groups[3]),
        "EASY": write_some(setup, "easy", training, groups[0][:2] + groups[3][:2]),
    }
    run = setup.folder / "runs" / "precious"
    if not run.exists():
        setup.run("precious")
    before = {name: (run / name).read_bytes() for name in MADE}
    named = [
        f"{key}={places.get(value, value)}" for key, value in (word.split("=", 1) for word in words)
    ]
    assert train(setup, "precious", *named) == 2
    assert message in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in MADE} == before


def test_a_training_that_diverges(setup: Setup, capsys: pytest.CaptureFixture):
    assert train(setup, "diverged", "probe.lr=1e30") == 2
    assert "the training diverged, choose a smaller probe.lr" in capsys.readouterr().err
    assert not (setup.folder / "runs" / "diverged" / "probe.json").exists()


def test_validation_must_be_other_images(setup: Setup, capsys: pytest.CaptureFixture):
    os.symlink(setup.training.folder, setup.folder / "link")
    shutil.copytree(setup.training.folder, setup.folder / "copy")
    for other in (f"{setup.training.folder}/", setup.folder / "link", setup.folder / "copy"):
        assert train(setup, "seen", LBFGS, f"validation={other}") == 2
        assert "a choice needs images that no fit has seen" in capsys.readouterr().err


def test_classes_that_validation_lacks_are_told(setup: Setup, caplog: pytest.LogCaptureFixture):
    three = setup.folder / "three"
    three.mkdir()
    samples = [setup.training._sample(row) for row in range(30)]
    for sample in samples[:10]:
        sample["cls"] = b"2"
    write_shard(three / "0.tar", samples)
    words = [LBFGS, "probe.classes=[dark, bright, odd]", f"data.shards={three}", setup.chosen_on]
    with caplog.at_level(logging.WARNING):
        assert train(setup, "lacks", *words) == 0
    assert "has no image of odd" in caplog.text


def test_a_changed_file_of_templates_is_seen(setup: Setup):
    file = setup.folder / "templates.txt"
    words = [LBFGS, setup.chosen_on, "probe.wise_ft=[0]", f"probe.templates={file}"]
    weights = []
    for line in ("a photo of a {}", "a drawing of the {}"):
        file.write_text(line + "\n")
        weights.append((setup.run("templates", *words) / "probe.safetensors").read_bytes())
    assert weights[0] != weights[1]


@pytest.mark.parametrize("words", [["probe.features=[embedding]"], ["probe.features=[site]"]])
def test_clip_runs_once_for_features_and_cue(
    setup: Setup, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    """On a fresh cache, and again for the embedding by another name: not at all."""
    seen: list[int] = []
    capture, encode = Tower.capture, Clip.encode_image

    def watch_capture(self: Tower, images: torch.Tensor, sites: list) -> dict:
        seen.append(len(images))
        return capture(self, images, sites)

    def watch_encode(self: Clip, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Tower, "capture", watch_capture)
    monkeypatch.setattr(Clip, "encode_image", watch_encode)
    latent = int(codes_of(setup, setup.training, "cls").sum(0).argmax())
    more = [LBFGS, f"probe.groups_latents=[{latent}]", f"sae={setup.folder / 'sae-cls'}"]
    site = ["site.layer=0"] if "site" in words[0] else []
    cache = f"cache-{words[0]}"
    assert train(setup, f"once-{len(site)}", *words, *more, *site, cache=cache) == 0
    assert sum(seen) == 90
    both = "probe.features=[embedding_raw, site]"
    assert train(setup, f"both-{len(site)}", LBFGS, both, "site.layer=0", cache=cache) == 0
    seen.clear()
    assert train(setup, f"name-{len(site)}", LBFGS, cache=cache) == 0
    assert sum(seen) == 0


def test_features_are_read_once(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    reads: list[int] = []
    of_shards = probe_features.FeatureReader.of_shards

    def watched(self, images, data, **more):
        reads.append(len(images.usable))
        return of_shards(self, images, data, **more)

    monkeypatch.setattr(probe_features.FeatureReader, "of_shards", watched)
    setup.run("read-once", "probe.standardise=true", setup.chosen_on)
    assert reads == [90, 60]


def test_one_threshold_for_both_sets(setup: Setup, caplog: pytest.LogCaptureFixture):
    """That of the training images, which these would not give."""
    found = codes_of(setup, setup.training, "spatial"), codes_of(setup, setup.validation, "spatial")
    latent = int(((found[0] > 0).double().mean(0) >= 0.9).nonzero()[0])
    threshold = infer_cue(found[0][:, latent]).threshold
    assert threshold > 0
    rows = found[1][:, latent].argsort()[-30:].tolist()
    activation = found[1][rows, latent]
    n_with = int((activation > threshold).sum())
    assert n_with != int(infer_cue(activation).has_cue.sum()), "the test tells nothing"
    part = write_some(setup, "part", setup.validation, rows)
    words = [LBFGS, f"probe.groups_latents=[{latent}]", f"sae={setup.folder / 'sae-spatial'}"]
    with caplog.at_level(logging.INFO):
        setup.run("threshold", *words, f"validation={part}")
    (line,) = (one for one in caplog.messages if one.startswith("validation: latents"))
    assert f"in {n_with} of 30 images" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe.classes=[a, a]"], "name each class once"),
        (['probe.classes=["1", "0"]'], "must stand at its own place"),
        (["probe.hidden=8"], "probe.hidden=8 does nothing without head=mlp"),
        (["probe.n_heads=8"], "probe.n_heads=8 does nothing without head=attention"),
        (["probe.prompts=[night, day]"], "do nothing without probe.init=text"),
        (["probe.templates=none"], "do nothing without probe.init=text"),
    ],
)
def test_settings_that_mislead(
    setup: Setup, words: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert train(setup, "misled", *words) == 2
    assert message in capsys.readouterr().err


def test_classes_may_be_called_by_their_numbers(setup: Setup):
    setup.run("numbers", LBFGS, 'probe.classes=["0", "1"]')
