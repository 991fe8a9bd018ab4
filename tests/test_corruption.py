"""Shards as they are found in the wild: what webdataset passes over in silence is named here.

Each damage is an error of `build_index` that names shard and byte, and a line of `check_shards`.
"""

import gc
import io
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import webdataset as wds
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from torchvision.transforms import ToTensor
from webdataset.autodecode import DecodingError
from webdataset.writer import TarWriter

from clipattr.data.check import check_shards
from clipattr.data.faults import Fault, Problem
from clipattr.data.images import image_loader
from clipattr.data.index import build_index, select_usable
from clipattr.data.pixels import Pixels
from clipattr.data.scan import MAX_FIELDS
from clipattr.data.shards import find_shards, read_json, read_label, read_text
from clipattr.errors import DataError
from clipattr.tools import run_index
from clipattr.world.sampling import Split
from clipattr.world.shards import write_split
from tests.tars import picture, sample, write_shard
from tests.test_data_shards import Bomb, write_members


def read_with_webdataset(path: Path, decoder: str | None = None) -> list[dict[str, Any]]:
    """It leaves its files to the garbage collector, which would warn in some later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        dataset = wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
        try:
            return list(dataset.decode(decoder) if decoder else dataset)
        finally:
            del dataset
            gc.collect()


def member_of(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as archive:
        return archive.getmember(name)


def end_of_members(path: Path) -> int:
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


# Damage: (how a good shard of the samples a, b, c is spoilt) -> (fault, key, byte)


class Damage(NamedTuple):
    fault: Fault
    key: str
    byte: int | None


def cut_at(path: Path, byte: int, blame: int | None = None) -> Damage:
    path.write_bytes(path.read_bytes()[:byte])
    return Damage(Fault.damaged, "", byte if blame is None else blame)


def cut_in_data(path: Path) -> Damage:
    """webdataset emits half of the sample."""
    member = member_of(path, "b.jpg")
    return cut_at(path, member.offset_data + 20, blame=member.offset)


def cut_between_members(path: Path) -> Damage:
    """webdataset says nothing and emits a sample without its image."""
    return cut_at(path, member_of(path, "b.jpg").offset)


def cut_in_header(path: Path) -> Damage:
    """webdataset says nothing."""
    member = member_of(path, "b.jpg")
    return cut_at(path, member.offset + 100, blame=member.offset)


def cut_before_end_marker(path: Path) -> Damage:
    return cut_at(path, end_of_members(path))


def cut_in_end_marker(path: Path) -> Damage:
    end = end_of_members(path)
    return cut_at(path, end + 700, blame=end)


def cut_to_nothing(path: Path) -> Damage:
    path.write_bytes(b"")
    return Damage(Fault.no_tar, "", 0)


def end_beyond_the_file(path: Path) -> Damage:
    """The last header promises more than there is, and what is missing is hidden by zeros."""
    member = member_of(path, "c.txt")
    content = bytearray(path.read_bytes())
    member.size = len(content)
    content[member.offset : member.offset + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(content)
    return Damage(Fault.damaged, "", member.offset)


def spoil_header(path: Path) -> Damage:
    """One bit: tarfile takes it for the end of the shard and says nothing."""
    member = member_of(path, "b.jpg")
    content = bytearray(path.read_bytes())
    content[member.offset + 1] ^= 4
    path.write_bytes(content)
    return Damage(Fault.damaged, "", member.offset)


def append_another(path: Path) -> Damage:
    """cat a.tar b.tar: readers stop at the first end marker."""
    end = end_of_members(path)
    path.write_bytes(path.read_bytes() * 2)
    return Damage(Fault.damaged, "", end)


def compress(path: Path) -> Damage:
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return Damage(Fault.no_tar, "", 0)


def no_tar_at_all(path: Path) -> Damage:
    path.write_bytes(picture() * 9 + bytes(2048))
    return Damage(Fault.no_tar, "", 0)


def with_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    write_members(path, [("a.jpg", picture()), ("a.txt", b"one"), *members])


def repeat_field(path: Path) -> Damage:
    """webdataset raises, or with a handler drops the rest of the sample."""
    with_members(path, [("a.TXT", b"two")])
    return Damage(Fault.field_twice, "a", member_of(path, "a.TXT").offset)


def repeat_key_later(path: Path) -> Damage:
    """webdataset makes two samples of one key."""
    with_members(path, [("b.jpg", picture()), ("a.jpg", picture()), ("a.txt", b"two")])
    return Damage(Fault.field_twice, "a", member_of(path, "b.jpg").offset + 512 + 1024)


def merge_by_dots(path: Path) -> Damage:
    """webdataset makes one sample of several."""
    names = ("img.v1.jpg", "img.v1.txt", "img.v2.jpg", "img.v2.txt")
    with_members(path, [(name, b"x") for name in names])
    return Damage(Fault.merged, "img", member_of(path, names[0]).offset)


def number_behind_a_dot(path: Path) -> Damage:
    """All of a shard in one sample, with more fields than a table should have columns."""
    with_members(path, [(f"img.{number}.jpg", b"x") for number in range(MAX_FIELDS + 5)])
    # The fields jpg and txt come first.
    byte = member_of(path, f"img.{MAX_FIELDS - 2}.jpg").offset
    return Damage(Fault.too_many_fields, "img", byte)


def absolute_name(path: Path) -> Damage:
    with_members(path, [("/etc/b.jpg", picture())])
    return Damage(Fault.unsafe_name, "", 512 + 1024 + 1024)


def name_that_climbs(path: Path) -> Damage:
    with_members(path, [("x/../../b.jpg", picture())])
    return Damage(Fault.unsafe_name, "", member_of(path, "x/../../b.jpg").offset)


def name_with_line_break(path: Path) -> Damage:
    """It would be two lines in every list of keys."""
    with_members(path, [("b\nc.jpg", picture())])
    return Damage(Fault.unreadable_name, "", member_of(path, "b\nc.jpg").offset)


def name_in_latin_1(path: Path) -> Damage:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("caf\u00e9.jpg"))
    return Damage(Fault.unreadable_name, "", 0)


def name_without_end(path: Path) -> Damage:
    with_members(path, [("b" * 2000 + ".jpg", picture())])
    with tarfile.open(path) as archive:  # its own header stands behind that of the long name
        byte = archive.getmembers()[-1].offset_data - 512
    return Damage(Fault.unreadable_name, "", byte)


def link(path: Path, kind: bytes) -> Damage:
    """tarfile gives no bytes for it, and the sample would lack its image."""
    member = tarfile.TarInfo("b.jpg")
    member.type, member.linkname = kind, "a.jpg"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member)
    return Damage(Fault.not_a_file, "", 0)


def hard_link(path: Path) -> Damage:
    return link(path, tarfile.LNKTYPE)


def symbolic_link(path: Path) -> Damage:
    return link(path, tarfile.SYMTYPE)


def device(path: Path) -> Damage:
    return link(path, tarfile.CHRTYPE)


def part_of_another_volume(path: Path) -> Damage:
    return link(path, b"M")


def gnu_sparse(path: Path) -> Damage:
    member = tarfile.TarInfo("b.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return Damage(Fault.no_tar, "", 0)


def pax_sparse(path: Path) -> Damage:
    member = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "path": "b.jpg"}
    with_members(path, [])
    start = end_of_members(path)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(member.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    return Damage(Fault.damaged, "", start + 1024)


DAMAGES: list[Callable[[Path], Damage]] = [
    cut_in_data,
    cut_between_members,
    cut_in_header,
    cut_before_end_marker,
    cut_in_end_marker,
    cut_to_nothing,
    end_beyond_the_file,
    spoil_header,
    append_another,
    compress,
    no_tar_at_all,
    repeat_field,
    repeat_key_later,
    merge_by_dots,
    number_behind_a_dot,
    absolute_name,
    name_that_climbs,
    name_with_line_break,
    name_in_latin_1,
    name_without_end,
    hard_link,
    symbolic_link,
    device,
    part_of_another_volume,
    gnu_sparse,
    pax_sparse,
]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "bad.tar", [sample(key) for key in "abc"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_refused(damage: Callable[[Path], Damage], shard: Path, tmp_path: Path):
    good = write_shard(tmp_path / "good.tar", [sample("other")])
    assert len(build_index([good, shard], cache=tmp_path / "cache")) == 4
    expected = damage(shard)
    (problem, *more) = check_shards([good, shard]).problems
    assert (problem.fault, problem.shard) == (expected.fault, str(shard))
    assert (problem.key, problem.byte) == (expected.key, expected.byte)
    assert {other.fault for other in more} <= {Fault.merged, Fault.scattered}
    for _ in range(2):  # no half index is left in the cache
        with pytest.raises(DataError) as error:
            build_index([good, shard], cache=tmp_path / "cache")
        assert str(error.value).startswith(str(problem))
        assert f"{shard}, " in str(problem)
        assert f"byte {expected.byte}: " in str(problem)


@pytest.mark.parametrize("cached", [False, True])
def test_shard_that_cannot_be_opened_is_named(shard: Path, tmp_path: Path, cached: bool):
    """A folder holds links into another one that is gone."""
    shard.unlink()
    shard.symlink_to(tmp_path / "gone.tar")
    paths = find_shards(str(tmp_path))
    cache = tmp_path / "cache" if cached else None
    with pytest.raises(DataError, match=f"{shard}: cannot be read: No such file"):
        build_index(paths, cache=cache)
    (problem,) = check_shards(paths, checksums=True, cache=cache).problems
    assert (problem.fault, problem.shard) == (Fault.damaged, str(shard))


def test_disk_that_fails_is_named(shard: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(io.BytesIO):
        name, mode = str(shard), "rb"

        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Failing())
    with pytest.raises(DataError, match=f"{shard}: cannot be read: Input/output error"):
        build_index([shard], cache=None)


# What is told, and read all the same


def told(path: Path) -> list[Problem]:
    """The problems of a shard that can be trained on."""
    build_index([path], cache=None)
    return check_shards([path]).problems


def test_dot_in_a_key(tmp_path: Path):
    """Nothing is merged, but no field is called jpg."""
    path = write_members(tmp_path / "a.tar", [("img.v1.jpg", picture()), ("img.v1.txt", b"x")])
    (problem,) = told(path)
    assert (problem.fault, problem.key, problem.byte) == (Fault.dotted, "img", 0)
    assert "v1.jpg" in problem.what


def test_several_images_of_a_sample_are_no_mistake(tmp_path: Path):
    names = ("a.jpg", "a.left.jpg", "a.right.jpg", "b.jpg", "b.seg.png")
    path = write_members(tmp_path / "a.tar", [(name, picture()) for name in names])
    assert told(path) == []


def test_members_of_a_sample_that_lie_apart(tmp_path: Path):
    """webdataset makes two samples of them, neither of which is whole."""
    names = ("a.jpg", "b.jpg", "b.txt", "a.txt")
    path = write_members(tmp_path / "a.tar", [(name, b"x") for name in names])
    (problem,) = told(path)
    byte = member_of(path, "a.txt").offset
    assert (problem.fault, problem.key, problem.byte) == (Fault.scattered, "a", byte)
    index = build_index([path], cache=None)
    assert [set(found.fields) for found in index] == [{"jpg", "txt"}] * 2
    assert [found["__key__"] for found in read_with_webdataset(path)] == ["a", "b", "a"]


def test_shard_without_a_sample(tmp_path: Path):
    """img2dataset leaves one where every download failed."""
    path = write_shard(tmp_path / "a.tar", [])
    (problem,) = told(path)
    assert (problem.fault, problem.shard) == (Fault.empty, str(path))


def test_members_that_are_no_fields(tmp_path: Path):
    """webdataset makes a sample of __meta__.json, in every shard."""
    names = ("__meta__.json", "x/__meta__.json", ".DS_Store", "x/._a.jpg", "README", "a.jpg")
    paths = [
        write_members(
            tmp_path / f"{n}.tar", [(name.replace("a.", f"{n}."), b"x") for name in names]
        )
        for n in range(2)
    ]
    index = build_index(paths, cache=None)
    assert [index.key(row) for row in range(len(index))] == ["0", "1"]
    assert check_shards(paths).problems == []
    assert "__meta__" in [found["__key__"] for found in read_with_webdataset(paths[0])]


def test_name_that_an_address_would_be_cut_at(tmp_path: Path):
    """webdataset parses the path as a URL and drops what follows the #."""
    path = write_shard(tmp_path / "part #1?a=%20.tar", [sample("a")])
    assert len(build_index(find_shards(str(path)), cache=None)) == 1


