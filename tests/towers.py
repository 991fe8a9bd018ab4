"""The open_clip architectures under test, built small or whole with weights that hide nothing."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import open_clip
import timm
import torch
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.vitamin import VitCfg
from torch import Tensor, nn

# Blocks, heads, patches (rows, columns) and pooling queries of a small tower. All differ, so that
# a swapped axis is an error.
BLOCKS, HEADS, GRID, QUERIES = 2, 3, (2, 4), 5

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "CLIP ViT": (
            "ViT-S-16",
            "ViT-S-16-alt",
            "ViT-S-32",
            "ViT-S-32-alt",
            "ViT-M-16",
            "ViT-M-16-alt",
            "ViT-M-32",
            "ViT-M-32-alt",
            "ViT-B-16",
            "ViT-B-16-plus",
            "ViT-B-16-plus-240",
            "ViT-B-16-quickgelu",
            "ViT-B-32",
            "ViT-B-32-256",
            "ViT-B-32-plus-256",
            "ViT-B-32-quickgelu",
            "ViT-L-14",
            "ViT-L-14-280",
            "ViT-L-14-336",
            "ViT-L-14-336-quickgelu",
            "ViT-L-14-quickgelu",
            "ViT-L-16",
            "ViT-L-16-320",
            "ViT-H-14",
            "ViT-H-14-378",
            "ViT-H-14-378-quickgelu",
            "ViT-H-14-quickgelu",
            "ViT-H-16",
            "ViT-g-14",
            "ViT-bigG-14",
            "ViT-bigG-14-quickgelu",
            "ViT-e-14",
        ),
        "MetaCLIP worldwide": (
            "ViT-L-14-worldwide",
            "ViT-L-14-worldwide-quickgelu",
            "ViT-H-14-worldwide",
            "ViT-H-14-worldwide-378",
            "ViT-H-14-worldwide-quickgelu",
            "ViT-bigG-14-worldwide",
            "ViT-bigG-14-worldwide-378",
        ),
        "CLIPA": (
            "ViT-L-14-CLIPA",
            "ViT-L-14-CLIPA-336",
            "ViT-H-14-CLIPA",
            "ViT-H-14-CLIPA-336",
            "ViT-bigG-14-CLIPA",
            "ViT-bigG-14-CLIPA-336",
        ),
        "CLIP ViT, other text tower": (
            "mt5-base-ViT-B-32",
            "mt5-xl-ViT-H-14",
            "nllb-clip-base",
            "nllb-clip-large",
            "roberta-ViT-B-32",
            "xlm-roberta-base-ViT-B-32",
            "xlm-roberta-large-ViT-H-14",
        ),
        "CoCa": ("coca_ViT-B-32", "coca_ViT-L-14", "coca_base", "coca_roberta-ViT-B-32"),
        "SigLIP": (
            "ViT-B-16-SigLIP",
            "ViT-B-16-SigLIP-256",
            "ViT-B-16-SigLIP-384",
            "ViT-B-16-SigLIP-512",
            "ViT-B-16-SigLIP-i18n-256",
            "ViT-L-16-SigLIP-256",
            "ViT-L-16-SigLIP-384",
            "ViT-SO400M-14-SigLIP",
            "ViT-SO400M-14-SigLIP-378",
            "ViT-SO400M-14-SigLIP-384",
            "ViT-SO400M-16-SigLIP-i18n-256",
            "nllb-clip-base-siglip",
            "nllb-clip-large-siglip",
        ),
        "SigLIP2": (
            "ViT-B-16-SigLIP2",
            "ViT-B-16-SigLIP2-256",
            "ViT-B-16-SigLIP2-384",
            "ViT-B-16-SigLIP2-512",
            "ViT-B-32-SigLIP2-256",
            "ViT-L-16-SigLIP2-256",
            "ViT-L-16-SigLIP2-384",
            "ViT-L-16-SigLIP2-512",
            "ViT-SO400M-14-SigLIP2",
            "ViT-SO400M-14-SigLIP2-378",
            "ViT-SO400M-16-SigLIP2-256",
            "ViT-SO400M-16-SigLIP2-384",
            "ViT-SO400M-16-SigLIP2-512",
            "ViT-gopt-16-SigLIP2-256",
            "ViT-gopt-16-SigLIP2-384",
        ),
        "EVA": ("EVA01-g-14", "EVA01-g-14-plus"),
        "EVA02": (
            "EVA02-B-16",
            "EVA02-L-14",
            "EVA02-L-14-336",
            "EVA02-E-14",
            "EVA02-E-14-plus",
        ),
        "PE-Core": (
            "PE-Core-T-16-384",
            "PE-Core-S-16-384",
            "PE-Core-B-16",
            "PE-Core-L-14-336",
            "PE-Core-bigG-14-448",
        ),
        "MobileCLIP ViT": ("MobileCLIP-B", "MobileCLIP2-B", "MobileCLIP2-L-14"),
        "ViTamin": (
            "ViTamin-S",
            "ViTamin-S-LTT",
            "ViTamin-B",
            "ViTamin-B-LTT",
            "ViTamin-L",
            "ViTamin-L-256",
            "ViTamin-L-336",
            "ViTamin-L-384",
            "ViTamin-L2",
            "ViTamin-L2-256",
            "ViTamin-L2-336",
            "ViTamin-L2-384",
            "ViTamin-XL-256",
            "ViTamin-XL-336",
            "ViTamin-XL-384",
        ),
        "timm ViT without class token": ("vit_medium_patch16_gap_256",),
    }
)
FAMILY = MappingProxyType({name: family for family, names in FAMILIES.items() for name in names})
NAMES = tuple(FAMILY)

# Towers that embed images but have no residual stream of tokens to cut.
EMBEDDERS = (
    "RN50",
    "RN50-quickgelu",
    "RN101",
    "RN101-quickgelu",
    "RN50x4",
    "RN50x4-quickgelu",
    "RN50x16",
    "RN50x16-quickgelu",
    "RN50x64",
    "RN50x64-quickgelu",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnext_base_w",
    "convnext_base_w_320",
    "convnext_large",
    "convnext_large_d",
    "convnext_large_d_320",
    "convnext_xlarge",
    "convnext_xxlarge",
    "convnext_xxlarge_320",
    "MobileCLIP-S1",
    "MobileCLIP-S2",
    "MobileCLIP2-S0",
    "MobileCLIP2-S2",
    "MobileCLIP2-S3",
    "MobileCLIP2-S4",
    "swin_base_patch4_window7_224",
    "vit_relpos_medium_patch16_cls_224",
)

SMALL_TEXT = MappingProxyType(
    {"context_length": 5, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
)


class Size(NamedTuple):
    """What a tower is natively."""

    kind: str
    blocks: int
    width: int
    heads: int
    patch: int
    image: int
    has_cls: bool


@cache
def native_size(name: str) -> Size:
    """Read from the config, or from the timm trunk built without memory."""
    vision = vision_config(name)
    image = vision["image_size"]
    if "timm_model_name" not in vision:
        kind, settings = "open_clip VisionTransformer", CLIPVisionCfg(**vision)
        assert isinstance(settings.layers, int)
        heads = settings.width // settings.head_width
        return Size(kind, settings.layers, settings.width, heads, settings.patch_size, image, True)
    trunk = native_trunk(vision["timm_model_name"])
    kind, patch = f"timm {type(trunk).__name__}", trunk.feature_info[0]["reduction"]
    heads, has_cls = trunk.blocks[0].attn.num_heads, trunk.cls_token is not None
    return Size(kind, len(trunk.blocks), trunk.embed_dim, heads, patch, image, has_cls)


@cache
def native_trunk(timm_name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(timm_name)


def vision_config(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    assert config is not None, f"open_clip {open_clip.__version__} does not know {name}"
    return config["vision_cfg"]


class Level(Enum):
    """How much of an architecture is built; patch size, head width and ratios stay native."""

    SMALL = "2 blocks of 3 heads, 2 x 4 patches"
    DEEP = "all blocks at native width, 2 x 4 patches"
    NATIVE = "as it is"


def reduced_width(name: str) -> int:
    """The stem of MobileCLIP-B writes out its channels, so its width stays."""
    size = native_size(name)
    stem_is_fixed = vision_config(name).get("timm_model_name") == "vit_base_mci_224"
    return size.width if stem_is_fixed else HEADS * (size.width // size.heads)


def build(name: str, level: Level = Level.SMALL, *, precision: str = "fp32") -> nn.Module:
    """The architecture with random weights and a small text tower."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    assert config is not None
    vision = config["vision_cfg"] | _vision_at(name, level)
    text: dict[str, Any] = dict(SMALL_TEXT)
    overrides = {"vision_cfg": vision, "text_cfg": text}
    if "multimodal_cfg" in config:
        text |= {"output_tokens": True}
        overrides["multimodal_cfg"] = dict(SMALL_TEXT)
    with _trunks_with(_trunk_at(name, level)):
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            precision=precision,
            force_image_size=vision["image_size"],
            **overrides,
        )
    randomise(model)
    return freeze(model)


