"""A cue that is only shown in pairs: groups, repairs and what they learn from, by plain loops."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.shortcuts_result import measure_effect, measure_effects
from clipattr.clip import image_tower
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.errors import DataError
from clipattr.jobs import shortcuts_learned
from clipattr.main import run_script
from clipattr.metrics.intervals import resampled_means
from clipattr.probes.files import load_probe
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.shortcuts.overlay import Kind, Overlay
from clipattr.shortcuts.pairs import paste_pairs, region_pairs
from clipattr.shortcuts.repair import find_erasure, fold_erasure
from clipattr.shortcuts.suppression_files import load_suppression
from tests.tars import write_shard
from tests.test_attribution_job import SITES
from tests.test_evaluate_sae import N_IMAGES, NAMES, noise
from tests.test_shortcuts_controls_job import without
from tests.test_shortcuts_job_parts import CONFIG, KEYS, ShortcutsJob, as_png, region_of

N_LEARNED, N_PAIRS, LATENTS = 63, 21, [3, 7]
LEARNED = [f"{number:03d}" for number in range(100, 100 + N_LEARNED)]
CUES = [
    {"name": "mark", "overlay": "sticker", "latents": LATENTS},
    {"name": "spot", "region": "mask.png"},
    {"name": "twin", "pair": "twin", "prompt": "a red fish"},
]


def write_twins(folder: Path, label: str, label_of_twin: int = 0) -> Path:
    """Scenes in two states; `label_of_twin` more is the class of the second picture."""
    samples = [
        {
            "__key__": f"{scene:02d}-{state}",
            "png": noise(200 + 2 * scene + number),
            label: str((scene + number * label_of_twin) % 7).encode(),
            "json": json.dumps({"pair": scene, "variant": state}).encode(),
        }
        for scene in range(14)
        for number, state in enumerate(("none", "twin"))
    ]
    folder.mkdir()
    write_shard(folder / "000.tar", samples)
    return folder


class MadeJob(ShortcutsJob):
    """Beside the evaluated images, others to learn from, and pairs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.learned = folder / "learned"
        self.learned.mkdir()
        samples = [
            {
                "__key__": key,
                "png": noise(int(key)),
                "mask.png": as_png((region_of(int(key) - 100) * 255).astype(np.uint8)),
                "cls": str(number % 7).encode(),
            }
            for number, key in enumerate(LEARNED)
        ]
        write_shard(self.learned / "000.tar", samples)
        self.twins = write_twins(folder / "twins", "cls")
        self.saw: list[int] = []

    def start(self, *overrides: str) -> int:
        words = self.places("all") | {
            "prompts": json.dumps(NAMES),
            "probe": str(self.folder / "probe"),
            "cues": json.dumps(CUES),
            "pairs.shards": str(self.twins),
            "pairs.images": str(N_PAIRS),
            "repair.shards": str(self.learned),
            "repair.Cs": "[1.0]",
            "atlas": "null",
            "shortcuts.resamples": "20",
            "shortcuts.automatic": "false",
        }
        del words["zeroshot.classes"]
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments])

    def unit(self, pixels: Tensor) -> Tensor:
        return normalize(self.encode(pixels).float(), dim=1)

    def learned_bytes(self) -> Tensor:
        return torch.stack([self.pixels.read(noise(int(key))) for key in LEARNED])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MadeJob:
    made = MadeJob(tmp_path_factory.mktemp("made"))
    encode = shortcuts_learned.encode

    def watch(config, audited, reader, images):
        made.saw.append(len(images))
        return encode(config, audited, reader, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortcuts_learned, "encode", watch)
        assert made.start() == 0
    return made


