"""An explanation with an atlas: labels, example images, and from which patches a latent fires."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipattr.clip import Site, image_tower
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.main import run_script
from clipattr.report.explanation import ExplainedScore, FiredBy, LatentPart, Meaning, Part
from clipattr.report.explanation import explanation_table as table_of
from clipattr.report.explanation_gallery import Gallery
from clipattr.report.explanation_picture import explanation_png
from clipattr.semantics.atlas_files import load_atlas
from tests.test_atlas_job import AtlasJob
from tests.test_attribution_job import SITES
from tests.test_evaluate_sae import noise
from tests.test_explain import VISION, Place

FILE = Path(__file__).parents[1] / "configs" / "evaluate" / "explain.yaml"


class ExplainJob(AtlasJob):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "photo.png").write_bytes(noise(3))
        self.atlases = {site: self.atlas(site, f"name=atlas-{site}") for site in SITES}

    def explain(self, site: str, *overrides: str, name: str = "explain") -> int:
        words = {
            "sae": str(self.folder / site),
            "image": str(self.folder / "photo.png"),
            "prompt": "a star",
            "model.name": self.model,
            "atlas": str(self.atlases[site]),
            "name": name,
            "runs": str(self.folder / "runs"),
            "top": "3",
            "examples": "2",
            "trainer.accelerator": "cpu",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [str(FILE), *(f"{key}={value}" for key, value in words.items())]
        return run_script("evaluate.py", EVALUATE_JOBS, arguments)

    def record(self, name: str) -> dict:
        return json.loads((self.folder / "runs" / name / "explanation.json").read_text())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ExplainJob:
    return ExplainJob(tmp_path_factory.mktemp("explain-atlas"))


@pytest.mark.parametrize("site", SITES)
def test_latents_have_the_labels_and_examples_of_the_atlas(job: ExplainJob, site: str, caplog):
    caplog.set_level("INFO")
    assert job.explain(site, name=site) == 0
    record, atlas = job.record(site), load_atlas(job.atlases[site])
    assert record["atlas"] == str(job.atlases[site])
    for each in record["scores"][0]["latents"]:
        words = atlas.words_of(each["latent"])
        assert [(label["word"], label["score"]) for label in each["labels"]] == words
        rows = atlas.tensors.examples[each["latent"], :2]
        assert each["examples"] == rows[rows >= 0].tolist()
        word = words[0][0] if words else "-"
        line = next(line for line in caplog.text.splitlines() if f" {each['latent']} " in line)
        assert line.endswith(f"  {word}")


def test_a_latent_of_the_class_token_says_from_where_it_fires(job: ExplainJob):
    assert job.explain("last", name="fired") == 0
    latents = job.record("fired")["scores"][0]["latents"]
    image = job.clip.preprocess(Image.open(io.BytesIO(noise(3))))[None]
    with torch.no_grad():
        codes = job.saes["last"].encode(image_tower(job.clip.model).cut(SITES["last"]).read(image))
    for each in latents:
        fired_by = each["fired_by"]
        assert np.shape(fired_by["patches"]) == (4, 4)
        total = np.sum(fired_by["patches"]) + fired_by["other_tokens"] + fired_by["nothing"]
        assert total == pytest.approx(float(codes.to_dense()[0, each["latent"]]), rel=1e-3)
        assert "heatmap" not in each
    assert job.explain("all", name="spatial") == 0
    assert all("fired_by" not in each for each in job.record("spatial")["scores"][0]["latents"])


def test_an_embedding_of_all_patches_has_no_heatmaps(tmp_path: Path, caplog):
    """What the class token read is not all that it is made of; the table does not need it."""
    vision = VISION | {"pool_type": "avg"}
    averaged = Place(tmp_path / "averaged", {"embedding": Site(-1, "embedding")}, vision)
    assert averaged.run("embedding", "prompt=a") == 0
    assert "no heatmaps: Site" in caplog.text
    assert all("fired_by" not in each for each in averaged.scores("embedding")[0]["latents"])


ERRORS = {
    "another sae": ("last", ["atlas=ATLAS-all"], "sha256 of its SAE's weights is"),
    "no atlas": ("last", ["atlas=SAE"], "atlas.json: cannot be read"),
    "absent": ("last", ["atlas=ABSENT"], "absent does not exist"),
    "more examples than pictures": ("last", ["examples=4", "atlas=BARE"], "Take fewer"),
    "too many": ("last", ["examples=10"], "examples=10: allowed are 0 to 9"),
    "pictures of other images": ("last", ["atlas=OTHER"], "thumbnails of the images other"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(job: ExplainJob, what: str, capsys):
    bare, other = job.folder / "bare", job.folder / "other-images"
    if not bare.exists():
        shutil.copytree(job.atlases["last"], bare)
        for path in (bare / "report" / "thumbs" / "0").glob("*.jpg"):
            path.unlink()
        shutil.copytree(job.atlases["last"], other)
        mark = other / "report" / "thumbs" / "thumbnails.json"
        mark.write_text(json.dumps(json.loads(mark.read_text()) | {"made_from": "other"}))
    site, words, message = ERRORS[what]
    paths = {"ATLAS-all": job.atlases["all"], "SAE": job.folder / "last", "BARE": bare}
    paths |= {"ABSENT": job.folder / "absent", "OTHER": other}
    for short, path in paths.items():
        words = [word.replace(short, str(path)) for word in words]
    assert job.explain(site, *words, name="error") == 2
    assert message in capsys.readouterr().err
    assert not (job.folder / "runs" / "error" / "explanation.json").exists()


def test_an_atlas_of_another_model_is_refused(job: ExplainJob, capsys):
    folder = job.folder / "foreign-atlas"
    shutil.copytree(job.atlases["last"], folder)
    record = json.loads((folder / "atlas.json").read_text())
    record["model"]["weights_sha256"] = "0" * 64
    (folder / "atlas.json").write_text(json.dumps(record))
    assert job.explain("last", f"atlas={folder}", name="error") == 2
    assert "belongs to model" in capsys.readouterr().err


def test_without_pictures_an_atlas_gives_labels_alone(job: ExplainJob):
    assert job.explain("last", "examples=0", name="labels") == 0
    for each in job.record("labels")["scores"][0]["latents"]:
        assert each["examples"] == []
        assert each["labels"]


def latent(number: int, *, fires: bool = False, rows: Sequence[int] = ()) -> LatentPart:
    fired_by = FiredBy([[1.0, -0.5], [0.0, 0.25]], 0.1, -0.1) if fires else None
    meaning = Meaning([("$cash", 0.2)], rows) if rows else None
    return LatentPart(number, 2.0, Part(0.5, 0.4, 0.3, 0.5), None, fired_by, meaning)


@pytest.mark.parametrize(
    ("fires", "n_rows", "cells"), [(True, 0, 5), (True, 4, 2), (False, 5, 2), (True, 9, 1)]
)
def test_a_row_of_the_picture_has_place_for_its_cells(fires: bool, n_rows: int, cells: int):
    """`cells` latents side by side: seven of them take as many rows as they need."""
    latents = [latent(number, fires=fires, rows=range(n_rows)) for number in range(7)]
    pictures = {row: np.full((9, 12, 3), 20 * row, dtype=np.uint8) for row in range(9)}
    seven = Gallery(np.zeros((8, 8, 3), dtype=np.uint8), latents, pictures).height
    fewest = Gallery(np.zeros((8, 8, 3), dtype=np.uint8), latents[:cells], pictures).height
    caption = Gallery(np.zeros((8, 8, 3), dtype=np.uint8), [], pictures).height
    assert caption == 0.0
    assert seven > fewest
    assert -(-7 // cells) == round((seven - 0.35) / (fewest - 0.35))


def test_the_picture_shows_the_examples():
    """A colour that nothing else of the picture has."""
    score = ExplainedScore("a", 0.5, 0.1, 1, 0.5, 0.0, Part(0.0, None, None, 0.0), [])
    score = score._replace(latents=[latent(7, fires=True, rows=[3])])
    assert "$cash" in table_of(score)
    picture = np.zeros((8, 8, 3), dtype=np.uint8) + np.array([11, 222, 33], dtype=np.uint8)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    drawn = Image.open(io.BytesIO(explanation_png(image, [score], {3: picture})))
    is_it = (np.asarray(drawn.convert("RGB")) == [11, 222, 33]).all(axis=2)
    assert is_it.sum() > 1000
