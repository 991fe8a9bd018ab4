import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipattr.atomic import STALE_SECONDS
from clipattr.data import writer
from clipattr.data.chunks import Layout, ReadBatch
from clipattr.data.columns import Column
from clipattr.data.shards import BadSample
from clipattr.data.store import ActivationStore
from clipattr.data.writer import StorePlan, write_stores
from clipattr.errors import DataError
from tests.stores import (
    FINGERPRINT,
    bytes_of,
    check_contents,
    keys_of,
    plan_of,
    reader,
    values_of,
    write,
)

# Layout


@settings(deadline=None)
@given(
    n_images=st.integers(1, 90),
    n_chunks=st.integers(1, 20),
    order=st.sampled_from(["mixed", "source"]),
    seed=st.integers(0, 2**63),
    n_rows=st.integers(0, 70),
    block_rows=st.integers(1, 9),
)
def test_chunks_and_blocks_partition(
    n_images: int, n_chunks: int, order: str, seed: int, n_rows: int, block_rows: int
):
    layout = Layout(n_images, min(n_chunks, n_images), order, seed, block_rows)
    images = layout.images().tolist()
    assert sorted(images) == list(range(n_images))
    bounds = [layout.bounds(chunk) for chunk in range(layout.n_chunks)]
    assert [place for first, last in bounds for place in range(first, last)] == sorted(images)
    sizes = [last - first for first, last in bounds]
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    blocks = [block.tolist() for block in layout.blocks(3, n_rows)]
    assert sorted(row for block in blocks for row in block) == list(range(n_rows))
    assert all(0 < len(block) <= block_rows for block in blocks)
    if order == "source":
        assert images == sorted(images)
        assert [row for block in blocks for row in block] == list(range(n_rows))


def test_mixing_depends_on_seed_and_chunk():
    first, other = Layout(50, 1, "mixed", 0, 50), Layout(50, 1, "mixed", 1, 50)
    orders = [
        first.images().tolist(),
        other.images().tolist(),
        first.blocks(0, 50)[0].tolist(),
        first.blocks(1, 50)[0].tolist(),
        other.blocks(0, 50)[0].tolist(),
        list(range(50)),
    ]
    assert len({tuple(order) for order in orders}) == 6


# What is written


@settings(deadline=None, max_examples=25)
@given(
    n_images=st.integers(1, 60),
    tokens=st.integers(1, 4),
    batch=st.integers(1, 30),
    chunk_images=st.integers(1, 30),
    block_rows=st.integers(1, 40),
    bad=st.sets(st.integers(0, 59), max_size=10),
)
def test_every_good_image_has_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    n_images: int,
    tokens: int,
    batch: int,
    chunk_images: int,
    block_rows: int,
    bad: set[int],
):
    """Whatever the sizes, and whatever batch they come in."""
    good = [image for image in range(n_images) if image not in bad]
    folder = tmp_path_factory.mktemp("store")
    broken = tuple(image for image in bad if image < n_images)
    arguments = {"tokens": tokens, "chunk_images": chunk_images, "block_rows": block_rows}
    read = reader(tokens, batch, broken)
    if not good:
        with pytest.raises(DataError, match=f"none of the {n_images} images can be read"):
            write(folder, n_images, read=read, max_bad_fraction=1.0, **arguments)
        return
    store = write(folder, n_images, read=read, max_bad_fraction=1.0, **arguments)
    check_contents(store, tokens, good)
    assert sorted(int(sample.key) for sample in store.bad) == sorted(broken)
    store.verify()


def test_source_order_is_kept(tmp_path: Path):
    store = write(
        tmp_path, tokens=3, order="source", read=reader(3, bad=(7,)), max_bad_fraction=0.1
    )
    images = torch.tensor([image for image in range(40) if image != 7])
    assert torch.equal(store.load("images").long(), images.repeat_interleave(3))
    assert torch.equal(store.load("tokens"), torch.arange(3).repeat(39).short())
    assert torch.equal(store.load(), values_of(images, 3).flatten(0, 1))
    assert torch.equal(store.rows_by_image(), torch.arange(117))