def spread(n: int) -> list[int]:
    return [place * n // N_PAIRS for place in range(N_PAIRS)]


def marked(images: Tensor, keys: list[str]):
    return paste_pairs(images, keys, Overlay(Kind.sticker), seed=0)


def cut(images: Tensor, keys: list[str], numbers: list[int]):
    """Rows that have a region and room for a placebo, and their pairs."""
    kept = [row for row, number in enumerate(numbers) if number not in (4, 5)]
    regions = torch.from_numpy(np.stack([region_of(numbers[row]) for row in kept]))
    return kept, region_pairs(images[kept], [keys[row] for row in kept], regions, seed=0)


def evaluated(job: MadeJob, cue: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, labels and flags of both sides of the pairs."""
    if cue == "twin":
        pictures = [noise(200 + 2 * scene + side) for side in (0, 1) for scene in range(14)]
        rows, sides = list(range(14)), torch.stack([job.pixels.read(one) for one in pictures])
    else:
        rows = spread(N_IMAGES)
        images, keys = job.bytes[rows], [KEYS[row] for row in rows]
        if cue == "mark":
            pairs = marked(images, keys)
        else:
            kept, pairs = cut(images, keys, rows)
            rows = [rows[row] for row in kept]
        sides = torch.cat([pairs.without, pairs.with_cue])
    labels = torch.tensor(rows).repeat(2) % 7
    return job.unit(sides), labels, torch.arange(len(sides)) >= len(rows)


@pytest.mark.parametrize("cue", ["mark", "spot", "twin"])
def test_groups_are_both_sides_of_the_pairs(job: MadeJob, cue: str):
    found = job.metrics("all")["cues"][cue]
    assert found["source"] == "pairs"
    unit, labels, has_cue = evaluated(job, cue)
    for head, weights, bias in (
        ("text", job.prompts(), torch.zeros(7)),
        ("probe", job.probe.weight, job.probe.bias),
    ):
        right = (unit @ weights.T + bias).argmax(dim=1) == labels
        rates = []
        for label, name in enumerate(NAMES):
            for state, side in (("without", False), ("with", True)):
                group = found["groups"][name][state]
                hits = right[(labels == label) & (has_cue == side)].double()
                assert group["images"] == len(hits)
                assert group["accuracy"][head]["mean"] == pytest.approx(float(hits.mean()))
                rates.append(float(hits.mean()))
        quality = found["quality"][head]
        assert quality["worst_group"] == pytest.approx(min(rates))
        assert quality["accuracy"] == pytest.approx(float(right.double().mean()))
        of_all = (job.unit(job.bytes) @ weights.T + bias).argmax(dim=1) == torch.arange(30) % 7
        assert quality["accuracy_of_all"] == pytest.approx(float(of_all.double().mean()))


def learning(job: MadeJob, cue: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of which the cue is known, labels and flags."""
    rows, images = spread(N_LEARNED), job.learned_bytes()
    keys = [LEARNED[row] for row in rows]
    if cue == "mark":
        pasted = marked(images[rows], keys).with_cue
        labels = torch.tensor([*range(N_LEARNED), *rows]) % 7
        has_cue = torch.arange(len(labels)) >= N_LEARNED
        return job.unit(torch.cat([images, pasted])), labels, has_cue
    kept, pairs = cut(images[rows], keys, rows)
    labels = torch.tensor([rows[row] for row in kept]).repeat(2) % 7
    has_cue = torch.arange(len(labels)) >= len(kept)
    return job.unit(torch.cat([pairs.without, pairs.with_cue])), labels, has_cue


@pytest.mark.parametrize("cue", ["mark", "spot"])
def test_repairs_are_learned_from_other_images_made_in_the_same_way(job: MadeJob, cue: str):
    """The saved projection is that of rows made by hand, and so is all that is said of it."""
    erasure = find_erasure(*learning(job, cue))
    wanted = fold_erasure(job.probe.weight, job.probe.bias, erasure)
    folder = job.folder / "runs" / "all" / "repaired" / cue / "project"
    probe, record = load_probe(folder)
    torch.testing.assert_close(probe.weight.double(), wanted.weights, rtol=1e-3, atol=1e-3)
    found = job.metrics("all")["cues"][cue]["repairs"]["project"]
    unit, labels, has_cue = evaluated(job, cue)
    weights, bias = (each.detach().double() for each in (probe.weight, probe.bias))
    logits = unit.double() @ weights.T + bias
    right = (logits.argmax(dim=1) == labels).double()
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    of_all = job.unit(job.bytes).double() @ weights.T + bias
    accuracy = float((of_all.argmax(dim=1) == torch.arange(N_IMAGES) % 7).double().mean())
    assert found["accuracy_of_all"] == pytest.approx(accuracy)
    assert record.metrics["accuracy"] == pytest.approx(accuracy)
    moved = contrast_logits(logits[has_cue] - logits[~has_cue]).mean(dim=0)
    moved /= contrast_logits(of_all).std(dim=0, correction=0)
    before = job.metrics("all")["cues"][cue]["effects"]["pairs"]
    headline = max(before, key=lambda name: before[name]["excess"]["mean"])
    score = list(before).index(headline)
    assert found["effect"]["mean"] == pytest.approx(float(moved[score]), rel=1e-2, abs=1e-4)


def test_each_learning_image_is_pasted_and_encoded_once(job: MadeJob):
    n_cut = len(cut(job.learned_bytes()[spread(N_LEARNED)], LEARNED, spread(N_LEARNED))[0])
    assert job.saw == [N_PAIRS, n_cut]


def test_methods_that_need_flags_have_them(job: MadeJob):
    cues = job.metrics("all")["cues"]
    assert cues["mark"]["repairs"].keys() == {
        *("suppress", "project", "retrain", "dfr", "balanced", "group_dro")
    }
    assert "project" in cues["spot"]["repairs"]
    # Its pairs are measured: a prompt is all that is left to learn from.
    assert cues["twin"]["repairs"].keys() == {"project"}
    assert any("pairs.shards are measured" in warning for warning in cues["twin"]["warnings"])


def test_latents_go_to_their_mean_over_all_that_is_learned_from(job: MadeJob):
    folder = job.folder / "runs" / "all" / "repaired" / "mark" / "suppress"
    suppression, record = load_suppression(folder, job.identity)
    assert record.site == SITES["all"].to_json()
    rows, images = spread(N_LEARNED), job.learned_bytes()
    pasted = marked(images[rows], [LEARNED[row] for row in rows]).with_cue
    with torch.no_grad():
        pixels = job.pixels.normalise(torch.cat([images, pasted]))
        x, _ = image_tower(job.clip.model).cut(SITES["all"]).prefix(pixels)
        dense = job.saes["all"].encode(x).to_dense()[..., LATENTS]
    wanted = dense.double().flatten(0, -2).mean(dim=0)
    assert suppression.means.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


def test_the_page_says_what_groups_are_and_shows_the_pairs(job: MadeJob):
    page = (job.folder / "runs" / "all" / "report" / "index.html").read_text()
    assert page.count("Groups from pairs") == 3
    n_stars = sum(row % 7 == 0 for row in spread(N_IMAGES))
    for state in ("without", "with"):
        assert f'alt="star {state} the cue mark, {n_stars} of {n_stars}"' in page
    first = [row for row in spread(N_IMAGES) if row % 7 == 0][1]
    pairs = marked(job.bytes[[first]], [KEYS[first]])
    for state, picture in (("without", pairs.without), ("with", pairs.with_cue)):
        shown = re.search(rf'base64,([^"]+)" alt="star {state} the cue mark, 2 of', page)
        assert shown is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[1]))))
        assert np.array_equal(pixels, picture[0].permute(1, 2, 0).numpy())
    assert "Accuracy <span>all images</span>" in page


