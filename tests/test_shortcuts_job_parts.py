"""The job on shortcuts at sites with tokens and seven classes: each part against a plain loop."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Rest, image_tower
from clipattr.codes import SparseCodes
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.data.pixels import Pixels
from clipattr.jobs.shortcuts_latents import (
    FEWEST,
    auroc_within,
    count_firing,
    find_separating,
    highest_auroc,
    stratify,
)
from clipattr.main import run_script
from clipattr.metrics.ranks import auroc
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.shortcuts.cues import Cue
from clipattr.shortcuts.overlay import Kind, Overlay
from clipattr.shortcuts.pairs import paste_pairs, region_pairs
from clipattr.spliced import Spliced
from tests.tars import write_shard
from tests.test_attribution_job import SITES, Job
from tests.test_evaluate_sae import N_IMAGES, NAMES, noise

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "shortcuts.yaml"
KEYS = [f"{number:03d}" for number in range(N_IMAGES)]
# Beside latents, which need no flags.
CUES = [
    {"name": "some", "latents": [3, 7]},
    {"name": "mark", "overlay": "sticker"},
    {"name": "spot", "region": "mask.png"},
    {"name": "words", "prompt": "a red fish", "field": "json:found"},
    {"name": "more words", "prompt": "a red fish"},
]


def region_of(number: int) -> np.ndarray:
    """A square in most images, nothing in one, and too much for a placebo in another."""
    region = np.zeros((32, 32), dtype=bool)
    side = {4: 0, 5: 30}.get(number, 6)
    region[number % 20 : number % 20 + side, 3 : 3 + side] = True
    return region


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class ShortcutsJob(Job):
    """Images of noise with a mask, a label and a flag."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shards = folder / "masked"
        self.shards.mkdir()
        samples = [
            {
                "__key__": key,
                "png": noise(number),
                "mask.png": as_png((region_of(number) * 255).astype(np.uint8)),
                "cls": str(number % 7).encode(),
                "json": json.dumps({"found": number % 3 == 0}).encode(),
            }
            for number, key in enumerate(KEYS)
        ]
        write_shard(self.shards / "000.tar", samples)
        self.probe = self.save_probe(list(NAMES))
        self.pixels = Pixels(self.clip.preprocess)

    def run(self, sae: str, *overrides: str) -> dict:
        words = self.places(sae) | {
            "prompts": json.dumps(NAMES),
            "probe": str(self.folder / "probe"),
            "atlas": "null",
            "cues": json.dumps(CUES),
            "pairs.shards": "null",
            "repair.shards": "null",
            "shortcuts.resamples": "50",
            "shortcuts.confirmed": "3",
        }
        del words["zeroshot.classes"]
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        assert run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments]) == 0
        return self.metrics(words["name"])

    @torch.no_grad()
    def score(self, head: str, embeddings: Tensor) -> Tensor:
        weights, bias = self.probe.weight, self.probe.bias
        if head == "text":
            weights, bias = self.prompts(), torch.zeros(len(NAMES))
        unit = normalize(embeddings, dim=-1).double()
        return contrast_logits(unit @ weights.double().T + bias.double())

    @torch.no_grad()
    def prompts(self) -> Tensor:
        tokens = self.clip.tokenizer(list(NAMES))
        return normalize(self.clip.encode_text(tokens).float(), dim=-1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(self.pixels.normalise(pixels))

    @property
    def bytes(self) -> Tensor:
        return torch.stack([self.pixels.read(noise(number)) for number in range(N_IMAGES)])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ShortcutsJob:
    return ShortcutsJob(tmp_path_factory.mktemp("shortcuts"))


@pytest.fixture(scope="module")
def found(job: ShortcutsJob) -> dict[str, dict]:
    return {site: job.run(site) for site in SITES}


def check(job: ShortcutsJob, effects: dict, sides: dict[str, Tensor]) -> None:
    """Means of every score, in standard deviations over all images."""
    for head in ("text", "probe"):
        spread = job.score(head, job.encode(job.bytes)).std(dim=0, correction=0)
        wanted = (job.score(head, sides["with"]) - job.score(head, sides["without"])).mean(
            0
        ) / spread
        names = [f"{name} rather than the others" for name in NAMES]
        assert list(effects) == names
        got = [effects[name][head]["mean"] for name in names]
        assert got == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-4)
        assert {effects[name]["n"] for name in names} == {len(sides["with"])}


@pytest.mark.parametrize("site", SITES)
def test_removal_takes_the_latents_out_of_every_token(
    job: ShortcutsJob, found: dict[str, dict], site: str
):
    effects = found[site]["cues"]["some"]["effects"]["removal"]
    cut, sae = image_tower(job.clip.model).cut(SITES[site]), job.saes[site]
    with torch.no_grad():
        x, rest = cut.prefix(job.images)
        dense = sae.encode(x).to_dense()
        without = x - dense[..., [3, 7]] @ sae.directions[[3, 7]]
        sides = {"with": cut.suffix(x, rest), "without": cut.suffix(without, rest)}
    check(job, effects, sides)