def test_mixed_rows_have_strangers_as_neighbours(tmp_path: Path):
    """Of 1200 rows in one chunk, about 3 in 1199 are followed by a token of the same image."""
    store = write(tmp_path, 400, tokens=3, chunk_images=400, block_rows=100)
    images = store.load("images")
    assert int((images[1:] == images[:-1]).sum()) <= 10
    # Each block holds images from everywhere: its mean is that of all within five deviations.
    means = images.float().reshape(12, 100).mean(dim=1)
    assert (means - 199.5).abs().max() < 5 * (400 / 12**0.5) / 10


def test_numbers_of_sub_sampled_tokens(tmp_path: Path):
    def read(images: Tensor) -> Iterator[ReadBatch]:
        numbers = torch.stack([images % 7, 49 - images % 5], dim=1)
        x = (images[:, None] * 100 + numbers)[:, :, None].float()
        yield ReadBatch(images, {"s": {"x": x, "tokens": numbers}}, [])

    plan = plan_of(tmp_path, tokens=2, width=1)
    store = write_stores({"s": plan}, keys_of(30), read)["s"]
    wanted = store.load("images") * 100 + store.load("tokens")
    assert torch.equal(store.load()[:, 0], wanted.float())


def test_several_sites_in_one_pass(tmp_path: Path):
    """One token and three, two dtypes; the images are asked for once."""
    asked: list[int] = []

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(9):
            asked.extend(part.tolist())
            values = {"cls": {"x": values_of(part, 1)[:, 0]}, "all": {"x": values_of(part, 3)}}
            yield ReadBatch(part, values, [])

    plans = {
        "cls": plan_of(tmp_path / "cls", dtype="float16"),
        "all": plan_of(tmp_path / "all", tokens=3),
    }
    stores = write_stores(plans, keys_of(50), read, chunk_images=12, block_rows=5)
    assert sorted(asked) == list(range(50))
    check_contents(stores["cls"], 1, list(range(50)))
    check_contents(stores["all"], 3, list(range(50)))
    before = {name: bytes_of(plan.folder) for name, plan in plans.items()}
    times = {path: path.stat().st_mtime_ns for path in plans["cls"].folder.iterdir()}
    # One is lost: only that one is written again, in the same bytes, if the other is finished
    for path in plans["all"].folder.iterdir():
        path.unlink()
    write_stores(plans, keys_of(50), read, chunk_images=12, block_rows=5)
    assert {path: path.stat().st_mtime_ns for path in plans["cls"].folder.iterdir()} == times
    # and if it is not.
    for path in [*plans["all"].folder.iterdir(), plans["cls"].folder / "store.json"]:
        path.unlink()
    write_stores(plans, keys_of(50), read, chunk_images=12, block_rows=5)
    for path in plans["cls"].folder.glob("act-*"):
        assert path.stat().st_mtime_ns == times[path]
    assert {name: bytes_of(plan.folder) for name, plan in plans.items()} == before


def test_all_sites_together_limit_a_file(tmp_path: Path):
    """36 rows hold nine images of one token and of three."""

    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield ReadBatch(images, {"cls": {"x": x1[images]}, "all": {"x": x3[images]}}, [])

    x1, x3 = values_of(torch.arange(40), 1), values_of(torch.arange(40), 3)
    plans = {"cls": plan_of(tmp_path / "cls"), "all": plan_of(tmp_path / "all", tokens=3)}
    write_stores(plans, keys_of(40), read, chunk_rows=36)
    for plan in plans.values():
        assert len(list(plan.folder.glob("*.tar"))) == 5


