"""The job that asks an atlas: a planted latent is found by words, by a picture and by another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import embed_prompts
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.main import run_script
from clipattr.semantics.atlas_files import Atlas, load_atlas, save_atlas
from clipattr.semantics.search import find_latents
from tests.test_atlas_job import AtlasJob
from tests.test_evaluate_sae import noise
from tests.tiny import save_tiny_clip

CONFIG = Path(__file__).parents[1] / "configs" / "evaluate" / "find.yaml"
PLANTED, SEEN, LIKE, DEAD = 4, 6, 11, 2


class Search(AtlasJob):
    """An atlas by the job of that name, and a copy in which some means are planted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.made = self.atlas("last")
        self.planted = self.plant(load_atlas(self.made))

    def plant(self, atlas: Atlas) -> Path:
        tensors = {name: value.clone() for name, value in atlas.tensors._asdict().items()}
        means = tensors["means"]
        texts = self.embed(["a red flag"])[0] - self.reference("a {}", atlas)
        means[PLANTED] = normalize(means.nanmean(0), dim=0) + 2 * normalize(texts, dim=0)
        (self.folder / "photo.png").write_bytes(noise(99))
        with torch.no_grad():
            pixels = self.clip.preprocess(Image.open(self.folder / "photo.png"))
            self.photo = normalize(self.clip.encode_image(pixels[None])[0], dim=0)
        means[SEEN] = 0.9 * self.photo
        means[LIKE] = means[SEEN] + 0.01 * torch.randn(16, generator=torch.Generator())
        means[DEAD] = torch.nan
        folder = self.folder / "planted"
        shutil.copytree(self.made, folder)
        save_atlas(Atlas(atlas.tensors._replace(means=means), atlas.origin), folder)
        self.means = means
        return folder

    def embed(self, prompts: list[str]) -> Tensor:
        return embed_prompts(self.clip, prompts)

    def reference(self, template: str, atlas: Atlas) -> Tensor:
        return self.embed([template.replace("{}", word) for word in atlas.origin.words]).mean(0)

    def find(self, name: str, *overrides: str, code: int = 0) -> dict:
        words = {
            "atlas": str(self.planted),
            "name": f"find/{name}",
            "runs": str(self.folder / "runs"),
            "cache": str(self.folder / "cache"),
            "top": "4",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [str(CONFIG), *(f"{key}={value}" for key, value in words.items())]
        assert run_script("evaluate.py", EVALUATE_JOBS, arguments) == code
        record = self.folder / "runs" / "find" / name / "find.json"
        return json.loads(record.read_text()) if record.exists() else {}


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return Search(tmp_path_factory.mktemp("find"))


def check(found: dict, means: Tensor, query: Tensor, *rest: object, **more: int) -> None:
    """Both lists are those of the pure function."""
    expected = find_latents(means, query, *rest, top=4, **more)
    for name in ("most", "least"):
        ranked = getattr(expected, name)
        assert [each["latent"] for each in found[name]] == ranked.latents.tolist()
        scores = [each["score"] for each in found[name]]
        assert scores == pytest.approx(ranked.scores.tolist(), abs=1e-5)


def test_words_find_the_planted_latent(search: Search, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    found = search.find("words", "query=[red flag, moon]")
    atlas = load_atlas(search.planted)
    assert [each["query"] for each in found["answers"]] == ["red flag", "moon"]
    assert found["answers"][0]["templates"] == ["a {}"]
    assert found["answers"][0]["most"][0]["latent"] == PLANTED
    reference = search.reference("a {}", atlas)
    for answer, prompt in zip(found["answers"], ["a red flag", "a moon"], strict=True):
        check(answer, search.means, search.embed([prompt])[0], reference)
    first = found["answers"][0]["most"][0]
    words = [(each["word"], each["score"]) for each in first["labels"]]
    assert words == atlas.words_of(PLANTED)
    table = parquet.read_table(search.planted / "latents.parquet")
    assert first["share_of_images"] == table["frequency"].to_pylist()[PLANTED]
    assert first["page"] == f"{search.planted}/report/latent.html#{PLANTED}"
    assert first["examples"] == [
        row for row in atlas.tensors.examples[PLANTED].tolist() if row >= 0
    ]
    folder = search.folder / "runs" / "find" / "words"
    assert (folder / "find.txt").read_text().strip() in caplog.text
    assert f"latent.html#{PLANTED}" in caplog.text
    assert '"a red flag"; score' in caplog.text
    with Image.open(folder / "find.png") as picture:
        assert picture.width > 500


def test_templates(search: Search, tmp_path: Path):
    (tmp_path / "templates.txt").write_text("a {}\n{} here")
    search.find("two", "query=moon", f"templates={tmp_path / 'templates.txt'}")
    table = (search.folder / "runs" / "find" / "two" / "find.txt").read_text()
    assert table.startswith('"moon" in 2 prompts; ')
    found = search.find("templates", "query=a red flag", "templates=none")["answers"][0]
    assert found["templates"] == ["{}"]
    reference = search.reference("{}", load_atlas(search.planted))
    check(found, search.means, search.embed(["a red flag"])[0], reference)


def test_a_picture_finds_the_latent_of_such_pictures(search: Search):
    found = search.find("image", f"image={search.folder / 'photo.png'}")["answers"][0]
    assert {found["most"][place]["latent"] for place in (0, 1)} == {SEEN, LIKE}
    check(found, search.means, search.photo)


def test_a_latent_finds_the_one_like_it(search: Search, monkeypatch: pytest.MonkeyPatch):
    """And no model is loaded for it."""
    monkeypatch.setattr("clipattr.jobs.atlas_words.load_clip", None)
    found = search.find("latent", f"latent={SEEN}")["answers"][0]
    assert found["most"][0]["latent"] == LIKE
    check(found, search.means, search.means[SEEN], without=SEEN)


def test_a_finished_search_shows_its_table_again(
    search: Search, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level("INFO")
    search.find("again", "query=moon")
    table = (search.folder / "runs" / "find" / "again" / "find.txt").read_text()
    caplog.clear()
    monkeypatch.setattr("clipattr.jobs.find.load_atlas", None)
    search.find("again", "query=moon")
    assert table in caplog.text


def test_an_atlas_without_table_and_pages(search: Search, tmp_path: Path):
    for name in ("atlas.json", "atlas.safetensors"):
        shutil.copy(search.planted / name, tmp_path)
    found = search.find("bare", "query=red flag", f"atlas={tmp_path}")["answers"][0]
    assert found["most"][0]["latent"] == PLANTED
    assert found["most"][0]["share_of_images"] is None
    assert found["most"][0]["page"] is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["query, image, latent", "none of them"]),
        (["query=sea", "latent=3"], ["query and latent are there"]),
        (["query=[]"], ["at least one"]),
        (["query=[sea, ' ']"], ["empty text"]),
        (["query=[sea, sea]"], ["'sea'", "twice"]),
        (["latent=-1"], ["latent=-1", "from 0"]),
        (["latent=20"], ["latent=20", "0 to 19"]),
        ([f"latent={DEAD}"], [f"latent={DEAD}", "fired on none"]),
        (["latent=3", "templates=none"], ["templates=none", "goes with query"]),
        (["query=sea", "templates=nothing"], ["templates='nothing'"]),
        (["query=sea", "top=0"], ["top=0"]),
        (["image=no.jpg"], ["image='no.jpg'", "does not exist"]),
        (["latent=3", "atlas=no"], ["atlas='no'", "does not exist"]),
        (["latent=3", "atlas={folder}"], ["no finished atlas", "configs/evaluate/atlas.yaml"]),
        (["image={folder}"], ["cannot be read"]),
        (["image={folder}/broken.jpg"], ["cannot be decoded"]),
    ],
)
def test_refusals(search: Search, capsys, words: list[str], parts: list[str]):
    (search.folder / "broken.jpg").write_bytes(b"no picture")
    filled = [word.replace("{folder}", str(search.folder)) for word in words]
    assert search.find("refused", *filled, code=2) == {}
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_other_weights_under_the_name_of_the_scorer(search: Search, tmp_path: Path, capsys):
    """Embeddings by two models have nothing in common."""
    shutil.copytree(search.planted, tmp_path / "atlas")
    record = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    record["scorer"]["name"] = save_tiny_clip(tmp_path / "other", seed=1)
    (tmp_path / "atlas" / "atlas.json").write_text(json.dumps(record))
    search.find("other", "query=sea", f"atlas={tmp_path / 'atlas'}", code=2)
    message = capsys.readouterr().err
    assert message.startswith("checkpoint error")
    assert record["scorer"]["weights_sha256"] in message


@pytest.mark.parametrize(("content", "part"), [(b"PAR", "no table"), (None, "has 3 latents")])
def test_a_damaged_table(search: Search, tmp_path: Path, capsys, content, part: str):
    shutil.copytree(search.planted, tmp_path / "atlas")
    path = tmp_path / "atlas" / "latents.parquet"
    if content is None:
        parquet.write_table(parquet.read_table(path).slice(0, 3), path)
    else:
        path.write_bytes(content)
    search.find("damaged", "latent=3", f"atlas={tmp_path / 'atlas'}", code=2)
    assert part in capsys.readouterr().err
