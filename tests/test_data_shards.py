import io
import pickle
import re
import tarfile
from pathlib import Path

import pytest

from clipattr.data.shards import (
    BadSample,
    Sample,
    check_bad,
    find_shards,
    read_json,
    read_label,
    read_text,
)
from clipattr.errors import DataError
from tests.plain_index import fingerprint, index_shards, keep_complete
from tests.tars import one, picture, sample, write_shard


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Any names in any order, which TarWriter would not write."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "000000.tar", [sample(f"{i:03d}") for i in range(3)])


# Finding shards


def test_file_folder_and_braces_name_shards(tmp_path: Path):
    paths = [tmp_path / f"{number:02d}.tar" for number in range(3)]
    for path in reversed(paths):
        write_shard(path, [sample(path.stem)])
    (tmp_path / "00_stats.json").write_text("{}")
    (tmp_path / ".03.tar.tmp-17").write_bytes(b"half")
    assert find_shards(str(paths[1])) == [paths[1]]
    assert find_shards(str(tmp_path)) == paths
    assert find_shards(f"{tmp_path}/{{00..02}}.tar") == paths
    assert find_shards(f"{tmp_path}/{{00,02}}.tar") == [paths[0], paths[2]]


def test_missing_shard_is_named(tmp_path: Path):
    write_shard(tmp_path / "0.tar", [sample("a")])
    with pytest.raises(DataError, match=rf"^data.shards=.*: {tmp_path}/1.tar does not exist$"):
        find_shards(f"{tmp_path}/{{0..1}}.tar")
    with pytest.raises(DataError, match=rf"{tmp_path}/1.tar does not exist and 2 more"):
        find_shards(f"{tmp_path}/{{0..3}}.tar")
    with pytest.raises(DataError, match="nowhere.tar does not exist"):
        find_shards("nowhere.tar")


def test_empty_folder_is_named(tmp_path: Path):
    (tmp_path / "image.jpg").write_bytes(picture())
    with pytest.raises(DataError, match=rf"'{tmp_path}': the folder holds no .tar file"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("spec", ["pipe:touch {marker}", "pipe:touch {marker} | cat http://a/"])
def test_nothing_is_given_to_a_shell(tmp_path: Path, spec: str):
    marker = tmp_path / "executed"
    with pytest.raises(DataError, match="with pipe:, which is not opened; allowed are local paths"):
        find_shards(spec.format(marker=marker))
    assert not marker.exists()


def test_unbalanced_braces():
    with pytest.raises(DataError, match=r"'train/\{0\.\.1\.tar' is no brace pattern"):
        find_shards("train/{0..1.tar")


# Indexing


def test_fields_hold_the_bytes_that_were_written(shard: Path):
    samples = index_shards([shard])
    assert [found.key for found in samples] == ["000", "001", "002"]
    for found in samples:
        assert {name: found.read(name) for name in found.fields} == {
            "jpg": picture(),
            "txt": b"a star",
            "cls": b"1",
        }
        assert (found.shard, found.image_field) == (shard, "jpg")


def test_members_as_webdataset_reads_them(tmp_path: Path):
    """Key up to the first dot, folders belong to it, lower-case fields, hidden files are none."""
    members = [
        ("x/000.JPG", b"1"),
        ("x/._000.jpg", b"2"),
        (".DS_Store", b"3"),
        ("README", b"4"),
        ("y/000.seg.png", b"5"),
        ("x/000.txt", b"6"),
    ]
    samples = index_shards([write_members(tmp_path / "a.tar", members)])
    assert {found.key: set(found.fields) for found in samples} == {
        "x/000": {"jpg", "txt"},
        "y/000": {"seg.png"},
    }
    assert samples[0].read("jpg") == b"1"


def cut_of(where: str, path: Path) -> int:
    """Where to cut the shard: relative to the caption of its second sample."""
    with tarfile.open(path) as archive:
        member = archive.getmember("001.txt")
        last = archive.getmembers()[-1]
    match where:
        case "in a header":
            return member.offset + 100
        case "after a header":
            return member.offset_data
        case "in a member":
            return member.offset_data + 3
        case "between members":
            return member.offset
        case "before the end marker":
            return last.offset_data + 512
        case "in the end marker":
            return last.offset_data + 512 + 700
        case _:
            return 0


@pytest.mark.parametrize(
    "where",
    [
        "in a header",
        "after a header",
        "in a member",
        "between members",
        "before the end marker",
        "in the end marker",
        "at the start",
    ],
)
def test_truncated_shard_is_named(shard: Path, tmp_path: Path, where: str):
    whole = write_shard(tmp_path / "whole.tar", [sample("other")])
    shard.write_bytes(shard.read_bytes()[: cut_of(where, shard)])
    with pytest.raises(DataError, match=f"{shard} is (truncated|damaged): .* end marker"):
        index_shards([whole, shard])


def test_cut_behind_a_member_that_ends_in_zeros_is_seen(tmp_path: Path):
    """Those zeros look like an end marker."""
    members = [("a.jpg", picture()), ("a.bin", bytes(2048)), ("b.jpg", picture())]
    path = write_members(tmp_path / "a.tar", members)
    with tarfile.open(path) as archive:
        end = archive.getmember("b.jpg").offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match=f"{path} is damaged: at byte {end} of {end} "):
        index_shards([path])


