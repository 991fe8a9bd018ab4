"""The walk over tar headers against tarfile, the index against `index_shards`."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from clipattr.data import index as index_module
from clipattr.data import parallel
from clipattr.data.index import ShardIndex, build_index, select_usable
from clipattr.data.shards import Sample
from clipattr.data.tables import load_table, save_table, table_file
from clipattr.data.tar import TarError, walk_members
from clipattr.errors import ConfigError, DataError
from tests.plain_index import fingerprint, index_shards, keep_complete
from tests.tars import picture, sample, write_shard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar_of(members: list[tarfile.TarInfo], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for number, member in enumerate(members):
            archive.addfile(member, io.BytesIO(bytes([number % 251]) * member.size))
    return buffer.getvalue()


def file_of(name: str, size: int = 0, mtime: float = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = size, mtime
    return member


def read_with_tarfile(path: Path) -> list[tuple[str, bool, int, int]]:
    with tarfile.open(path) as archive:
        return [(m.name, m.isfile(), m.offset_data, m.size) for m in archive]


def read_with_ours(path: Path) -> list[tuple[str, bool, int, int]]:
    return [(m.name.rstrip("/"), m.kind == "file", m.offset, m.size) for m in walk_members(path)]


def damage_of(path: Path) -> TarError | None:
    try:
        read_with_ours(path)
    except TarError as error:
        return error
    return None


# The walk


@st.composite
def archives(draw: st.DrawFn) -> tuple[list[tarfile.TarInfo], int]:
    tar_format = draw(st.sampled_from(FORMATS))
    letters = st.text("ab.\u00e9\u732b", min_size=1, max_size=4)
    # Longer than a header has room for, where the format knows a way.
    limit = 2 if tar_format == tarfile.USTAR_FORMAT else 40
    words = st.lists(letters.filter(lambda word: word.strip(".")), min_size=1, max_size=limit)
    members = []
    for number in range(draw(st.integers(0, 6))):
        name = "/".join(draw(words)) + f"{number}"
        member = file_of(name, draw(st.sampled_from([0, 1, 511, 512, 513, 3000])))
        member.mtime = draw(st.sampled_from([0, 1.5]))
        if draw(st.booleans()) and draw(st.booleans()):
            member.type, member.size = tarfile.DIRTYPE, 0
        members.append(member)
    return members, tar_format


@settings(max_examples=150, deadline=None)
@given(archive=archives())
def test_members_are_those_of_tarfile(archive, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(tar_of(*archive))
    assert read_with_ours(path) == read_with_tarfile(path)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_member_that_needs_more_than_eleven_octal_digits(tmp_path: Path, tar_format: int):
    """9 GiB of nothing: the file has a hole, no disk is filled."""
    path = tmp_path / "a.tar"
    size = 9 << 30
    with path.open("wb") as file:
        file.write(file_of("a.bin", size).tobuf(tar_format))
        file.truncate(file.tell() + size)
        file.seek(0, os.SEEK_END)
        file.write(tar_of([file_of("b.txt", 3)], tar_format))
    assert read_with_ours(path) == read_with_tarfile(path)
    assert [size for *_, size in read_with_ours(path)] == [size, 3]


def test_long_names_and_old_directories(tmp_path: Path):
    """A prefix, a GNU long name, a directory from before ustar; and no prefix without its magic."""
    long = "/".join(["folder"] * 30) + "/name.jpg"
    old = file_of("old/", 0)
    old.type = tarfile.AREGTYPE
    for tar_format, name in zip(FORMATS, (long, long, long), strict=True):
        path = tmp_path / f"{tar_format}.tar"
        path.write_bytes(tar_of([file_of(name, 5), old, file_of("x.txt", 1)], tar_format))
        found = read_with_ours(path)
        assert found == read_with_tarfile(path)
        assert [(name, is_file) for name, is_file, *_ in found] == [
            (long, True),
            ("old", False),
            ("x.txt", True),
        ]


def small_tar(tmp_path: Path) -> Path:
    members = [file_of("a.jpg", 600), file_of("a.txt", 3, mtime=1.5), file_of("b.jpg", 512)]
    path = tmp_path / "small.tar"
    path.write_bytes(tar_of(members, tarfile.PAX_FORMAT))
    return path


def test_every_damaged_byte_of_a_header_is_seen(tmp_path: Path):
    """Or it changes nothing: the padding of the checksum itself."""
    path = small_tar(tmp_path)
    whole = path.read_bytes()
    members = read_with_ours(path)
    (start,) = [offset - 512 for name, _, offset, _ in members if name == "a.txt"]
    n_seen = 0
    for byte in range(start, start + 512):
        flipped = whole[byte] ^ (1 << byte % 8)
        path.write_bytes(whole[:byte] + bytes([flipped]) + whole[byte + 1 :])
        damage = damage_of(path)
        if damage is None:
            assert read_with_ours(path) == members
        else:
            assert damage.byte == start
            n_seen += 1
    assert n_seen > 500


def test_every_cut_is_seen(tmp_path: Path):
    path = small_tar(tmp_path)
    whole = path.read_bytes()
    members = read_with_ours(path)
    last = members[-1]
    end = last[2] + last[3] + 1024  # behind the end marker, tar pads its records
    assert end < len(whole)
    for length in [*range(0, end, 19), *range(0, end, 512), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(TarError) as found:
            read_with_ours(path)
        assert found.value.byte <= length
    for length in (end, end + 1, end + 700):
        path.write_bytes(whole[:length])
        assert read_with_ours(path) == members


@settings(max_examples=300, deadline=None)
@given(
    header=st.integers(0, 3),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_no_header_hangs_or_breaks_the_walk(
    header: int, changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
):
    """Any header with a right checksum: negative sizes, unknown types, pax headers of nonsense."""
    path = small_tar(tmp_path_factory.mktemp("tar"))
    content = bytearray(path.read_bytes())
    start = [0, 512 + 1024, 512 + 1024 + 512, 512 + 1024 + 1024][header]
    block = bytearray(content[start : start + 512])
    for place, value in changes:
        block[place] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content[start : start + 512] = block
    path.write_bytes(content)
    damage = damage_of(path)
    if damage is None:
        assert all(offset + size <= len(content) for _, _, offset, size in read_with_ours(path))
    else:
        assert 0 <= damage.byte <= len(content)


@pytest.mark.parametrize(
    "content",
    [
        b"9" * 5000,
        b"99 path=a.jpg\n",
        b"2 path=a.jpg\n",
        b"0 path=a.jpg\n",
        b"x path=a.jpg\n",
        b"14 path=a.jpg\n" + b"-1 size=3\n",
        b"9" * 5000 + b" size=1\n",
    ],
)
def test_pax_header_of_nonsense(tmp_path: Path, content: bytes):
    extension, member = file_of("pax", len(content)), file_of("a.txt", 3)
    extension.type = tarfile.XHDTYPE
    path = tmp_path / "a.tar"
    body = content.ljust(-(-len(content) // 512) * 512, b"\0")
    header = extension.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(header + body + tar_of([member], tarfile.USTAR_FORMAT))
    damage = damage_of(path)
    if b"size=" in content or b"path=" in content:
        assert damage is not None
        assert damage.byte == 0
    else:
        assert read_with_ours(path) == [("a.txt", True, len(header + body) + 512, 3)]


def test_pax_header_for_all_members(tmp_path: Path):
    """A comment, as git archive writes, is passed over; a path for every member is not."""
    for name, value in (("comment", "x" * 40), ("path", "a.jpg"), ("size", "3")):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(
            path, "w", format=tarfile.PAX_FORMAT, pax_headers={name: value}
        ) as archive:
            archive.addfile(file_of("b.txt"))
        if name == "comment":
            assert read_with_ours(path) == read_with_tarfile(path)
        else:
            with pytest.raises(TarError, match="at byte 0: a pax header that gives all"):
                read_with_ours(path)


def header_with(member: tarfile.TarInfo, place: int, content: bytes, tar_format: int) -> bytes:
    """A header of which some bytes are replaced, with a right checksum."""
    block = bytearray(member.tobuf(tar_format))
    block[place : place + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_size_of_a_directory_counts_no_bytes(tmp_path: Path):
    folder = file_of("x/")
    folder.type = tarfile.DIRTYPE
    header = header_with(folder, 124, b"00000001777", tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(header + tar_of([file_of("x/a.txt", 3)], tarfile.USTAR_FORMAT))
    assert read_with_ours(path) == [("x", False, 512, 0), ("x/a.txt", True, 1024, 3)]
    assert read_with_tarfile(path)[1] == ("x/a.txt", True, 1024, 3)


def test_time_in_the_place_of_the_prefix(tmp_path: Path):
    """GNU tar -G keeps the time of the last access there; tarfile takes it for a folder."""
    header = header_with(file_of("a.txt"), 345, b"14567012345\0", tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(1024))
    assert read_with_ours(path) == [("a.txt", True, 512, 0)]
    assert read_with_tarfile(path)[0][0] != "a.txt"


def test_large_extension_is_not_read(tmp_path: Path):
    member = file_of("a.txt")
    member.pax_headers = {"comment": "x" * 70_000}
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([member], tarfile.PAX_FORMAT))
    with pytest.raises(TarError, match="at byte 0: a header of 70015 bytes"):
        read_with_ours(path)


BAD_SIZES = [b"-0000000100", b"0000000064x", b"\x80" + b"\xff" * 11]


@pytest.mark.parametrize("size", BAD_SIZES)
def test_size_that_is_none(tmp_path: Path, size: bytes):
    header = header_with(file_of("a.txt"), 124, size.ljust(12, b"\0"), tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(2048))
    with pytest.raises(TarError, match="at byte 0"):
        read_with_ours(path)


def test_blank_size_is_zero(tmp_path: Path):
    header = header_with(file_of("a.txt"), 124, b" " * 11 + b"\0", tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(1024))
    assert read_with_ours(path) == read_with_tarfile(path) == [("a.txt", True, 512, 0)]


# The index


FIELDS = ("jpg", "png", "txt", "cls", "json", "seg.png")


@st.composite
def shard_contents(draw: st.DrawFn) -> list[list[dict[str, object]]]:
    """Shards of samples with any of the fields; some keys need escapes in JSON, none repeats."""
    number = 0
    shards: list[list[dict[str, object]]] = []
    for _ in range(draw(st.integers(1, 3))):
        rows: list[dict[str, object]] = []
        for _ in range(draw(st.integers(0, 4))):
            number += 1
            prefix = draw(st.sampled_from(["", "x/", '"', "\u00e9", "\\", "a%d "]))
            names = draw(st.sets(st.sampled_from(FIELDS), min_size=1))
            content = st.binary(max_size=20)
            rows.append(
                {"__key__": f"{prefix}{number}"} | {name: draw(content) for name in sorted(names)}
            )
        shards.append(rows)
    return shards


def write_shards(folder: Path, contents: list[list[dict[str, object]]]) -> list[Path]:
    return [write_shard(folder / f"{number:03d}.tar", rows) for number, rows in enumerate(contents)]


@settings(max_examples=60, deadline=None)
@given(contents=shard_contents(), data=st.data())
def test_index_holds_what_index_shards_finds(
    contents, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("index")
    paths = write_shards(folder, contents)
    samples = index_shards(paths)
    for _ in range(2):  # built, and read from the cache
        index = build_index(paths, cache=folder / "cache")
        assert list(index) == samples
        assert [index.key(row) for row in range(len(index))] == [found.key for found in samples]
        assert index.fingerprint == fingerprint(samples)
        assert set(index.fields) == {name for found in samples for name in found.fields}
    rows = data.draw(st.lists(st.integers(0, len(samples) - 1))) if samples else []
    chosen = index.select(np.array(rows, dtype=np.int64))
    assert list(chosen) == [samples[row] for row in rows]
    assert chosen.fingerprint == fingerprint([samples[row] for row in rows])
    written = [row for rows in contents for row in rows]
    for found, row in zip(samples, written, strict=True):
        assert {name: found.read(name) for name in found.fields} == {
            name: content for name, content in row.items() if name != "__key__"
        }


@settings(max_examples=60, deadline=None)
@given(
    contents=shard_contents(),
    needed=st.lists(st.sampled_from(("txt", "cls", "none")), unique=True, max_size=2),
    limit=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_usable_samples_are_those_of_keep_complete(
    contents, needed: list[str], limit: float, tmp_path_factory: pytest.TempPathFactory
):
    paths = write_shards(tmp_path_factory.mktemp("index"), contents)

    def outcome(keep, samples):
        try:
            good, bad = keep(samples, tuple(needed), limit)
        except DataError as error:
            return str(error)
        return list(good), bad

    index = build_index(paths, cache=None)
    assert outcome(select_usable, index) == outcome(keep_complete, index_shards(paths))


def test_short_read_is_an_error(tmp_path: Path):
    """A label cut from 12 to 1 would be another class."""
    path = write_shard(tmp_path / "a.tar", [sample("a", cls=b"12")])
    index = build_index([path], cache=None)
    offset, _ = index.sample(0).fields["cls"]
    path.write_bytes(path.read_bytes()[: offset + 1])
    with pytest.raises(DataError, match=f"{path} ends within a.cls"):
        index.sample(0).read("cls")


def test_no_shard_and_no_sample(tmp_path: Path):
    empty = write_shard(tmp_path / "a.tar", [])
    for paths in ([], [empty]):
        index = build_index(paths, cache=tmp_path / "cache")
        assert (len(index), list(index), index.fingerprint) == (0, [], fingerprint([]))
        with pytest.raises(DataError, match="the shards hold no sample"):
            select_usable(index, (), 1.0)


# The cache of the index


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    names = ("a", "b", "c", "d")
    return [
        write_shard(tmp_path / f"{name}.tar", [sample(f"{name}{i}") for i in range(3)])
        for name in names
    ]


class Scans:
    """Counts the shards that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: str = "") -> None:
        self.names: list[str] = []
        original = index_module.scan_shard

        def scan(path: Path):
            if path.name == fail_at:
                raise KeyboardInterrupt
            self.names.append(path.name)
            return original(path)

        monkeypatch.setattr(index_module, "scan_shard", scan)


