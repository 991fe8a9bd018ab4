"""What the class token reads: all of it is the model, and less of it the model without a patch."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from clipattr.clip import Cut, Site
from clipattr.clip.class_token import Reads, check_class_token, climb, read_tokens
from clipattr.clip.site import STREAMS
from clipattr.errors import ConfigError
from tests.test_towers_options import OPEN_CLIP, OPTIONS, subject_of, timm_subject
from tests.tower_checks import Subject, difference
from tests.tower_hooks import patched

PLAIN = "layer scale"


def sites(subject: Subject) -> list[Site]:
    places = [(layer, stream) for layer in (0, 1) for stream in STREAMS if stream != "embedding"]
    found = [Site(*place, "cls") for place in places if place != (0, "residual_before")]
    return [*found, Site(1, "embedding", "cls")] if subject.tower.trunk.pools_cls else found


def check(subject: Subject) -> None:
    for site in sites(subject):
        cut = subject.tower.cut(site)
        reads = read_tokens(cut, subject.inputs)
        n_layers = site.layer + (site.stream != "residual_before")
        assert reads.values.shape[1:3] == (n_layers, subject.positions["all"].shape[1])
        with torch.no_grad():
            found = climb(cut, reads.start, reads.values.sum(dim=2))
            difference(found, cut.read(subject.inputs), f"{site}: climb")


@pytest.mark.parametrize("option", [name for name in OPTIONS if "patch dropout" not in name])
def test_all_that_is_read_makes_the_token_of_open_clip(option: str):
    check(subject_of(OPEN_CLIP | {"attn_pooler_queries": 5} | OPTIONS[option]))


WITH_CLASS = ["class token and registers", "norms in front of projections", "post-norm"]
WITH_CLASS += ["rotary positions per layer", "packed SwiGLU of Eva", "pictures of any size"]


@pytest.mark.parametrize("option", WITH_CLASS)
def test_all_that_is_read_makes_the_token_of_timm(option: str, monkeypatch: pytest.MonkeyPatch):
    check(timm_subject(option, monkeypatch))


@torch.no_grad()
def reads_by_hand(subject: Subject, layer: int) -> Tensor:
    """Head after head, [image, token, heads]: its weight times its value."""
    before = subject.tower.cut(Site(layer, "residual_before", "all")).read(subject.inputs)
    normed = subject.tower.normed_input(layer, before)
    weights = subject.tower.attention_weights(layer, before)
    maps = subject.tower.head_maps(layer)
    heads = [
        weights[:, head, 0, :, None] * (normed @ maps.value[head] + maps.value_bias[head])
        for head in range(len(maps.value))
    ]
    return torch.cat(heads, dim=-1)


@torch.no_grad()
def test_without_a_patch_is_the_model_whose_class_token_does_not_read_it():
    """In the hooked model the other tokens are held at what they are."""
    subject = subject_of(OPEN_CLIP | OPTIONS[PLAIN])
    cut: Cut = subject.tower.cut(Site(1, "residual", "cls"))
    reads: Reads = read_tokens(cut, subject.inputs)
    patch = 4
    edited = {}
    for layer in (0, 1):
        clean = subject.tower.cut(Site(layer, "heads", "all")).read(subject.inputs).clone()
        by_hand = reads_by_hand(subject, layer)
        difference(reads.values[:, layer], by_hand, f"reads of block {layer}")
        clean[:, 0] -= by_hand[:, patch]
        edited[layer] = clean
    with ExitStack() as stack:
        for layer, heads in edited.items():
            stack.enter_context(
                patched(subject.blocks[layer], "heads", lambda full, heads=heads: heads)
            )
        expected = subject.encode(subject.inputs)
    kept = reads.values.sum(dim=2) - reads.values[:, :, patch]
    found = cut.suffix(climb(cut, reads.start, kept))
    difference(found, expected, "without the patch")
    assert (expected - subject.encode(subject.inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(1, "residual", "spatial"), "tokens=cls"),
        (Site(0, "residual_before", "cls"), "has read nothing"),
    ],
)
def test_sites_at_which_nothing_was_read(site: Site, message: str):
    subject = subject_of(OPEN_CLIP)
    with pytest.raises(ConfigError, match=message):
        read_tokens(subject.tower.cut(site), subject.inputs)


def test_an_embedding_of_all_patches_has_no_class_token():
    subject = subject_of(OPEN_CLIP | OPTIONS["average"])
    with pytest.raises(ConfigError, match="pools all patches"):
        check_class_token(subject.tower.cut(Site(-1, "embedding", "cls")))
