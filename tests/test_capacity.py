"""The page of capacity on paper: its tables are the script's, and its formulas hold."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipattr.data import ShardIndex
from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.stream import AHEAD, ActivationStream
from clipattr.data.writer import StorePlan, write_stores
from tests.stores import keys_of

ROOT = Path(__file__).parents[1]
LARGE = 400_000_000


@pytest.fixture(scope="module")
def capacity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("capacity", ROOT / "benchmarks" / "capacity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_script(capacity):
    """After a change: python benchmarks/capacity.py prints what belongs there."""
    page = (ROOT / "docs" / "capacity.md").read_text()
    assert len(capacity.tables()) == 3
    for table in capacity.tables():
        assert table in page
    for said in (
        f"{capacity.READ_BYTES / 768 / 2e6:g} M rows/s",
        f"{capacity.EXACT_IMAGES} images/s and core",
        f"{capacity.FAST_IMAGES} with the fast one",
        f"reach {100 * capacity.REACHED:.0f} % of their peak",
        f"n = {capacity.EXPANSION} d latents with k = {capacity.K}",
        f"2 d + {capacity.row_bytes(0):.1f}",
        f"{(capacity.index_bytes(LARGE) + capacity.name_bytes(LARGE)) / 1e9:.0f} GB per process",
        f"{capacity.chunk_bytes(768) / 1e9:.1f} GB at d = 768",
    ):
        assert said in page


@pytest.mark.parametrize("name", ["B/32", "B/16", "L/14"])
def test_the_work_of_a_tower_is_that_of_open_clip(capacity, name):
    """Counted by torch, on tensors without memory."""
    (tower,) = (one for one in capacity.TOWERS if one.name == name)
    model = open_clip.create_model(f"ViT-{name.replace('/', '-')}", device="meta").visual
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == pytest.approx(tower.flops, rel=0.01)


def write(folder: Path, n_rows: int, width: int):
    x = torch.zeros(n_rows, width, dtype=torch.float16)

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(8192):
            yield ReadBatch(part, {"s": {"x": x[part]}}, [])

    plan = StorePlan(folder, {}, {"x": Column("float16", width)})
    return write_stores({"s": plan}, keys_of(n_rows), read)["s"]


@pytest.mark.parametrize("width", [8, 64])
def test_the_bytes_of_a_store(capacity, tmp_path, width):
    n_rows = 4 * capacity.BLOCK_ROWS
    write(tmp_path, n_rows, width)
    found = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert found == pytest.approx(n_rows * capacity.row_bytes(width), rel=0.01)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_memory_of_a_training_process(capacity, tmp_path, world_size):
    store, batch_size = write(tmp_path, 2 * capacity.WINDOW_ROWS, 8), capacity.BATCH
    stream = ActivationStream(
        store, batch_size=batch_size, seed=0, length=8, world_size=world_size, rank=0
    )
    (batch,) = next(iter(stream))
    held = sum(buffer.nbytes for buffer in stream._buffers)
    assert AHEAD == capacity.AHEAD
    assert held + (AHEAD + 1) * batch.nbytes == capacity.window_bytes(8, world_size)


def test_the_memory_of_an_index(capacity):
    keys = np.array([f"{row:09d}".encode() for row in range(1000)])
    places = np.zeros((1000, 3), dtype=np.int64)
    index = ShardIndex(
        [Path("a.tar")],
        ("jpg", "txt", "json"),
        keys=keys,
        shard_numbers=np.zeros(1000, dtype=np.int32),
        offsets=places,
        sizes=places,
    )
    columns = (index.keys, index.shard_numbers, index.offsets, index.sizes)
    assert sum(column.nbytes for column in columns) == capacity.index_bytes(1000)
