import io
import os
import pickle
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Resize, ToTensor
from webdataset.writer import TarWriter

from clipattr.data import (
    BadSample,
    ShardIndex,
    SiteRows,
    build_index,
    cache_activations,
    image_loader,
    load_features,
)
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError
from clipattr.world import shards as world_shards
from clipattr.world.sampling import Split
from clipattr.world.shards import draw_samples

SIDE = 6
PREPROCESS = Compose([ToTensor()])
PIXELS = Pixels(PREPROCESS)
WEIGHT = torch.randn(3 * SIDE * SIDE, 5, generator=torch.Generator().manual_seed(0))


class Prefix:
    """A linear tower that counts the images it saw, and may fail."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.n_images = 0
        self.fail_after = fail_after

    def __call__(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        self.n_images += len(images)
        if self.fail_after is not None and self.n_images > self.fail_after:
            raise KeyboardInterrupt
        return {name: images.flatten(1) @ WEIGHT for name in names}


def array_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def png_of(number: int) -> bytes:
    """Lossless, so that a test can compute what the model must see."""
    buffer = io.BytesIO()
    Image.fromarray(array_of(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, images: dict[str, bytes]) -> Path:
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for key, content in images.items():
            writer.write({"__key__": key, "png": content})
    return path


def index_of(*paths: Path) -> ShardIndex:
    return build_index(paths, cache=None)


def write_shards(folder: Path, broken: tuple[int, ...] = ()) -> ShardIndex:
    """Images 0 to 8 in three shards; the broken ones are cut in their middle."""
    folder.mkdir(exist_ok=True)
    paths = []
    for first in (0, 3, 6):
        images = {f"{n}": png_of(n) for n in range(first, first + 3)}
        images |= {key: png[: len(png) // 2] for key, png in images.items() if int(key) in broken}
        paths.append(write_shard(folder / f"{first}.tar", images))
    return index_of(*paths)


@pytest.fixture
def samples(tmp_path: Path) -> ShardIndex:
    return write_shards(tmp_path / "shards")


class Cached(NamedTuple):
    x: Tensor
    images: Tensor
    bad: list[BadSample]
    fingerprint: dict[str, object]


def cache(
    samples: ShardIndex,
    prefix: Prefix,
    folder: Path,
    *,
    preprocess: Compose = PREPROCESS,
    weights: str = "w",
    dtype: str = "float32",
    max_bad_fraction: float = 0.0,
) -> Cached:
    stores = cache_activations(
        samples,
        prefix,
        Pixels(preprocess),
        sites={"x": SiteRows({"weights": weights, "site": {"layer": 1}}, width=5)},
        dtype=dtype,
        folder=folder,
        batch_size=2,
        workers=0,
        max_bad_fraction=max_bad_fraction,
        progress=False,
    )
    return Cached(*load_features(stores["x"]), stores["x"].bad, stores["x"].fingerprint)


def expected_rows(numbers: list[int]) -> Tensor:
    """Oracle: numpy in float64, from the pixels that were written."""
    rows = [(array_of(n).transpose(2, 0, 1) / 255).reshape(-1) for n in numbers]
    return torch.from_numpy(np.stack(rows) @ WEIGHT.double().numpy())


# Values


def test_rows_are_the_prefix_of_the_decoded_images(samples: ShardIndex, tmp_path: Path):
    store = cache(samples, Prefix(), tmp_path / "cache")
    assert store.x.dtype == torch.float32
    torch.testing.assert_close(store.x.double(), expected_rows(list(range(9))), atol=1e-5, rtol=0)
    assert store.images.tolist() == list(range(9))
    assert store.bad == []


def test_preprocessing_is_applied(samples: ShardIndex, tmp_path: Path):
    flipped = Compose([lambda image: image.transpose(Image.Transpose.ROTATE_180), ToTensor()])
    store = cache(samples, Prefix(), tmp_path / "cache", preprocess=flipped)
    turned = np.ascontiguousarray(array_of(0)[::-1, ::-1].transpose(2, 0, 1)) / 255
    expected = torch.from_numpy(turned.reshape(-1) @ WEIGHT.double().numpy())
    torch.testing.assert_close(store.x[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str):
    buffer = io.BytesIO()
    grey = Image.fromarray(np.full((SIDE, SIDE), 255, dtype=np.uint8)).convert("RGB")
    grey.convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    (found,) = index_of(write_shard(tmp_path / "a.tar", {"a": buffer.getvalue()}))
    (batch,) = image_loader([found], PIXELS, batch_size=1, workers=0)
    assert torch.equal(batch.images, torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8))


# The cache


def test_second_call_runs_nothing(samples: ShardIndex, tmp_path: Path):
    first, second = Prefix(), Prefix()
    stores = [cache(samples, prefix, tmp_path / "cache") for prefix in (first, second)]
    assert (first.n_images, second.n_images) == (9, 0)
    assert torch.equal(stores[0].x, stores[1].x)
    assert torch.equal(stores[0].images, stores[1].images)
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.parametrize(("dtype", "error"), [("float16", 5e-4), ("bfloat16", 4e-3)])
def test_half_the_space_costs_half_the_digits(
    samples: ShardIndex, tmp_path: Path, dtype: str, error: float
):
    exact = cache(samples, Prefix(), tmp_path / "cache").x
    rough = cache(samples, Prefix(), tmp_path / "cache", dtype=dtype).x
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=error, atol=0)


def test_what_the_values_depend_on_is_in_the_fingerprint(samples: ShardIndex, tmp_path: Path):
    """And each of the variants is computed, not read from the cache of another one."""
    resized = Compose([Resize(SIDE), ToTensor()])
    other_images = write_shards(tmp_path / "other")
    write_shard(tmp_path / "other" / "6.tar", {f"{n}": png_of(n) + b"\0" for n in (6, 7, 8)})
    other_images = index_of(*sorted((tmp_path / "other").glob("*.tar")))
    prefix = Prefix()
    folder = tmp_path / "cache"
    stores = [
        cache(samples, prefix, folder),
        cache(samples, prefix, folder, weights="other"),
        cache(samples, prefix, folder, preprocess=resized),
        cache(other_images, prefix, folder),
    ]
    assert all(a.fingerprint != b.fingerprint for a, b in combinations(stores, 2))
    assert prefix.n_images == 4 * 9
    fewer = cache(samples.select(np.arange(6)), prefix, folder)
    assert fewer.fingerprint not in [store.fingerprint for store in stores]
    assert torch.equal(fewer.x, stores[0].x[:6])


# Broken images


def test_broken_image_stops_the_run_by_default(tmp_path: Path):
    samples = write_shards(tmp_path / "shards", broken=(4,))
    message = rf"1 of 9 samples .*'4' in {tmp_path}/shards/3.tar: png cannot be decoded: .*allows 0"
    with pytest.raises(DataError, match=message):
        cache(samples, Prefix(), tmp_path / "cache")


def test_repaired_image_is_read_again(tmp_path: Path):
    """Even where the good file is as long as the broken one was."""
    png = png_of(4)
    content = {"4": png[:20] + bytes(20) + png[40:]}
    path = write_shard(tmp_path / "a.tar", content)
    broken = index_of(path)
    with pytest.raises(DataError, match="1 of 1 samples"):
        cache(broken, Prefix(), tmp_path / "cache")
    write_shard(path, {"4": png})
    repaired = index_of(path)
    assert repaired.fingerprint == broken.fingerprint
    store = cache(repaired, Prefix(), tmp_path / "cache")
    torch.testing.assert_close(store.x.double(), expected_rows([4]), atol=1e-5, rtol=0)


def test_broken_images_are_skipped_and_reported_when_allowed(tmp_path: Path):
    samples = write_shards(tmp_path / "shards", broken=(1, 7, 8))
    first, second = Prefix(), Prefix()
    for prefix in (first, second):  # the second reads the report from the cache
        store = cache(samples, prefix, tmp_path / "cache", max_bad_fraction=0.34)
        assert store.images.tolist() == [0, 2, 3, 4, 5, 6]
        expected = expected_rows([0, 2, 3, 4, 5, 6])
        torch.testing.assert_close(store.x.double(), expected, atol=1e-5, rtol=0)
        assert sorted((Path(bad.shard).name, bad.key) for bad in store.bad) == [
            ("0.tar", "1"),
            ("6.tar", "7"),
            ("6.tar", "8"),
        ]
        assert all("png cannot be decoded" in bad.reason for bad in store.bad)
    assert (first.n_images, second.n_images) == (6, 0)
    with pytest.raises(DataError, match="3 of 9 samples .*allows 2"):
        cache(samples, Prefix(), tmp_path / "cache", max_bad_fraction=0.33)


def test_shard_of_broken_images_counts_like_any_other(tmp_path: Path):
    samples = write_shards(tmp_path / "shards", broken=(3, 4, 5))
    store = cache(samples, Prefix(), tmp_path / "cache", max_bad_fraction=0.5)
    assert store.images.tolist() == [0, 1, 2, 6, 7, 8]
    torch.testing.assert_close(
        store.x.double(), expected_rows([0, 1, 2, 6, 7, 8]), atol=1e-5, rtol=0
    )
    assert sorted(bad.key for bad in store.bad) == ["3", "4", "5"]


def test_no_image_at_all(tmp_path: Path):
    samples = write_shards(tmp_path / "shards", broken=tuple(range(9)))
    with pytest.raises(DataError, match="none of the 9 images can be read"):
        cache(samples, Prefix(), tmp_path / "cache", max_bad_fraction=1.0)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["empty", "text", "jpeg cut", "pickle", "svg"])
def test_what_is_no_image_is_reported(tmp_path: Path, content: str):
    jpeg = io.BytesIO()
    Image.fromarray(array_of(0)).resize((64, 64)).save(jpeg, "JPEG")
    marker = tmp_path / "executed"
    contents = {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "jpeg cut": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "pickle": pickle.dumps(Bomb(marker)),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    }
    images = {"good": png_of(0), "bad": contents[content]}
    samples = index_of(write_shard(tmp_path / "a.tar", images))
    (batch,) = image_loader(samples, PIXELS, batch_size=2, workers=0)
    assert batch.rows.tolist() == [0]
    assert [(bad.shard, bad.key) for bad in batch.bad] == [(str(tmp_path / "a.tar"), "bad")]
    assert not marker.exists()


def test_decompression_bomb_is_reported(samples: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 3)
    (batch,) = image_loader(samples.select(np.arange(1)), PIXELS, batch_size=1, workers=0)
    assert len(batch.rows) == 0
    assert "exceeds limit" in batch.bad[0].reason


# Workers


# Python 3.12 warns of every fork of a process that has threads, which a test run may have.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_decode_the_same_world_in_the_same_order(tmp_path: Path):
    """One broken image among them, so that reports travel between processes as well."""
    world_shards._write_shard(tmp_path / "a.tar", (0, 7), split=Split.val, seed=0)
    write_shard(tmp_path / "b.tar", {"broken": b"no image"})
    samples = index_of(tmp_path / "a.tar", tmp_path / "b.tar")
    batches = [
        list(image_loader(samples, PIXELS, batch_size=3, workers=workers)) for workers in (0, 2)
    ]
    assert [batch.rows.tolist() for batch in batches[0]] == [[0, 1, 2], [3, 4, 5], [6]]
    for alone, shared in zip(*batches, strict=True):
        assert torch.equal(alone.rows, shared.rows)
        assert torch.equal(alone.images, shared.images)
        assert alone.bad == shared.bad
    broken = ("broken", "png cannot be decoded: it is none of JPEG, PNG, WEBP")
    assert [(bad.key, bad.reason) for bad in batches[1][-1].bad] == [broken]
    jpeg = next(draw_samples(Split.val, 4, seed=0))["jpg"]
    with Image.open(io.BytesIO(jpeg)) as image:  # type: ignore[arg-type]
        expected = torch.from_numpy(np.array(image).transpose(2, 0, 1))
    assert torch.equal(batches[1][1].images[1], expected)


def test_file_replaced_by_one_of_the_same_size_is_read_again(samples: ShardIndex, tmp_path: Path):
    before = cache(samples, Prefix(), tmp_path / "cache")
    stamp = samples.shards[0].stat().st_mtime_ns
    os.utime(samples.shards[0], ns=(stamp, stamp + 10**9))
    prefix = Prefix()
    after = cache(samples, prefix, tmp_path / "cache")
    assert prefix.n_images == len(samples)
    assert after.fingerprint == before.fingerprint