@pytest.mark.parametrize("site", SITES)
def test_overlays_are_pasted_on_the_pixels(job: ShortcutsJob, found: dict[str, dict], site: str):
    effects = found[site]["cues"]["mark"]["effects"]
    pairs = paste_pairs(job.bytes, KEYS, Overlay(Kind.sticker), seed=0)
    sides = {name: job.encode(getattr(pairs, name)) for name in ("without", "with_cue", "placebo")}
    check(job, effects["pairs"], {"with": sides["with_cue"], "without": sides["without"]})
    placebo = {"with": sides["placebo"], "without": sides["without"]}
    check(job, effects["placebo of the pairs"], placebo)


def test_regions_are_cut_out_where_they_can_be(job: ShortcutsJob, found: dict[str, dict]):
    cue = found["all"]["cues"]["spot"]
    rows = [row for row in range(N_IMAGES) if row not in (4, 5)]
    regions = torch.from_numpy(np.stack([region_of(row) for row in rows]))
    pairs = region_pairs(job.bytes[rows], [KEYS[row] for row in rows], regions, seed=0)
    sides = {name: job.encode(getattr(pairs, name)) for name in ("without", "with_cue", "placebo")}
    check(job, cue["effects"]["pairs"], {"with": sides["with_cue"], "without": sides["without"]})
    # The image has what the placebo lacks.
    placebo = {"with": sides["with_cue"], "without": sides["placebo"]}
    check(job, cue["effects"]["placebo of the pairs"], placebo)
    assert any("2 of 30 images have no region" in warning for warning in cue["warnings"])


