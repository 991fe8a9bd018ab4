"""What is loaded is what is on disk, with its own preprocessing, in the precision asked for."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipattr.clip import Clip, build_clip, load_clip
from clipattr.clip.names import CONFIG_FILE, MERGES_FILE, WEIGHTS_FILE
from clipattr.errors import CheckpointError, ConfigError
from tests.clip_folders import MODEL, MODELS, PREPROCESS, TEXT, write_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a test that breaks the model works on a copy."""
    return write_model(tmp_path_factory.mktemp("tiny"), MODEL)


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(f"local-dir:{folder}")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_loaded_weights_are_the_ones_on_disk(clip: Clip, folder: Path):
    found = clip.model.state_dict()
    for name, value in load_file(folder / WEIGHTS_FILE).items():
        assert torch.equal(found[name], value), name


def test_model_is_frozen_and_in_eval_mode(clip: Clip):
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not any(module.training for module in clip.model.modules())
    assert not clip.encode_image(torch.zeros(1, 3, 32, 32)).requires_grad


# Precision and embedders


@pytest.fixture(scope="module", params=MODELS)
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("any"), MODELS[request.param])


def inputs_of(clip: Clip) -> tuple[Tensor, Tensor]:
    size = clip.preprocess(Image.new("RGB", (9, 9))).shape
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    return images, clip.tokenizer(["a red star", "a fish on sand", "bolt"])


def test_embeddings_are_the_model_s_before_normalisation(any_folder: Path):
    clip = load_clip(f"local-dir:{any_folder}")
    images, tokens = inputs_of(clip)
    model = cast(open_clip.CLIP, clip.model)
    for found, expected in (
        (clip.encode_image(images), model.encode_image(images, normalize=True)),
        (clip.encode_text(tokens), model.encode_text(tokens, normalize=True)),
    ):
        assert found.shape == (3, 16)
        assert (found.norm(dim=1) - 1).abs().min() > 0.01
        torch.testing.assert_close(normalize(found, dim=1), expected)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_low_precision_is_close_and_really_low(any_folder: Path, precision: str, tolerance: float):
    """Measured: at most two thirds of the tolerance; float32 itself would be at 0."""
    full, low = (load_clip(f"local-dir:{any_folder}", precision=p) for p in ("fp32", precision))
    assert (low.precision, low.dtype) == (precision, DTYPES[precision])
    images, tokens = inputs_of(full)
    for found, expected in (
        (low.encode_image(images), full.encode_image(images)),
        (low.encode_text(tokens), full.encode_text(tokens)),
    ):
        assert found.dtype == low.dtype
        error = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
        assert 1e-5 < error.max() < tolerance


@pytest.mark.parametrize("kind", ["open_clip ViT", "timm ViT"])
@pytest.mark.parametrize("precision", DTYPES)
def test_images_of_any_dtype_are_cast(kind: str, precision: str, tmp_path: Path):
    folder = write_model(tmp_path / "model", MODELS[kind])
    clip = load_clip(f"local-dir:{folder}", precision=precision)
    images, _ = inputs_of(clip)
    expected = clip.encode_image(images)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = clip.encode_image(images.to(dtype))
        assert found.dtype == clip.dtype
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_layer_norms_of_open_clip_towers_stay_in_float32(folder: Path, precision: str):
    clip = load_clip(f"local-dir:{folder}", precision=precision)
    norms = [module for module in clip.model.modules() if isinstance(module, nn.LayerNorm)]
    layers = [module for module in clip.model.modules() if isinstance(module, nn.Linear)]
    assert len(norms) > 5
    assert {module.weight.dtype for module in norms} == {torch.float32}
    assert {module.weight.dtype for module in layers} == {clip.dtype}
    # A float16 sum of squares would overflow above 65504.
    assert norms[0](torch.full((1, 32), 300.0).to(clip.dtype)).isfinite().all()


