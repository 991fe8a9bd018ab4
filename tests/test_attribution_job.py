"""The job that evaluates attribution: what it writes, at two sites, by one and by two processes."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import HeadScore, attribution_patching, load_reliance
from clipattr.callbacks import FaithfulnessCallback
from clipattr.clip import Site, image_tower, load_clip
from clipattr.clip.templates import ClassNames
from clipattr.config.choices import Method
from clipattr.config.schema import EVALUATE_JOBS, DeviceConfig
from clipattr.jobs.class_head import Classes
from clipattr.main import run_script
from clipattr.probes import LinearProbe, ProbeRecord, save_probe
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule, rows_loader
from clipattr.training.trainer import build_tester
from tests.test_evaluate_sae import N_IMAGES, NAMES, noise, write_images
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "evaluate" / "attribution.yaml"
N_LATENTS, K = 20, 4
SITES = {"last": Site(1), "all": Site(0, "residual", "all")}
METHODS = {
    "attribution_patching",
    "integrated_gradients",
    "act_times_logit_lens",
    "logit_lens",
    "energy",
    "random",
    "exact",
}


class Job:
    """The shipped config on a tiny model and on shards of noise."""

    def __init__(self, folder: Path) -> None:

        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny")
        self.clip = load_clip(self.model)
        self.shards = write_images(folder / "images")
        pictures = [Image.open(io.BytesIO(noise(number))) for number in range(N_IMAGES)]
        self.images = torch.stack([self.clip.preprocess(picture) for picture in pictures])
        self.identity = {"name": self.model, "weights_sha256": self.clip.weights_sha256}
        self.saes = {name: self.save(name, site) for name, site in SITES.items()}

    def save(self, name: str, site: Site) -> TopKSae:
        generator = torch.Generator().manual_seed(0)
        sae = TopKSae(d_model=32, n_latents=N_LATENTS, k=K, generator=generator)
        with torch.no_grad():
            cut = image_tower(self.clip.model).cut(site)
            sae.initialise_from(cut.read(self.images).flatten(0, -2))
        save_sae(sae, self.folder / name, SaeRecord(site.to_json(), self.identity, "data"))
        return sae.requires_grad_(False)

    def save_probe(self, names: list[str], lowest: float = 5) -> LinearProbe:
        probe = LinearProbe(16, len(names)).requires_grad_(False)
        probe.weight.copy_(torch.randn(len(names), 16, generator=torch.Generator().manual_seed(1)))
        probe.bias.copy_(torch.linspace(lowest, lowest + 1, len(names)))
        record = ProbeRecord(names, self.identity, "cls", "data")
        save_probe(probe, self.folder / "probe", record)
        return probe

    def places(self, sae: str) -> dict[str, str]:
        """What any job on this model and these shards is told."""
        return {
            "sae": str(self.folder / sae),
            "name": sae,
            "data.shards": str(self.shards),
            "zeroshot.classes": json.dumps(NAMES),
            "model.name": self.model,
            "runs": str(self.folder / "runs"),
            "data.cache": str(self.folder / "cache"),
            "data.workers": "0",
            "data.batch_size": "8",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }

    def arguments(self, sae: str, *overrides: str) -> list[str]:
        words = self.places(sae) | {
            "evaluation.images": "20",
            "evaluation.resamples": "20",
            "evaluation.overlap_top": "2",
            "evaluation.top": "3",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        return [str(CONFIG), *(f"{key}={value}" for key, value in words.items() if value)]

    def run(self, sae: str, *overrides: str) -> int:
        return run_script("evaluate.py", EVALUATE_JOBS, self.arguments(sae, *overrides))

    def metrics(self, name: str) -> dict:
        return json.loads((self.folder / "runs" / name / "metrics.json").read_text())

    def reliance(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / "runs" / name / "reliance.safetensors")

    def texts(self) -> Tensor:
        classes = Classes(ClassNames(NAMES, NAMES), ("a {}",))
        return classes.head(self.clip, str(self.folder / "heads"), progress=False).weights

    def attributions(self, name: str, weights: Tensor, images: list[int]) -> Tensor:
        """[image, class, latent], summed over tokens, one image and class after the other."""
        cut, sae = image_tower(self.clip.model).cut(SITES[name]), self.saes[name]
        found = torch.zeros(len(images), len(weights), N_LATENTS, dtype=torch.float64)
        for place, image in enumerate(images):
            with torch.no_grad():
                x, rest = cut.prefix(self.images[image][None])
            codes = sae.encode(x)
            for number in range(len(weights)):
                score = HeadScore(cut.suffix, weights, torch.tensor([number]), rest=rest)
                values = attribution_patching(score, x, codes, sae.directions)
                dense = codes._replace(values=values).to_dense().reshape(-1, N_LATENTS)
                found[place, number] = dense.double().sum(0)
        return found

    def predictions(self, weights: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        with torch.no_grad():
            units = normalize(self.clip.encode_image(self.images), dim=1)
        return (units @ weights.T + bias).argmax(dim=1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    made = Job(tmp_path_factory.mktemp("attribution"))
    assert made.run("last") == 0
    return made


CHOSEN = [number * N_IMAGES // 20 for number in range(20)]


def test_the_files_of_the_run(job: Job):
    found = job.metrics("last")
    assert found["images"] == 20
    assert found["steps"] == K
    for table in (found, found["control"]):
        assert table["faithfulness"].keys() == METHODS
        for method, row in table["faithfulness"].items():
            assert row["deletion_drop"]["low"] <= row["deletion_drop"]["mean"]
            assert (row["global"]["minus_logit_lens"] is None) == (method == "logit_lens")
        assert table["faithfulness"]["exact"]["spearman_exact"]["mean"] == pytest.approx(1)
    trained, untrained = (
        t["faithfulness"]["exact"]["deletion_drop"] for t in (found, found["control"])
    )
    assert trained != untrained
    picture = job.folder / "runs" / "last" / "faithfulness.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    images = sum(row["exact"]["images"] for row in found["by_class"].values())
    assert images == 20
    predicted = job.predictions(job.texts())[CHOSEN]
    assert set(found["by_class"]) == {NAMES[number] for number in predicted.tolist()}


def test_reliance_is_the_mean_over_all_images(job: Job):
    found = job.reliance("last")
    expected = job.attributions("last", job.texts(), list(range(N_IMAGES)))
    torch.testing.assert_close(found["mean_attribution"], expected.mean(0), atol=1e-6, rtol=1e-4)
    fired = (expected != 0).any(dim=1).double().mean(0)
    torch.testing.assert_close(found["share_of_images"], fired)
    check_signs(found["share_positive"], expected.transpose(0, 1))
    lines = (job.folder / "runs" / "last" / "reliance.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert len(rows) == 3 * len(NAMES)
    for number, name in enumerate(NAMES):
        of_class = [row for row in rows if row["class"] == name]
        values = found["mean_attribution"][number]
        order = values.abs().argsort(descending=True)[:3].tolist()
        assert [int(row["latent"]) for row in of_class] == order
        assert float(of_class[0]["mean_attribution"]) == pytest.approx(
            float(values[order[0]]), rel=1e-5
        )


def test_inside_the_tower_reliance_is_that_of_the_images_of_a_class(job: Job):
    # With several tokens an image has more active latents than k.
    overrides = ["evaluation.control=false", f"evaluation.overlap_top={K}"]
    assert job.run("all", "evaluation.explained=label", *overrides) == 0
    assert job.metrics("all")["faithfulness"]["exact"]["overlap_exact"]["mean"] == 1
    found = job.reliance("all")
    labels = torch.arange(N_IMAGES)[CHOSEN] * 7 // N_IMAGES
    every = job.attributions("all", job.texts(), CHOSEN)
    for number in range(len(NAMES)):
        expected = every[labels == number, number].mean(0)
        torch.testing.assert_close(
            found["mean_attribution"][number], expected, atol=1e-6, rtol=1e-3
        )
        fired = (every[labels == number, number] != 0).double().mean(0)
        torch.testing.assert_close(found["share_of_images"][number], fired)
    explained = [every[labels == number, number] for number in range(len(NAMES))]
    check_signs(found["share_positive"], explained)
    assert "control" not in job.metrics("all")


def check_signs(found: Tensor, attributions: Sequence[Tensor] | Tensor) -> None:
    """Of every class against [image, latent]; what never fired has no share."""
    for row, of_class in zip(found, attributions, strict=True):
        fired, positive = (of_class != 0).sum(0), (of_class > 0).sum(0)
        torch.testing.assert_close(row, positive / fired, equal_nan=True)
        assert ((row.isnan()) == (fired == 0)).all()
    assert 0.1 < float(found.nanmean()) < 0.9


def test_later_steps_read_the_reliance(job: Job):
    """One loader for both kinds of means; the long table has the same numbers."""
    overrides = ["evaluation.explained=label", "evaluation.control=false", "evaluation.signs=false"]
    assert job.run("all", *overrides, "name=unsigned") == 0
    labels = torch.arange(N_IMAGES)[CHOSEN] * 7 // N_IMAGES
    for name, over, n_images in (
        ("last", "all images", [N_IMAGES] * len(NAMES)),
        ("unsigned", "images of the class", labels.bincount(minlength=len(NAMES)).tolist()),
    ):
        found = load_reliance(job.folder / "runs" / name, job.identity)
        assert found.origin.class_names == list(NAMES)
        assert (found.origin.over, found.origin.n_images) == (over, n_images)
        assert found.origin.head == {"templates": "a {}"}
        assert (found.share_positive is None) == (name == "unsigned")
        share = found.share_of_images.expand_as(found.mean_attribution)
        table = parquet.read_table(job.folder / "runs" / name / "reliance.parquet")
        assert len(table) == int((share > 0).sum())
        expected = found.mean_attribution[share > 0].float().numpy()
        np.testing.assert_array_equal(table.column("mean_attribution").to_numpy(), expected)


def test_what_cannot_be_decoded_counts_in_no_class(job: Job):
    shards = write_images(job.folder / "damaged", broken=(CHOSEN[0], CHOSEN[9]))
    overrides = ["evaluation.explained=label", "evaluation.control=false", "name=damaged"]
    assert job.run("all", *overrides, f"data.shards={shards}", "data.max_bad_fraction=0.2") == 0
    assert job.metrics("damaged")["images"] == 18
    found = load_reliance(job.folder / "runs" / "damaged")
    seen = [place for place in range(20) if place not in (0, 9)]
    labels = torch.arange(N_IMAGES)[CHOSEN][seen] * 7 // N_IMAGES
    assert found.origin.n_images == labels.bincount(minlength=len(NAMES)).tolist()
    every = job.attributions("all", job.texts(), [CHOSEN[place] for place in seen])
    for number in range(len(NAMES)):
        expected = every[labels == number, number].mean(0)
        torch.testing.assert_close(found.mean_attribution[number], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("sae", ["last", "all"])
def test_half_precision(job: Job, sae: str):
    """Weights in bf16, the dictionary in float32: the numbers to the digits that bf16 has."""
    half = load_clip(job.model, precision="bf16")
    identity = {"name": job.model, "weights_sha256": half.weights_sha256}
    record = SaeRecord(SITES[sae].to_json(), identity, "data")
    save_sae(job.saes[sae], job.folder / f"{sae}-half", record)
    overrides = ["evaluation.explained=label", "model.precision=bf16"]
    assert job.run(f"{sae}-half", *overrides) == 0
    found = job.reliance(f"{sae}-half")["mean_attribution"]
    if sae == "last":
        expected = job.attributions(sae, job.texts(), list(range(N_IMAGES))).mean(0)
    else:
        labels = torch.arange(N_IMAGES)[CHOSEN] * 7 // N_IMAGES
        every = job.attributions(sae, job.texts(), CHOSEN)
        rows = [every[labels == number, number].mean(0) for number in range(len(NAMES))]
        expected = torch.stack(rows)
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.98
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.05, atol=0)


def test_images_are_explained_for_their_own_labels(job: Job, tmp_path):
    """Against the callback on activations that are read here, in the order of the images."""
    overrides = ["evaluation.explained=label", "evaluation.control=false", "name=labelled"]
    assert job.run("last", *overrides) == 0
    cut = image_tower(job.clip.model).cut(SITES["last"])
    labels = torch.arange(N_IMAGES)[CHOSEN] * 7 // N_IMAGES
    callback = FaithfulnessCallback(
        Spliced(cut, job.saes["last"]),
        job.texts(),
        labels,
        methods=list(Method),
        n_steps=K,
        ig_steps=8,
        overlap_top=2,
        resamples=20,
        seed=0,
    )
    with torch.no_grad():
        loader = rows_loader(cut.read(job.images[CHOSEN]), batch_size=7)
    trainer = build_tester(DeviceConfig("cpu", False), tmp_path, callbacks=[callback])
    trainer.test(SplicedModule(callback.spliced), loader, verbose=False)
    found = job.metrics("labelled")
    for method, result in callback.results.items():
        row = found["faithfulness"][method.name]
        check_equal(result.deletion_curve, row["curves"]["deletion"])
        check_equal(result.spearman_exact._asdict(), row["spearman_exact"])
        for number, numbers in callback.by_class[method].items():
            check_equal(numbers, found["by_class"][NAMES[number]][method.name])


def test_a_probe_is_a_head(job: Job):
    names = [f"kind {number}" for number in range(7)]
    probe = job.save_probe(names)
    overrides = [
        f"probe={job.folder / 'probe'}",
        "zeroshot.classes=",
        "zeroshot=null",
        "name=probe",
    ]
    assert job.run("last", *overrides) == 0
    predicted = job.predictions(probe.weight, probe.bias)[CHOSEN]
    found = job.metrics("probe")
    assert set(found["by_class"]) == {names[number] for number in predicted.tolist()}
    expected = job.attributions("last", probe.weight, list(range(N_IMAGES))).mean(0)
    torch.testing.assert_close(
        job.reliance("probe")["mean_attribution"], expected, atol=1e-6, rtol=1e-4
    )


def test_the_areas_of_negative_logits_are_null(job: Job):
    """The file stays strict JSON; what does not divide by the score stays defined."""
    job.save_probe([f"kind {number}" for number in range(7)], lowest=-20)
    overrides = [f"probe={job.folder / 'probe'}", "zeroshot.classes=", "zeroshot=null"]
    assert job.run("last", *overrides, "name=negative") == 0
    found = job.metrics("negative")
    nothing = {"mean": None, "low": None, "high": None}
    for table in (found, found["control"]):
        for row in table["faithfulness"].values():
            for numbers in (row, row["global"]):
                assert numbers["deletion_auc"] == numbers["insertion_auc"] == nothing
            assert row["deletion_drop"]["low"] <= row["deletion_drop"]["mean"]
    assert all(row["exact"]["deletion_auc"] is None for row in found["by_class"].values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("probe=tests",), "both are there"),
        (("zeroshot=null", "zeroshot.classes="), "neither is there"),
        (("zeroshot.label=null", "evaluation.explained=label"), "which field is the label"),
        (("evaluation.methods=[logit_lens]",), "lacks attribution_patching"),
        ((f"evaluation.overlap_top={K}",), f"overlap_top={K}: must be below the {K} active"),
        (("zeroshot.classes=[star]",), "zeroshot.classes=['star']: one entry is imagenet"),
        (("zeroshot.templates=photo",), "zeroshot.templates='photo': neither a set"),
    ],
)
def test_what_cannot_work_is_said(job: Job, overrides, words: str, capsys, caplog):
    assert job.run("last", *overrides, "name=refused") == 2
    assert words in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize("sae", ["last", pytest.param("all", marks=pytest.mark.slow)])
def test_two_processes_find_the_numbers_of_one(job: Job, sae: str):
    one = f"{sae}-one"
    assert job.run(sae, f"name={one}") == 0
    arguments = job.arguments(sae, f"name={sae}-two", "trainer.devices=2")
    command = [sys.executable, "evaluate.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    check_equal(job.metrics(one), job.metrics(f"{sae}-two"))
    for name, matrix in job.reliance(one).items():
        other = job.reliance(f"{sae}-two")[name]
        torch.testing.assert_close(other, matrix, rtol=1e-5, atol=1e-9, equal_nan=True)


def check_equal(one: object, other: object) -> None:
    """To the rounding of float32: blocks behind the site see other batches; a file has no nan."""
    if one != one:
        one = None
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for name, value in one.items():
            check_equal(value, other[name])
    elif isinstance(one, list):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    else:
        assert other == (pytest.approx(one, rel=1e-4, abs=1e-5) if isinstance(one, float) else one)
