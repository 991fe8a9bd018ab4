"""Stores and streams under threads: ranks that share a verdict, iterations that overlap."""

import threading
import time
from pathlib import Path

import pytest

from clipattr.data import writer
from clipattr.data.stream import ActivationStream
from clipattr.errors import ConfigError, DataError
from clipattr.training.activations import ActivationDataModule
from clipattr.training.streams import Place
from tests.stores import check_contents, keys_of, plan_of, reader, write


def write_on_ranks(folder: Path, world_size: int, bad: tuple[int, ...]) -> list[object]:
    """What every rank gets, a store or an error."""
    barrier = threading.Barrier(world_size)
    found: list[object] = [None] * world_size

    def run(rank: int) -> None:
        try:
            found[rank] = writer.write_stores(
                {"s": plan_of(folder)},
                keys_of(40),
                reader(bad=bad),
                chunk_images=12,
                block_rows=5,
                rank=rank,
                world_size=world_size,
                barrier=lambda: barrier.wait(20),
                max_bad_fraction=0.075,
            )["s"]
        except (DataError, threading.BrokenBarrierError) as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pass_with_too_many_bad_images_is_read_again_after_the_repair(
    tmp_path: Path, world_size: int
):
    """Each of two ranks is below the limit of 3, both together are above it."""
    found = write_on_ranks(tmp_path, world_size, bad=(0, 1, 2, 3))
    assert [type(one) for one in found] == [DataError] * world_size
    assert not (tmp_path / "store.json").exists()
    for store in write_on_ranks(tmp_path, world_size, bad=()):
        assert isinstance(store, writer.ActivationStore), store
        check_contents(store, 1, list(range(40)))


def test_two_iterations_of_one_stream_do_not_share_a_window(tmp_path: Path, monkeypatch):
    """The first is not closed yet when the second begins: zip, or a reference that was kept."""
    store = write(tmp_path, 4000, block_rows=50, chunk_images=500)
    order = {"batch_size": 100, "seed": 0, "length": 40, "lanes": 4, "window": 100}
    wanted = [batch[0].tolist() for batch in ActivationStream(store, fields=("images",), **order)]
    read_run = writer.ActivationStore.read_run

    def read_slowly(self, *arguments):
        time.sleep(0.02)
        read_run(self, *arguments)

    monkeypatch.setattr(writer.ActivationStore, "read_run", read_slowly)
    stream = ActivationStream(store, fields=("images",), **order)
    first = iter(stream)
    assert next(first)[0].tolist() == wanted[0]
    time.sleep(0.1)  # it reads ahead, and is in the middle of a later window
    second = iter(stream)
    found = [next(second)[0].tolist() for _ in range(1, 40)]
    first.close()
    assert found == wanted[1:]


def test_any_number_of_ranks_that_divides_the_batch_shares_the_lanes(tmp_path: Path):
    store = write(tmp_path, 400)

    def stream_of(data: ActivationDataModule, rank: int, world_size: int) -> ActivationStream:
        return data.open_stream(Place(rank, world_size, world_size, pin_memory=False))

    def module() -> ActivationDataModule:
        data = ActivationDataModule(
            lambda _: store, batch_size=192, seed=0, n_steps=4, fields=("images",)
        )
        data.store = store
        return data

    for world_size, lanes in ((1, 32), (2, 32), (64, 64), (3, 96)):
        streams = [stream_of(module(), rank, world_size) for rank in range(world_size)]
        rows = [row for stream in streams for row in next(iter(stream))[0].tolist()]
        assert len(set(rows)) == 192
        assert streams[0].state_dict()["lanes"] == lanes
    with pytest.raises(ConfigError, match="batch_size=192 on 128 devices"):
        stream_of(module(), 0, 128)
    begun = stream_of(module(), 0, 64)
    whole = [batch[0].tolist() for batch in stream_of(module(), 0, 1)]
    resumed = module()
    resumed.load_state_dict(dict(begun.state_dict()))
    alone = stream_of(resumed, 0, 1)
    assert alone.state_dict()["lanes"] == 64
    assert next(iter(alone))[0].tolist() != whole[0]
