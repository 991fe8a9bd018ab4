"""Tiny models of several families, as open_clip folders with random weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from clipattr.clip import build_clip
from clipattr.clip.names import BUNDLED, CONFIG_FILE, MERGES_FILE, WEIGHTS_FILE

TEXT = {"context_length": 8, "vocab_size": 644, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
MODEL = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
LISTED = MODEL | {"text_cfg": TEXT | {"vocab_size": 49408}}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 32}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 64}
POOLED = VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
MODELS: Mapping[str, Mapping[str, object]] = {
    "open_clip ViT": MODEL,
    "timm ViT": MODEL | {"vision_cfg": TIMM, "custom_text": True, "init_logit_bias": -10.0},
    "ResNet": MODEL | {"vision_cfg": VISION | {"layers": [1, 1, 1, 1], "patch_size": None}},
    "ConvNeXt": MODEL | {"vision_cfg": CONVNEXT},
    "CoCa": MODEL
    | {
        "vision_cfg": POOLED,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def write_model(
    folder: Path, model_cfg: Mapping[str, object], preprocess_cfg: Mapping[str, object] = PREPROCESS
) -> Path:
    """A folder with a config, merges and random weights; none is the identity by accident."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BUNDLED["planted-world"] / MERGES_FILE, folder / MERGES_FILE)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    model, _, _ = build_clip(str(folder))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.03 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    return folder
