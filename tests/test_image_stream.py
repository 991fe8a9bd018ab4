"""Batches of images: which rows, whose substitutes, on any number of ranks and workers."""

import os
import pickle
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import ToTensor

from clipattr.data.image_stream import DRAWS, ImageStream
from clipattr.data.images import (
    Augment,
    Edit,
    ImageBatch,
    ImageError,
    default_workers,
    image_loader,
)
from clipattr.data.index import ShardIndex, build_index
from clipattr.data.lanes import LaneOrder
from clipattr.data.order import rows_of_step
from clipattr.data.pixels import Pixels
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.metrics.exact_once import ExactOnce
from tests.tars import picture, sample, write_shard

N = 60
BROKEN = {3, 17, 40}
# Python 3.12 warns of every fork of a process that has threads, which a test run may have.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Digits:
    """An image is the number that its file says."""

    def read(self, content: bytes, edit: Edit | None = None) -> Tensor:
        if content == b"broken":
            raise ImageError("it is broken")
        return torch.full((3, 1, 1), int(content), dtype=torch.uint8)


def number_of(contents: Mapping[str, bytes]) -> Tensor:
    return torch.tensor(int(contents["txt"].decode("utf-8")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ShardIndex]:
    """60 numbers in a shard; by True, three of them are broken."""
    folder = tmp_path_factory.mktemp("shards")
    found = {}
    for some_broken in (False, True):
        samples = []
        for row in range(N):
            content = b"broken" if some_broken and row in BROKEN else b"%d" % row
            samples.append(sample(f"k{row}", jpg=content, txt=b"%d" % (1000 + row)))
        path = write_shard(folder / f"{some_broken}.tar", samples)
        found[some_broken] = build_index([path], cache=None)
    return found


def in_shards(index: ShardIndex, sizes: list[int]) -> ShardIndex:
    """The first rows, as if they stood in shards of those sizes."""
    chosen = index.select(np.arange(sum(sizes)))
    numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return ShardIndex(
        [index.shards[0]] * len(sizes),
        index.fields,
        keys=chosen.keys,
        shard_numbers=numbers,
        offsets=chosen.offsets,
        sizes=chosen.sizes,
    )


def stream_of(index: ShardIndex, batch_size: int, **options: object) -> ImageStream:
    arguments: dict[str, object] = {"seed": 0, "length": 5} | options
    return ImageStream(index, Digits(), batch_size=batch_size, **arguments)


def take(stream: ImageStream, n_batches: int) -> list[ImageBatch]:
    """The next batches, over the ends of iterations."""
    batches = (batch for _ in iter(int, 1) for batch in stream)
    return list(islice(batches, n_batches))


# Order


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int | None]:
    """Ragged shards, a global batch that they fill, and a window or none."""
    sizes = draw(st.lists(st.integers(1, 15), min_size=1, max_size=4))
    batch_size = draw(st.integers(1, sum(sizes)))
    return sizes, batch_size, draw(st.none() | st.integers(batch_size, 2 * sum(sizes)))


@settings(deadline=None)
@given(case=cases(), seed=st.integers(0, 2**40), number=st.integers(0, 3))
def test_pass_repeats_nothing_and_leaves_the_remainder(
    rows: dict[bool, ShardIndex], case: tuple[list[int], int, int | None], seed: int, number: int
):
    sizes, batch_size, window = case
    n_rows, index = sum(sizes), in_shards(rows[False], sizes)
    n_batches = n_rows // batch_size
    stream = stream_of(
        index, batch_size, seed=seed, length=n_batches, window=window, start=number * n_batches
    )
    batches = list(stream)
    assert len(batches) == len(stream) == n_batches
    seen = [row for batch in batches for row in batch.rows.tolist()]
    assert len(seen) == len(set(seen)) == n_rows - n_rows % batch_size
    assert set(seen) <= set(range(n_rows))
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.rows.tolist()
        assert batch.keys == [f"k{row}" for row in batch.rows.tolist()]
        assert (batch.bad, batch.fields) == ([], {})


