"""Controls in the job on shortcuts, against plain loops: what chance does, and what is too few."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.shortcuts_result import UNDEFINED, CueEffect
from clipattr.clip import image_tower
from clipattr.config.inputs import DataConfig
from clipattr.data import build_index, find_shards
from clipattr.data.store import hash_json
from clipattr.jobs import shortcuts as job_module
from clipattr.jobs import shortcuts_controls
from clipattr.jobs.model import embeddings_fingerprint, read_embeddings
from clipattr.jobs.shortcuts_controls import Controls
from clipattr.jobs.shortcuts_effects import headline_score
from clipattr.metrics.intervals import Interval
from clipattr.probes.files import load_probe, save_probe
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.shortcuts.null_heads import null_heads
from clipattr.shortcuts.overlay import Kind, Overlay
from clipattr.shortcuts.pairs import paste_pairs
from tests.tars import write_shard
from tests.test_attribution_job import SITES
from tests.test_evaluate_sae import N_IMAGES, NAMES, noise
from tests.test_shortcuts_job_parts import KEYS, ShortcutsJob

LATENTS = [3, 7]
CUES = [
    {"name": "some", "latents": LATENTS},
    {"name": "mark", "overlay": "sticker"},
    {"name": "other", "latents": [5]},
]
N_HEADS, N_DRAWS = 25, 12
SCORES = [f"{name} rather than the others" for name in NAMES]


class Watched(ShortcutsJob):
    """The job, and the controls that it made."""

    controls: Controls

    def watch(self, site: str, *overrides: str) -> dict:
        make = job_module.make_controls

        def keep(*arguments) -> Controls:
            self.controls = make(*arguments)
            return self.controls

        few = (f"shortcuts.shuffled={N_HEADS}", f"shortcuts.placebos={N_DRAWS}")
        cues = f"cues={json.dumps(CUES)}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job_module, "make_controls", keep)
            return self.run(site, cues, "shortcuts.automatic=false", *few, *overrides)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("controls"))


@pytest.fixture(scope="module")
def found(job: Watched) -> dict:
    return job.watch("all")


def unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.double(), dim=1)


@torch.no_grad()
def sizes(job: Watched, heads: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    """|mean effect| of every head and score, image by image."""
    images = unit(job.encode(job.bytes))
    found = []
    for head in heads:
        upper, lower, scores = (contrast_logits(each @ head.T) for each in (*sides, images))
        found.append((upper - lower).mean(dim=0) / scores.std(dim=0, correction=0))
    return torch.stack(found).abs()


def check_band(effects: dict, nulls: Tensor, judged: dict, *, itself: int) -> None:
    """`itself` is 1 where the judged effect counts as one of those of chance."""
    for number, score in enumerate(SCORES):
        n_as_large = int((nulls[:, number] >= abs(judged[score]["probe"]["mean"])).sum())
        share = (itself + n_as_large) / (itself + len(nulls))
        assert effects[score]["null_share"] == pytest.approx(share)
        assert effects[score]["n_null"] == len(nulls)
        high = float(nulls[:, number].quantile(0.95))
        assert effects[score]["null_high"] == pytest.approx(high, rel=1e-3, abs=1e-5)


def check_heads(effects: dict, nulls: Tensor) -> None:
    """Each head by the score with its largest excess over the prompts."""
    text = [abs(effects[score]["text"]["mean"]) for score in SCORES]
    picked = []
    for head in nulls.tolist():
        excess = [size - of_text for size, of_text in zip(head, text, strict=True)]
        picked.append(head[excess.index(max(excess))])
    check_band(effects, torch.tensor(picked)[:, None].expand(-1, len(SCORES)), effects, itself=1)


@torch.no_grad()
def without(job: Watched, latents: list[int]) -> tuple[Tensor, Tensor]:
    cut, sae = image_tower(job.clip.model).cut(SITES["all"]), job.saes["all"]
    x, rest = cut.prefix(job.images)
    dense = sae.encode(x).to_dense()
    edited = x - dense[..., latents] @ sae.directions[latents]
    return unit(cut.suffix(x, rest)), unit(cut.suffix(edited, rest))


def test_effects_stand_beside_those_on_probes_of_shuffled_labels(job: Watched, found: dict):
    labels = torch.arange(N_IMAGES) % len(NAMES)
    images = unit(job.encode(job.bytes))
    heads = null_heads(images, labels, n_classes=len(NAMES), n_heads=N_HEADS, seed=0)
    torch.testing.assert_close(job.controls.heads, heads, rtol=1e-3, atol=1e-3)
    # From here with those of the job: of a pair, a share may hang on the last digit.
    heads = job.controls.heads
    upper, lower = without(job, LATENTS)
    moved = (upper - lower).mean(dim=0)
    torch.testing.assert_close(job.controls.changes["some"], moved, rtol=1e-3, atol=1e-6)
    removal = found["cues"]["some"]["effects"]["removal"]
    check_heads(removal, sizes(job, heads, (upper, lower)))
    pasted = paste_pairs(job.bytes, KEYS, Overlay(Kind.sticker), seed=0)
    plain, marked, placebo = (
        unit(job.encode(getattr(pasted, side))) for side in ("without", "with_cue", "placebo")
    )
    effects = found["cues"]["mark"]["effects"]
    check_heads(effects["pairs"], sizes(job, heads, (marked, plain)))
    of_placebo = effects["placebo of the pairs"]
    check_heads(of_placebo, sizes(job, heads, (placebo, plain)))


def test_placebos_of_the_removal_are_mean_sizes_over_draws(job: Watched, found: dict, monkeypatch):
    drawn: list[list[int]] = []
    change_each = shortcuts_controls.change_each

    def watch(audited, images, n_images, latents):
        sets = latents.items()
        drawn.extend(each.tolist() for (cue, n), each in sets if cue == "some" and n)
        return change_each(audited, images, n_images, latents)

    monkeypatch.setattr(shortcuts_controls, "change_each", watch)
    assert job.watch("all", "name=again")["cues"] == found["cues"]
    assert len(drawn) == len({frozenset(one) for one in drawn}) == N_DRAWS
    assert not {latent for one in drawn for latent in one} & {*LATENTS, 5}
    moved = [without(job, one) for one in drawn]
    heads = torch.stack([job.prompts(), job.probe.weight]).double().detach()
    text, probe = torch.stack([sizes(job, heads, sides) for sides in moved], dim=1)
    cue = found["cues"]["some"]["effects"]
    effects = cue["placebo of the removal"]
    for number, score in enumerate(SCORES):
        for head, of_head in (("text", text), ("probe", probe), ("excess", probe - text)):
            wanted = pytest.approx(float(of_head[:, number].mean()), rel=1e-3, abs=1e-5)
            assert effects[score][head]["mean"] == wanted
        assert effects[score]["n"] == N_DRAWS
    check_band(effects, probe, cue["removal"], itself=0)


def test_tables_and_the_page_say_it(job: Watched, found: dict):
    folder = job.folder / "runs" / "all"
    rows = list(csv.DictReader((folder / "effects.csv").read_text().splitlines()))
    row = next(one for one in rows if one["cue"] == "mark" and one["measure"] == "pairs")
    wanted = found["cues"]["mark"]["effects"]["pairs"][row["score"]]
    assert float(row["null_high"]) == wanted["null_high"]
    assert float(row["null_share"]) == wanted["null_share"]
    page = (folder / "report" / "index.html").read_text()
    assert "probes trained on shuffled labels" in page
    assert f"Of {N_DRAWS} draws of other latents" in page


def test_fewer_than_ten_pairs_show_nothing(job: Watched):
    found = job.watch("last", "pairs.images=9", "name=few")["cues"]["mark"]
    row = found["effects"]["pairs"][SCORES[0]]
    assert row["n"] == 9
    for name in ("text", "probe", "excess", "amplification"):
        assert set(row[name].values()) == {None}
    assert row["null_high"] is None
    warning = "9 pairs: what they do is not defined with fewer than 10"
    assert found["warnings"].count(warning) == 1
    found = job.watch("last", "pairs.images=10", "name=enough")["cues"]["mark"]
    assert found["effects"]["pairs"][SCORES[0]]["probe"]["low"] is not None
    assert not any("pairs: what they do" in one for one in found["warnings"])


def test_the_headline_is_of_the_first_measure_that_is_defined():
    """Six pairs say nothing; the removal of the latents still does."""

    def row(measure: str, score: str, excess: float) -> CueEffect:
        found = Interval(excess, excess, excess)
        return CueEffect(measure, score, found, found, UNDEFINED, found, found, 6)

    names = ["a", "b", "c"]
    pairs = [row("pairs", name, math.nan) for name in names]
    placebo = [row("placebo of the pairs", name, 9.0 - at) for at, name in enumerate(names)]
    removal = [row("removal", name, at) for name, at in zip(names, (0.1, 0.4, 0.2), strict=True)]
    direction = [row("direction", name, at) for at, name in enumerate(names)]
    assert headline_score([*pairs, *placebo, *removal, *direction], names) == 1
    assert headline_score([*removal[::2], *direction], names) == 2
    assert headline_score([*pairs, *placebo], names) == headline_score([], names) == 0


def test_few_draws_have_no_interval_and_none_can_be_asked_for(job: Watched):
    cue = job.watch("last", "shortcuts.placebos=3", "name=three")["cues"]["some"]
    row = cue["effects"]["placebo of the removal"][SCORES[0]]
    assert row["n"] == 3
    assert row["probe"]["mean"] > 0
    assert row["probe"]["low"] is None
    none = ("shortcuts.placebos=0", "shortcuts.shuffled=0", "name=zero")
    cue = job.watch("last", *none)["cues"]["some"]
    assert cue["effects"].keys() == {"removal"}
    row = cue["effects"]["removal"][SCORES[0]]
    assert (row["null_high"], row["null_share"], row["n_null"]) == (None, None, 0)


def test_probes_say_which_images_they_have_seen(job: Watched, tmp_path: Path, caplog):
    """By the number that train_probe writes: that of the cache of embeddings."""
    learned = tmp_path / "learned"
    learned.mkdir()
    samples = [
        {"__key__": f"{100 + n}", "png": noise(100 + n), "cls": str(n % 7).encode()}
        for n in range(70)
    ]
    write_shard(learned / "000.tar", samples)
    data = DataConfig(cache=str(tmp_path / "cache"), workers=0)
    names = {}
    for name, folder in (("evaluated", job.shards), ("learned", learned)):
        index = build_index(find_shards(str(folder)), cache=None)
        names[name] = embeddings_fingerprint(job.clip, index, data)
        store = read_embeddings(job.clip, index, data, progress=False)
        assert names[name] == hash_json(store.fingerprint)
    probe, record = load_probe(job.folder / "probe")
    options = (f"repair.shards={learned}", "repair.Cs=[1.0]", "name=repairs")
    job.watch("last", *options)
    folder = job.folder / "runs" / "repairs"
    assert "learned from the evaluated images" not in (folder / "report/index.html").read_text()
    for method, wanted in (
        ("suppress", f"{record.data_fingerprint}+{names['learned']}"),
        ("retrain", names["learned"]),
    ):
        repaired = json.loads((folder / "repaired/some" / method / "probe.json").read_text())
        assert repaired["data_fingerprint"] == wanted
    for number, seen in enumerate((names["evaluated"], f"old+{names['evaluated']}")):
        known, folder = dataclasses.replace(record, data_fingerprint=seen), tmp_path / str(number)
        save_probe(probe, folder, known)
        job.watch("last", f"probe={folder}", f"name=seen{number}")
        page = (job.folder / "runs" / f"seen{number}" / "report/index.html").read_text()
        said = "the probe was learned from the evaluated images, data.shards="
        assert said in page
        assert any(said in one for one in job.metrics(f"seen{number}")["warnings"])
        assert any(said in one.getMessage() for one in caplog.records)
        caplog.clear()
