"""Zero-shot accuracy: the numbers against plain loops, and the job on any labelled shards."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import open_clip
import pytest
import torch
import yaml
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from clipattr.clip import Clip, load_clip
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.errors import DataError
from clipattr.main import run_script
from clipattr.metrics.accuracy import measure_accuracy, wilson_interval
from clipattr.world.factors import NOUNS
from tests.tars import write_shard
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "evaluate" / "zeroshot.yaml"
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
NAMES = ["star", "moon", "bolt", "drop", "red fish", "sand", "a boat on the sea"]
N_IMAGES = 40


# The numbers


@pytest.mark.parametrize("n_classes", [3, 5, 6, 9])
def test_accuracy_against_a_plain_loop(n_classes: int):
    """The last class has no image; it is in the scores all the same."""
    generator = torch.Generator().manual_seed(n_classes)
    scores = torch.randn(50, n_classes, generator=generator)
    labels = torch.randint(0, n_classes - 1, (50,), generator=generator)
    found = measure_accuracy(
        zip(scores.split([20, 1, 29]), labels.split([20, 1, 29]), strict=True), n_classes
    )
    ranks = [
        sum(float(other) > float(row[label]) for other in row)
        for row, label in zip(scores.double(), labels, strict=True)
    ]
    shares: list[float | None] = []
    for number in range(n_classes):
        own = [rank == 0 for rank, label in zip(ranks, labels, strict=True) if label == number]
        shares.append(sum(own) / len(own) if own else None)
        assert found.images[number] == len(own)
    seen = [share for share in shares if share is not None]
    assert found.per_class == pytest.approx(shares)
    assert found.per_class[-1] is None
    assert found.mean_per_class == pytest.approx(sum(seen) / len(seen))
    assert found.top1.mean == pytest.approx(sum(rank == 0 for rank in ranks) / 50)
    if n_classes > 5:
        assert found.top5 is not None
        assert found.top5.mean == pytest.approx(sum(rank < 5 for rank in ranks) / 50)
    else:
        assert found.top5 is None


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (1, 1), (3, 10), (1812, 2000)])
def test_interval_is_scipy_s(right: int, images: int):
    expected = binomtest(right, images).proportion_ci(method="wilson")
    found = wilson_interval(right, images)
    assert found == pytest.approx((right / images, expected.low, expected.high), abs=1e-9)


def test_scores_that_are_not_finite_have_no_accuracy():
    scores = torch.tensor([[0.1, 0.2], [float("nan"), 0.3]])
    with pytest.raises(DataError, match="1 images of a batch have a score of nan"):
        measure_accuracy([(scores, torch.tensor([0, 1]))], 2)


# The job


def noise(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def label_of(number: int) -> int:
    """Class 3 has no image."""
    return (0, 1, 2, 4, 5, 6)[number % 6]


def write_shards(folder: Path, fields: Callable[[int], dict[str, bytes]]) -> Path:
    folder.mkdir()
    samples: list[dict[str, object]] = [
        {"__key__": f"{number:03d}", "png": noise(number), **fields(number)}
        for number in range(N_IMAGES)
    ]
    write_shard(folder / "000.tar", samples[:25])
    write_shard(folder / "001.tar", samples[25:])
    return folder


class Job:
    """The shipped config on a tiny model and on shards of noise."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.numbers = write_shards(
            folder / "numbers", lambda number: {"cls": f"{label_of(number)}\n".encode()}
        )

    def run(self, *overrides: str) -> int:
        words = {
            "data.shards": str(self.numbers),
            "zeroshot.classes": json.dumps(NAMES),
            "zeroshot.templates": "simple",
            "model.name": self.model,
            "runs": str(self.folder / "runs"),
            "data.cache": str(self.folder / "cache"),
            "data.workers": "0",
            "trainer.accelerator": "cpu",
            "trainer.progress": "false",
        }
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(CONFIG), *arguments])

    def metrics(self, name: str = "zeroshot/world") -> dict:
        return json.loads((self.folder / "runs" / name / "metrics.json").read_text())["zeroshot"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("zeroshot")
    return Job(folder, save_tiny_clip(folder / "resnet", vision_cfg=RESNET))


def encode(clip: Clip) -> Tensor:
    pictures = [Image.open(io.BytesIO(noise(number))) for number in range(N_IMAGES)]
    with torch.no_grad():
        batch = torch.stack([clip.preprocess(one) for one in pictures])
        return cast(Callable[..., Tensor], clip.model.encode_image)(batch)


def ranks_by_hand(job: Job, names: list[str]) -> list[int]:
    """How many classes beat the true one, image by image, with open_clip's own classifier."""
    clip = load_clip(job.model)
    assert isinstance(clip.model.visual, ModifiedResNet)
    weights = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, names, ["a photo of a {}."]
    )
    ranks = []
    for number, embedding in enumerate(encode(clip).double()):
        scores = [float(embedding @ column) for column in weights.T.double()]
        ranks.append(sum(score > scores[label_of(number)] for score in scores))
    return ranks