def test_a_store_goes_on_alone_with_the_files_it_was_begun_with(tmp_path: Path):
    """And beside one with larger files, which takes a pass of its own."""
    asked: list[int] = []

    def read(images: Tensor) -> Iterator[ReadBatch]:
        asked.extend(images.tolist())
        values = {name: {"x": values_of(images, tokens)} for name, tokens in sizes.items()}
        yield ReadBatch(images, values, [])

    def fail(images: Tensor) -> Iterator[ReadBatch]:
        yield from read(images[:10])
        raise KeyboardInterrupt

    sizes = {"cls": 1, "all": 3, "alone": 1}
    plans = {name: plan_of(tmp_path / name, tokens=tokens) for name, tokens in sizes.items()}
    together = {name: plans[name] for name in ("cls", "all")}
    with pytest.raises(KeyboardInterrupt):
        write_stores(together, keys_of(40), fail, chunk_rows=40)
    with pytest.raises(KeyboardInterrupt):
        write_stores({"alone": plans["alone"]}, keys_of(40), fail, chunk_rows=40)
    asked.clear()
    write_stores({"cls": plans["cls"]}, keys_of(40), read, chunk_rows=40)
    assert len(asked) == 30
    stores = write_stores(plans, keys_of(40), read, chunk_rows=40)
    assert len(asked) == 30 + 30 + 40
    for name, tokens in sizes.items():
        check_contents(stores[name], tokens, list(range(40)))
    files = {name: len(list(plan.folder.glob("*.tar"))) for name, plan in plans.items()}
    assert files == {"cls": 4, "all": 4, "alone": 1}


def test_sparse_codes_are_rows_too(tmp_path: Path):
    columns = {"indices": Column("int32", 4), "values": Column("float16", 4)}
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 70_000, (30, 4), generator=generator)
    values = torch.rand(30, 4, generator=generator).half()

    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield ReadBatch(images, {"s": {"indices": indices[images], "values": values[images]}}, [])

    store = write_stores({"s": StorePlan(tmp_path, {}, columns)}, keys_of(30), read)["s"]
    rows = store.rows_by_image()
    assert torch.equal(store.read(rows, "indices"), indices.int())
    assert torch.equal(store.read(rows, "values"), values)


# Ranks and kills


def write_on_ranks(folder: Path, asked: list[list[int]]) -> list[ActivationStore]:
    """Threads that meet at a real barrier, one for each list, which gets what it is asked for."""
    barrier = threading.Barrier(len(asked))
    stores: list[ActivationStore] = []

    def run(rank: int) -> None:
        stores.append(
            write_stores(
                {"s": plan_of(folder, tokens=2)},
                keys_of(40),
                reader(2, asked=asked[rank]),
                chunk_images=12,
                block_rows=5,
                rank=rank,
                world_size=len(asked),
                barrier=lambda: barrier.wait(30),
            )["s"]
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stores


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path: Path, world_size: int):
    """With 5 ranks and 4 chunks one has nothing to do."""
    write(tmp_path / "one", tokens=2)
    asked: list[list[int]] = [[] for _ in range(world_size)]
    stores = write_on_ranks(tmp_path / "many", asked)
    assert len(stores) == world_size
    assert sorted(image for part in asked for image in part) == list(range(40))
    assert sum(not part for part in asked) == max(0, world_size - 4)
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")


def fail_after(n_images: int, tokens: int) -> writer.Read:
    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield from reader(tokens)(images[:n_images])
        raise KeyboardInterrupt

    return read


