"""What heads read: from the cache and of pixels, against the model taken by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Site
from clipattr.codes import SparseCodes, pool_tokens
from clipattr.config.inputs import DataConfig
from clipattr.data.draw import draw_tokens
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.jobs import probe_features
from clipattr.jobs.model import SiteEncoder
from clipattr.jobs.probe_features import FeatureReader, describe_codes, open_reader
from clipattr.jobs.shards import Images, find_images
from clipattr.probes.features import (
    CodesPart,
    EmbeddingPart,
    FeatureSpec,
    SitePart,
    parse_features,
)
from tests.probe_images import N_LATENTS, SITES, Setup
from tests.tars import write_shard

NORMALISED, RAW = EmbeddingPart(), EmbeddingPart(is_normalised=False)
CLS = SitePart(0, "mlp", "cls")
MEAN = SitePart(0, "residual", "spatial", pool="mean")
TOKENS = SitePart(0, "residual", "spatial")
DRAWN = SitePart(0, "residual", "spatial", drawn=3)
SPECS: dict[str, tuple] = {
    "embedding": (NORMALISED,),
    "raw": (RAW,),
    "cls": (CLS,),
    "mean": (MEAN,),
    "tokens": (TOKENS,),
    "drawn": (DRAWN,),
    "together": (NORMALISED, CLS, MEAN, RAW),
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def images(setup: Setup) -> Images:
    return find_images(str(setup.training.folder), config_of(setup), progress=False)


def config_of(setup: Setup, cache: str = "cache") -> DataConfig:
    return DataConfig(
        shards=str(setup.training.folder),
        cache=str(setup.folder / cache),
        workers=0,
        batch_size=32,
    )


@torch.no_grad()
def by_hand(setup: Setup, part: EmbeddingPart | SitePart) -> Tensor:
    pixels = setup.pixels(setup.training)
    if isinstance(part, EmbeddingPart):
        x = setup.clip.encode_image(pixels)
        return normalize(x, dim=-1) if part.is_normalised else x
    x = setup.tower.cut(Site(part.layer, part.stream, part.tokens)).read(pixels)
    if part.drawn is not None:
        keys = [f"{number:03d}" for number in range(len(pixels))]
        tokens = draw_tokens(keys, x.shape[1], part.drawn)
        x = torch.stack([row[chosen] for row, chosen in zip(x, tokens, strict=True)])
    return x.mean(1) if part.pool == "mean" else x


def sae_part(setup: Setup, name: str, pool: str) -> CodesPart:
    return describe_codes(setup.clip, str(setup.folder / f"sae-{name}"), pool)[0]


@pytest.mark.parametrize("name", SPECS)
def test_dense_features_are_those_of_the_model(
    setup: Setup, images: Images, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe_features, "_CHUNK", 37)
    reader = FeatureReader(FeatureSpec(SPECS[name]), setup.clip)
    expected = torch.cat([by_hand(setup, part) for part in SPECS[name]], dim=-1)
    found = reader.of_shards(images, config_of(setup), progress=False)
    assert found.images.tolist() == list(range(90))
    assert isinstance(found.x, Tensor)
    torch.testing.assert_close(found.x, expected, atol=1e-5, rtol=1e-5)
    assert reader.width == expected.shape[-1]
    keys = [f"{number:03d}" for number in range(90)]
    fresh = reader.of_images(setup.pixels(setup.training), keys)
    torch.testing.assert_close(fresh, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("site", "pool"), [("cls", "max"), ("spatial", "max"), ("spatial", "mean")]
)
def test_codes_are_those_of_the_sae(
    setup: Setup, images: Images, site: str, pool: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probe_features, "_CHUNK", 37)
    part = sae_part(setup, site, pool)
    reader = open_reader(f"{part} + embedding, raw", setup.clip, str(setup.folder / f"sae-{site}"))
    with torch.no_grad():
        x = setup.tower.cut(SITES[site]).read(setup.pixels(setup.training))
        codes = setup.saes[site].encode(x)
    dense = codes.to_dense()
    if site == "spatial":
        dense = dense.amax(1) if pool == "max" else dense.mean(1)
        assert part.pool == pool
        assert torch.equal(pool_tokens(codes, pool).to_dense(), dense) or pool == "mean"
    expected = torch.cat([dense, by_hand(setup, RAW)], dim=1)
    for found in (
        reader.of_shards(images, config_of(setup), progress=False).x,
        reader.of_images(setup.pixels(setup.training), []),
    ):
        assert isinstance(found, SparseCodes)
        assert found.n_latents == reader.width == N_LATENTS + 16
        torch.testing.assert_close(found.to_dense(), expected, atol=1e-5, rtol=1e-5)


def test_the_model_runs_once_per_image(
    setup: Setup, images: Images, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    call = SiteEncoder.__call__

    def counted(self: SiteEncoder, pixels: Tensor, names: list[str]) -> dict[str, Tensor]:
        seen.append(len(pixels))
        return call(self, pixels, names)

    monkeypatch.setattr(SiteEncoder, "__call__", counted)
    monkeypatch.setattr(type(setup.clip), "encode_image", None)
    reader = FeatureReader(FeatureSpec(SPECS["together"]), setup.clip)
    first = reader.of_shards(images, config_of(setup, "once"), progress=False)
    assert sum(seen) == 90
    again = reader.of_shards(images, config_of(setup, "once"), progress=False)
    assert sum(seen) == 90
    assert torch.equal(first.x, again.x)
    assert first.fingerprint == again.fingerprint


def test_broken_images_have_no_rows(setup: Setup, tmp_path: Path):
    samples = [setup.training._sample(number) for number in range(12)]
    samples[5]["png"] = b"broken"
    write_shard(tmp_path / "000.tar", samples)
    config = replace(config_of(setup), shards=str(tmp_path), max_bad_fraction=0.1)
    found = find_images(str(tmp_path), config, progress=False)
    reader = FeatureReader(FeatureSpec((RAW,)), setup.clip)
    rows = reader.of_shards(found, config, progress=False)
    good = [number for number in range(12) if number != 5]
    assert rows.images.tolist() == good
    torch.testing.assert_close(rows.x, by_hand(setup, RAW)[good], atol=1e-5, rtol=1e-5)
    assert [one.key for one in rows.bad] == ["005"]
    with pytest.raises(DataError, match="1 of 12 samples"):
        reader.of_shards(found, replace(config, max_bad_fraction=0.05), progress=False)


@pytest.mark.parametrize(
    "parts",
    [
        (NORMALISED,),
        (RAW, CLS),
        (DRAWN,),
        (CodesPart(3, "residual", "all", 4096, "ab12", "mean"), NORMALISED),
    ],
)
def test_words_are_read_back(parts: tuple):
    spec = FeatureSpec(parts)
    assert parse_features(str(spec)) == spec
    assert (spec.codes is not None) == isinstance(parts[0], CodesPart)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raw embedding", "expected 'embedding, L2-normalised'"),
        ("site(layer=1)", r"site has the fields \['layer'\]"),
        (str(CLS).replace("layer=0", "layer=-1"), "layer is '-1', expected a whole number"),
        (str(CLS).replace("layer=0", "layer=00"), "reads as"),
        ("", "feature ''"),
    ],
)
def test_other_words_are_refused(text: str, message: str):
    with pytest.raises(CheckpointError, match=message):
        parse_features(text)


def test_the_sae_must_be_that_of_the_probe(setup: Setup):
    words = str(sae_part(setup, "cls", "max"))
    with pytest.raises(ConfigError, match="sae=FOLDER"):
        open_reader(words, setup.clip)
    with pytest.raises(CheckpointError, match="sha256 of its tensors"):
        open_reader(words, setup.clip, str(setup.folder / "sae-spatial"))
