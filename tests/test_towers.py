"""The proof behind docs/towers.md: every site of every image tower, against raw hooks."""

import pytest
import torch
from open_clip import create_model
from torch import nn

from clipattr.clip import Site, image_tower
from clipattr.errors import ConfigError
from tests import towers_table
from tests.tower_checks import (
    TOLERANCE,
    check_attention,
    check_inputs,
    check_last_layer,
    check_rows,
    check_sites,
    image_subject,
    untouched,
)
from tests.tower_hooks import STREAMS
from tests.towers import (
    EMBEDDERS,
    FAMILY,
    NAMES,
    SMALL_TEXT,
    Level,
    build,
    distinct,
    native_size,
    prefix_tokens,
    vision_config,
    visual_of,
)
from tests.towers_table import DEEP, DOCUMENT, NATIVE, check, embedder_row, facts

SMALL = distinct(NAMES, Level.SMALL)


@pytest.mark.parametrize("name", SMALL, ids=["=".join(same) for same in SMALL.values()])
def test_every_site_is_the_model(name: str):
    subject = image_subject(build(name))
    with untouched(subject.model):
        check_sites(subject, subject.sites())
        # EVA02 norms what its heads give, or what attention adds.
        check_attention(subject, linear=FAMILY[name] != "EVA02")
        check_last_layer(subject)
        for site in subject.few_sites():
            check_rows(subject, site)
            check_inputs(subject, site)


def test_a_tower_says_what_it_is():
    for name in ("ViT-H-14", "EVA02-B-16", "ViT-B-16-SigLIP"):
        model = build(name)
        tower, size = image_tower(model), native_size(name)
        n_prefix, has_cls = prefix_tokens(model)
        assert (tower.n_layers, tower.n_prefix, tower.has_cls) == (2, n_prefix, has_cls)
        assert tower.d_model == 3 * size.width // size.heads
        for stream in STREAMS:
            if not has_cls:
                with pytest.raises(ConfigError, match="no class token, allowed are spatial"):
                    tower.cut(Site(0, stream, "cls"))


def test_names_that_are_checked_as_one_are_one_tower():
    for first, *others in SMALL.values():
        if vision_config(first).get("timm_model_name") is None:
            continue  # the configs are equal but for the size
        expected = description(build(first))
        for other in {vision_config(name)["timm_model_name"]: name for name in others}.values():
            assert description(build(other)) == expected, (first, other)


def description(model: nn.Module) -> dict[str, object]:
    """Every setting of every module of the image tower, and the shapes of its weights."""
    plain = (bool, int, float, str, tuple)
    return {
        name: (
            type(module).__name__,
            {key: value for key, value in vars(module).items() if isinstance(value, plain)},
            {key: value.shape for key, value in module.named_parameters(recurse=False)},
        )
        for name, module in visual_of(model).named_modules()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct(DEEP, Level.DEEP))
def test_sites_of_a_tower_with_all_its_blocks(name: str):
    check(name, Level.DEEP)


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_sites_of_a_tower_as_it_is(name: str):
    check(name, Level.NATIVE)


def test_the_table_lists_what_is_verified():
    """Versions and errors are those of its last run; names and facts must be those of today."""
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "|" in line]
    found = [row for row in rows if not row.startswith(("|---", "| name "))]
    towers, embedders = found[: len(NAMES)], found[len(NAMES) :]
    assert embedders == [embedder_row(name) for name in EMBEDDERS], "run `make towers`"
    assert [row.rsplit("|", 4)[0] + "|" for row in towers] == [facts(name) for name in NAMES]
    for row in towers:
        errors = [float(cell) for cell in row.split("|")[-4:-1]]
        assert max(errors) <= TOLERANCE, row
    assert f"{towers_table.Level.SMALL.value};" in DOCUMENT.read_text(encoding="utf-8")


def test_the_table_covers_what_was_asked_for():
    assert len(NAMES) >= 40
    assert len(set(FAMILY.values())) >= 8
    assert not set(NAMES) & set(EMBEDDERS)
    assert set(NATIVE) | set(DEEP) | set(towers_table.SMALL_ONLY) == set(NAMES)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_towers_without_tokens_say_what_they_are_for(name: str):
    with torch.device("meta"):
        model = create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            device="meta",
            text_cfg=dict(SMALL_TEXT),
        )
    kind = embedder_row(name).split()[-2]
    with pytest.raises(ConfigError, match=rf"{kind}.*embeds images.*VisionTransformer and .*Eva"):
        image_tower(model.eval())