def distinct(names: Sequence[str], level: Level) -> dict[str, tuple[str, ...]]:
    """The names that are the same image tower at this level, by the first of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        config = open_clip.get_model_config(name)
        assert config is not None
        vision = config["vision_cfg"] | _vision_at(name, level)
        if "timm_model_name" in vision and level is not Level.NATIVE:
            # The level overrides the size of the pictures behind the last underscore; some names
            # of one family have another activation.
            timm_name = vision["timm_model_name"]
            vision["timm_model_name"] = re.sub(r"_\d{3}$", "", timm_name)
            vision["modules"] = repr(native_trunk(timm_name))
        parts = (vision, config["embed_dim"], config.get("quick_gelu", False))
        found.setdefault(json.dumps(parts, sort_keys=True), []).append(name)
    return {same[0]: tuple(same) for same in found.values()}


def _vision_at(name: str, level: Level) -> dict[str, Any]:
    """What the level changes in the config of the image tower."""
    if level is Level.NATIVE:
        return {}
    size = native_size(name)
    image = {"image_size": (GRID[0] * size.patch, GRID[1] * size.patch)}
    if level is Level.DEEP or "timm_model_name" in vision_config(name):
        return image
    width = reduced_width(name)
    return image | {"layers": BLOCKS, "width": width, "attn_pooler_queries": QUERIES}


def _trunk_at(name: str, level: Level) -> dict[str, Any]:
    """What the level changes in the arguments of timm."""
    timm_name = vision_config(name).get("timm_model_name")
    if timm_name is None or level is Level.NATIVE:
        return {}
    image = {"img_size": _vision_at(name, level)["image_size"]}
    if level is Level.DEEP:
        return image
    size, width = native_size(name), reduced_width(name)
    trunk = image | {"depth": BLOCKS}
    if width != size.width:
        trunk |= {"embed_dim": width, "num_heads": HEADS}
    if timm_name.startswith("vitamin"):
        stem = VitCfg(embed_dim=(16, 32, width), depths=(1, 1, 1), stem_width=16)
        trunk |= {"embed_cfg": stem}
    return trunk


@contextmanager
def _trunks_with(settings: Mapping[str, object]) -> Iterator[None]:
    """open_clip passes no size to timm: `timm.create_model` gets these settings on top."""
    with mock.patch.object(timm, "create_model", partial(timm.create_model, **settings)):
        yield


def freeze(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """No gamma is one, no bias zero, no branch silent: nothing is the identity by accident."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if last in ("logit_scale", "logit_bias"):
            continue
        if "scale" in last or "gamma" in last or (last == "weight" and parameter.ndim == 1):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.ndim < 2 or "pos" in last or last in ("cls_token", "reg_token"):
            parameter.copy_(0.4 * noise)
        elif last in ("latent", "query") or "token_embedding" in name:
            parameter.copy_(noise)
        else:
            # A bare parameter `proj` is multiplied from the right, a weight from the left.
            fan_in = parameter.shape[0] if last.endswith("projection") or last == "proj" else 0
            parameter.copy_(noise * (fan_in or parameter[0].numel()) ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)


def images_for(model: nn.Module, rows: int) -> Tensor:
    visual: Any = visual_of(model)
    height, width = visual.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, height, width, generator=generator)


def visual_of(model: nn.Module) -> VisionTransformer | TimmModel:
    visual = model.visual
    assert isinstance(visual, VisionTransformer | TimmModel)
    return visual


def prefix_tokens(model: nn.Module) -> tuple[int, bool]:
    """How many tokens come before the patches, and whether the first is a class token."""
    visual = visual_of(model)
    if isinstance(visual, VisionTransformer):
        return 1, True
    trunk: Any = visual.trunk
    return trunk.num_prefix_tokens, trunk.cls_token is not None
