"""The stream of sets that are too large to index: full batches for every rank, come what may."""

import pickle
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from clipattr.data import sequential, streaming, transfer
from clipattr.data.images import ImageBatch
from clipattr.data.pixels import Pixels
from clipattr.data.shards import BadSample, find_shards
from clipattr.data.streaming import StreamedImages
from clipattr.errors import CheckpointError, ConfigError, DataError
from tests.remote_server import serve
from tests.tars import picture, sample, write_shard
from tests.test_data_shards import Bomb, write_members

PIXELS = Pixels(Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]))
N_SHARDS, N_SAMPLES = 5, 6


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write_shard(tmp_path / f"{s}.tar", [sample(f"{s}-{i}") for i in range(N_SAMPLES)])
        for s in range(N_SHARDS)
    ]


def open_stream(paths: list[Path], **options: Any) -> StreamedImages:
    options = {"batch_size": 4, "seed": 0, "length": 10, "shuffle": 8} | options
    return StreamedImages(paths, PIXELS, **options)


def endless(stream: StreamedImages) -> Iterator[ImageBatch]:
    while True:
        yield from stream


def take(stream: StreamedImages, n_batches: int) -> list[ImageBatch]:
    """By hand, so that no batch is taken and dropped."""
    batches = endless(stream)
    return [next(batches) for _ in range(n_batches)]


