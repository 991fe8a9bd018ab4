"""The job `predict`, against the model and the probe called by hand on each picture."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.jobs.predict_images import Predictions, predict_images
from clipattr.main import run_script
from clipattr.probes import LinearProbe, MlpProbe, ProbeRecord, save_probe
from clipattr.probes.features import EMBEDDING, CodesPart, FeatureSpec, SitePart
from clipattr.probes.sparse import SparseProbe
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.shortcuts.repair import Suppression
from clipattr.shortcuts.suppression_files import FEATURE, SuppressionRecord, save_suppression
from tests.tiny import save_tiny_clip

CONFIG = Path(__file__).parents[1] / "configs" / "evaluate" / "predict.yaml"
CLASSES = ["cracked, not intact", "gr\u00fcn", "a b"]
NAMES = [
    "a photo.jpg",
    "b.PNG",
    "deep/er/c.webp",
    "deep/\u00fcber, \u96ea.jpeg",
    "z/8.jfif",
    'z/9 "x".png',
]
"""Sorted."""
N_LATENTS = 24


def noise(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = {".png": "PNG", ".webp": "WEBP"}
    noise(number).save(path, formats.get(path.suffix.lower(), "JPEG"))


def draw(head: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head.requires_grad_(False)


class Place:
    """A tiny model, pictures, SAEs at two sites, and probes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.photos = folder, folder / "photos"
        self.clip = load_clip(save_tiny_clip(folder / "tiny"))
        self.model = {"name": self.clip.name, "weights_sha256": self.clip.weights_sha256}
        for number, name in enumerate(NAMES):
            save_picture(self.photos / name, number)
        self.images = {name: self.open(self.photos / name) for name in NAMES}
        self.probe = self.save("probe", LinearProbe(16, 3))
        self.tower = image_tower(self.clip.model)
        self.sites = {"cls": Site(1, "residual", "cls"), "spatial": Site(0, "residual", "spatial")}
        self.saes = {name: self.save_sae(name, site) for name, site in self.sites.items()}

    def open(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            return self.clip.preprocess(image.convert("RGB"))[None]

    def save(self, name: str, head: torch.nn.Module, feature: str = EMBEDDING, **more):
        return self.write(name, draw(head), feature, **more)

    def write(self, name: str, head: torch.nn.Module, feature: str = EMBEDDING, **more):
        record = ProbeRecord(CLASSES, self.model, "cls", "data", feature=feature, **more)
        save_probe(head, self.folder / name, record)
        return head

    def save_sae(self, name: str, site: Site) -> TopKSae:
        cut = self.tower.cut(site)
        generator = torch.Generator().manual_seed(1)
        sae = TopKSae(d_model=cut.d_site, n_latents=N_LATENTS, k=6, generator=generator)
        x = torch.cat([cut.read(image).flatten(0, -2) for image in self.images.values()])
        sae.initialise_from(x.repeat(5, 1))
        save_sae(sae, self.folder / name, SaeRecord(cut.site.to_json(), self.model, "data"))
        return sae.requires_grad_(False)

    def sha256(self, sae: str) -> str:
        return json.loads((self.folder / sae / "sae.json").read_text())["tensors_sha256"]

    def suppress(self, name: str, site: str, suppression: Suppression) -> LinearProbe:
        """A repaired probe with what it needs."""
        record = SuppressionRecord(
            "tag",
            str(self.folder / site),
            self.sha256(site),
            N_LATENTS,
            self.sites[site].to_json(),
            self.model,
        )
        save_suppression(self.folder / name, suppression, record)
        return self.save(name, LinearProbe(16, 3), FEATURE)

    def run(self, name: str, *overrides: str) -> int:
        words = {
            "images": self.photos,
            "probe": self.folder / "probe",
            "model.name": self.clip.name,
            "runs": self.folder / "runs",
            "name": name,
            "data.workers": 0,
            "data.batch_size": 4,
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        } | dict(word.split("=", 1) for word in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments])

    def table(self, name: str) -> list[list[str]]:
        path = self.folder / "runs" / name / "predictions.csv"
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def by_hand(self, embed: Callable[[Tensor], Tensor], head: torch.nn.Module) -> Tensor:
        """One picture at a time."""
        logits = [head(embed(image)) for image in self.images.values()]
        return torch.cat(logits).double().softmax(dim=1)

    def unit(self, image: Tensor) -> Tensor:
        return normalize(self.clip.encode_image(image), dim=1)

    def predict(self, probe: str, **settings) -> Predictions:
        return predict_images(self.folder / probe, self.photos, self.clip, workers=0, **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("predict"))