@settings(deadline=None)
@given(
    world_size=st.integers(1, 4),
    share=st.integers(1, 12),
    window=st.none() | st.just(50),
    some_broken=st.booleans(),
    t=st.integers(0, 30),
)
def test_ranks_share_the_global_batch(
    rows: dict[bool, ShardIndex],
    world_size: int,
    share: int,
    window: int | None,
    some_broken: bool,
    t: int,
):
    """Whatever their number, substitutes and reports included."""
    batch_size = world_size * share
    index = in_shards(rows[some_broken], [20, 7, 33])
    (whole,) = take(stream_of(index, batch_size, window=window, start=t), 1)
    parts = []
    for rank in range(world_size):
        stream = stream_of(
            index, batch_size, window=window, start=t, rank=rank, world_size=world_size
        )
        parts += take(stream, 1)
    assert [len(part.rows) for part in parts] == [share] * world_size
    assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
    assert [bad for part in parts for bad in part.bad] == whole.bad


@pytest.mark.parametrize("t", [0, 5, 7, 20])
def test_rows_are_those_of_the_two_orders(rows: dict[bool, ShardIndex], t: int):
    index = in_shards(rows[False], [20, 7, 33])
    (found,) = take(stream_of(index, 8, start=t), 1)
    assert torch.equal(found.rows, rows_of_step(N, 8, 0, t))
    lanes = LaneOrder(np.array([0, 20, 27, 60]), batch_size=8, seed=0, lanes=8, window=24)
    (found,) = take(stream_of(index, 8, start=t, window=24), 1)
    assert found.rows.tolist() == lanes.rows_of_batch(t, range(8)).tolist()
    # Put in another order, the shards change more often.
    again = index.select(np.array([*range(10), *range(20, 40), *range(10, 20), *range(40, 60)]))
    lanes = LaneOrder(np.array([0, 10, 17, 30, 40, 60]), batch_size=8, seed=0, lanes=8, window=24)
    (found,) = take(stream_of(again, 8, start=t, window=24), 1)
    assert found.rows.tolist() == lanes.rows_of_batch(t, range(8)).tolist()


@FORKS
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_order_is_the_same_for_every_number_of_workers(rows: dict[bool, ShardIndex]):
    """With broken samples, substitutes and fields; on the second of two ranks."""
    options = {"rank": 1, "world_size": 2, "length": 11, "start": 6, "fields": {"text": number_of}}
    alone = take(stream_of(rows[True], 20, **options), 9)
    assert any(batch.bad for batch in alone)
    for workers in (1, 3):
        for found, expected in zip(
            take(stream_of(rows[True], 20, workers=workers, **options), 9), alone, strict=True
        ):
            assert torch.equal(found.rows, expected.rows)
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.fields["text"], expected.fields["text"])
            assert (found.keys, found.bad) == (expected.keys, expected.bad)


def test_stream_travels_to_a_process_that_is_spawned(rows: dict[bool, ShardIndex]):
    stream = stream_of(rows[True], 7, fields={"text": number_of}, window=20)
    again = pickle.loads(pickle.dumps(stream))
    for one, other in zip(take(again, 4), take(stream, 4), strict=True):
        assert torch.equal(one.rows, other.rows)
        assert one.bad == other.bad


# Position


@settings(deadline=None)
@given(start=st.integers(0, 12), length=st.integers(1, 6))
def test_iteration_ends_at_a_multiple_of_the_length(
    rows: dict[bool, ShardIndex], start: int, length: int
):
    stream = stream_of(rows[False], 9, length=length, start=start)
    assert len(list(stream)) == length - start % length
    assert stream.t % length == 0
    assert len(list(stream)) == length


