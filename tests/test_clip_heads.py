"""Text heads: rows, scores, probabilities, their cache; templates and lists of class names."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import open_clip
import pytest
import torch
from open_clip import zero_shot_metadata
from torch import Tensor

from clipattr.clip import (
    Clip,
    TextHead,
    embed_prompts,
    heads,
    load_class_names,
    load_clip,
    load_templates,
    prompt_head,
    text_head,
)
from clipattr.clip.templates import TEMPLATES
from clipattr.errors import CheckpointError, ConfigError, DataError
from tests.tiny import CONFIG, save_tiny_clip

TEXT = CONFIG["model_cfg"]["text_cfg"] | {"context_length": 77}
PROMPTS = ["a star", "a red fish on sand", "a moon", "a bolt", "shape"]
NAMES = ["star", "star fish", "moon", "bolt", "drop"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny", text_cfg=TEXT))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """With a bias of its logits, as SigLIP has."""
    folder = tmp_path_factory.mktemp("siglip") / "tiny"
    return load_clip(save_tiny_clip(folder, init_logit_scale=1.5, init_logit_bias=-0.7))


@pytest.fixture
def embeddings() -> Tensor:
    return 3 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


class Counted:
    """Counts the prompts that go through the text tower, and breaks off after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, limit: float = math.inf) -> None:
        self.prompts, self.limit = 0, limit
        encode = Clip.encode_text

        def encode_text(clip: Clip, tokens: Tensor) -> Tensor:
            if self.prompts + len(tokens) > self.limit:
                raise KeyboardInterrupt
            self.prompts += len(tokens)
            return encode(clip, tokens)

        monkeypatch.setattr(Clip, "encode_text", encode_text)


# Rows


def raw_rows(clip: Clip, prompts: list[str]) -> Tensor:
    """What open_clip itself makes of the prompts."""
    encode = cast(Callable[..., Tensor], clip.model.encode_text)
    return encode(clip.tokenizer(prompts))


