import json
from pathlib import Path

import pytest

from clipattr.data.shards import find_shards, read_json, read_label, read_text
from clipattr.errors import DataError
from tests.plain_index import fingerprint, index_shards, keep_complete
from tests.tars import one, picture, sample, write_shard

# Labels and JSON

CLASSES = ["star", "star fish", "bolt"]


@pytest.mark.parametrize(
    ("content", "label"), [(b"0", 0), (b"2", 2), (b" 1\n", 1), (b"bolt", 2), (b"star fish\n", 1)]
)
def test_class_number(tmp_path: Path, content: bytes, label: int):
    assert read_label(one(tmp_path, cls=content), "cls", CLASSES) == label


@pytest.mark.parametrize("content", [b"3", b"-1", b"one", b"1.0", b"", b"\xff", b"stars", b"Bolt"])
def test_bad_class_number(tmp_path: Path, content: bytes):
    found = one(tmp_path, cls=content)
    with pytest.raises(
        DataError, match=rf"{found.shard}: label 'cls' of sample 'a' .*0 to 2 and the n"
    ):
        read_label(found, "cls", CLASSES)


@pytest.mark.parametrize(
    ("value", "label"),
    [(2, 2), ("2", 2), (True, 1), (False, 0), ("star fish", 1)],
    ids=["int", "text", "yes", "no", "name"],
)
def test_label_in_json(tmp_path: Path, value: object, label: int):
    found = one(tmp_path, json=json.dumps({"group": value}).encode())
    assert read_label(found, "json:group", CLASSES) == label


@pytest.mark.parametrize("value", [3, -1, 1.5, None, "yes", [1], float("nan")])
def test_bad_label_in_json(tmp_path: Path, value: object):
    found = one(tmp_path, json=json.dumps({"group": value}).encode())
    with pytest.raises(DataError, match=r"label 'json:group' of sample 'a' is .*0 to 2 and the n"):
        read_label(found, "json:group", CLASSES)


def test_json_without_the_key(tmp_path: Path):
    found = one(tmp_path, json=b'{"label": 1}')
    with pytest.raises(DataError, match=rf"{found.shard}: a.json has no key 'group'"):
        read_label(found, "json:group", CLASSES)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"{'a': 1}"])
def test_broken_json(tmp_path: Path, content: bytes):
    found = one(tmp_path, json=content)
    with pytest.raises(DataError, match=rf"{found.shard}: a.json is not JSON"):
        read_json(found)


@pytest.mark.parametrize("content", [b"[]", b"1", b"null"])
def test_json_that_is_no_object(tmp_path: Path, content: bytes):
    with pytest.raises(DataError, match="a.json holds no JSON object"):
        read_json(one(tmp_path, json=content))


# Another writer's shards


@pytest.mark.parametrize(
    ("field", "image_format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
)
def test_shard_of_img2dataset(tmp_path: Path, field: str, image_format: str):
    """Its fields and its side files; a failed download leaves a gap in the keys."""
    rows: list[dict[str, object]] = []
    for number in (0, 2):
        key = f"{number:09d}"
        meta = {
            "caption": "caf\u00e9 at night",
            "url": "https://host/image",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 8,
            "height": 8,
            "original_width": 640,
            "original_height": 480,
            "exif": "{}",
            "sha256": "0" * 64,
            "similarity": float("nan"),
        }
        rows.append(
            {
                "__key__": key,
                field: picture(image_format),
                "txt": str(meta["caption"]).encode(),
                "json": json.dumps(meta, indent=4).encode(),
            }
        )
    write_shard(tmp_path / "00000.tar", rows)
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 2}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    samples, bad = keep_complete(index_shards(find_shards(str(tmp_path))), ("txt", "json"), 0.0)
    assert bad == []
    assert [found.key for found in samples] == ["000000000", "000000002"]
    assert [found.image_field for found in samples] == [field, field]
    assert samples[1].read(field) == picture(image_format)
    assert read_text(samples[1]) == "caf\u00e9 at night"
    assert read_json(samples[1])["original_width"] == 640
    with pytest.raises(DataError, match="lacks cls; has .*json.*txt"):
        keep_complete(samples, ("cls",), 0.0)


def test_fingerprint_follows_what_the_shards_hold(tmp_path: Path):
    base = [sample("a"), sample("b")]
    variants = [
        base,
        [sample("a"), sample("c")],
        [sample("a"), sample("b", txt=b"a longer caption")],
        [sample("a"), sample("b", json=b"{}")],
        base[:1],
        base[::-1],
    ]
    found = [
        fingerprint(index_shards([write_shard(tmp_path / "x.tar", rows)])) for rows in variants
    ]
    assert len(set(found)) == len(variants)
    (tmp_path / "elsewhere").mkdir()
    moved = write_shard(tmp_path / "elsewhere" / "x.tar", base)
    assert fingerprint(index_shards([moved])) == found[0]