def test_second_start_reads_no_shard(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = build_index(paths, cache=tmp_path / "cache")
    scans = Scans(monkeypatch)
    second = build_index(paths, cache=tmp_path / "cache")
    assert scans.names == []
    assert list(first) == list(second)
    build_index(paths, cache=None)
    assert len(scans.names) == 4


def test_killed_run_goes_on_behind_the_last_shard(paths: list[Path], tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        Scans(patch, fail_at="c.tar")
        with pytest.raises(KeyboardInterrupt):
            build_index(paths, cache=tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        scans = Scans(patch)
        index = build_index(paths, cache=tmp_path / "cache")
    assert scans.names == ["c.tar", "d.tar"]
    assert list(index) == index_shards(paths)


def test_replaced_shard_is_read_again(paths: list[Path], tmp_path: Path):
    """One of the same size and name; only its time tells."""
    before = paths[1].stat()
    build_index(paths, cache=tmp_path / "cache")
    write_shard(paths[1], [sample(f"B{i}") for i in range(3)])
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert paths[1].stat().st_size == before.st_size
    index = build_index(paths, cache=tmp_path / "cache")
    assert [index.key(row) for row in (2, 3, 4, 5)] == ["a2", "B0", "B1", "B2"]


def test_shards_of_one_name_do_not_share_a_cache(tmp_path: Path):
    """webdataset's own cache goes by the base name, and returned the labels of another split."""
    folders = [tmp_path / "train", tmp_path / "val"]
    for folder in folders:
        folder.mkdir()
        path = write_shard(folder / "0.tar", [sample(folder.name[0])])
        os.utime(path, ns=(0, 0))
    keys = [build_index([folder / "0.tar"], cache=tmp_path / "cache").key(0) for folder in folders]
    assert keys == ["t", "v"]


def test_damaged_cache_is_built_again(paths: list[Path], tmp_path: Path):
    cache = tmp_path / "cache"
    expected = list(build_index(paths, cache=cache))
    file = table_file(cache, paths[0])
    whole = file.read_bytes()
    damaged = [whole[:n] for n in (0, 3, 4, 50, len(whole) - 1)]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        for place in range(0, len(whole), 17)
    ]
    for content in damaged:
        file.write_bytes(content)
        assert list(build_index(paths, cache=cache)) == expected
        assert load_table(file) is not None


def test_table_survives_its_file(tmp_path: Path, paths: list[Path]):
    table, _ = index_module.scan_shard(paths[0])
    save_table(tmp_path / "x" / "table", table)
    loaded = load_table(tmp_path / "x" / "table")
    assert loaded is not None
    assert loaded.fields == table.fields
    assert loaded.keys.tolist() == [b"a0", b"a1", b"a2"]
    for name in ("offsets", "sizes"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))
    assert load_table(tmp_path / "nowhere") is None


def test_cache_that_cannot_be_written(paths: list[Path], tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=rf"the cache '{tmp_path}/cache/index' cannot be written"):
        build_index(paths, cache=tmp_path / "cache")


# Other processes


def test_another_process_finds_the_same(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And keeps it."""
    scans = Scans(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "PATIENCE", 0.0)
        index = build_index(paths[:1], cache=tmp_path / "cache", workers=2)
    assert list(index) == index_shards(paths[:1])
    assert list(build_index(paths[:1], cache=tmp_path / "cache")) == list(index)
    assert scans.names == []


def test_processes_start_late_and_for_the_rest(monkeypatch: pytest.MonkeyPatch):
    pools: list[int] = []

    class Pool:
        def __init__(self, n_processes: int, *_: object) -> None:
            pools.append(n_processes)

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, function, items):
            return [-function(item) for item in items]

    clock = iter([0.0, 0.0, 3.9, 4.1])
    monkeypatch.setattr(parallel, "monotonic", lambda: next(clock))
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    assert list(parallel.map_in_processes(abs, [1, 2, 3, 4, 5], workers=8)) == [1, 2, -3, -4, -5]
    assert pools == [3]
    monkeypatch.setattr(parallel, "monotonic", lambda: 0.0)
    assert list(parallel.map_in_processes(abs, [-3, 2], workers=8)) == [3, 2]
    monkeypatch.setattr(parallel, "PATIENCE", 0.0)
    assert list(parallel.map_in_processes(abs, [-3, 2], workers=1)) == [3, 2]
    assert pools == [3]


# Shards of other writers


def test_tar_writer_with_its_defaults(tmp_path: Path):
    """It encodes, and writes a pax header with the time before every member."""
    path = tmp_path / "a.tar"
    with TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write(
                {"__key__": f"{number:06d}", "jpg": picture(), "cls": number, "json": {"n": number}}
            )
    index = build_index([path], cache=None)
    assert list(index) == index_shards([path])
    assert [index.sample(row).read("cls") for row in range(3)] == [b"0", b"1", b"2"]
    assert index.sample(2).read("json") == b'{"n": 2}'


def test_index_travels_to_other_processes(paths: list[Path]):
    index = build_index(paths, cache=None)
    copy = pickle.loads(pickle.dumps(index))
    assert isinstance(copy, ShardIndex)
    assert list(copy) == list(index)
    assert isinstance(copy[0], Sample)