def test_pairs_without_a_label_have_no_groups(job: MadeJob):
    twins = write_twins(job.folder / "bare", "txt")
    options = (f"pairs.shards={twins}", f"cues={json.dumps([CUES[2]])}", "name=bare")
    assert job.start(*options) == 0
    found = job.metrics("bare")["cues"]["twin"]
    assert found["source"] == ""
    assert found["groups"] == {}
    assert "pairs.shards have no cls: no groups are read off the pairs" in found["warnings"]


def test_a_pair_of_two_labels_is_an_error(job: MadeJob, capsys: pytest.CaptureFixture[str]):
    twins = write_twins(job.folder / "mixed", "cls", label_of_twin=1)
    assert job.start(f"pairs.shards={twins}", "name=mixed") == 2
    error = capsys.readouterr().err
    assert "00-none is 'star' and 00-twin, the same scene with the cue, is 'moon'" in error


def test_masks_may_be_missing_where_repairs_are_learned(job: MadeJob):
    bare = job.folder / "no-masks"
    bare.mkdir()
    samples = [
        {"__key__": key, "png": noise(int(key)), "cls": str(number % 7).encode()}
        for number, key in enumerate(LEARNED)
    ]
    write_shard(bare / "000.tar", samples)
    options = (f"cues={json.dumps([CUES[1]])}", "name=no-masks", f"repair.shards={bare}")
    assert job.start(*options) == 0
    found = job.metrics("no-masks")["cues"]["spot"]
    assert found["repairs"] == {}
    assert any("has the field 'mask.png'" in warning for warning in found["warnings"])
    assert any("no repair by dfr" in warning for warning in found["warnings"])


