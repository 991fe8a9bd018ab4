import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipattr.data.columns import DTYPES, Column
from clipattr.data.store import ActivationStore
from clipattr.data.writer import write_stores
from clipattr.errors import DataError
from tests.plain_index import index_shards
from tests.stores import FINGERPRINT, check_contents, keys_of, plan_of, reader, values_of, write

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """40 images of 3 tokens in four chunks of six blocks."""
    return write(tmp_path / "store", tokens=3)


# What is in it


def test_the_numbers_of_a_store(store: ActivationStore):
    assert (store.n_rows, store.n_images, store.tokens, store.order) == (120, 40, 3, "mixed")
    assert store.columns == {
        "x": Column("float32", 5),
        "images": Column("int32", None),
        "tokens": Column("int16", None),
    }
    assert store.fingerprint == FINGERPRINT
    assert store.keys == keys_of(40)
    assert store.bad == []
    assert store.n_blocks == 24
    assert np.diff(store.starts).tolist() == [5] * 24
    check_contents(store, 3, list(range(40)))


def test_a_plain_reader_of_tars_finds_every_row(store: ActivationStore):
    """Oracle: tarfile and np.load, no code of ours."""
    found = {}
    for path in sorted(store.folder.glob("act-*.tar")):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            for name in names:
                if name.endswith(".x.npy"):
                    stem = name.removesuffix("x.npy")
                    x, images, tokens = (
                        np.load(io.BytesIO(archive.extractfile(stem + kind).read()))
                        for kind in ("x.npy", "images.npy", "tokens.npy")
                    )
                    assert (x.dtype, images.dtype, tokens.dtype) == ("<f4", "<i4", "<i2")
                    found |= {
                        (i, t): row
                        for i, t, row in zip(images.tolist(), tokens.tolist(), x, strict=True)
                    }
            assert len(names) == len(set(names)) == 18
    assert sorted(found) == [(image, token) for image in range(40) for token in range(3)]
    for (image, token), row in found.items():
        assert row.tolist() == values_of(torch.tensor([image]), 3)[0, token].tolist()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_webdataset_reads_the_files(store: ActivationStore):
    urls = [str(path) for path in sorted(store.folder.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 24
    assert {frozenset(sample) for sample in samples} == {
        frozenset({"__key__", "__url__", "__local_path__", "x.npy", "images.npy", "tokens.npy"})
    }
    x = torch.cat([torch.from_numpy(sample["x.npy"]) for sample in samples])
    assert torch.equal(x, store.load())


def test_our_own_index_accepts_the_files(store: ActivationStore):
    samples = index_shards(sorted(store.folder.glob("*.tar")))
    assert [sample.key for sample in samples][5:8] == [
        "000000-000005",
        "000001-000000",
        "000001-000001",
    ]
    assert all(set(sample.fields) == {"x.npy", "images.npy", "tokens.npy"} for sample in samples)


def test_every_dtype_is_kept(tmp_path: Path):
    for dtype in ("float16", "bfloat16", "float32"):
        store = write(tmp_path / dtype, dtype=dtype)
        assert store.load().dtype == DTYPES[dtype][0]
        if dtype != "bfloat16":
            check_contents(store, 1, list(range(40)))
        images = store.load("images").long()
        wanted = values_of(images, 1)[:, 0].to(DTYPES[dtype][0])
        assert torch.equal(store.load(), wanted)
        some = torch.tensor([39, 0, 17, 0])
        assert torch.equal(store.read(some), wanted[some])
    assert store.block(0)["x"].dtype == np.float32


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path):
    store = write(tmp_path, dtype="bfloat16")
    bits = store.block(2)["x"]
    assert bits.dtype == np.uint16
    rows = slice(*store.starts[2:4].tolist())
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), store.load()[rows])


# Reading


def test_a_block_is_a_view_that_nobody_can_write(store: ActivationStore):
    block = store.block(3)
    assert np.array_equal(block["x"], store.load()[15:20])
    assert block["x"].ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        block["x"][0] = 0
    base = block["x"]
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == store.folder / "act-000000.tar"


@SAME_FOLDER
@given(start=st.integers(0, 120), size=st.integers(0, 120))
def test_any_run_of_rows(store: ActivationStore, start: int, size: int):
    stop = min(120, start + size)
    for name, column in store.columns.items():
        out = column.empty(stop - start)
        store.read_run(name, start, out)
        assert torch.equal(out, store.load(name)[start:stop])


@SAME_FOLDER
@given(rows=st.lists(st.integers(0, 119), max_size=30))
def test_any_rows(store: ActivationStore, rows: list[int]):
    chosen = torch.tensor(rows, dtype=torch.int64)
    for name in store.columns:
        assert torch.equal(store.read(chosen, name), store.load(name)[chosen])


def test_rows_that_do_not_exist(store: ActivationStore):
    for row in (-1, 120):
        with pytest.raises(IndexError, match="of 120"):
            store.read(torch.tensor([5, row]))
    with pytest.raises(DataError, match=r"has no column 'y', only \['x', 'images', 'tokens'\]"):
        store.load("y")


def test_rows_in_the_order_of_the_source(store: ActivationStore):
    rows = store.rows_by_image()
    assert sorted(rows.tolist()) == list(range(120))
    assert torch.equal(store.load("images")[rows], torch.arange(40).repeat_interleave(3).int())
    assert torch.equal(store.load("tokens")[rows], torch.arange(3).repeat(40).short())
    assert torch.equal(store.read(rows), values_of(torch.arange(40), 3).flatten(0, 1))


