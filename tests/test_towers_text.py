"""Every text tower of open_clip, and its options, against raw hooks."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import jaxtyping
import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from clipattr.clip import Site, Tower, text_tower
from clipattr.errors import ConfigError
from tests.tower_checks import (
    Subject,
    check_attention,
    check_last_layer,
    check_rows,
    check_sites,
    difference,
    untouched,
)
from tests.towers import BLOCKS, EMBEDDERS, HEADS, NAMES, SMALL_TEXT, freeze, randomise

LENGTH, VOCABULARY = 9, 23
SMALL_IMAGES = {"image_size": 8, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}


def reduced_config(name: str) -> dict[str, Any] | None:
    """The config with a small text tower; None for one of Hugging Face."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    assert config is not None
    text = config["text_cfg"]
    if "hf_model_name" in text:
        return None
    head_width = text["width"] // text["heads"]
    text |= {"width": HEADS * head_width, "heads": HEADS, "layers": BLOCKS}
    text |= {"context_length": LENGTH, "vocab_size": VOCABULARY}
    # Names of tokenizers say nothing about the tower.
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(key, None)
    config["vision_cfg"] = SMALL_IMAGES | {"output_tokens": text.get("output_tokens", False)}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = dict(SMALL_TEXT)
    return config


def distinct() -> dict[str, dict[str, Any]]:
    """One name for each text tower that differs in more than its size."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in (*NAMES, *EMBEDDERS):
        config = reduced_config(name)
        if config is not None:
            found.setdefault(json.dumps(config, sort_keys=True), (name, config))
    return dict(found.values())


VARIANTS = distinct()


def build(config: Mapping[str, Any]) -> Any:
    settings = dict(config)
    custom = settings.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in settings else CustomTextCLIP if custom else CLIP
    model = kind(**settings)
    randomise(model)
    return freeze(model)


ENDS = (4, LENGTH - 1, 2, 5)


def ids_with(end: int) -> Tensor:
    """Words, an end of text at another place in each row (also the last), padding behind it."""
    generator = torch.Generator().manual_seed(2)
    # Words differ from every end (2, 7, 22) and from padding (0, 5).
    ids = torch.randint(8, VOCABULARY - 1, (len(ENDS), LENGTH), generator=generator)
    for row, position in enumerate(ENDS):
        ids[row, position] = end
        ids[row, position + 1 :] = 0
    return ids


def text_subject(model: Any) -> Subject:
    is_plain = isinstance(model, CLIP)
    part: Any = model if is_plain else model.text
    pooling = part.text_pool_type if is_plain else part.pool_type
    end = part.text_eos_id if is_plain else part.eos_id
    ids = ids_with(end if pooling == "eos" else VOCABULARY - 1)
    rows, length = ids.shape
    if not is_plain and part.cls_emb is not None:
        length, pooling = length + 1, "last"
    ends = {"last": (length - 1,) * rows, "first": (0,) * rows}
    pooled = torch.tensor(ends.get(pooling, ENDS))
    everything = torch.arange(length).expand(rows, -1)

    def encode(batch: Tensor) -> Tensor:
        return model.encode_text(batch, normalize=False)

    blocks = list(part.transformer.resblocks)
    positions = {"cls": pooled[:, None], "all": everything}
    return Subject(text_tower(model), model, encode, blocks, ids, positions)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_site_is_the_model(name: str):
    subject = text_subject(build(VARIANTS[name]))
    with untouched(subject.model):
        check_sites(subject, subject.sites())
        check_attention(subject, linear=True)
        if VARIANTS[name]["text_cfg"].get("proj_type") != "none":
            check_last_layer(subject)
        for site in (Site(0, "mlp", "cls"), Site(0, "residual", "all"), Site(1, "heads", "cls")):
            check_rows(subject, site)


BASE = {
    "embed_dim": 24,
    "vision_cfg": SMALL_IMAGES,
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": 48,
        "heads": 3,
        "layers": 2,
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "last": {"pool_type": "last"},
    "first": {"pool_type": "first", "no_causal_mask": True},
    "first causal": {"pool_type": "first"},
    "eos": {"pool_type": "eos", "eos_id": 7},
    "no causal mask": {"no_causal_mask": True},
    "layer scale": {"ls_init_value": 0.1},
    "no projection": {"proj_type": "none"},
    "biased projection": {"proj_bias": True},
    "tokens": {"output_tokens": False, "norm_kwargs": {"eps": 1e-2}},
    "class token": {"embed_cls": True},
    "class token, no causal mask": {"embed_cls": True, "no_causal_mask": True},
    "padding inside": {"embed_cls": True, "pad_id": 9},
}


# open_clip's CLIP drops the class token: only CustomTextCLIP has one.
BOTH = [(option, True) for option in OPTIONS]
BOTH += [(option, False) for option in OPTIONS if "embed_cls" not in OPTIONS[option]]


@pytest.mark.parametrize(("option", "custom"), BOTH)
def test_options(option: str, custom: bool):
    text = BASE["text_cfg"] | OPTIONS[option]
    subject = text_subject(build(BASE | {"text_cfg": text, "custom_text": custom}))
    check_sites(subject, subject.sites())
    if option != "no projection":
        check_last_layer(subject)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cls_mask", [None, False, True])
def test_padding_masks(causal: bool, cls_mask: bool | None):
    """open_clip's configs cannot ask for them, a model that was put together by hand can."""
    text = BASE["text_cfg"] | {"no_causal_mask": not causal, "embed_cls": cls_mask is not None}
    model = build(BASE | {"text_cfg": text, "custom_text": True})
    model.text.use_pad_mask = not causal
    model.text.correct_cls_mask = bool(cls_mask)
    subject = text_subject(model)
    check_sites(subject, subject.sites())


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP2"])
def test_halves_compile_and_follow_autocast(name: str, monkeypatch: pytest.MonkeyPatch):
    """As users run it: shapes are checked in tests only, and dynamo cannot trace the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config = reduced_config(name)
    assert config is not None
    subject = text_subject(build(config))
    cut = subject.tower.cut(Site(0, "mlp", "cls"))
    exact = subject.encode(subject.inputs)
    torch.compiler.reset()
    x, rest = torch.compile(cut.prefix, backend="eager", fullgraph=True)(subject.inputs)
    compiled = torch.compile(cut.suffix, backend="eager", fullgraph=True)(x, rest)
    difference(compiled, exact, "compiled")
    with torch.autocast("cpu", torch.bfloat16):
        expected = subject.encode(subject.inputs)
        found = cut.suffix(*cut.prefix(subject.inputs))
    rounding = (expected - exact).abs().max()
    assert rounding > 1e-3, "autocast did nothing"
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 2 * rounding


def test_end_of_text_that_is_missing_or_doubled():
    """The first of equal ids is pooled; without an end open_clip pools the first token."""
    for option in ("argmax", "eos"):
        text = BASE["text_cfg"] | OPTIONS[option]
        model = build(BASE | {"text_cfg": text})
        tower: Tower = text_tower(model)
        ids = torch.full((3, LENGTH), 3)
        ids[1, 2] = ids[1, 6] = 22 if option == "argmax" else 7
        ids[2, :] = 22 if option == "argmax" else 7
        expected = model.encode_text(ids)
        difference(tower.embed(ids), expected, option)
        cut = tower.cut(Site(0, "residual", "cls"))
        difference(cut.suffix(*cut.prefix(ids)), expected, option)


def test_text_tower_of_hugging_face_is_refused():
    model = build(BASE | {"custom_text": True})
    encoder = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(encoder)
    model.text = encoder.eval()
    with pytest.raises(ConfigError, match="HFTextEncoder"):
        text_tower(model)


def test_patches_of_a_text_are_refused():
    with pytest.raises(ConfigError, match="text tower has no patches, allowed are cls"):
        text_tower(build(BASE)).cut(Site(0, "residual", "spatial"))