@FORKS
@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (1, 0), (4, 0), (7, 0), (7, 2)])
def test_resumed_stream_equals_the_whole(rows: dict[bool, ShardIndex], stop: int, workers: int):
    """t counts what was delivered, not what workers had read ahead."""
    whole = [batch.rows.tolist() for batch in take(stream_of(rows[True], 8), 12)]
    stream = stream_of(rows[True], 8, workers=workers)
    assert [batch.rows.tolist() for batch in take(stream, stop)] == whole[:stop]
    state = stream.state_dict()
    assert state["t"] == stop
    again = stream_of(rows[True], 8)
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert [batch.rows.tolist() for batch in take(again, 12 - stop)] == whole[stop:]


def test_another_order_is_refused_by_name(rows: dict[bool, ShardIndex]):
    state = stream_of(rows[False], 8, window=16).state_dict()
    rotated = Augment("rotated", lambda image, _: image.rotate(90), 0)
    others = {
        "seed": stream_of(rows[False], 8, window=16, seed=1),
        "batch_size": stream_of(rows[False], 4, window=16),
        "window": stream_of(rows[False], 8),
        "index": stream_of(rows[False].select(np.arange(59)), 8, window=16),
        "augment": stream_of(rows[False], 8, window=16, augment=rotated),
    }
    for name, stream in others.items():
        with pytest.raises(CheckpointError, match=f"cannot resume: {name} was"):
            stream.load_state_dict(state)
    stream_of(rows[False], 8, window=16, rank=1, world_size=2).load_state_dict(state)


