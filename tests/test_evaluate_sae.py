"""The job that evaluates an SAE: what it writes, from cached rows and through the tower."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipattr.callbacks import SaeEvaluation, mean_by_type
from clipattr.clip import Clip, Cut, Site, Tower, image_tower, load_clip
from clipattr.clip.templates import ClassNames
from clipattr.config.schema import EVALUATE_JOBS, DeviceConfig
from clipattr.jobs.class_head import Classes
from clipattr.jobs.site_states import FreshStates, spread
from clipattr.main import run_script
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester
from tests.tars import write_shard
from tests.tiny import save_tiny_clip

CONFIG = Path(__file__).parents[1] / "configs" / "evaluate" / "sae.yaml"
NAMES = ("star", "moon", "bolt", "drop", "red fish", "sand", "boat")
N_IMAGES, N_LATENTS, N_MEAN = 30, 20, 7
SITES = {"cls": Site(1, "residual", "cls"), "all": Site(0, "residual", "all")}


def noise(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    """Sorted by class, as shards of a folder of classes are."""
    folder.mkdir()
    samples: list[dict[str, object]] = [
        {
            "__key__": f"{number:03d}",
            "png": b"broken" if number in broken else noise(number),
            "cls": str(number * 7 // N_IMAGES).encode(),
        }
        for number in range(N_IMAGES)
    ]
    write_shard(folder / "000.tar", samples[:20])
    write_shard(folder / "001.tar", samples[20:])
    return folder


class Job:
    """The shipped config on a tiny model and on shards of noise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny")
        self.clip = load_clip(self.model)
        self.shards = write_images(folder / "images")
        self.images = torch.stack(
            [self.clip.preprocess(Image.open(io.BytesIO(noise(n)))) for n in range(N_IMAGES)]
        )
        for name, site in SITES.items():
            self.save(name, site)

    def save(self, name: str, site: Site, d_model: int = 32, sha: str | None = None) -> Spliced:
        sae = TopKSae(
            d_model=d_model, n_latents=N_LATENTS, k=3, generator=torch.Generator().manual_seed(0)
        )
        cut = image_tower(self.clip.model).cut(site)
        if d_model == 32:
            with torch.no_grad():
                sae.initialise_from(cut.read(self.images).flatten(0, -2))
        model = {"name": self.model, "weights_sha256": sha or self.clip.weights_sha256}
        save_sae(sae, self.folder / name, SaeRecord(site.to_json(), model, "data"))
        return Spliced(cut, sae.requires_grad_(False).eval())

    def run(self, sae: str, *overrides: str, name: str | None = None) -> int:
        words = {
            "sae": str(self.folder / sae),
            "name": name or sae,
            "data.shards": str(self.shards),
            "zeroshot.classes": json.dumps(NAMES),
            "model.name": self.model,
            "mean_images": str(N_MEAN),
            "runs": str(self.folder / "runs"),
            "data.cache": str(self.folder / "cache"),
            "data.workers": "0",
            "data.batch_size": "8",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments])

    def path(self, name: str, file: str = "metrics.json") -> Path:
        return self.folder / "runs" / name / file

    def metrics(self, name: str) -> dict:
        return json.loads(self.path(name).read_text())

    def by_hand(self, site: Site) -> SaeEvaluation:
        """The callback on states that the tower gives here, the mean of every n-th image."""
        spliced = self.save("by-hand", site)
        chosen = [number * N_IMAGES // N_MEAN for number in range(N_MEAN)]
        with torch.no_grad():
            x, rest = spliced.cut.prefix(self.images)
        mean = mean_by_type(spliced, x[chosen].double().mean(0))
        classes = Classes(ClassNames(NAMES, NAMES), ("a {}",))
        head = classes.head(self.clip, str(self.folder / "heads"), progress=False)
        labels = torch.arange(N_IMAGES) * 7 // N_IMAGES
        evaluation = SaeEvaluation(spliced, mean, head, labels)
        settings = DeviceConfig(progress=False, accelerator="cpu")
        batch = (x, torch.arange(N_IMAGES), rest)
        loader = torch.utils.data.DataLoader([batch], batch_size=None)
        trainer = build_tester(settings, self.folder, callbacks=[evaluation])
        trainer.test(SplicedModule(spliced), loader, verbose=False)
        return evaluation


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("evaluate_sae"))