def assert_close(found: Predictions, wanted: Tensor) -> None:
    assert found.paths == NAMES
    torch.testing.assert_close(found.probabilities, wanted, atol=2e-6, rtol=0)


def test_table_equals_a_plain_loop(place: Place, caplog: pytest.LogCaptureFixture):
    assert place.run("plain", "data.workers=1") == 0
    wanted = place.by_hand(place.unit, place.probe)
    header, *rows = place.table("plain")
    assert header == ["path", "label", "probability", *CLASSES]
    assert [row[0] for row in rows] == NAMES
    assert [row[1] for row in rows] == [CLASSES[n] for n in wanted.argmax(1).tolist()]
    numbers = torch.tensor([[float(cell) for cell in row[2:]] for row in rows]).double()
    expected = torch.cat([wanted.amax(1, keepdim=True), wanted], dim=1)
    torch.testing.assert_close(numbers, expected, atol=2e-6, rtol=0)
    metrics = json.loads((place.folder / "runs/plain/metrics.json").read_text())
    counts = {name: [row[1] for row in rows].count(name) for name in CLASSES}
    assert metrics == {"images": len(NAMES), "bad": 0, "predicted": counts}
    caplog.set_level("INFO")
    assert place.run("plain", "data.workers=1") == 0
    assert "is finished" in caplog.text


def test_three_lines_in_a_notebook_do_what_the_job_does(place: Place):
    found = predict_images(place.folder / "probe", str(place.photos), place.clip)
    wanted = place.by_hand(place.unit, place.probe)
    assert_close(found, wanted)
    assert found.class_names == CLASSES
    assert found.labels == [CLASSES[number] for number in wanted.argmax(dim=1).tolist()]
    assert found.bad == []


def test_best_classes_by_name(place: Place):
    assert place.run("top", "top=2") == 0
    wanted = place.by_hand(place.unit, place.probe)
    header, *rows = place.table("top")
    assert header == ["path", "label", "probability", "label_2", "probability_2"]
    for row, probabilities in zip(rows, wanted.tolist(), strict=True):
        ranked = sorted(range(3), key=lambda number: -probabilities[number])[:2]
        assert row[1::2] == [CLASSES[number] for number in ranked]
        assert [float(cell) for cell in row[2::2]] == pytest.approx(
            [probabilities[number] for number in ranked], abs=2e-6
        )
    assert place.run("top", "top=9") == 0
    assert len(place.table("top")[0]) == 1 + 2 * 3


def test_one_file(place: Place):
    assert place.run("one", f"images={place.photos / NAMES[2]}") == 0
    assert [row[0] for row in place.table("one")[1:]] == ["c.webp"]