def test_training_s_random_numbers_are_left_alone(rows: dict[bool, ShardIndex]):
    before = torch.get_rng_state()
    take(stream_of(rows[True], 8), 7)
    list(image_loader(rows[True], Digits(), batch_size=8, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_shared_or_filled_is_refused(rows: dict[bool, ShardIndex]):
    with pytest.raises(ConfigError, match="batch_size=8 does not divide by 3 devices"):
        stream_of(rows[False], 8, world_size=3)
    with pytest.raises(ConfigError, match="batch_size=61, but there are 60 images"):
        stream_of(rows[False], 61)


# Broken samples


def test_broken_sample_is_reported_and_replaced(rows: dict[bool, ShardIndex]):
    """A plain loop draws the same substitutes."""
    n_bad = 0
    for t, batch in enumerate(take(stream_of(rows[True], 12, seed=5), 12)):
        wanted = rows_of_step(N, 12, 5, t).tolist()
        keys = []
        for place, row in enumerate(wanted):
            draws = np.random.Generator(np.random.Philox(key=[5, t], counter=[0, 3, place, 0]))
            candidates = draws.integers(N, size=DRAWS).tolist()
            while wanted[place] in BROKEN:
                keys.append(f"k{wanted[place]}")
                wanted[place] = candidates.pop(0)
            assert row in BROKEN or row == wanted[place]
        assert batch.rows.tolist() == wanted
        assert batch.images[:, 0, 0, 0].tolist() == wanted
        assert [bad.key for bad in batch.bad] == keys
        for bad in batch.bad:
            assert bad.shard == str(rows[True].shards[0])
            assert bad.reason == "jpg cannot be decoded: it is broken"
        n_bad += len(keys)
    assert n_bad >= 2 * len(BROKEN)  # each in both passes


def test_set_of_broken_samples_is_an_error(rows: dict[bool, ShardIndex]):
    index = rows[True].select(np.array(sorted(BROKEN)))
    with pytest.raises(DataError, match=f"{DRAWS} samples in a row cannot be used; the last is"):
        take(stream_of(index, 2), 1)


# Fields


def test_fields_are_made_of_the_same_samples(rows: dict[bool, ShardIndex]):
    stream = stream_of(rows[True], 10, fields={"text": number_of})
    for batch in take(stream, 6):
        assert (batch.fields["text"] - 1000).tolist() == batch.rows.tolist()


def test_sample_whose_field_is_wrong_is_broken(tmp_path: Path):
    texts = [b"0", b"one", b"\xff", b"3"]
    samples = [sample(f"k{n}", jpg=b"%d" % n, txt=text) for n, text in enumerate(texts)]
    index = build_index([write_shard(tmp_path / "a.tar", samples)], cache=None)
    stream = stream_of(index, 4, fields={"text": number_of})
    (batch,) = take(stream, 1)
    assert set(batch.rows.tolist()) <= {0, 3}
    assert torch.equal(batch.fields["text"], batch.rows)
    reasons = {bad.key: bad.reason for bad in batch.bad}
    assert set(reasons) == {"k1", "k2"}
    assert reasons["k1"].startswith("text cannot be made of its fields: invalid literal")
    assert "utf-8" in reasons["k2"]
    # A field that no one has is a mistake of the program.
    with pytest.raises(KeyError, match="json"):
        take(stream_of(index, 4, fields={"text": lambda contents: contents["json"]}), 1)


def test_functions_see_the_fields_that_exist(rows: dict[bool, ShardIndex]):
    def names(contents: Mapping[str, bytes]) -> Tensor:
        assert sorted(contents) == ["cls", "jpg", "txt"]
        assert len(contents) == 3
        return torch.tensor("json" in contents)

    (batch,) = take(stream_of(rows[False], 5, fields={"has": names}), 1)
    assert not batch.fields["has"].any()


# Evaluation


@settings(deadline=None)
@given(world_size=st.integers(1, 4), n_rows=st.integers(1, 11), batch_size=st.integers(1, 4))
def test_evaluation_sees_every_sample_once(
    rows: dict[bool, ShardIndex], world_size: int, n_rows: int, batch_size: int
):
    """In one run per rank; a rank may have none. Count and hash prove it."""
    index = rows[False].select(np.arange(n_rows))
    proof, seen = ExactOnce(torch.arange(n_rows)), []
    for rank in range(world_size):
        loader = image_loader(
            index, Digits(), batch_size=batch_size, workers=0, rank=rank, world_size=world_size
        )
        own = [batch.rows for batch in loader]
        assert len(own) == len(loader)
        for part in own:
            proof.update(part)
            seen += part.tolist()
        sizes = sum(len(part) for part in own)
        assert n_rows // world_size <= sizes <= -(-n_rows // world_size)
    assert proof.compute() == n_rows
    assert seen == list(range(n_rows))


# Augmentation


def darken(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    image.paste((int(generator.integers(256)), 0, 0), (0, 0, 8, 8))
    return image


def test_augmentation_is_a_function_of_seed_and_key(tmp_path: Path):
    samples = [sample(f"k{n}", jpg=picture("PNG")) for n in range(6)]
    index = build_index([write_shard(tmp_path / "a.tar", samples)], cache=None)
    augment = Augment("red square", darken, 7)
    assert augment.fingerprint == "red square (seed 7)"
    pixels = Pixels(ToTensor())

    def reds(batches: list[ImageBatch]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for batch in batches:
            for key, red in zip(batch.keys, batch.images[:, 0, 0, 0].tolist(), strict=True):
                found.setdefault(key, set()).add(red)
        return found

    def stream(rank: int, augment: Augment) -> ImageStream:
        return ImageStream(
            index, pixels, batch_size=4, seed=1, length=9, rank=rank, world_size=2, augment=augment
        )

    first = reds(take(stream(0, augment), 12))
    assert all(len(values) == 1 for values in first.values())
    assert len({value for values in first.values() for value in values}) == 6
    assert first == reds(take(stream(1, augment), 12))
    # The same in evaluation, also of another selection.
    chosen = index.select(np.array([4, 1]))
    loader = image_loader(chosen, pixels, batch_size=2, workers=0, augment=augment)
    assert reds(list(loader)) == {key: first[key] for key in ("k4", "k1")}
    assert reds(take(stream(0, augment._replace(seed=8)), 12)) != first


# Workers


def test_workers_are_the_cores_that_are_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [default_workers(ranks) for ranks in (1, 2, 8, 16, 32)] == [15, 7, 1, 1, 1]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert default_workers() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_workers() == 1