def test_what_a_repair_leaves_is_as_uncertain_as_what_was_there():
    """Beside a spread that is taken as known, pairs that all say the same would show no doubt."""
    torch.manual_seed(0)
    changes, scores = 1 + 0.01 * torch.randn(300), torch.randn(40).exp()
    draw = {"resamples": 400, "seed": 3}
    both = {"text": scores[:, None], "probe": scores[:, None]}
    for same_images, n in ((False, 300), (True, 40)):
        table = changes[:n, None]
        (wanted,) = measure_effects(
            table, table, scores=both, same_images=same_images, names=["x"], measure="m", **draw
        )
        found = measure_effect(
            changes[:n], scores, same_images=same_images, what="repaired probe", **draw
        )
        assert found == pytest.approx(wanted.probe)
        assert found.high - found.low > 0.1 * found.mean
    with pytest.raises(DataError, match="repaired probe: 300 effects, but scores of 40 images"):
        measure_effect(changes, scores, same_images=True, what="repaired probe", **draw)


@pytest.mark.parametrize("cue", ["mark", "spot"])
def test_the_spread_of_a_repaired_probe_is_drawn_anew(job: MadeJob, cue: str):
    """Of pairs: their draws, and others of the images."""
    found = job.metrics("all")["cues"][cue]["repairs"]["project"]["effect"]
    probe, _ = load_probe(job.folder / "runs" / "all" / "repaired" / cue / "project")
    weights = probe.weight.detach().double()
    unit, _, has_cue = evaluated(job, cue)
    logits = unit.double() @ weights.T
    of_all = contrast_logits(job.unit(job.bytes).double() @ weights.T)
    before = job.metrics("all")["cues"][cue]["effects"]["pairs"]
    score = list(before).index(max(before, key=lambda name: before[name]["excess"]["mean"]))
    changes = contrast_logits(logits[has_cue] - logits[~has_cue])[:, score]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    means = resampled_means(changes[:, None], resamples=20, generator=generators[0])[:, 0]
    scores = of_all[:, score] - of_all[:, score].mean()
    moments = torch.stack([scores, scores.square()], dim=1)
    mean, square = resampled_means(moments, resamples=20, generator=generators[1]).unbind(1)
    drawn = means / (square - mean.square()).sqrt()
    wanted = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    assert [found["low"], found["high"]] == pytest.approx(wanted, rel=1e-2, abs=1e-4)


def test_where_pairs_are_too_few_a_repair_is_measured_by_removal(job: MadeJob):
    """As the headline is: nothing defined stands below what is not."""
    options = (f"cues={json.dumps([CUES[0]])}", "pairs.images=9", "repair.methods=[project]")
    assert job.start(*options, "name=nine") == 0
    found = job.metrics("nine")["cues"]["mark"]
    removal = found["effects"]["removal"]
    score = list(removal).index(max(removal, key=lambda name: removal[name]["excess"]["mean"]))
    probe, _ = load_probe(job.folder / "runs" / "nine" / "repaired" / "mark" / "project")
    weights, bias = (each.detach().double() for each in (probe.weight, probe.bias))
    before, after = (contrast_logits(each @ weights.T + bias) for each in without(job, LATENTS))
    wanted = (before - after).mean(dim=0) / before.std(dim=0, correction=0)
    effect = found["repairs"]["project"]["effect"]
    assert effect["mean"] == pytest.approx(float(wanted[score]), rel=1e-2, abs=1e-4)
    assert effect["low"] < effect["high"]