def test_unusual_names_are_keys_like_any_other(tmp_path: Path):
    names = ("./a.jpg", "caf\u00e9 \u732b\u00a0/b.jpg", "..c/d.jpg", "a..b/c'\"\\%s.jpg", "~/e.jpg")
    path = write_members(tmp_path / "a.tar", [(name, b"x") for name in names])
    index = build_index([path], cache=tmp_path / "cache")
    assert [index.key(row) for row in range(len(index))] == [name[:-4] for name in names]


# Keys over several shards


def test_cut_shard_does_not_lend_its_label_to_the_next(tmp_path: Path):
    """webdataset joins cls of the cut shard to jpg of the next one, where keys begin anew."""
    for name in ("0", "1"):
        fields = [("000.cls", name.encode()), ("000.jpg", picture())]
        write_members(tmp_path / f"{name}.tar", fields)
    cut = member_of(tmp_path / "0.tar", "000.jpg").offset_data + 9
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:cut])
    paths = find_shards(str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path}/0.tar, byte 1024: '000.jpg' has "):
        build_index(paths, cache=None)
    repeated, *_ = [p for p in check_shards(paths).problems if p.fault is Fault.key_twice]
    assert (repeated.shard, repeated.key) == (str(paths[1]), "000")


def test_key_in_two_shards(tmp_path: Path):
    first = write_shard(tmp_path / "0.tar", [sample("x"), sample("a"), sample("b")])
    again = write_shard(tmp_path / "1.tar", [sample("new"), sample("b"), sample("a")])
    byte = member_of(again, "b.cls").offset  # TarWriter sorts the fields
    expected = (
        f"{again}, sample 'b', byte {byte}: the key stands in {first} already (and 1 more like it);"
    )
    with pytest.raises(DataError) as error:
        build_index([first, again], cache=tmp_path / "cache")
    assert str(error.value).startswith(expected)
    (problem,) = check_shards([first, again]).problems
    assert str(problem) == str(error.value)
    with pytest.raises(DataError, match=rf"sample 'x'.* stands in {first} already"):
        build_index([first, first], cache=None)