def test_precisions_have_their_own_hashes(folder: Path):
    hashes = [load_clip(f"local-dir:{folder}", precision=p).weights_sha256 for p in DTYPES]
    assert len(set(hashes)) == 3


def test_logit_scale_and_bias(any_folder: Path):
    weights = load_file(any_folder / WEIGHTS_FILE)
    clip = load_clip(f"local-dir:{any_folder}")
    assert clip.logit_scale == pytest.approx(weights["logit_scale"].double().exp().item())
    bias = weights.get("logit_bias")
    assert clip.logit_bias == (None if bias is None else bias.item())


# Preprocessing and tokenizer


def squash(image: Image.Image) -> Image.Image:
    return image.resize((32, 32), Image.Resampling.BILINEAR)


def crop(image: Image.Image) -> Image.Image:
    return image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))


@pytest.mark.parametrize(
    ("options", "resize"),
    [
        ({"interpolation": "bilinear", "resize_mode": "squash"}, squash),
        ({"interpolation": "bicubic", "resize_mode": "shortest"}, crop),
        ({}, crop),
    ],
)
def test_preprocessing_is_the_model_s_own(
    tmp_path: Path, options: dict[str, object], resize: Callable[[Image.Image], Image.Image]
):
    clip = load_clip(f"local-dir:{write_model(tmp_path / 'model', MODEL, PREPROCESS | options)}")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = (np.asarray(resize(image)) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    result = clip.preprocess(image).permute(1, 2, 0).double()
    torch.testing.assert_close(result, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_tokenizer_reads_the_merges_of_the_folder(clip: Clip):
    """Every word of the world is one token there, and the length is the config's."""
    tokens = clip.tokenizer(["a red star"])
    assert tokens.shape == (1, 8)
    assert (tokens != 0).sum() == 5  # start, three words, end
    assert tokens.max() == 643


def test_tokenizer_that_the_text_tower_does_not_know(broken: Path):
    """Without its merges, a folder gets open_clip's own: an IndexError at the first prompt."""
    (broken / MERGES_FILE).unlink()
    message = rf"49408 tokens and its text tower knows 644: .* as {MERGES_FILE}"
    with pytest.raises(CheckpointError, match=rf"local-dir:{broken}' could not.*{message}"):
        load_clip(f"local-dir:{broken}")
    with pytest.raises(CheckpointError, match=rf"clip.architecture='{broken}' could.*{message}"):
        build_clip(str(broken))


@pytest.mark.parametrize("key", ["hf_tokenizer_name", "hf_model_name"])
def test_text_side_of_transformers_names_the_extra(
    broken: Path, key: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = {"model_cfg": MODEL | {"text_cfg": TEXT | {key: "some/tokenizer"}}}
    (broken / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"some/tokenizer.*pip install 'clipattr\[hf\]'"):
        load_clip(f"local-dir:{broken}")


def test_tokenizer_of_transformers(broken: Path):
    """Runs where the extra is installed."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[PAD]": 1, "red": 2, "star": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(str(broken))
    text = TEXT | {"hf_tokenizer_name": "some/where", "tokenizer_kwargs": {"clean": "canonicalize"}}
    (broken / CONFIG_FILE).write_text(json.dumps({"model_cfg": MODEL | {"text_cfg": text}}))
    clip = load_clip(f"local-dir:{broken}", precision="bf16")
    tokens = clip.tokenizer(["Red star!", "fish"])
    assert tokens.tolist() == [[2, 3, *[1] * 6], [0, *[1] * 7]]
    assert clip.encode_text(tokens).shape == (2, 16)


def test_code_of_a_folder_is_refused(broken: Path):
    text = TEXT | {"tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "x"}
    (broken / CONFIG_FILE).write_text(json.dumps({"model_cfg": MODEL | {"text_cfg": text}}))
    with pytest.raises(CheckpointError, match=r"trust_remote_code.*runs none"):
        load_clip(f"local-dir:{broken}")