def check_equal(found: dict, expected: SaeEvaluation) -> None:
    assert list(found["sae"]) == list(expected.types)
    for kind, each in expected.types.items():
        numbers = found["sae"][kind]
        assert numbers["reconstruction"]["n_rows"] == int(each.reconstruction.n_rows)
        for name in ("fvu", "explained_variance", "cosine", "l0", "dead_fraction"):
            value = float(getattr(each.reconstruction, name))
            assert numbers["reconstruction"][name] == pytest.approx(value, rel=1e-5)
        assert numbers["frequency"] == each.frequency._asdict()
        assert numbers["splice"]["images"] == N_IMAGES
        for name in ("similarity", "kl", "agreement", "cross_entropy", "top1", "top5"):
            shown, measure = numbers["splice"][name], getattr(each.splice, name)
            if measure.clean == measure.ablated:
                assert shown["recovered"] is None
            else:
                assert shown["recovered"] == pytest.approx(measure.recovered, rel=1e-3)
            for number, variant in enumerate(("clean", "spliced", "ablated")):
                value = shown[variant]
                if isinstance(value, dict):
                    assert value["low"] <= value["mean"] <= value["high"]
                    value = value["mean"]
                assert value == pytest.approx(measure[number], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", SITES)
def test_job_equals_the_callback_on_the_whole_set(job: Job, name: str, caplog):
    caplog.set_level("INFO")
    assert job.run(name) == 0
    expected = job.by_hand(SITES[name])
    found = job.metrics(name)
    check_equal(found, expected)
    assert found["identity_error"] < 1e-5
    assert len(found["frequency_edges"]) == 25
    assert job.path(name, "frequency.png").read_bytes().startswith(b"\x89PNG")
    assert "recovered" in caplog.text
    latents = expected.latents
    assert latents is not None
    rows = list(csv.DictReader(job.path(name, "latents.csv").read_text().splitlines()))
    assert [int(row["latent"]) for row in rows] == list(range(N_LATENTS))
    for row, count, mean, largest in zip(rows, *latents[1:], strict=True):
        assert int(row["firing_count"]) == count
        assert float(row["frequency"]) == pytest.approx(int(count) / latents.n_rows, rel=1e-5)
        if count:
            assert float(row["mean_active"]) == pytest.approx(float(mean), rel=1e-4)
            assert float(row["max"]) == pytest.approx(float(largest), rel=1e-4)
        else:
            assert (row["mean_active"], row["max"]) == ("", "")


def test_no_image_enters_clip_twice(job: Job, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def counted(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def run(self: object, images: Tensor, *rest: object) -> object:
            seen.append(len(images))
            return method(self, images, *rest)

        monkeypatch.setattr(owner, name, run)

    counted(Cut, "prefix")
    counted(Tower, "capture")
    counted(Clip, "encode_image")
    for name in SITES:
        seen.clear()
        cache = f"data.cache={job.folder / ('cache-of-' + name)}"
        assert job.run(name, cache, name=f"{name}-counted") == 0
        assert sum(seen) == N_IMAGES
    seen.clear()
    again = f"data.cache={job.folder / 'cache-of-cls'}"
    assert job.run("cls", again, "seed=1", name="cls-again") == 0
    assert not seen


def test_batch_size_changes_nothing(job: Job):
    """Also where the images of the mean end within a batch."""
    for size in (3, 30):
        assert job.run("all", f"data.batch_size={size}", name=f"all-{size}") == 0
    one, other = (job.metrics(f"all-{size}")["sae"] for size in (3, 30))
    for kind in one:
        for part in ("reconstruction", "splice"):
            for name, value in one[kind][part].items():
                value, twin = value, other[kind][part][name]
                if isinstance(value, dict):
                    value, twin = value["ablated"], twin["ablated"]
                if isinstance(value, dict):
                    value, twin = value["mean"], twin["mean"]
                assert value == pytest.approx(twin, rel=1e-4, abs=1e-9), (kind, name)


def test_cached_and_fresh_states_are_the_same(job: Job, monkeypatch: pytest.MonkeyPatch):
    assert job.run("cls") == 0
    # `is_whole` decides: without it the suffix gets the rest that it does not need.
    monkeypatch.setattr(
        "clipattr.jobs.evaluate_sae.CachedStates",
        lambda *arguments, n_mean, progress: FreshStates(*arguments, n_mean=n_mean),
    )
    assert job.run("cls", name="cls-fresh") == 0
    one, other = job.metrics("cls")["sae"]["cls"], job.metrics("cls-fresh")["sae"]["cls"]
    assert one["frequency"] == other["frequency"]
    assert one["splice"]["kl"]["ablated"] == pytest.approx(other["splice"]["kl"]["ablated"])
    assert one["splice"]["top1"] == other["splice"]["top1"]


def test_without_labels(job: Job):
    assert job.run("all", "zeroshot.label=null", name="unlabelled") == 0
    assert job.run("all") == 0
    found, whole = job.metrics("unlabelled")["sae"]["all"], job.metrics("all")["sae"]["all"]
    assert set(found["splice"]) == {"images", "similarity", "kl", "agreement"}
    assert found["splice"]["kl"] == whole["splice"]["kl"]


@pytest.mark.parametrize("name", SITES)
def test_broken_images_are_left_out_and_named(job: Job, tmp_path: Path, name: str):
    """Image 4 is one of those of the mean, 5 is none."""
    shards = write_images(tmp_path / "images", broken=(4, 5))
    overrides = (f"data.shards={shards}", f"data.cache={tmp_path / 'cache'}")
    assert job.run(name, *overrides, name=f"{name}-refused") == 2
    assert job.run(name, *overrides, "data.max_bad_fraction=0.1", name=f"{name}-broken") == 0
    found = job.metrics(f"{name}-broken")["sae"]
    assert all(each["splice"]["images"] == N_IMAGES - 2 for each in found.values())
    lines = job.path(f"{name}-broken", "bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["004", "005"]


def test_second_run_is_skipped(job: Job, caplog, monkeypatch: pytest.MonkeyPatch):
    caplog.set_level("INFO")
    assert job.run("cls") == 0
    monkeypatch.setattr("clipattr.jobs.evaluate_sae.load_model", None)
    assert job.run("cls") == 0
    assert "is finished" in caplog.text


def test_sae_that_does_not_fit_is_refused(job: Job, capsys):
    job.save("foreign", SITES["cls"], sha="0" * 64)
    assert job.run("foreign") == 2
    assert "belongs to model" in capsys.readouterr().err
    job.save("wide", SITES["cls"], d_model=31)
    assert job.run("wide") == 2
    assert "is of width 31" in capsys.readouterr().err
    assert job.run("cls", "mean_images=0", name="none") == 2
    assert "mean_images=0: must be greater than 0" in capsys.readouterr().err
    assert not job.path("foreign").exists()


@pytest.mark.parametrize(("n", "chosen"), [(10, 3), (7, 7), (1000, 512)])
def test_spread_takes_different_images_of_the_whole_set(n: int, chosen: int):
    found = spread(n, chosen)
    assert len(set(found.tolist())) == chosen
    assert found.min() == 0
    assert found.max() >= n - 1 - n // chosen
    assert np.diff(found).max(initial=1) <= -(-n // chosen)