@pytest.mark.parametrize("damage", ["one bit", "zeros"])
def test_damaged_header_does_not_lose_the_samples_behind_it(shard: Path, damage: str):
    """tarfile takes it for the end of the shard and says nothing."""
    with tarfile.open(shard) as archive:
        start = archive.getmember("001.txt").offset
    content = bytearray(shard.read_bytes())
    if damage == "zeros":
        content[start : start + 512] = bytes(512)
    else:
        content[start] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard} is damaged: at byte {start} of {len(content)}"):
        index_shards([shard])


def test_no_tar_file_at_all(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"this is no tar file" * 100 + bytes(1024))
    with pytest.raises(DataError, match=f"{path} is not a readable tar file"):
        index_shards([path])


def test_key_in_two_shards(shard: Path, tmp_path: Path):
    again = write_shard(tmp_path / "again.tar", [sample("new"), sample("001")])
    with pytest.raises(DataError, match=f"key '001' stands in {shard} and again in {again}"):
        index_shards([shard, again])


def test_field_twice(tmp_path: Path):
    path = write_members(tmp_path / "a.tar", [("000.txt", b"a"), ("000.txt", b"b")])
    with pytest.raises(DataError, match=f"{path}: sample '000' has the field 'txt' twice"):
        index_shards([path])


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_members_are_never_executed(tmp_path: Path):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    code = f"open({str(marker)!r}, 'w')".encode()
    fields = {"pyd": bomb, "pickle": bomb, "pkl": bomb, "pth": bomb, "pt": bomb, "py": code}
    found = one(tmp_path, json=b"{}", **fields)
    (kept,), bad = keep_complete([found], ("txt", "cls", "json"), 0.0)
    assert bad == []
    assert kept.read("pyd") == bomb
    assert (read_text(kept), read_json(kept), read_label(kept, "cls", ["no", "yes"])) == (
        "a star",
        {},
        1,
    )
    assert fingerprint([kept])
    assert not marker.exists()
    pickle.loads(bomb)  # the bomb is real
    assert marker.exists()


# Incomplete samples


@pytest.fixture
def incomplete(tmp_path: Path) -> list[Sample]:
    """Ten samples: 3 has no caption, 5 no label, 7 no image."""
    samples = [sample(f"{number}") for number in range(10)]
    del samples[3]["txt"], samples[5]["cls"], samples[7]["jpg"]
    return index_shards([write_shard(tmp_path / "a.tar", samples)])


def test_incomplete_samples_are_reported(incomplete: list[Sample], tmp_path: Path):
    good, bad = keep_complete(incomplete, ("txt", "cls"), 0.3)
    assert [found.key for found in good] == ["0", "1", "2", "4", "6", "8", "9"]
    shard = str(tmp_path / "a.tar")
    assert bad == [
        BadSample(shard, "3", "lacks txt; has cls, jpg"),
        BadSample(shard, "5", "lacks cls; has jpg, txt"),
        BadSample(shard, "7", "lacks image (jpg, jpeg, png, webp); has cls, txt"),
    ]


def test_only_what_a_job_needs_is_missed(incomplete: list[Sample]):
    good, bad = keep_complete(incomplete, (), 0.1)
    assert (len(good), [entry.key for entry in bad]) == (9, ["7"])


def test_too_many_incomplete_samples(incomplete: list[Sample], tmp_path: Path):
    message = (
        f"3 of 10 samples cannot be used; the first is '3' in {tmp_path}/a.tar: lacks txt; "
        "has cls, jpg. data.max_bad_fraction=0.29 allows 2"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        keep_complete(incomplete, ("txt", "cls"), 0.29)
    with pytest.raises(DataError, match="lacks cls; .*data.max_bad_fraction=0.0 allows 0"):
        keep_complete(incomplete[4:7], ("cls",), 0.0)


def test_shards_without_a_sample(tmp_path: Path):
    path = write_members(tmp_path / "a.tar", [("README", b"nothing here")])
    with pytest.raises(DataError, match="the shards hold no sample"):
        keep_complete(index_shards([path]), (), 0.0)


@pytest.mark.parametrize(("n_bad", "is_error"), [(0, False), (2, False), (3, True)])
def test_limit_of_bad_samples(n_bad: int, is_error: bool):
    bad = [BadSample("a.tar", str(number), "broken") for number in range(n_bad)]
    if is_error:
        with pytest.raises(DataError, match=r"3 of 20 .*'0' in a.tar: broken.*allows 2"):
            check_bad(bad, 20, 0.1)
    else:
        check_bad(bad, 20, 0.1)
