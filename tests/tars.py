"""Tiny shards for tests, written by webdataset's own writer."""

import io
from pathlib import Path

from PIL import Image
from webdataset.writer import TarWriter

from clipattr.data.shards import Sample
from tests.plain_index import index_shards


def picture(image_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(buffer, image_format)
    return buffer.getvalue()


def sample(key: str, **fields: bytes) -> dict[str, object]:
    return {"__key__": key, "jpg": picture(), "txt": b"a star", "cls": b"1"} | fields


def write_shard(path: Path, samples: list[dict[str, object]]) -> Path:
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for content in samples:
            writer.write(content)
    return path


def one(tmp_path: Path, **fields: bytes) -> Sample:
    (found,) = index_shards([write_shard(tmp_path / "one.tar", [sample("a", **fields)])])
    return found