def keys_of(batches: list[ImageBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def bad_of(batches: list[ImageBatch]) -> list[BadSample]:
    return [bad for batch in batches for bad in batch.bad]


# Batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_rank_has_full_batches_of_its_own(paths: list[Path], world_size: int, workers: int):
    orders = []
    for rank in range(world_size):
        stream = open_stream(
            paths, batch_size=6, rank=rank, world_size=world_size, workers=workers, length=7
        )
        assert len(stream) == 7
        batches = list(stream)
        assert (len(batches), stream.t) == (7, 7)
        for batch in batches:
            share = 6 // world_size
            assert batch.images.shape == (share, 3, 8, 8)
            assert (batch.images.dtype, batch.bad) == (torch.uint8, [])
            assert batch.rows.tolist() == [-1] * share
            assert len(batch.keys) == share
        orders.append(tuple(keys_of(batches)))
    assert len(set(orders)) == world_size


def test_workers_draw_different_shards(paths: list[Path]):
    batches = take(open_stream(paths, batch_size=6, workers=2, shuffle=1), 20)
    first, second = keys_of(batches[::2]), keys_of(batches[1::2])
    assert first != second
    for keys in (first, second):  # each reads all shards in a pass
        assert len(set(keys[: N_SHARDS * N_SAMPLES])) == N_SHARDS * N_SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_a_function_of_seed_and_place(paths: list[Path], workers: int):
    def keys(**options: Any) -> list[str]:
        return keys_of(take(open_stream(paths, workers=workers, **options), 15))

    assert keys() == keys()
    for other in ({"seed": 1}, {"start": 3}, {"rank": 1, "world_size": 2, "batch_size": 8}):
        assert keys(**other) != keys()


def test_epochs_go_on_where_they_ended(paths: list[Path]):
    """An iteration that begins anew would never meet the end of a large set."""
    whole = keys_of(take(open_stream(paths, length=12), 12))
    stream = open_stream(paths, length=4)
    parts = [keys_of(list(stream)) for _ in range(3)]
    assert [key for part in parts for key in part] == whole
    stream = open_stream(paths, length=12)
    interrupted = keys_of(list(islice(stream, 5)))
    assert interrupted + keys_of(list(stream)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_all_samples_come_about_equally_often(paths: list[Path], workers: int):
    n_passes, n = 20, N_SHARDS * N_SAMPLES
    counts = Counter(keys_of(take(open_stream(paths, workers=workers), n * n_passes // 4)))
    assert len(counts) == n
    found = np.array(list(counts.values()))
    assert found.sum() == n * n_passes
    assert scipy.stats.chisquare(found).pvalue > 0.01
    # Better than chance: each comes once in each pass of a worker, and waits in its buffer.
    assert found.var() < n_passes


def test_buffer_mixes_shards(paths: list[Path]):
    shuffled = keys_of(take(open_stream(paths, shuffle=20), 5))
    assert len({key.partition("-")[0] for key in shuffled[:6]}) > 2
    plain = keys_of(take(open_stream(paths, shuffle=1), 5))
    assert len({key.partition("-")[0] for key in plain[:6]}) == 1


def test_more_workers_than_shards(paths: list[Path]):
    batches = take(open_stream(paths[:1], workers=2, rank=2, world_size=4), 12)
    assert set(Counter(keys_of(batches))) == {f"0-{i}" for i in range(N_SAMPLES)}


def test_remote_shards(paths: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    with serve() as served:
        for path in paths:
            served.put(f"/{path.name}", path.read_bytes())
        shards = find_shards(f"{served.url}/{{0..4}}.tar")
        stream = StreamedImages(shards, PIXELS, batch_size=4, seed=0, length=10, shuffle=8)
        assert keys_of(list(stream)) == keys_of(list(open_stream(paths)))
        del served.files["/3.tar"]
        stream = StreamedImages(shards, PIXELS, batch_size=4, seed=0, length=10, shuffle=8)
        bad = bad_of(list(stream))
    assert {(b.shard, b.key) for b in bad} == {(f"{served.url}/3.tar", "")}
    assert "HTTP 404" in bad[0].reason


# Resuming


def test_state_is_the_position(paths: list[Path]):
    stream = open_stream(paths)
    take(stream, 13)
    state = stream.state_dict()
    assert state == {"t": 13, "seed": 0, "batch_size": 4}
    resumed = open_stream(paths)
    resumed.load_state_dict(state)
    batches = list(resumed)
    assert (resumed.t, len(batches)) == (20, 7)
    assert keys_of(batches) == keys_of(list(open_stream(paths, start=13)))
    assert keys_of(batches) != keys_of(list(open_stream(paths)))[: 4 * 7]
    stream.load_state_dict(state)  # one that runs goes on there, too
    assert keys_of(list(stream)) == keys_of(batches)


@pytest.mark.parametrize(("name", "other"), [("seed", 1), ("batch_size", 8)])
def test_another_order_is_refused(paths: list[Path], name: str, other: int):
    state = open_stream(paths).state_dict() | {name: other}
    with pytest.raises(CheckpointError, match=f"cannot resume: {name} was {other} and is"):
        open_stream(paths).load_state_dict(state)


def test_what_cannot_work(paths: list[Path]):
    with pytest.raises(ConfigError, match="batch_size=4 does not divide by 3 devices"):
        open_stream(paths, world_size=3)
    with pytest.raises(DataError, match="no shards"):
        open_stream([])


# Other fields


def length_of_text(fields: Mapping[str, bytes]) -> Tensor:
    text = fields["txt"].decode()
    if not text:
        raise ValueError("it is empty")
    return torch.tensor([len(text)])


@pytest.mark.parametrize("workers", [0, 1])
def test_fields_are_made_of_the_raw_bytes(tmp_path: Path, workers: int):
    samples = [sample(str(n), txt=b"x" * n) for n in range(4)]
    samples += [sample("4", txt=b"\xff"), sample("5")]
    del samples[5]["txt"]
    path = write_shard(tmp_path / "0.tar", samples)
    stream = open_stream([path], fields={"n": length_of_text}, workers=workers, shuffle=1)
    batches = take(stream, 6)
    for batch in batches:
        assert batch.fields["n"][:, 0].tolist() == [int(key) for key in batch.keys]
    assert set(keys_of(batches)) == {"1", "2", "3"}
    reasons = {bad.key: bad.reason for bad in bad_of(batches)}
    assert reasons.keys() == {"0", "4", "5"}
    assert reasons["0"] == "n cannot be made of its fields: it is empty"
    assert "can't decode byte 0xff" in reasons["4"]
    assert reasons["5"] == "n: there is no 'txt'"


def test_mistake_of_a_function_is_no_bad_sample(paths: list[Path]):
    def fail(_: Mapping[str, bytes]) -> Tensor:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        take(open_stream(paths, fields={"n": fail}), 1)


# Faults


def test_bad_samples_are_left_out_and_told(tmp_path: Path):
    samples = [sample(str(n)) for n in range(8)]
    del samples[2]["jpg"]
    samples[5]["jpg"] = picture()[:100]
    path = write_shard(tmp_path / "0.tar", samples)
    batches = take(open_stream([path], shuffle=1), 6)  # 24 images: four passes
    assert Counter(keys_of(batches)) == dict.fromkeys("013467", 4)
    assert [(b.shard, b.key) for b in batches[0].bad] == [(str(path), "2")]
    found = dict((bad.key, bad.reason) for bad in bad_of(batches))
    assert found["2"] == "lacks image (jpg, jpeg, png, webp); has cls, txt"
    assert found["5"].startswith("jpg cannot be decoded: ")
    assert all(len(batch.keys) == 4 for batch in batches)


def end_of(path: Path, name: str) -> int:
    with tarfile.open(path) as archive:
        member = archive.getmember(name)
    return member.offset_data + -(-member.size // 512) * 512


@pytest.mark.parametrize("where", ["between members", "in a member", "in a header", "end marker"])
def test_cut_shard_is_told_and_its_last_sample_dropped(
    paths: list[Path], tmp_path: Path, where: str
):
    with tarfile.open(paths[0]) as archive:
        names = [name for name in archive.getnames() if name.startswith("0-3")]
    end = end_of(paths[0], names[0])
    if where == "end marker":
        end = end_of(paths[0], names[-1].replace("0-3", "0-5"))
    length = end + {"in a member": 512 + 1, "in a header": 100}.get(where, 0)
    paths[0].write_bytes(paths[0].read_bytes()[:length])
    batches = take(open_stream(paths, shuffle=1), 20)
    expected = {f"0-{n}" for n in range(5 if where == "end marker" else 3)}
    assert {key for key in keys_of(batches) if key.startswith("0-")} == expected
    bad = bad_of(batches)
    assert {(b.shard, b.key) for b in bad} == {(str(paths[0]), "")}
    assert bad[0].reason.startswith("is damaged at byte ")


def test_fields_of_two_shards_are_never_joined(tmp_path: Path):
    """webdataset joins the label of the cut shard and the image of the next one."""
    labels = []
    for number in range(2):
        members = [("000.cls", b"%d" % number), ("000.jpg", picture()), ("000.txt", b"x")]
        write_members(tmp_path / f"{number}.tar", [*members, ("001.jpg", picture())])
    cut = tmp_path / "0.tar"
    cut.write_bytes(cut.read_bytes()[: end_of(cut, "000.cls") + 600])

    def label(fields: Mapping[str, bytes]) -> Tensor:
        labels.append(fields["cls"])
        return torch.tensor(int(fields["cls"]))

    stream = open_stream([cut, tmp_path / "1.tar"], fields={"label": label}, shuffle=1)
    batches = take(stream, 10)
    assert set(labels) == {b"1"}
    assert {b.shard for b in bad_of(batches) if not b.key} == {str(cut)}


def test_sample_in_pieces_is_told(tmp_path: Path):
    members = [(f"{key}.jpg", picture()) for key in "abc"]
    members += [("a.png", picture("PNG")), ("d.jpg", picture()), ("d.jpg", picture())]
    path = write_members(tmp_path / "0.tar", members)
    batches = take(open_stream([path], batch_size=3, shuffle=1), 3)
    assert set(keys_of(batches)) == {"a", "b", "c"}
    reasons = {bad.key: bad.reason for bad in bad_of(batches)}
    assert reasons["a"] == "its fields do not stand side by side, or the key comes twice"
    assert reasons["d"] == "the field 'jpg' comes twice"


def test_what_is_no_file_is_told(paths: list[Path]):
    with tarfile.open(paths[0], "a") as archive:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    reasons = {bad.reason for bad in bad_of(take(open_stream(paths), 20))}
    assert reasons == {"'x.jpg' is a symbolic link, not a file"}


def test_too_large_a_field_is_not_read(paths: list[Path], monkeypatch: pytest.MonkeyPatch):
    write_shard(paths[0], [sample("large", bin=bytes(5000)), sample("small")])
    monkeypatch.setattr(sequential, "MAX_FIELD_BYTES", 4000)
    bad = bad_of(take(open_stream(paths), 20))
    assert {(b.key, b.reason) for b in bad} == {("large", "bin has 5000 bytes")}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["gone", "no tar", "empty", "undecodable"])
def test_set_that_cannot_be_read(
    paths: list[Path], workers: int, damage: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streaming, "MAX_BAD_IN_A_ROW", 100)
    for path in paths:
        if damage == "gone":
            path.unlink()
        elif damage == "no tar":
            path.write_bytes(b"this is no tar file" * 100)
        elif damage == "empty":
            write_shard(path, [])
        else:
            write_shard(path, [sample("a", jpg=b"no picture")])
    expected = {
        "gone": "none of 9 shards .* has a sample; the last is .*: cannot be read: .*No such file",
        "no tar": "the last is .*: is damaged at byte 0: neither a tar header",
        "empty": "the last is .*/[0-4].tar: holds no sample",
        "undecodable": "100 samples in a row cannot be used; the last is 'a' in .*: jpg cannot be",
    }
    with pytest.raises(DataError, match=f"^[^\n]*{expected[damage]}[^\n]*$"):
        take(open_stream(paths, workers=workers), 1)


def test_one_good_shard_among_damaged_ones_is_enough(paths: list[Path]):
    for path in paths[1:]:
        path.write_bytes(b"")
    assert {key[0] for key in keys_of(take(open_stream(paths), 100))} == {"0"}


def test_members_are_never_executed(tmp_path: Path):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    names = ("pyd", "pickle", "pkl", "pth", "pt", "pkl.gz")
    path = write_shard(tmp_path / "0.tar", [sample("a", **dict.fromkeys(names, bomb))])
    seen = []

    def look(fields: Mapping[str, bytes]) -> Tensor:
        seen.append(all(fields[name] == bomb for name in names))
        return torch.zeros(())

    take(open_stream([path], fields={"x": look}), 2)
    assert seen
    assert all(seen)
    assert not marker.exists()
    pickle.loads(bomb)  # the bomb is real
    assert marker.exists()
