import itertools
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.lanes import LaneOrder
from clipattr.data.store import ActivationStore
from clipattr.data.stream import AHEAD, ActivationStream, EvaluationStream, evaluation_rows
from clipattr.data.writer import StorePlan, write_stores
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.metrics.exact_once import ExactOnce
from tests.stores import reader, values_of, write

SEEDS = st.integers(0, 2**63)


@st.composite
def orders(draw: st.DrawFn) -> LaneOrder:
    """Ragged blocks, one row and more, with 12 lanes or fewer."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    lanes = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if n <= sum(sizes)]))
    batch_size = lanes * draw(st.integers(1, sum(sizes) // lanes))
    window = batch_size * draw(st.integers(1, 4)) + draw(st.integers(0, batch_size - 1))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return LaneOrder(starts, batch_size=batch_size, seed=draw(SEEDS), lanes=lanes, window=window)


# The order: what holds for every size


@settings(deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_holds_no_row_twice_and_leaves_out_less_than_a_batch(order: LaneOrder, epoch: int):
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    everything = range(order.lanes)
    rows = [row for t in steps for row in order.rows_of_batch(t, everything).tolist()]
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(order.n_rows))
    assert 0 <= order.n_rows - len(rows) < order.lanes * order.share


@settings(deadline=None)
@given(orders(), st.integers(0, 60))
def test_ranks_share_the_batch_of_one(order: LaneOrder, t: int):
    whole = order.rows_of_batch(t, order.lanes_of(0, 1)).tolist()
    for world_size in (1, 2, 3, 4):
        if order.lanes % world_size:
            with pytest.raises(ConfigError, match=f"does not divide by {world_size} devices"):
                order.lanes_of(0, world_size)
            continue
        parts = [
            order.rows_of_batch(t, order.lanes_of(rank, world_size)).tolist()
            for rank in range(world_size)
        ]
        assert len({len(part) for part in parts}) == 1
        assert [row for part in parts for row in part] == whole


def oracle(sizes: list[int], seed: int, lanes: int, share: int, steps: int, t: int) -> list[int]:
    """The rows of batch t, by lists: the module's text and numpy's Philox, nothing else."""

    def draw(epoch: int, *counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, *counter]))

    n_rows = sum(sizes)
    per_epoch = n_rows // (lanes * share)
    epoch, step = divmod(t, per_epoch)
    blocks, row = [], 0
    for size in sizes:
        blocks.append(list(range(row, row + size)))
        row += size
    circle = []
    for block in draw(epoch, 0, 0, 0).permutation(len(sizes)):
        circle += blocks[block]
    start = draw(epoch, 1, 0, 0).integers(n_rows)
    circle = circle[start:] + circle[:start]
    length = per_epoch * share
    batch = []
    for lane in range(lanes):
        mine = circle[lane * length : (lane + 1) * length]
        number = step // steps
        window = mine[number * steps * share : (number + 1) * steps * share]
        order = draw(epoch, 2, lane, number).permutation(len(window))
        place = (step % steps) * share
        batch += [window[i] for i in order[place : place + share]]
    return batch


@settings(deadline=None)
@given(orders(), st.integers(0, 60))
def test_rows_are_those_of_plain_lists(order: LaneOrder, t: int):
    sizes = np.diff(order.starts).tolist()
    wanted = oracle(sizes, order.seed, order.lanes, order.share, order.window_steps, t)
    assert order.rows_of_batch(t, range(order.lanes)).tolist() == wanted


@settings(deadline=None)
@given(orders(), st.lists(st.integers(0, 40), min_size=2, max_size=6))
def test_rows_depend_on_t_alone(order: LaneOrder, steps: list[int]):
    """In whatever order batches are asked for, and whatever a caller does to what it got."""
    lanes = range(order.lanes)
    wanted = {t: order.rows_of_batch(t, lanes).tolist() for t in sorted(set(steps))}
    for t in steps:
        rows = order.rows_of_batch(t, lanes)
        assert rows.tolist() == wanted[t]
        rows[:] = 0


def order_of(sizes: list[int], seed: int = 0, **changes: int) -> LaneOrder:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    settings = {"batch_size": 8, "lanes": 4, "window": 16} | changes
    return LaneOrder(starts, seed=seed, **settings)


def epoch_of(order: LaneOrder, epoch: int) -> list[int]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [r for t in steps for r in order.rows_of_batch(t, range(order.lanes)).tolist()]


@pytest.mark.parametrize("sizes", [[31], [1] * 31, [7, 8, 9, 7]])
def test_what_is_left_out_differs_from_epoch_to_epoch(sizes: list[int]):
    """Also in a store of a single block; and after some epochs every row was seen."""
    order = order_of(sizes)
    left = [frozenset(range(31)) - frozenset(epoch_of(order, epoch)) for epoch in range(6)]
    assert {len(rows) for rows in left} == {7}
    assert len(set(left)) > 3
    assert not frozenset.intersection(*left)


def test_epochs_and_seeds_differ():
    assert epoch_of(order_of([40]), 0) != epoch_of(order_of([40]), 1)
    assert epoch_of(order_of([40]), 0) != epoch_of(order_of([40], seed=1), 0)


def test_every_row_is_as_often_at_every_step():
    """20 rows in two batches of 8: 400 epochs; each row about 160 times, four deviations."""
    order = order_of([6, 6, 8], window=8)
    counts = np.zeros((2, 20))
    for t in range(800):
        counts[t % 2, order.rows_of_batch(t, range(4))] += 1
    assert np.abs(counts - 160).max() <= 4 * np.sqrt(400 * 0.4 * 0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10}, "batch_size=10 does not divide by lanes=4"),
        ({"window": 7}, "window=7, but it must hold batch_size=8 rows"),
        (
            {"batch_size": 40, "window": 99},
            "batch_size=40, but there are 31 rows: choose a smaller",
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        order_of([31], **changes)


# The stream


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """117 rows of 39 images in blocks of up to five rows."""
    folder = tmp_path_factory.mktemp("store")
    return write(folder, tokens=3, read=reader(3, bad=(7,)), max_bad_fraction=0.1)


def stream_of(store: ActivationStore, **changes: object) -> ActivationStream:
    settings = {"batch_size": 12, "seed": 3, "lanes": 12, "window": 36, "length": 30} | changes
    return ActivationStream(store, **settings)


ALL = ("x", "images", "tokens")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batches_hold_the_rows_of_the_order(store: ActivationStore, world_size: int):
    """Over three epochs of nine batches, with windows of three batches."""
    for rank in range(world_size):
        stream = stream_of(store, rank=rank, world_size=world_size, fields=ALL)
        n_seen = 0
        for t, batch in enumerate(stream):
            lanes = stream.order.lanes_of(rank, world_size)
            rows = torch.from_numpy(stream.order.rows_of_batch(t, lanes))
            assert len(rows) == 12 // world_size
            for name, found in zip(ALL, batch, strict=True):
                assert torch.equal(found, store.read(rows, name))
            n_seen += 1
        assert n_seen == 30


@settings(deadline=None, max_examples=40)
@given(
    start=st.integers(0, 40),
    share=st.integers(1, 3),
    lanes=st.sampled_from([1, 3, 12]),
    window=st.integers(36, 200),
    seed=SEEDS,
)
def test_a_stream_that_starts_at_t_goes_on_as_the_whole_one(
    store: ActivationStore, start: int, share: int, lanes: int, window: int, seed: int
):
    settings = {"batch_size": lanes * share, "lanes": lanes, "window": window, "seed": seed}
    whole = list(stream_of(store, length=45, **settings))
    part = list(stream_of(store, length=45, start=start, **settings))
    assert len(part) == 45 - start
    for (found,), (wanted,) in zip(part, whole[start:], strict=True):
        assert torch.equal(found, wanted)


def test_a_restart_with_another_number_of_ranks(store: ActivationStore):
    def rows(stream: ActivationStream, n_batches: int) -> list[list[float]]:
        return [batch[0][:, 0].tolist() for batch in itertools.islice(stream, n_batches)]

    whole = rows(stream_of(store), 30)
    first = [stream_of(store, rank=rank, world_size=2) for rank in range(2)]
    seen = [a + b for a, b in zip(rows(first[0], 11), rows(first[1], 11), strict=True)]
    states = [stream.state_dict() for stream in first]
    assert states[0] == states[1]
    second = [stream_of(store, rank=rank, world_size=3) for rank in range(3)]
    for stream in second:
        stream.load_state_dict(states[0])
    parts = [rows(stream, 19) for stream in second]
    seen += [a + b + c for a, b, c in zip(*parts, strict=True)]
    assert seen == whole


def test_batches_are_counted_when_they_are_delivered(store: ActivationStore):
    stream, n_read = stream_of(store), 0
    for number, _ in enumerate(stream, 1):
        assert stream.state_dict()["t"] == number
        n_read = number
        if number == 4:
            break
    assert (stream.t, n_read) == (4, 4)


def test_an_iteration_ends_at_the_next_multiple_of_the_length(store: ActivationStore):
    """So that a trainer that was resumed inside its epoch ends it where it would have."""
    stream = stream_of(store, length=7, start=4)
    assert len(stream) == 7
    assert [sum(1 for _ in stream) for _ in range(3)] == [3, 7, 7]
    assert stream.t == 21


def test_a_batch_belongs_to_the_caller(store: ActivationStore):
    wanted = [batch[0].clone() for batch in stream_of(store)]
    for (found,), expected in zip(stream_of(store), wanted, strict=True):
        assert torch.equal(found, expected)
        found.zero_()


def test_the_state_of_a_stream(store: ActivationStore):
    stream = stream_of(store, start=5)
    state = stream.state_dict()
    assert state == {
        "t": 5,
        "seed": 3,
        "batch_size": 12,
        "lanes": 12,
        "window": 36,
        "index": store.index_hash,
    }
    for name, value in state.items():
        other = "another" if name == "index" else int(value) + 1
        if name == "t":
            stream.load_state_dict(state | {name: other})
            assert stream.t == 6
            continue
        message = f"cannot resume: {name} was {other!r} and is {value!r} now"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            stream.load_state_dict(state | {name: other})
    with pytest.raises(CheckpointError, match="seed was None"):
        stream.load_state_dict({"delivered": 4})
    assert stream.t == 6


def n_threads() -> int:
    return sum(thread.name.startswith("rows") for thread in threading.enumerate())


def test_the_thread_ends_with_the_iteration(store: ActivationStore):
    batches = iter(stream_of(store))
    assert n_threads() == 0
    next(batches)
    assert n_threads() == 1
    batches.close()
    assert n_threads() == 0
    assert len(list(stream_of(store))) == 30
    assert n_threads() == 0


def test_no_more_than_a_few_batches_are_read_ahead(store: ActivationStore):
    """And none for an iteration that was given up."""
    stream, numbers, seconds = stream_of(store), [], 0.0
    read = stream._read

    def slowly(t: int) -> tuple[Tensor, ...]:
        numbers.append(t)
        time.sleep(seconds)
        return read(t)

    stream._read = slowly
    batches = iter(stream)
    for n_taken in range(1, 4):
        next(batches)
        wait_until(lambda n=n_taken: len(numbers) >= n + AHEAD)
        time.sleep(0.1)
        assert len(numbers) == n_taken + AHEAD
    seconds = 0.5
    next(batches)
    next(batches)
    batches.close()
    assert len(numbers) <= 4 + AHEAD
    assert numbers == list(range(len(numbers)))


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(500):
        if is_true():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_an_error_of_the_thread_arrives(tmp_path: Path):
    store = write(tmp_path)
    batches = iter(ActivationStream(store, batch_size=4, seed=0, length=40, lanes=4, window=4))
    next(batches)
    for path in tmp_path.glob("*.tar"):
        os.truncate(path, 600)
    with pytest.raises(DataError, match=r"act-00000\d.tar: is cut before byte"):
        list(batches)
    assert n_threads() == 0


def test_an_unknown_column(store: ActivationStore):
    with pytest.raises(DataError, match="no column 'label'"):
        stream_of(store, fields=("x", "label"))


def test_pinned_memory_is_asked_for(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    """Windows are not pinned, batches are: checked without a GPU."""
    empty, asked = Column.empty, []

    def spy(column: Column, n_rows: int, *, pin_memory: bool = False) -> Tensor:
        asked.append((n_rows, pin_memory))
        return empty(column, n_rows)

    monkeypatch.setattr(Column, "empty", spy)
    list(stream_of(store, pin_memory=True, length=2))
    list(EvaluationStream(store, batch_size=100, pin_memory=True))
    assert asked == [(36, False), (12, True), (12, True), (100, True), (17, True)]


@pytest.mark.gpu
def test_batches_are_pinned(store: ActivationStore):
    (batch,) = stream_of(store, pin_memory=True, length=1)
    assert batch[0].is_pinned()


# Small stores


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "lanes"), [(1, 1, 1), (5, 4, 4), (5, 5, 1), (13, 4, 2), (24, 8, 8)]
)
def test_small_stores(tmp_path: Path, n_rows: int, batch_size: int, lanes: int):
    """One row, one block, fewer rows than a window."""
    store = write(tmp_path, n_rows)
    stream = ActivationStream(
        store, batch_size=batch_size, seed=1, length=8, lanes=lanes, fields=("images",)
    )
    per_epoch = n_rows // batch_size
    images = [batch[0].tolist() for batch in stream]
    for first in range(0, 8 - per_epoch + 1, per_epoch):
        epoch = list(itertools.chain(*images[first : first + per_epoch]))
        assert len(epoch) == len(set(epoch)) == per_epoch * batch_size


def test_too_few_rows(tmp_path: Path):
    with pytest.raises(ConfigError, match="batch_size=64, but there are 40 rows: choose a smaller"):
        ActivationStream(write(tmp_path), batch_size=64, seed=0, length=1)


# Shuffle quality


def write_sorted(folder: Path, order: str) -> ActivationStore:
    """40,000 images sorted by class, 100 classes in 16 dimensions, two tokens each."""
    centres = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(1000):
            x = centres[part // 200][:, None].repeat(1, 2, 1)
            yield ReadBatch(part, {"s": {"x": x}}, [])

    plan = StorePlan(folder, {}, {"x": Column("float32", 16)}, 2)
    keys = [str(image) for image in range(20_000)]
    return write_stores({"s": plan}, keys, read, order=order, block_rows=1024)["s"]


def quality(store: ActivationStore) -> float:
    """Variance of the means of batches of 512 against that of independent rows; 1 is perfect."""
    stream = ActivationStream(store, batch_size=512, seed=0, length=5 * 78, window=8192)
    means = torch.stack([batch[0].double().mean(dim=0) for batch in stream])
    x = store.load().double()
    wanted = x.var(dim=0) / 512 * (1 - 512 / len(x))
    return float(((means - x.mean(dim=0)).square().mean(dim=0) / wanted).mean())


def test_a_class_sorted_source_is_well_mixed(tmp_path: Path):
    """390 x 16 numbers: a standard deviation of 0.02 around what is true."""
    assert quality(write_sorted(tmp_path / "mixed", "mixed")) < 1.1
    # Without the mixing, the 32 lanes alone, the measure notices.
    assert quality(write_sorted(tmp_path / "source", "source")) > 1.5


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("batch_size", [1, 10, 200])
def test_every_row_is_evaluated_exactly_once(
    store: ActivationStore, world_size: int, batch_size: int
):
    """With 50 ranks and 39 images some have none."""
    proof = ExactOnce(torch.arange(store.n_rows))
    x, n_empty = [], 0
    for rank in range(world_size):
        stream = EvaluationStream(
            store, batch_size=batch_size, rank=rank, world_size=world_size, fields=ALL
        )
        batches = list(stream)
        assert len(stream) == len(batches) == math.ceil(len(stream.rows) / batch_size)
        assert stream.rows == evaluation_rows(store, rank, world_size)
        n_empty += not batches
        for number, (rows, images, tokens) in enumerate(batches):
            first = stream.rows.start + number * batch_size
            proof.update(torch.arange(first, first + len(rows)))
            wanted = values_of(images.long(), 3)[torch.arange(len(rows)), tokens.long()]
            assert torch.equal(rows, wanted)
            x.append(rows)
    assert proof.compute() == 117
    assert torch.equal(torch.cat(x), store.load())
    assert n_empty == max(0, world_size - 39)


def test_all_tokens_of_an_image_are_on_one_rank(tmp_path: Path):
    store = write(tmp_path, tokens=3, order="source")
    ranks = [store.read(torch.tensor(evaluation_rows(store, r, 7)), "images") for r in range(7)]
    owners = [set(images.tolist()) for images in ranks]
    assert sum(len(images) for images in owners) == 40


def evaluate(rank: int, folder: str, n_rows: int) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    store = ActivationStore.open(Path(folder) / "store")
    stream = EvaluationStream(store, batch_size=4, rank=rank, world_size=2, fields=("images",))
    proof = ExactOnce(torch.arange(n_rows))
    for (images,) in stream:
        proof.update(images)
    assert len(stream.rows) == [n_rows // 2, n_rows - n_rows // 2][rank]
    assert proof.compute() == n_rows
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 9])
def test_two_processes_prove_it_together(tmp_path: Path, n_rows: int):
    """Of one row the first process gets none."""
    write(tmp_path / "store", n_rows)
    spawn(evaluate, args=(str(tmp_path), n_rows), nprocs=2)


# The proof


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**62), unique=True, min_size=2, max_size=30), st.data())
def test_a_lost_or_doubled_row_fails(numbers: list[int], data: st.DataObject):
    proof = ExactOnce(torch.tensor(numbers))
    for part in torch.tensor(numbers)[torch.randperm(len(numbers))].split(4):
        proof.update(part)
    assert proof.compute() == len(numbers)
    lost, doubled = data.draw(st.permutations(range(len(numbers))))[:2]
    changed = list(numbers)
    changed[lost] = numbers[doubled]
    proof.reset()
    proof.update(torch.tensor(changed))
    with pytest.raises(DataError, match=f"saw {len(numbers)} rows, as many as are due, but not"):
        proof.compute()
    proof.update(torch.tensor(numbers[:1]))
    with pytest.raises(DataError, match=f"saw {len(numbers) + 1} rows, {len(numbers)} are due"):
        proof.compute()


def test_hashes_are_those_of_splitmix64():
    """Oracle: Python's integers; the first number is that of the reference implementation."""
    mask = 2**64 - 1

    def mix(number: int) -> int:
        z = (number + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    assert mix(0) == 0xE220A8397B1DCDAF
    numbers = [0, 1, 117, 2**31, 2**62]
    proof = ExactOnce(torch.tensor(numbers))
    assert proof.expected_hashes & mask == sum(map(mix, numbers)) & mask
