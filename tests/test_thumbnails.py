"""Thumbnails against the decoded image, and which bytes of a shard are read for them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipattr.data import build_index, find_shards
from clipattr.data.index import ShardIndex
from clipattr.data.shards import Sample
from clipattr.data.thumbnails import fit, thumbnail_name, write_thumbnails
from clipattr.data.transfer import TransferError
from clipattr.errors import DataError
from tests.remote_server import serve
from tests.tars import sample, write_shard

SIZES = ((640, 480), (90, 300), (50, 40), (1500, 1000), (640, 2))


def draw(size: tuple[int, int], image_format: str, seed: int) -> bytes:
    """A smooth picture with structure on the scale of a thumbnail."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    picture.save(buffer, image_format, **({"quality": 95} if image_format != "PNG" else {}))
    return buffer.getvalue()


def make_index(folder: Path) -> ShardIndex:
    """Two shards, of which row 5 is broken and row 6 is PostScript."""
    fields = [
        {"jpg": draw(SIZES[0], "JPEG", 0)},
        {"png": draw(SIZES[1], "PNG", 1)},
        {"webp": draw(SIZES[2], "WEBP", 2)},
        {"jpg": draw(SIZES[3], "JPEG", 3)},
        {"png": draw(SIZES[4], "PNG", 4)},
        {"jpg": draw(SIZES[0], "JPEG", 5)[:2000]},
        {"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
    ]
    rows = [{"__key__": f"{number}", "txt": b"a", **each} for number, each in enumerate(fields)]
    write_shard(folder / "a.tar", rows[:4])
    write_shard(folder / "b.tar", [*rows[4:], {"__key__": "7", "txt": b"no image"}])
    return build_index(find_shards(str(folder)), cache=None)


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    (tmp_path / "shards").mkdir()
    return make_index(tmp_path / "shards")


def write(index: ShardIndex, rows: object, folder: Path, **options: object):
    options = {"made_from": index.fingerprint, "progress": False} | options
    return write_thumbnails(index, rows, folder, **options)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_pixels_are_near_those_of_the_resized_image(index: ShardIndex, tmp_path: Path):
    found = write(index, torch.tensor([[0, 1, 2], [3, 4, -1]]), tmp_path / "thumbs")
    assert found == (5, 0, {})
    for row, size in enumerate(SIZES):
        with Image.open(tmp_path / "thumbs" / thumbnail_name(row)) as file:
            assert file.format == "JPEG"
            thumbnail = np.asarray(file.convert("RGB")).astype(float)
        sample = index.sample(row)
        with Image.open(io.BytesIO(sample.read(sample.image_field))) as whole:
            assert whole.size == size
            small = whole.convert("RGB").resize(fit(size, 112), Image.Resampling.BICUBIC)
        difference = np.abs(thumbnail - np.asarray(small).astype(float))
        assert thumbnail.shape == np.asarray(small).shape
        assert difference.mean() < 3, row


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (112, 84)),
        ((30, 112), (30, 112)),
        ((50, 40), (50, 40)),
        ((224, 1), (112, 1)),
        ((113, 113), (112,) * 2),
    ],
)
def test_the_longer_side_fits(size: tuple[int, int], expected: tuple[int, int]):
    assert fit(size, 112) == expected


def test_each_row_once_and_only_what_is_missing(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    plain = Sample.read
    monkeypatch.setattr(
        Sample, "read", lambda self, name: read.append(self.key) or plain(self, name)
    )
    folder = tmp_path / "thumbs"
    assert write(index, [2, 0, 2, -1, 0], folder) == (2, 0, {})
    assert sorted(read) == ["0", "2"]
    read.clear()
    (folder / "0/.3.jpg.tmp-other-1-abc").write_bytes(b"of another machine, which may write it")
    assert write(index, (0, 1, 2), folder) == (1, 2, {})
    assert read == ["1"]
    assert files_of(folder) == ["0/0.jpg", "0/1.jpg", "0/2.jpg"]


def test_what_is_broken_is_reported_and_has_no_file(index: ShardIndex, tmp_path: Path):
    found = write(index, range(len(index)), tmp_path / "thumbs")
    assert (found.n_written, found.n_present) == (5, 0)
    assert {row: bad.key for row, bad in found.bad.items()} == {5: "5", 6: "6", 7: "7"}
    assert "jpg cannot be decoded" in found.bad[5].reason
    assert "none of JPEG, PNG, WEBP" in found.bad[6].reason
    assert found.bad[7].reason == "lacks an image; has txt"
    assert len(files_of(tmp_path / "thumbs")) == 5


def test_rows_of_another_set_are_refused(index: ShardIndex, tmp_path: Path):
    folder = tmp_path / "thumbs"
    for wrong in ([8], [-2]):
        with pytest.raises(DataError, match="the set has 8 images"):
            write(index, wrong, folder)
    write(index, [0], folder)
    for other in ({"made_from": "else"}, {"size": 56}, {"quality": 50}):
        with pytest.raises(DataError, match="holds thumbnails of"):
            write(index, [0], folder, **other)
    (folder / "thumbnails.json").unlink()
    with pytest.raises(DataError, match=r"no thumbnails\.json"):
        write(index, [1], folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "thumbnails.json").write_text("{")
    with pytest.raises(DataError, match=r"thumbnails\.json"):
        write(index, [1], tmp_path / "broken")


def test_a_thousand_files_in_a_folder(tmp_path: Path):
    samples = [sample(f"{number:04}") for number in range(1002)]
    index = build_index([write_shard(tmp_path / "a.tar", samples)], cache=None)
    write(index, torch.tensor([999, 1000, 1001]), tmp_path / "thumbs")
    assert files_of(tmp_path / "thumbs") == ["0/999.jpg", "1/1000.jpg", "1/1001.jpg"]


def test_only_the_wanted_bytes_of_a_remote_shard_are_read(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    local = make_index(tmp_path / "shards")
    with serve() as served:
        for name in ("a.tar", "b.tar"):
            served.put(f"/{name}", (tmp_path / "shards" / name).read_bytes())
        shards = find_shards(f"{served.url}/{{a,b}}.tar", download_limit=0)
        index = build_index(shards, cache=None)
        served.requests.clear()
        found = write(index, [3, 1, 3, 4], tmp_path / "thumbs", threads=2)
        assert found == (3, 0, {})
        expected = []
        for row in (1, 3, 4):
            offset, size = local.sample(row).fields[local.sample(row).image_field]
            path = f"/{local.sample(row).shard.name}"
            expected.append((path, f"bytes={offset}-{offset + size - 1}"))
        assert sorted(served.requests) == sorted(expected)
        served.files.clear()
        with pytest.raises(TransferError):
            write(index, [0], tmp_path / "thumbs")
    assert files_of(tmp_path / "thumbs") == ["0/1.jpg", "0/3.jpg", "0/4.jpg"]
    marked = json.loads((tmp_path / "thumbs" / "thumbnails.json").read_text())
    assert marked == {"made_from": local.fingerprint, "size": 112, "quality": 85}