def test_prompts_are_unit_rows_of_the_text_tower(clip: Clip):
    rows = embed_prompts(clip, PROMPTS)
    assert rows.shape == (5, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    raw = raw_rows(clip, PROMPTS)
    torch.testing.assert_close(rows, raw / raw.square().sum(dim=1, keepdim=True).sqrt())
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_prompts_do_not_depend_on_the_batch(clip: Clip, batch_size: int):
    expected = embed_prompts(clip, PROMPTS)
    torch.testing.assert_close(embed_prompts(clip, PROMPTS, batch_size=batch_size), expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("imagenet_80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet_7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_rows_are_those_of_open_clip(clip: Clip, name: str, theirs: tuple):
    head = text_head(clip, NAMES, templates=load_templates(name))
    expected = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, NAMES, theirs)
    assert head.names == tuple(NAMES)
    torch.testing.assert_close(head.weights, expected.T, atol=1e-6, rtol=1e-6)
    assert (head.weights @ head.weights.T).fill_diagonal_(0).max() < 0.9999


def test_rows_against_a_plain_loop(clip: Clip):
    """The mean of unit rows and not of raw ones, with templates as different as can be."""
    templates = ("{}", "a red {} on a checked sand, a {}")
    head = text_head(clip, NAMES, templates=templates, batch_size=3)
    for name, row in zip(NAMES, head.weights, strict=True):
        total = torch.zeros(16, dtype=torch.float64)
        for template in templates:
            raw = raw_rows(clip, [name.join(template.split("{}"))])[0].double()
            total += raw / raw.norm()
        torch.testing.assert_close(row.double(), total / total.norm(), atol=1e-6, rtol=0)


def test_prompt_head_takes_prompts_as_they_are(clip: Clip):
    head = prompt_head(clip, PROMPTS)
    torch.testing.assert_close(head.weights, embed_prompts(clip, PROMPTS))
    assert head.names == tuple(PROMPTS)


def test_rows_are_float32_also_of_a_bf16_model(clip: Clip):
    rows = embed_prompts(clip, PROMPTS)
    half = load_clip(clip.name, precision="bf16")
    found = text_head(half, NAMES).weights
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(embed_prompts(half, PROMPTS), rows, atol=0.03, rtol=0)


def test_rows_that_are_not_finite_are_refused(clip: Clip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        Clip, "encode_text", lambda _, tokens: torch.full((len(tokens), 16), math.inf)
    )
    with pytest.raises(ConfigError, match=r"model.precision=fp32 .* not finite"):
        text_head(clip, NAMES)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["a", "b", "a"], ["{}"], "stand twice: a$"),
        (["a", " "], ["{}"], "class name 1 is empty"),
        ([], ["{}"], "0 class names, 1 templates"),
        (["a"], [], "1 class names, 0 templates"),
        (["a"], ["{}", "a photo"], "template 'a photo' has no {}"),
        (["a"], "a {}", "template 'a' has no {}"),
    ],
)
def test_wrong_words(clip: Clip, names: list[str], templates: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        text_head(clip, names, templates=templates)


def test_no_prompts(clip: Clip):
    with pytest.raises(ConfigError, match="no prompts"):
        embed_prompts(clip, [])


@pytest.mark.parametrize("progress", [True, False])
def test_progress(clip: Clip, capfd: pytest.CaptureFixture[str], progress: bool):
    text_head(clip, NAMES, progress=progress)
    assert ("5/5" in capfd.readouterr().err) == progress


# Scores and probabilities


def test_scores_are_cosines(clip: Clip, embeddings: Tensor):
    head = text_head(clip, NAMES)
    expected = [
        [float(row @ e) / float(row.norm() * e.norm()) for row in head.weights.double()]
        for e in embeddings.double()
    ]
    scores = head.scores(embeddings)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(head.scores(embeddings[2]), scores[2])
    torch.testing.assert_close(head.scores(embeddings.view(2, 3, 16)), scores.view(2, 3, 5))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_have_the_wider_dtype(
    clip: Clip, embeddings: Tensor, given: torch.dtype, expected: torch.dtype
):
    head = text_head(clip, NAMES)
    scores = head.scores(embeddings.to(given))
    assert scores.dtype == expected
    torch.testing.assert_close(scores.float(), head.scores(embeddings), atol=0.01, rtol=0)


def logits_of(clip: Clip, images: Tensor) -> Tensor:
    """What the model itself says of images and prompts."""
    get_logits = cast(Callable[..., tuple[Tensor, Tensor]], clip.model.get_logits)
    return get_logits(images, clip.tokenizer(PROMPTS))[0]


def test_probabilities_are_the_model_s_own(clip: Clip, siglip: Clip):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    logits = logits_of(clip, images)
    found = prompt_head(clip, PROMPTS).probabilities(clip.encode_image(images))
    torch.testing.assert_close(found, logits.softmax(dim=1), atol=1e-5, rtol=0)
    logits = logits_of(siglip, images)
    head = prompt_head(siglip, PROMPTS)
    found = head.probabilities(siglip.encode_image(images))
    torch.testing.assert_close(found, logits.sigmoid(), atol=1e-5, rtol=0)
    assert (head.logit_scale, head.logit_bias) == pytest.approx((math.exp(1.5), -0.7))


def test_probabilities_written_out(embeddings: Tensor):
    weights = torch.eye(16)[:3]
    cosines = (embeddings / embeddings.norm(dim=1, keepdim=True))[:, :3].double()
    shared = TextHead(("a", "b", "c"), weights, 7.0, None).probabilities(embeddings)
    alone = TextHead(("a", "b", "c"), weights, 7.0, -2.0).probabilities(embeddings)
    for row in range(6):
        powers = [math.exp(7 * float(cosine)) for cosine in cosines[row]]
        for number in range(3):
            expected = powers[number] / sum(powers)
            assert float(shared[row, number]) == pytest.approx(expected, abs=1e-6)
            expected = 1 / (1 + math.exp(2) / powers[number])
            assert float(alone[row, number]) == pytest.approx(expected, abs=1e-6)


# Cache


def test_cached_rows_are_read_and_not_embedded(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = text_head(clip, NAMES)
    counted = Counted(monkeypatch)
    first = text_head(clip, NAMES, cache=tmp_path / "text")
    second = text_head(clip, NAMES, cache=tmp_path / "text")
    assert counted.prompts == 5
    assert torch.equal(first.weights, plain.weights)
    assert torch.equal(second.weights, plain.weights)


def test_killed_run_goes_on_with_the_first_missing_chunk(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    templates = ("{}", "a {}", "a red {}")
    whole = text_head(clip, NAMES, templates=templates)
    monkeypatch.setattr(heads, "_CHUNK_PROMPTS", 7)  # two classes
    with monkeypatch.context() as patch:
        counted = Counted(patch, limit=13)
        with pytest.raises(KeyboardInterrupt):
            text_head(clip, NAMES, templates=templates, cache=tmp_path)
        assert counted.prompts == 12
    counted = Counted(monkeypatch)
    resumed = text_head(clip, NAMES, templates=templates, cache=tmp_path)
    assert counted.prompts == 3
    torch.testing.assert_close(resumed.weights, whole.weights)


def test_everything_that_decides_the_rows_is_in_the_key(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text_head(clip, ["a", "b"], templates=("{}", "red {}"), cache=tmp_path)
    counted = Counted(monkeypatch)
    words = ("a", "red a", "b", "red b")  # the same prompts, one class each
    assert len(text_head(clip, words, templates=("{}",), cache=tmp_path).weights) == 4
    assert counted.prompts == 4
    other = replace(clip, weights_sha256="0" * 64)
    text_head(other, words, templates=("{}",), cache=tmp_path)
    assert counted.prompts == 8
    text_head(replace(clip, precision="bf16"), words, templates=("{}",), cache=tmp_path)
    assert counted.prompts == 12
    text_head(clip, [*words[:3], "red c"], templates=("{}",), cache=tmp_path)
    assert counted.prompts == 16
    text_head(clip, words, templates=("{}",), cache=tmp_path)
    assert counted.prompts == 16


def test_equal_weights_under_another_activation_are_another_model(tmp_path: Path):
    plain = load_clip(save_tiny_clip(tmp_path / "plain"))
    quick = load_clip(save_tiny_clip(tmp_path / "quick", quick_gelu=True))
    assert quick.weights_sha256 != plain.weights_sha256
    first = text_head(plain, NAMES, cache=tmp_path / "text").weights
    second = text_head(quick, NAMES, cache=tmp_path / "text").weights
    torch.testing.assert_close(second, text_head(quick, NAMES).weights)
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost", "no json"])
def test_damaged_cache_is_named(clip: Clip, tmp_path: Path, damage: str):
    text_head(clip, NAMES, cache=tmp_path)
    (rows,) = tmp_path.glob("*.safetensors")
    content = bytearray(rows.read_bytes())
    match damage:
        case "cut":
            rows.write_bytes(content[:-5])
        case "flipped":
            content[-3] ^= 1
            rows.write_bytes(content)
        case "lost":
            rows.unlink()
        case _:
            rows.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"{rows.stem}.*; delete {tmp_path}/{rows.stem}\.\*"):
        text_head(clip, NAMES, cache=tmp_path)


# Templates and class names


@pytest.mark.parametrize(
    ("name", "theirs", "n_templates"),
    [
        ("imagenet_80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES, 80),
        ("imagenet_7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES, 7),
    ],
)
def test_sets_are_those_of_open_clip(name: str, theirs: tuple, n_templates: int):
    found = load_templates(name)
    assert len(found) == n_templates
    for word in ("tench", "yellow lady's slipper", "cherimoya (custard apple)"):
        assert [t.replace("{}", word) for t in found] == [template(word) for template in theirs]


def test_other_templates(tmp_path: Path):
    assert load_templates("simple") == ("a photo of a {}.",)
    assert load_templates("none") == ("{}",)
    assert load_templates("a {} at night") == ("a {} at night",)
    path = tmp_path / "some.txt"
    path.write_bytes(b"\xef\xbb\xbfa {}\r\n  the {}, a {}  \r\n")
    assert load_templates(str(path)) == ("a {}", "the {}, a {}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a {}\na photo\n", r"line 2: 'a photo' has no {}"),
        (b"a {}\n\nthe {}\n", "line 2: is blank"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a {}\nan {}\n\xff {}\n", "line 3: is not UTF-8"),
    ],
)
def test_broken_template_file(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}.*{message}"):
        load_templates(str(path))


def test_unknown_template_names_the_sets():
    with pytest.raises(ConfigError, match=rf"'imagenet'.*{', '.join(TEMPLATES)}"):
        load_templates("imagenet")


def test_classes_of_imagenet():
    words, names = load_class_names(["imagenet"])
    assert list(words) == list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    assert len(set(names)) == 1000
    changed = [(a, b) for a, b in zip(words, names, strict=True) if a != b]
    assert ("sunglasses", "sunglasses (837)") in changed
    assert [word for word, _ in changed] == ["missile", "missile", "sunglasses", "sunglasses"]


def test_other_classes(tmp_path: Path):
    assert load_class_names(["a", "b"]) == (("a", "b"), ("a", "b"))
    path = tmp_path / "names.txt"
    path.write_text("stars\nmoon, half\n", encoding="utf-8")
    assert load_class_names([str(path)]).names == ("stars", "moon, half")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\na\n", "line 3: 'a' stands in line 1 as well"),
        (b"a\n", "holds one class name"),
        (b"a\n\nb", "line 2: is blank"),
        (b"\n", "is empty"),
        (b"a\n\xe9\n", "line 2: is not UTF-8"),
    ],
)
def test_broken_class_file(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}.*{message}"):
        load_class_names([str(path)])


def test_one_class_is_no_list():
    with pytest.raises(ConfigError, match=r"\['star'\].*imagenet or a text file"):
        load_class_names(["star"])