def test_broken_files_are_listed_and_limited(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for number in range(5):
        save_picture(tmp_path / f"{number}.png", number)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    noise(0).save(tmp_path / "moving.gif")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert place.run("broken", f"images={tmp_path}") == 2
    assert "2 of 7 samples cannot be used" in capsys.readouterr().err
    assert place.run("broken", f"images={tmp_path}", "data.max_bad_fraction=0.3") == 2
    message = capsys.readouterr().err
    assert "3 of 7 samples cannot be used" in message
    assert "data.max_bad_fraction=0.3 allows 2" in message
    assert not (place.folder / "runs/broken").exists()
    assert place.run("broken", f"images={tmp_path}", "data.max_bad_fraction=0.5") == 0
    assert [row[0] for row in place.table("broken")[1:]] == ["0.png", "1.png", "2.png", "4.png"]
    lines = (place.folder / "runs/broken/bad_samples.jsonl").read_text().splitlines()
    reasons = {each["key"]: each["reason"] for each in map(json.loads, lines)}
    assert reasons.keys() == {"3.png", "gone.jpg", "moving.gif"}
    assert reasons["3.png"].startswith("png cannot be decoded")
    assert reasons["gone.jpg"] == "does not exist"
    assert reasons["moving.gif"].startswith(".gif is read as no picture")


def test_a_new_picture_redoes_the_table(place: Place, tmp_path: Path):
    for n_pictures in (1, 2):
        save_picture(tmp_path / f"{n_pictures}.png", n_pictures)
        assert place.run("grows", f"images={tmp_path}") == 0
        assert len(place.table("grows")) == 1 + n_pictures


def test_nothing_to_predict(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "notes.txt").write_text("no picture")
    assert place.run("none", f"images={tmp_path}") == 2
    assert "holds no picture with a name that ends in .jpg" in capsys.readouterr().err
    noise(0).save(tmp_path / "a.bmp")
    assert place.run("none", f"images={tmp_path}") == 2
    assert "1 cannot be read; the first is 'a.bmp': .bmp is read as" in capsys.readouterr().err
    assert place.run("none", f"images={tmp_path / 'nowhere'}") == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    with pytest.raises(DataError, match="nowhere': does not exist"):
        predict_images(place.folder / "probe", tmp_path / "nowhere", place.clip)


@pytest.mark.parametrize("word", ["top=0", "data.batch_size=0", "data.max_bad_fraction=1"])
def test_wrong_settings_are_refused(place: Place, word: str, capsys: pytest.CaptureFixture):
    assert place.run("wrong", word) == 2
    assert f"config error: {word.split('=')[0]}=" in capsys.readouterr().err


def test_a_probe_of_another_model_is_refused(place: Place, tmp_path: Path):
    other = load_clip(save_tiny_clip(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="weights"):
        predict_images(place.folder / "probe", place.photos, other)


def test_an_sae_that_nothing_needs_is_refused(place: Place):
    with pytest.raises(ConfigError, match="which needs no SAE; leave it out"):
        place.predict("probe", sae=place.folder / "cls")


def test_logits_that_are_not_finite_are_refused(place: Place):
    probe = place.save("infinite", LinearProbe(16, 3))
    probe.weight[1] = 3e38
    probe.bias[1] = 3e38
    probe.weight *= place.unit(place.images[NAMES[0]]).sign()
    place.write("infinite", probe)
    with pytest.raises(DataError, match=r"6 of 6 pictures, 'a photo.jpg' and those behind it"):
        place.predict("infinite")


def test_several_labels(place: Place):
    probe = place.save("several", LinearProbe(16, 3), is_multilabel=True)
    units = torch.cat([place.unit(each) for each in place.images.values()])
    probe.bias -= probe(units).mean(dim=0)
    place.write("several", probe, is_multilabel=True)
    wanted = 1 / (1 + (-probe(units).double()).exp())
    assert_close(place.predict("several"), wanted)
    assert place.run("several", f"probe={place.folder / 'several'}") == 0
    header, *rows = place.table("several")
    assert header == ["path", "label", *CLASSES]
    labels = [
        " | ".join(name for name, p in zip(CLASSES, row, strict=True) if p >= 0.5)
        for row in wanted.tolist()
    ]
    assert any(" | " in label for label in labels)
    assert [row[1] for row in rows] == labels
    numbers = torch.tensor([[float(cell) for cell in row[2:]] for row in rows]).double()
    torch.testing.assert_close(numbers, wanted, atol=2e-6, rtol=0)
    metrics = json.loads((place.folder / "runs/several/metrics.json").read_text())
    assert list(metrics["predicted"].values()) == (wanted >= 0.5).sum(dim=0).tolist()


def test_another_preprocessing_is_said(place: Place, caplog: pytest.LogCaptureFixture):
    place.save("told", LinearProbe(16, 3), preprocess=str(place.clip.preprocess))
    place.predict("told")
    assert "pictures made by" not in caplog.text
    place.predict("told", decode="fast")
    assert "Normalize" in caplog.text
    assert caplog.text.rstrip().endswith("decoded fast")


def test_a_name_that_is_no_text(place: Place, tmp_path: Path):
    """Written as the file system has it, not as another name."""
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((place.photos / NAMES[1]).read_bytes())
    assert place.run("bytes", f"images={tmp_path}") == 0
    table = (place.folder / "runs/bytes/predictions.csv").read_bytes()
    assert table.split(b"\n")[1].startswith(b"caf\xe9.png,")


def test_a_hidden_layer_on_a_site(place: Place):
    part = SitePart(0, "residual", "spatial", None, "mean")
    head = place.save("mlp", MlpProbe(32, 3, hidden=5), str(FeatureSpec((part,))))
    cut = place.tower.cut(place.sites["spatial"])
    assert_close(place.predict("mlp"), place.by_hand(lambda x: cut.read(x).mean(dim=1), head))


def test_a_sparse_head_on_codes(place: Place):
    part = CodesPart(1, "residual", "cls", N_LATENTS, place.sha256("cls"))
    head = place.save("sparse", SparseProbe(N_LATENTS, 3), str(FeatureSpec((part,))))
    cut, sae = place.tower.cut(place.sites["cls"]), place.saes["cls"]
    wanted = place.by_hand(lambda x: sae.encode(cut.read(x)), head)
    assert_close(place.predict("sparse", sae=place.folder / "cls"), wanted)
    with pytest.raises(ConfigError, match="sae=FOLDER"):
        place.predict("sparse")


@pytest.mark.parametrize("site", ["cls", "spatial"])
def test_a_repaired_probe_sees_pictures_without_the_cue(place: Place, site: str):
    suppression = Suppression(torch.tensor([3, 17, 5]), torch.tensor([0.2, 1.5, 0.0]))
    head = place.suppress(f"repaired-{site}", site, suppression)
    cut, sae = place.tower.cut(place.sites[site]), place.saes[site]

    def embed(image: Tensor) -> Tensor:
        x, rest = cut.prefix(image)
        codes = sae.encode(x)
        edited = x.clone()
        for latent, mean in zip(*suppression, strict=True):
            a = (codes.values * (codes.indices == latent)).sum(dim=-1, keepdim=True)
            edited -= (a - mean) * sae.directions[latent]
        return normalize(cut.suffix(edited, rest), dim=1)

    wanted = place.by_hand(embed, head)
    assert (wanted - place.by_hand(place.unit, head)).abs().max() > 1e-3
    assert_close(place.predict(f"repaired-{site}"), wanted)


def test_the_sae_of_a_repaired_probe_may_have_moved(place: Place):
    place.suppress("moved", "cls", Suppression(torch.tensor([3]), torch.tensor([0.2])))
    before = place.predict("moved").probabilities
    (place.folder / "cls").rename(place.folder / "elsewhere")
    try:
        with pytest.raises(ConfigError, match="cls, is not there; name its folder by sae=FOLDER"):
            place.predict("moved")
        assert place.run("moved", "probe=" + str(place.folder / "moved")) == 2
        found = place.predict("moved", sae=place.folder / "elsewhere")
        assert found.probabilities.equal(before)
    finally:
        (place.folder / "elsewhere").rename(place.folder / "cls")
    with pytest.raises(CheckpointError, match="its latents are those of the SAE"):
        place.predict("moved", sae=place.folder / "spatial")


def test_a_picture_of_another_format_is_seen_where_all_was_finished(place: Place, tmp_path: Path):
    save_picture(tmp_path / "a.png", 0)
    assert place.run("grown", f"images={tmp_path}") == 0
    noise(1).save(tmp_path / "new.gif")
    assert place.run("grown", f"images={tmp_path}") == 2


def test_the_folder_of_the_probe_is_not_replaced(place: Place, capsys: pytest.CaptureFixture):
    for probe in ("runs/own", "runs/own/repaired/cue"):
        place.write(probe, LinearProbe(16, 3))
        assert place.run("own", f"probe={place.folder / probe}") == 2
        assert "lies in the folder of this run, which would be replaced" in capsys.readouterr().err
    assert not (place.folder / "runs" / "own" / "manifest.json").exists()
