"""The job that describes latents: what it writes, at two sites, by its own and by other eyes."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import load_reliance
from clipattr.clip import embed_prompts, image_tower, load_clip
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.main import run_script
from clipattr.probes import LinearProbe, ProbeRecord, save_probe
from clipattr.semantics.atlas_files import load_atlas
from clipattr.semantics.labels import label_scores, semantic_mean
from clipattr.semantics.unexpected import Threshold
from tests.test_attribution_job import N_LATENTS, SITES, Job
from tests.test_evaluate_sae import N_IMAGES, NAMES, noise
from tests.tiny import save_tiny_clip

CONFIG = Path(__file__).parents[1] / "configs" / "demo" / "atlas.yaml"
WORDS = ["star", "blue", "red"]


class AtlasJob(Job):
    def words(self, sae: str, *overrides: str) -> list[str]:
        words = self.places(sae) | {
            "scorer.name": self.model,
            "atlas.vocabulary": json.dumps(WORDS),
            "atlas.examples": "4",
            "atlas.shown": "3",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        return [str(CONFIG), *(f"{key}={value}" for key, value in words.items())]

    def atlas(self, sae: str, *overrides: str) -> Path:
        assert run_script("evaluate.py", EVALUATE_JOBS, self.words(sae, *overrides)) == 0
        names = [each for each in overrides if each.startswith("name=")]
        return self.folder / "runs" / (names[0].removeprefix("name=") if names else sae)

    def dense(self, name: str) -> Tensor:
        with torch.no_grad():
            state = image_tower(self.clip.model).cut(SITES[name]).prefix(self.images)
            codes = self.saes[name].encode(state.x).to_dense()
        return codes if codes.ndim == 2 else codes.amax(dim=1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> AtlasJob:
    return AtlasJob(tmp_path_factory.mktemp("atlas"))


@pytest.mark.parametrize("site", SITES)
def test_means_and_labels_are_those_of_the_top_images(job: AtlasJob, site: str) -> None:
    folder = job.atlas(site)
    found = load_atlas(folder, job.identity)
    dense = job.dense(site)
    top = dense.topk(4, dim=0)
    ids = top.indices.where(top.values > 0, -1).T
    assert (found.tensors.examples == ids).all()
    with torch.no_grad():
        embeddings = normalize(job.clip.encode_image(job.images), dim=1)
    means = semantic_mean(embeddings, ids)
    torch.testing.assert_close(found.tensors.means, means, atol=1e-5, rtol=1e-5, equal_nan=True)
    words = list(dict.fromkeys([*WORDS, *NAMES]))
    assert found.origin.words == words
    texts = embed_prompts(job.clip, [*(f"a {word}" for word in words), ""])
    scores = label_scores(means, texts[:-1], texts[-1])
    for latent, row in enumerate(scores):
        if not row.isnan().any():
            best = row.argmax()
            assert int(found.tensors.labels[latent, 0]) == int(best)
            assert float(found.tensors.label_scores[latent, 0]) == pytest.approx(
                float(row[best]), abs=1e-5
            )


def keep_everything(found: Tensor, by_chance: list[Tensor], *, level: float) -> Threshold:
    return Threshold(0.0, len(found), sum(map(len, by_chance)) / len(by_chance))


@pytest.mark.parametrize("site", SITES)
def test_tables_have_a_row_per_latent_and_per_pair(
    job: AtlasJob, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of noise nothing is above chance; the list is what is tested.
    monkeypatch.setattr("clipattr.semantics.unexpected.SIGMAS", -1e9)
    monkeypatch.setattr("clipattr.jobs.atlas_unexpected.evidence_threshold", keep_everything)
    folder = job.atlas(site, f"name=loose-{site}")
    table = parquet.read_table(folder / "latents.parquet").to_pydict()
    assert table["latent"] == list(range(N_LATENTS))
    fires = (job.dense(site) > 0).double().mean(dim=0)
    assert table["frequency"] == pytest.approx(fires.tolist())
    assert set(table["label"]) <= {*WORDS, *NAMES, None}
    for name in ("clarity", "monosemanticity", "polysemanticity", "class_entropy", "map_x"):
        assert any(value is not None for value in table[name]), name
    pairs = parquet.read_table(folder / "unexpected.parquet").to_pydict()
    ranks = [rank for rank in pairs["rank"] if rank is not None]
    assert len(ranks) > 5
    assert ranks == list(range(1, len(set(pairs["latent"])) + 1))
    seen: set[int] = set()
    for rank, latent in zip(pairs["rank"], pairs["latent"], strict=True):
        assert (rank is None) == (latent in seen)
        seen.add(latent)
    assert pairs["evidence"] == sorted(pairs["evidence"], reverse=True)
    metrics = json.loads((folder / "metrics.json").read_text())["atlas"]
    assert metrics["unexpected"]["pairs"] == len(pairs["rank"])
    assert metrics["unexpected"]["latents"] == len(ranks)
    by_chance = [metrics["unexpected"][f"by_shuffled_{what}"] for what in ("latents", "images")]
    assert metrics["unexpected"]["by_chance"] == pytest.approx(sum(by_chance))
    reliance = load_reliance(folder, job.identity)
    assert reliance.mean_attribution.shape == (len(NAMES), N_LATENTS)
    for row, (name, latent) in enumerate(zip(pairs["class"], pairs["latent"], strict=True)):
        value = reliance.mean_attribution[NAMES.index(name), latent]
        assert pairs["mean_attribution"][row] == pytest.approx(float(value), rel=1e-5)
    assert metrics["images"] == N_IMAGES


def test_everything_that_a_page_shows_is_there(job: AtlasJob) -> None:
    folder = job.atlas("last")
    report = folder / "report"
    data = "".join(path.read_text() for path in sorted((report / "data").glob("*.js")))
    assert (report / "index.html").is_file()
    for name in NAMES:
        assert json.dumps(name) in data
    examples = load_atlas(folder).tensors.examples[:, :3]
    for row in examples[examples >= 0].unique().tolist():
        assert (report / "thumbs" / "0" / f"{row}.jpg").is_file()


def test_a_finished_atlas_is_not_made_again(job: AtlasJob) -> None:
    before = (job.atlas("last") / "metrics.json").stat().st_mtime_ns
    assert (job.atlas("last") / "metrics.json").stat().st_mtime_ns == before


def test_without_labels_there_is_no_class_entropy(job: AtlasJob) -> None:
    folder = job.atlas("last", "zeroshot.label=null", "name=unlabelled")
    names = parquet.read_schema(folder / "latents.parquet").names
    assert "class_entropy" not in names
    assert "monosemanticity" in names


def test_another_scorer_sees_the_same_images_with_its_own_eyes(job: AtlasJob) -> None:
    other = save_tiny_clip(job.folder / "other", seed=3)
    folder = job.atlas("last", f"scorer.name={other}", "name=other")
    found = load_atlas(folder)
    clip = load_clip(other)
    assert found.origin.scorer["weights_sha256"] == clip.weights_sha256
    pictures = [Image.open(io.BytesIO(noise(number))) for number in range(N_IMAGES)]
    images = torch.stack([clip.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        embeddings = normalize(clip.encode_image(images), dim=1)
    means = semantic_mean(embeddings, found.tensors.examples)
    torch.testing.assert_close(found.tensors.means, means, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_probe_drives_what_the_names_of_its_classes_mean(job: AtlasJob) -> None:
    job.save_probe(list(NAMES))
    folder = job.atlas("last", f"probe={job.folder / 'probe'}", "name=probe")
    assert (folder / "report" / "index.html").is_file()
    found, plain = (load_reliance(each) for each in (folder, job.atlas("last")))
    assert found.origin.head == {"probe": str(job.folder / "probe")}
    assert not torch.equal(found.mean_attribution, plain.mean_attribution)


def test_a_probe_of_other_classes_is_refused(
    job: AtlasJob, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = LinearProbe(16, 2).requires_grad_(False)
    save_probe(probe, job.folder / "wrong", ProbeRecord(["a", "b"], job.identity, "cls", "data"))
    words = job.words("last", f"probe={job.folder / 'wrong'}", "name=wrong")
    assert run_script("evaluate.py", EVALUATE_JOBS, words) == 2
    assert "zeroshot.classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("atlas.examples=1", "atlas.examples"),
        ("atlas.level=0", "atlas.level"),
        ("atlas.shuffles=0", "atlas.shuffles"),
        ("atlas.vocabulary=[missing.txt]", "missing.txt"),
        ("scorer.name=local-dir:missing", "missing"),
    ],
)
def test_errors_name_the_setting(
    job: AtlasJob, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = job.words("last", override, "name=bad")
    assert run_script("evaluate.py", EVALUATE_JOBS, words) == 2
    assert message in capsys.readouterr().err
    assert not (job.folder / "runs" / "bad").exists()