# Images


def decode(path: Path) -> tuple[list[int], list[tuple[str, str]]]:
    """The rows that can be decoded, and key and reason of the others."""
    index = build_index([path], cache=None)
    loader = image_loader(index, Pixels(ToTensor()), batch_size=8, workers=0)
    (batch,) = list(loader)
    return batch.rows.tolist(), [(bad.key, bad.reason) for bad in batch.bad]


def photo() -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    noise.save(buffer, "JPEG")
    return buffer.getvalue()


def test_cut_image_is_named(tmp_path: Path):
    """webdataset's error has no text, and another decoder returns half a picture."""
    whole = photo()
    contents = [whole, whole[: len(whole) // 2], whole[:3], b"", whole]
    rows = [{"__key__": f"{n}", "jpg": content} for n, content in enumerate(contents)]
    good, bad = decode(write_shard(tmp_path / "a.tar", rows))
    assert good == [0, 4]
    assert [key for key, _ in bad] == ["1", "2", "3"]
    assert bad[0][1].startswith("jpg cannot be decoded: image file is truncated")


def test_flipped_bit_is_found_by_checksum_alone(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", [sample("a", jpg=photo())])
    assert check_shards([path], checksums=True).problems == []
    member = member_of(path, "a.jpg")
    content = bytearray(path.read_bytes())
    content[member.offset_data + member.size - 300] ^= 1
    path.write_bytes(content)
    assert decode(path) == ([0], [])
    assert check_shards([path]).problems == []
    (problem,) = check_shards([path], checksums=True).problems
    assert (problem.fault, problem.shard) == (Fault.changed, str(path))


# Nothing in a shard is executed


def test_no_member_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same shard, given to webdataset, executes the marker: this test would notice."""
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    code = f"open({str(marker)!r}, 'w')".encode()
    fields = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt", "x.pyd"), bomb)
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file\n".encode()
    shard = write_shard(
        tmp_path / "a.tar",
        [
            sample("a", py=code, json=b'{"n": 1}', **fields),
            sample("b", json=b"{}") | {"jpg": bomb},
            sample("c", json=b"{}") | {"jpg": script},
        ],
    )
    index = build_index([shard], cache=tmp_path / "cache")
    index, _ = select_usable(build_index([shard], cache=tmp_path / "cache"), ("json",), 0.0)
    assert index.fingerprint
    assert decode(shard)[0] == [0]
    found = index.sample(0)
    assert found.read("pyd") == bomb
    assert (read_text(found), read_json(found)) == ("a star", {"n": 1})
    assert read_label(found, "cls", ["no", "yes"]) == 1
    assert run_index([str(shard), "--checksums", "--cache", str(tmp_path / "cache")]) == 0
    assert "3 samples" in capsys.readouterr().out
    assert not marker.exists()
    with suppress(DecodingError):  # not all of it is what its name says
        read_with_webdataset(shard, "rgb8")
    assert marker.exists()


def test_postscript_in_a_jpg_reaches_no_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """PIL alone would start Ghostscript, a program that reads and writes files."""
    marker = tmp_path / "started"
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {marker}\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    path = write_shard(tmp_path / "a.tar", [sample("a", jpg=script)])
    assert decode(path) == ([], [("a", "jpg cannot be decoded: it is none of JPEG, PNG, WEBP")])
    assert not marker.exists()
    with pytest.raises(UnidentifiedImageError):  # our interpreter draws nothing
        Image.open(io.BytesIO(script)).load()
    assert marker.exists()


# Between us and the others


def test_shard_of_the_world_is_read_by_webdataset(tmp_path: Path):
    (path,) = write_split(tmp_path, Split.val, 3, seed=0, shard_size=3)
    index = build_index([path], cache=None)
    n_read = 0
    for row, found in enumerate(read_with_webdataset(path, "rgb8")):
        ours = index.sample(row)
        assert found["__key__"] == ours.key
        assert found["json"] == read_json(ours)
        assert found["txt"] == read_text(ours)
        assert found["cls"] == int(ours.read("cls"))
        assert found["jpg"].shape == (96, 96, 3)
        n_read += 1
    assert n_read == len(index) == 3


def test_shard_in_the_layout_of_img2dataset_is_read_here(tmp_path: Path):
    """Nine digits, a gap where a download failed, pax headers, files beside the shards."""
    with TarWriter(str(tmp_path / "00000.tar")) as writer:
        for number in (0, 2):
            key = f"{number:09d}"
            meta = {"key": key, "status": "success", "sha256": "0" * 64, "exif": "{}"}
            writer.write({"__key__": key, "jpg": photo(), "txt": "a caption", "json": meta})
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    index = build_index(find_shards(str(tmp_path)), cache=None)
    usable, bad = select_usable(index, ("txt", "json"), 0.0)
    assert bad == []
    assert [found.key for found in usable] == ["000000000", "000000002"]
    assert read_text(usable[1]) == "a caption"
    assert read_json(usable[0])["key"] == "000000000"
    assert decode(tmp_path / "00000.tar") == ([0, 1], [])