@pytest.mark.parametrize("n_images", [0, 5, 11, 25, 39])
def test_a_stopped_pass_goes_on_where_it_was(tmp_path: Path, n_images: int):
    """Chunks of ten images: what is whole is not read again."""
    write(tmp_path / "whole", tokens=2)
    folder, asked = tmp_path / "stopped", list[int]()
    with pytest.raises(KeyboardInterrupt):
        write(folder, tokens=2, read=fail_after(n_images, 2))
    n_whole = n_images // 10
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        f"act-{number:06d}.tar" for number in range(n_whole)
    ]
    with pytest.raises(DataError, match=r"store.json: does not exist"):
        ActivationStore.open(folder)
    write(folder, tokens=2, read=reader(2, asked=asked))
    assert len(asked) == 40 - 10 * n_whole
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import tests.stores as stores
from clipattr import atomic
n_left = int(sys.argv[2])
real = {function}
def killed(*arguments):
    global n_left
    n_left -= 1
    if n_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
{function} = killed
stores.write(Path(sys.argv[1]), tokens=2)
"""


FILES = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 6, 8, 11)), 7]


@pytest.mark.parametrize("n_files", FILES)
@pytest.mark.parametrize("function", ["os.fsync", "Path.replace"])
def test_killed_at_a_file(tmp_path: Path, function: str, n_files: int):
    """SIGKILL before one of the 12 files is whole, or has its name; two ranks finish the pass."""
    root, folder = str(Path(__file__).parents[1]), tmp_path / "killed"
    script = KILLED.format(root=root, function=function)
    write(tmp_path / "whole", tokens=2)
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(n_files)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left_over,) = folder.glob(".*.tmp-*")
    left_over.unlink()
    asked: list[int] = []
    write_on_ranks(folder, [asked, asked])
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")
    n_whole = max(0, n_files - 2) // 2  # keys and plan come first, then two files per chunk
    assert len(asked) == 40 - 10 * min(4, n_whole)


def test_a_chunk_without_its_description_does_not_exist(tmp_path: Path):
    write(tmp_path / "whole")
    write(tmp_path / "part")
    (tmp_path / "part" / "store.json").unlink()
    (tmp_path / "part" / "act-000001.json").unlink()
    (tmp_path / "part" / "act-000002.tar").write_bytes(b"cut")
    asked: list[int] = []
    write(tmp_path / "part", read=reader(asked=asked))
    assert len(asked) == 20
    assert bytes_of(tmp_path / "part") == bytes_of(tmp_path / "whole")


def test_left_overs_of_killed_processes_are_swept(tmp_path: Path):
    old, new = tmp_path / ".act-000000.tar.tmp-17", tmp_path / ".act-000001.tar.tmp-18"
    for path in (old, new):
        path.write_bytes(b"half")
    hours = time.time() - 2 * STALE_SECONDS
    os.utime(old, (hours, hours))
    write(tmp_path)
    assert not old.exists()
    assert new.exists()  # of a process that may still be writing


# A store that is there


def test_a_finished_store_is_read_and_not_written(tmp_path: Path):
    first = write(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    asked: list[int] = []
    again = write(tmp_path, read=reader(asked=asked), seed=5, chunk_images=3, block_rows=2)
    assert asked == []
    assert again.index_hash == first.index_hash
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": {"weights": "v"}}, "fingerprint.site={.*}, asked for is None"),
        (
            {"fingerprint": FINGERPRINT | {"weights": "v"}},
            "fingerprint.weights='w', asked for is 'v'",
        ),
        ({"columns": {"x": Column("float16", 5)}}, r"columns.x=\['float32', 5\]"),
        ({"columns": {"x": Column("float32", 4)}}, r"columns.x=\['float32', 5\]"),
        ({"tokens": 2}, "tokens=1, asked for is 2"),
    ],
)
def test_another_plan_is_refused(tmp_path: Path, is_finished: bool, change: dict, message: str):
    write(tmp_path)
    if not is_finished:
        (tmp_path / "store.json").unlink()
    plan = plan_of(tmp_path)._replace(**change)
    with pytest.raises(DataError, match=f"{tmp_path}: was made with {message}"):
        write_stores({"s": plan}, keys_of(40), reader(), chunk_images=12, block_rows=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=0, asked for is 1"),
        ({"block_rows": 6}, "block_rows=5, asked for is 6"),
        ({"chunk_images": 3}, "n_chunks=4, asked for is 14"),
        ({"order": "source"}, "order='mixed', asked for is 'source'"),
        ({"n_images": 41}, "n_images=40, asked for is 41"),
    ],
)
def test_an_unfinished_store_goes_on_with_its_own_layout_only(
    tmp_path: Path, change: dict, message: str
):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, read=fail_after(15, 1))
    with pytest.raises(DataError, match=f"was made with {message}"):
        write(tmp_path, **change)


def test_a_finished_store_must_have_the_order_that_is_wanted(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(DataError, match="order='mixed', asked for is 'source'"):
        write(tmp_path, order="source")


# Faults


def test_bad_images_are_listed(tmp_path: Path):
    store = write(tmp_path, read=reader(bad=(3, 31)), max_bad_fraction=0.05)
    assert store.n_rows == 38
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["0003", "0031"]
    assert json.loads(lines[0])["shard"] == "a.tar"
    assert sorted(store.bad) == [
        BadSample("a.tar", "0003", "broken"),
        BadSample("a.tar", "0031", "broken"),
    ]


def test_no_good_image_at_all(tmp_path: Path):
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        write(tmp_path, 3, read=reader(bad=(0, 1, 2)), max_bad_fraction=1.0)


def test_too_many_bad_images_stop_the_pass(tmp_path: Path):
    """And no chunk with a hole is kept: it will be read again when the images are repaired."""
    images = Layout(40, 4, "mixed", 0, 5).images()
    bad = (int(images[2]), int(images[13]))
    message = f"2 of 40 samples cannot be used; the first is '{bad[0]:04d}' in a.tar: broken"
    with pytest.raises(DataError, match=message):
        write(tmp_path, read=reader(bad=bad), max_bad_fraction=0.03)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["act-000000.tar"]
    asked: list[int] = []
    store = write(tmp_path, read=reader(asked=asked))
    assert len(asked) == 40  # the chunk that was kept had a hole
    check_contents(store, 1, list(range(40)))


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 7e4), ("float32", float("nan")), ("bfloat16", float("-inf"))]
)
def test_a_number_that_cannot_be_stored(tmp_path: Path, dtype: str, value: float):
    def read(images: Tensor) -> Iterator[ReadBatch]:
        x = values_of(images, 2)
        x[images == 17, 1, 3] = value
        yield ReadBatch(images, {"s": {"x": x}}, [])

    message = f"x of image 17 of the source is not finite as {dtype}: the model gives nan"
    with pytest.raises(DataError, match=message):
        write(tmp_path, tokens=2, dtype=dtype, read=read)
    assert not (tmp_path / "store.json").exists()


def test_a_disk_that_fails_stops_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files are written by another thread: its error must arrive."""

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path, 8, chunk_images=8)
    (tmp_path / "store.json").unlink()
    (tmp_path / "act-000000.json").unlink()
    monkeypatch.setattr("clipattr.atomic.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 8, chunk_images=8)
    assert not (tmp_path / "store.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/file/store: cannot be made")):
        write(tmp_path / "file" / "store")


def test_nothing_to_store(tmp_path: Path):
    with pytest.raises(DataError, match="no image to store"):
        write_stores({"s": plan_of(tmp_path)}, [], reader())


def test_keys_with_a_line_break(tmp_path: Path):
    with pytest.raises(DataError, match="holds a line break"):
        write_stores({"s": plan_of(tmp_path)}, ["a", "b\nc"], reader())


def test_keys_that_are_no_utf8(tmp_path: Path):
    keys = ["\udcff", "\u2028", "a b"]
    store = write_stores({"s": plan_of(tmp_path)}, keys, reader())["s"]
    assert store.keys == keys


@pytest.mark.parametrize("fault", ["order", "others", "too few"])
def test_a_reader_that_does_not_keep_its_word(tmp_path: Path, fault: str):
    def read(images: Tensor) -> Iterator[ReadBatch]:
        wrong = {"order": images.flip(0), "others": images + 1, "too few": images[:-1]}[fault]
        yield ReadBatch(wrong, {"s": {"x": values_of(wrong, 1)}}, [])

    with pytest.raises(AssertionError, match="`read` (gave other images|ended 1 images too early)"):
        write(tmp_path, read=read)