def test_a_prompt_is_taken_out_of_the_images_with_the_cue(
    job: ShortcutsJob, found: dict[str, dict]
):
    cues = found["last"]["cues"]
    with torch.no_grad():
        texts = job.clip.encode_text(job.clip.tokenizer(["a red fish", ""]))
        texts = normalize(texts.double(), dim=1)
        direction = normalize(texts[0] - texts[1], dim=0)
        unit = normalize(job.encode(job.bytes).double(), dim=1)
    along = unit @ direction
    # Where nobody says which have it, those that fit best: 20 at least, but no more than half.
    fits = along >= along.sort(descending=True).values[N_IMAGES // 2 - 1]
    for name, has in (("words", torch.arange(N_IMAGES) % 3 == 0), ("more words", fits)):
        edited = unit[has] - torch.outer(along[has] - along[~has].mean(), direction)
        effects = cues[name]["effects"]["direction"]
        check(job, effects, {"with": unit[has], "without": edited})


def test_groups_of_few_images_have_intervals_and_the_worst_is_that_of_the_table(
    found: dict[str, dict],
):
    cue = found["last"]["cues"]["words"]
    groups = [side for label in cue["groups"].values() for side in label.values()]
    assert {1, 2} <= {each["images"] for each in groups}
    for head in ("text", "probe"):
        for each in groups:
            share, n = each["accuracy"][head], each["images"]
            of = binomtest(round(share["mean"] * n), n).proportion_ci(method="wilson")
            assert [share["low"], share["high"]] == pytest.approx([of.low, of.high], abs=1e-12)
        worst = min(each["accuracy"][head]["mean"] for each in groups)
        assert cue["quality"][head]["worst_group"] == pytest.approx(worst)
    assert any("no label of data.shards=" in warning for warning in cue["warnings"])


@pytest.mark.parametrize("site", SITES)
def test_the_first_latents_are_confirmed_by_taking_them_out(
    job: ShortcutsJob, found: dict[str, dict], site: str
):
    table = found[site]["amplified"]["latents"]
    assert [each["rank"] for each in table.values()] == [1, 2, 3]
    cut, sae = image_tower(job.clip.model).cut(SITES[site]), job.saes[site]
    with torch.no_grad():
        x, rest = cut.prefix(job.images)
        dense = sae.encode(x).to_dense()
        for name, each in table.items():
            edited = x - dense[..., [int(name)]] @ sae.directions[[int(name)]]
            without = cut.suffix(edited, rest)
            place = [f"{one} rather than the others" for one in NAMES].index(each["score"])
            for head in ("text", "probe"):
                score = job.score(head, cut.suffix(x, rest))[:, place]
                effect = (score - job.score(head, without)[:, place]).mean()
                wanted = effect / score.std(correction=0)
                assert each[head]["mean"] == pytest.approx(float(wanted), rel=1e-3, abs=1e-5)
            fires = (dense[..., int(name)] > 0).reshape(N_IMAGES, -1).any(dim=1).double().mean()
            assert each["share_of_images"] == pytest.approx(float(fires))


class FixedCodes:
    """An SAE whose codes are what it is given, densely."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents, self.b_dec = n_latents, torch.zeros(n_latents)

    def encode(self, x: Tensor) -> SparseCodes:
        indices = torch.arange(self.n_latents).expand_as(x)
        return SparseCodes(indices, x, self.n_latents)


class FixedSpliced(Spliced):
    def __init__(self, n_latents: int) -> None:
        self.sae = FixedCodes(n_latents)  # type: ignore[assignment]


def as_batches(dense: Tensor) -> list[tuple[Tensor, Tensor, Rest]]:
    rows = torch.arange(len(dense)).split(64)
    return [(part, row, Rest()) for part, row in zip(dense.split(64), rows, strict=True)]


def mean_of_labels(dense: Tensor, flags: Cue, labels: Tensor) -> Tensor:
    """The plain loop: labels with enough images of both kinds, by how many pairs they can make."""
    areas, weights = [], []
    for label in labels.unique():
        members = flags.known & (labels == label)
        n_with, n_without = int((members & flags.has).sum()), int((members & ~flags.has).sum())
        if min(n_with, n_without) >= FEWEST:
            areas.append(auroc(dense[members], flags.has[members]))
            weights.append(n_with * n_without / (n_with + n_without))
    return sum(w * area for w, area in zip(weights, areas, strict=True)) / sum(weights)


@pytest.mark.parametrize("n_labels", [1, 3])
def test_latents_of_a_flag_are_those_of_a_dense_auroc(n_labels: int):
    generator = torch.Generator().manual_seed(0)
    has, known = (torch.rand(200, generator=generator) < share for share in (0.4, 0.9))
    labels = torch.randint(n_labels, (200,), generator=generator)
    labels[:15] = 7  # too few
    dense = torch.rand(200, 50, generator=generator).clamp(min=0.6) - 0.6
    strength = torch.linspace(0, 1, 50)
    dense = dense + strength * has[:, None] * torch.rand(200, 50, generator=generator)
    flags = {"a": Cue(has, known), "b": Cue(~has, known)}
    strata = {name: stratify(each, labels) for name, each in flags.items()}
    found = find_separating(FixedSpliced(50), as_batches(dense), strata, at_least=0.8)
    fired = count_firing(FixedSpliced(50), as_batches(dense), strata)["a"]
    for label in range(n_labels):
        for state in (0, 1):
            members = known & (labels == label) & (has == bool(state))
            assert fired[label, state].tolist() == (dense[members] > 0).sum(dim=0).tolist()
    areas = mean_of_labels(dense, flags["a"], labels)
    wanted = (areas >= 0.8).nonzero().flatten()
    assert 3 < len(wanted) < 47
    assert found["a"].latents.sort().values.tolist() == wanted.tolist()
    assert found["a"].auroc.tolist() == pytest.approx(areas[found["a"].latents].tolist())
    assert found["a"].auroc.tolist() == sorted(found["a"].auroc.tolist(), reverse=True)
    assert found["b"].latents.tolist() == []


def test_a_latent_of_the_label_does_not_stand_for_a_cue_that_goes_with_it():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    has = labels.bool() == (torch.rand(2000, generator=generator) < 0.95)
    fires = torch.stack([labels.bool(), has], dim=1)
    dense = fires * (0.5 + torch.rand(2000, 2, generator=generator))
    flags = Cue(has, torch.ones_like(has))
    # Over all images the latent of the label would tell the cue.
    assert float(auroc(dense, has)[0]) > 0.9
    found = find_separating(
        FixedSpliced(2), as_batches(dense), {"cue": stratify(flags, labels)}, at_least=0.8
    )
    assert found["cue"].latents.tolist() == [1]


def test_labels_with_few_images_of_one_kind_have_no_say():
    labels = torch.tensor([0] * 40 + [1] * 40)
    has = torch.zeros(80, dtype=torch.bool)
    has[:FEWEST], has[40 : 40 + FEWEST - 1] = True, True
    found = stratify(Cue(has, torch.ones_like(has)), labels)
    assert found.counts.tolist() == [[40 - FEWEST, FEWEST]]
    assert found.place.tolist() == [0] * 40 + [-1] * 40
    known = torch.ones_like(has)
    known[0] = False
    assert not len(stratify(Cue(has, known), labels).counts)
    together = stratify(Cue(has, known), None)
    assert together.counts.tolist() == [[80 - 2 * FEWEST + 1, 2 * FEWEST - 2]]
    assert together.place.tolist() == [-1] + [0] * 79


def test_no_latent_is_left_out_by_the_counts():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rate = torch.rand(2, 2, generator=generator)
        has = torch.rand(90, generator=generator) < 0.5
        labels = torch.randint(2, (90,), generator=generator)
        strata = stratify(Cue(has, torch.ones_like(has)), labels)
        values = torch.rand(90, generator=generator) + has
        values = values * (torch.rand(90, generator=generator) < rate[labels, has.long()])
        fired = torch.tensor(
            [
                [
                    int(((values > 0) & (labels == one) & (has == bool(state))).sum())
                    for state in (0, 1)
                ]
                for one in (0, 1)
            ]
        )
        bound = highest_auroc(fired[..., None], strata)
        assert float(auroc_within(values[:, None], strata)) <= float(bound) + 1e-12
