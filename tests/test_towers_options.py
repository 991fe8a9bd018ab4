"""Options that no name of open_clip uses, but a user's config may: cut right, or refused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from clipattr.clip import Site, image_tower
from clipattr.errors import ConfigError
from tests.tower_checks import (
    Subject,
    blocks_of,
    check_attention,
    check_inputs,
    check_sites,
    image_subject,
)
from tests.towers import SMALL_TEXT, freeze, native_trunk, randomise

OPEN_CLIP: dict[str, Any] = {
    "image_size": (16, 32),
    "patch_size": 8,
    "width": 48,
    "layers": 2,
    "head_width": 16,
}
OPTIONS: Mapping[str, dict[str, Any]] = {
    "average": {"pool_type": "avg"},
    "norm behind the class token": {"final_ln_after_pool": True},
    "layer scale": {"ls_init_value": 0.1},
    "no pre-norm": {"no_ln_pre": True},
    "patch dropout": {"patch_dropout": 0.5},
    "attention pooling, average": {"attentional_pool": True, "pool_type": "avg"},
    "norm and activation": {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}},
    "norms of q and k": {"qk_norm": True},
    "scaled heads": {"scale_heads": True},
    "inner norm": {"scale_attn_inner": True},
    "norm of attention": {"scale_attn": True, "ls_init_value": 0.1},
    "norm in the MLP": {"scale_fc": True},
}


def subject_of(vision: Mapping[str, Any], change: Callable[[Any], None] | None = None) -> Subject:
    """`change` gets every block; the weights are drawn afterwards."""
    model = CustomTextCLIP(24, dict(vision), dict(SMALL_TEXT))  # type: ignore[arg-type]
    for block in blocks_of(model):
        if change is not None:
            change(block)
    randomise(model)
    return image_subject(freeze(model))


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_open_clip(option: str):
    subject = subject_of(OPEN_CLIP | {"attn_pooler_queries": 5} | OPTIONS[option])
    check_sites(subject, subject.sites())


def test_value_output_maps_of_scaled_heads():
    """Layer scale and head scale are part of the maps."""
    subject = subject_of(OPEN_CLIP | {"scale_heads": True, "ls_init_value": 0.1})
    maps = subject.tower.head_maps(0)
    before = subject.tower.cut(Site(0, "residual_before", "all")).read(subject.inputs)
    normed = subject.tower.normed_input(0, before)
    weights = subject.tower.attention_weights(0, before)
    total = maps.output_bias
    for head in range(3):
        value = normed @ maps.value[head] + maps.value_bias[head]
        total = total + weights[:, head] @ value @ maps.output[head]
    attention = subject.tower.cut(Site(0, "attention", "all")).read(subject.inputs)
    torch.testing.assert_close(total, attention, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "option",
    [{"pool_type": "none"}, {"attentional_pool": "parallel"}, {"attentional_pool": "cascade"}],
)
def test_a_tower_that_gives_no_single_vector_is_refused(option: dict[str, str]):
    model = CustomTextCLIP(48, OPEN_CLIP | option, dict(SMALL_TEXT))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pool_type='none'"):
        image_tower(freeze(model))


# timm: a model, how open_clip pools it, and arguments of the model that open_clip does not have.
VIT = "vit_base_patch16_224"
TIMM: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "class token and registers": ("vit_base_patch14_reg4_dinov2", {"timm_pool": "token"}, {}),
    "registers alone": ("vit_medium_patch16_reg1_gap_256", {"timm_pool": "avg"}, {}),
    "pooled with its prefix": (VIT, {"timm_pool": "avg"}, {"pool_include_prefix": True}),
    "largest value": (VIT, {"timm_pool": "max"}, {}),
    "linear head of open_clip": (VIT, {"timm_proj": "linear", "timm_proj_bias": True}, {}),
    "MLP head of open_clip": (VIT, {"timm_proj": "mlp"}, {}),
    "norms of q and k": (VIT, {}, {"qk_norm": True}),
    "norms in front of projections": (VIT, {}, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "post-norm": (VIT, {}, {"block_fn": ResPostBlock}),
    "packed SwiGLU": (VIT, {}, {"mlp_layer": SwiGLUPacked}),
    "rotary positions, registers": (
        "vit_medium_patch16_rope_reg1_gap_256",
        {"timm_pool": "avg"},
        {},
    ),
    "rotary positions per layer": ("vit_base_patch16_rope_mixed_224", {}, {}),
    "rotary positions of DINOv3": ("vit_base_patch16_dinov3", {}, {}),
    "pictures of any size": ("eva02_base_patch16_clip_224", {}, {"dynamic_img_size": True}),
    "packed SwiGLU of Eva": (
        "eva02_base_patch16_clip_224",
        {},
        {"scale_mlp": False, "qkv_fused": True},
    ),
    "norms of q and k of Eva": (
        "vit_pe_core_base_patch16_224",
        {"timm_pool": "map"},
        {"qk_norm": True},
    ),
}


def timm_subject(
    option: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] | None = None
) -> Subject:
    name, pooling, arguments = TIMM[option]
    native = native_trunk(name)
    patch = native.feature_info[0]["reduction"]
    size = (2 * patch, 4 * patch)
    width = 3 * native.embed_dim // native.blocks[0].attn.num_heads
    shape = {"depth": 2, "embed_dim": width, "num_heads": 3, "img_size": size} | arguments
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, **shape))
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    return subject_of(vision | pooling | {"image_size": size}, change)


@pytest.mark.parametrize("option", TIMM)
def test_options_of_timm(option: str, monkeypatch: pytest.MonkeyPatch):
    subject = timm_subject(option, monkeypatch)
    check_sites(subject, subject.sites())
    for site in subject.few_sites():
        check_inputs(subject, site)


@pytest.mark.parametrize("option", ["norms of q and k", "packed SwiGLU of Eva"])
def test_gate_on_the_heads(option: str, monkeypatch: pytest.MonkeyPatch):
    """No trunk of today passes it on, its layers have it."""

    def change(block: Any) -> None:
        block.attn.gate = nn.Linear(192, 192)

    subject = timm_subject(option, monkeypatch, change)
    check_sites(subject, subject.sites())
    check_attention(subject, linear=False)


HEADLESS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "differential attention": (VIT, {"attn_layer": "diff"}),
    "grouped queries": (
        "vit_pe_core_base_patch16_224",
        {"num_heads": 4, "embed_dim": 256, "num_kv_heads": 2, "qkv_fused": False},
    ),
}


@pytest.mark.parametrize("option", HEADLESS)
def test_attention_of_another_kind_has_every_stream_but_heads(
    option: str, monkeypatch: pytest.MonkeyPatch
):
    name, arguments = HEADLESS[option]
    pool = {"timm_pool": "map" if "pe_core" in name else "token"}
    monkeypatch.setitem(TIMM, "headless", (name, pool, arguments))
    subject = timm_subject("headless", monkeypatch)
    check_sites(subject, [site for site in subject.sites() if site.stream != "heads"])
    refused: Sequence[Callable[[], object]] = (
        lambda: subject.tower.cut(Site(0, "heads")),
        lambda: subject.tower.head_maps(0),
        lambda: subject.tower.attention_weights(0, torch.zeros(1, 9, subject.tower.d_model)),
    )
    for call in refused:
        with pytest.raises(ConfigError, match="not read head by head"):
            call()


def test_blocks_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TIMM, "parallel", (VIT, {}, {"block_fn": ParallelScalingBlock}))
    with pytest.raises(ConfigError, match="has no sites"):
        timm_subject("parallel", monkeypatch)


def test_a_subclass_is_not_taken_for_what_it_extends(monkeypatch: pytest.MonkeyPatch):
    class Doubled(ResPostBlock):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().forward(*args, **kwargs)

    monkeypatch.setitem(TIMM, "doubled", (VIT, {}, {"block_fn": Doubled}))
    with pytest.raises(ConfigError, match="has no sites"):
        timm_subject("doubled", monkeypatch)