def test_no_file_stays_open(store: ActivationStore):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    store.load()
    store.read(torch.arange(0, 120, 7))
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "v"}, "fingerprint.weights='w', asked for is 'v'"),
        ({"site": {"layer": 3, "tokens": "all"}}, "fingerprint.site.layer=-1, asked for is 3"),
        ({"dtype": "bf16"}, "fingerprint.dtype=None, asked for is 'bf16'"),
        ({"site": "last"}, r"fingerprint.site={'layer': -1, 'tokens': 'all'}, asked for is 'last'"),
    ],
)
def test_another_fingerprint_is_refused(store: ActivationStore, change: dict, message: str):
    assert ActivationStore.open(store.folder, FINGERPRINT).n_rows == 120
    with pytest.raises(DataError, match=f"{store.folder}: was made with {message}"):
        ActivationStore.open(store.folder, FINGERPRINT | change)


def test_no_store(tmp_path: Path):
    with pytest.raises(DataError, match=r"store.json: does not exist: no finished store"):
        ActivationStore.open(tmp_path)


def test_a_store_of_another_version(store: ActivationStore):
    path = store.folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(DataError, match="has format 7, this version reads 1"):
        ActivationStore.open(store.folder)


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_file_of_another_size_is_refused(store: ActivationStore, damage: str):
    path = store.folder / "act-000002.tar"
    content = path.read_bytes()
    path.unlink()
    sizes = {"cut": len(content) // 2, "gone": 0, "longer": len(content) + 512}
    if damage != "gone":
        path.write_bytes((content + bytes(512))[: sizes[damage]])
    message = f"{path}: has {sizes[damage]} of its {len(content)} bytes; delete it"
    with pytest.raises(DataError, match=message):
        ActivationStore.open(store.folder)


@SAME_FOLDER
@given(data=st.data())
def test_one_flipped_bit_in_the_description_is_noticed(store: ActivationStore, data: st.DataObject):
    """Or changes no value: a blank may become a tab."""
    path = store.folder / "store.json"
    content = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        if content[place] in b" \t\r\n" and damaged[place] in b" \t\r\n":
            assert ActivationStore.open(store.folder).index_hash == store.index_hash
        else:
            with pytest.raises(DataError, match=r"store.json: (is damaged|has format)"):
                ActivationStore.open(store.folder)
    finally:
        path.write_bytes(content)


def test_whole_files_are_verified(store: ActivationStore):
    store.verify()


@SAME_FOLDER
@given(data=st.data())
def test_one_flipped_bit_in_any_member_is_found(store: ActivationStore, data: st.DataObject):
    """In its tar header, its .npy header or its rows.

    Bytes 148 to 155 of a tar header are its checksum, in octal digits that can be written in
    several ways; what fills a member up to 512 bytes is nobody's.
    """
    path = store.folder / "act-000001.tar"
    with tarfile.open(path) as archive:
        member = data.draw(st.sampled_from(archive.getmembers()))
    first, end = member.offset_data - 512, member.offset_data + member.size
    places = st.integers(0, end - first - 1).filter(lambda place: not 148 <= place < 156)
    place, bit = first + data.draw(places), data.draw(st.integers(0, 7))
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(DataError, match=str(path)):
            ActivationStore.open(store.folder).verify()
    finally:
        path.write_bytes(content)


def test_damaged_keys_are_found(store: ActivationStore):
    path = store.folder / "keys.txt"
    path.write_text(path.read_text().replace("0017", "0071"))
    with pytest.raises(DataError, match=r"keys.txt: is damaged"):
        _ = ActivationStore.open(store.folder).keys


def test_a_file_cut_after_it_was_opened(store: ActivationStore):
    """An error and not a bus error, which would kill the process."""
    path = store.folder / "act-000003.tar"
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=f"{path}: is cut before byte"):
        store.load()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_objects_are_never_unpickled(store: ActivationStore, tmp_path: Path):
    """A member replaced by an object array of the same size, as np.load would run it."""
    marker, path = tmp_path / "executed", store.folder / "act-000000.tar"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    with tarfile.open(path) as archive:
        member = archive.getmembers()[0]
    bomb = buffer.getvalue()
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + len(bomb)] = bomb
    path.write_bytes(content)
    opened = ActivationStore.open(store.folder)
    with pytest.raises(
        DataError, match=rf"{path}: at byte 512 no .npy member with 5 rows of Column"
    ):
        opened.block(0)
    opened.load()
    assert not marker.exists()
    np.load(io.BytesIO(bomb), allow_pickle=True)  # the bomb is real
    assert marker.exists()


# The hash that a position depends on


def test_index_hash_depends_on_what_is_where(tmp_path: Path):
    def hash_of(name: str, **changes: object) -> str:
        return write(tmp_path / name, tokens=3, **changes).index_hash

    plain = hash_of("plain")
    assert hash_of("again") == plain
    others = [
        hash_of("seed", seed=1),
        hash_of("blocks", block_rows=6),
        hash_of("chunks", chunk_images=20),
        hash_of("fewer", n_images=39),
        hash_of("bad", read=reader(3, bad=(4,)), max_bad_fraction=0.1),
        hash_of("source", order="source"),
        hash_of("dtype", dtype="float16"),
    ]
    plan = plan_of(tmp_path / "weights", tokens=3)._replace(fingerprint={"weights": "v"})
    sizes = {"chunk_images": 12, "block_rows": 5}
    others.append(write_stores({"s": plan}, keys_of(40), reader(3), **sizes)["s"].index_hash)
    assert len({plain, *others}) == 9