def test_job_against_a_plain_loop_on_a_model_without_sites(job: Job, caplog):
    caplog.set_level("INFO")
    assert job.run() == 0
    found, ranks = job.metrics(), ranks_by_hand(job, NAMES)
    assert found["images"] == N_IMAGES
    assert found["top1"]["mean"] == pytest.approx(sum(rank == 0 for rank in ranks) / N_IMAGES)
    assert found["top5"]["mean"] == pytest.approx(sum(rank < 5 for rank in ranks) / N_IMAGES)
    shares = []
    for label, name in enumerate(NAMES):
        own = [ranks[number] == 0 for number in range(N_IMAGES) if label_of(number) == label]
        assert found["per_class"][name]["images"] == len(own)
        if own:
            shares.append(sum(own) / len(own))
            assert found["per_class"][name]["accuracy"] == pytest.approx(shares[-1])
    assert found["per_class"]["drop"] == {"accuracy": None, "images": 0}
    assert found["classes_without_images"] == 1
    assert found["mean_per_class"] == pytest.approx(sum(shares) / 6)
    assert 0 < sum(rank == 0 for rank in ranks) < sum(rank < 5 for rank in ranks) < N_IMAGES
    assert "1 classes have no image and no accuracy: drop" in caplog.text
    assert "40 images of 6 classes" in caplog.text


def test_names_in_json_are_labels_too(job: Job):
    def fields(number: int) -> dict[str, bytes]:
        return {"json": json.dumps({"kind": NAMES[label_of(number)]}).encode()}

    shards = write_shards(job.folder / "names", fields)
    assert job.run() == 0
    overrides = (f"data.shards={shards}", "zeroshot.label=json:kind", "name=names")
    assert job.run(*overrides) == 0
    assert job.metrics("names") == job.metrics()


def test_class_file_and_template_file(job: Job, caplog):
    caplog.set_level("INFO")
    assert job.run() == 0
    names, templates = job.folder / "names.txt", job.folder / "templates.txt"
    names.write_text("\n".join(NAMES) + "\n")
    templates.write_text("a photo of a {}.\n")
    overrides = (f"zeroshot.classes=[{names}]", f"zeroshot.templates={templates}", "name=files")
    assert job.run(*overrides) == 0
    assert job.metrics("files") == job.metrics()
    # Another content of the same files is another result, not a finished run.
    names.write_text("\n".join(reversed(NAMES)) + "\n")
    assert job.run(*overrides) == 0
    assert list(job.metrics("files")["per_class"]) == NAMES[::-1]
    templates.write_text("a drawing of a {}\n")
    assert job.run(*overrides) == 0
    assert "files is finished" not in caplog.text
    assert job.run(*overrides) == 0
    assert "files is finished" in caplog.text


def test_imagenet(job: Job):
    """1000 names, two pairs of which are one word: the pair shares a row and keeps its numbers."""
    assert job.run("zeroshot.classes=[imagenet]", "name=imagenet") == 0
    found = job.metrics("imagenet")
    assert len(found["per_class"]) == 1000
    assert found["classes_without_images"] == 994
    assert found["per_class"]["sunglasses (837)"] == {"accuracy": None, "images": 0}
    ranks = ranks_by_hand(job, list(open_clip.IMAGENET_CLASSNAMES))
    assert found["top1"]["mean"] == pytest.approx(sum(rank == 0 for rank in ranks) / N_IMAGES)


def test_few_classes_have_no_top5(job: Job):
    shards = write_shards(job.folder / "two", lambda number: {"cls": str(number % 2).encode()})
    overrides = (f"data.shards={shards}", "zeroshot.classes=[star, moon]", "name=two")
    assert job.run(*overrides) == 0
    assert job.metrics("two")["top5"] is None
    assert job.metrics("two")["images"] == N_IMAGES


def test_second_run_is_skipped(job: Job, caplog, monkeypatch: pytest.MonkeyPatch):
    caplog.set_level("INFO")
    assert job.run() == 0
    monkeypatch.setattr("clipattr.jobs.evaluate_zeroshot.load_model", None)
    assert job.run() == 0
    assert "is finished" in caplog.text


def test_images_and_prompts_are_embedded_once(job: Job, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("the model ran although its embeddings are cached")

    assert job.run() == 0
    monkeypatch.setattr(Clip, "encode_image", forbidden)
    monkeypatch.setattr(Clip, "encode_text", forbidden)
    assert job.run("name=again") == 0
    assert job.metrics("again") == job.metrics()


def test_equal_weights_under_another_activation_have_their_own_cache(job: Job, tmp_path: Path):
    found = set()
    for name, options in (("plain", {}), ("quick", {"quick_gelu": True})):
        model = save_tiny_clip(tmp_path / name, **options)
        assert job.run(f"model.name={model}", f"name={name}") == 0
        found.add(json.loads((job.folder / "runs" / name / "manifest.json").read_text())["data"])
    assert len(found) == 2


def test_broken_samples_are_left_out(job: Job, caplog):
    caplog.set_level("INFO")

    def fields(number: int) -> dict[str, bytes]:
        label = {} if number == 1 else {"cls": str(label_of(number)).encode()}
        return label | ({"png": b"no picture"} if number in (5, 30) else {})

    shards = write_shards(job.folder / "broken", fields)
    options = (f"data.shards={shards}", "data.max_bad_fraction=0.1", "name=broken")
    assert job.run(*options) == 0
    found, ranks = job.metrics("broken"), ranks_by_hand(job, NAMES)
    kept = [number for number in range(N_IMAGES) if number not in (1, 5, 30)]
    assert found["images"] == 37
    for label, name in enumerate(NAMES):
        own = [ranks[number] == 0 for number in kept if label_of(number) == label]
        share = sum(own) / len(own) if own else None
        assert found["per_class"][name] == {"accuracy": share, "images": len(own)}
    assert "3 broken samples were left out" in caplog.text


def test_broken_samples_of_both_kinds_are_limited_together(job: Job, capsys):
    """One lacks its label and one its image: each alone is below the limit."""

    def fields(number: int) -> dict[str, bytes]:
        label = {} if number == 1 else {"cls": b"0"}
        return label | ({"png": b"no picture"} if number == 5 else {})

    options = (f"data.shards={write_shards(job.folder / 'two kinds', fields)}", "name=two")
    assert job.run(*options, "data.max_bad_fraction=0.03") == 2
    message = capsys.readouterr().err
    assert "2 of 40 samples cannot be used" in message
    assert job.run(*options, "data.max_bad_fraction=0.05") == 0


@pytest.mark.parametrize(
    ("overrides", "kind", "parts"),
    [
        (["zeroshot.classes=[a, b, c, d, e]"], "data", ["label 'cls'", "'5'", "0 to 4"]),
        (["zeroshot.label=json:kind"], "data", ["lacks json", "40 of 40"]),
        (["zeroshot.label=kind"], "config", ["zeroshot.label='kind'", "cls or json:<key>"]),
        (["zeroshot.classes=[]"], "config", ["zeroshot.classes=[]", "[imagenet]"]),
        (["zeroshot.classes=[a, b, a]"], "config", ["zeroshot.classes: a stands there twice"]),
        (["zeroshot.classes=[none.txt]"], "config", ["none.txt", "one name a line"]),
        (["zeroshot.classes=imagenet"], "config", ["must be a list of text"]),
        (["zeroshot.templates=imagenet_8"], "config", ["imagenet_8", "imagenet_80"]),
    ],
)
def test_wrong_settings_cost_no_forward(
    job: Job, capsys, monkeypatch: pytest.MonkeyPatch, overrides, kind, parts
):
    monkeypatch.setattr("clipattr.jobs.evaluate_zeroshot.load_model", None)
    assert job.run("name=wrong", *overrides) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{kind} error: ")
    assert all(part in message for part in parts), message
    assert not (job.folder / "runs" / "wrong").exists()


def test_shipped_config_names_the_nouns_of_the_world():
    values = yaml.safe_load(CONFIG.read_text())
    assert tuple(values["zeroshot"]["classes"]) == NOUNS
    assert values["zeroshot"]["templates"] == "a {}"
