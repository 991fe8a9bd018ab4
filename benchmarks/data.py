"""Rows per second from an activation store into a loop, and how well they are shuffled.

    python benchmarks/data.py [--rows 262144] [--folder DIR]

262,144 rows of 768 float16 from a class-sorted source, read from the page cache in batches of 4096.
Loaders take turns, one epoch each, nine times; medians and their ratios are the result. Shuffle
quality is the variance of batch means against that of independent rows: 1 is perfect.

Loaders of other packages are measured where they can be imported: saev's shuffled loader (it stores
float32; Python 3.12) and overcomplete's AsyncTensorDataset (files of 16,384 rows).
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.store import ActivationStore
from clipattr.data.stream import ActivationStream, EvaluationStream
from clipattr.data.writer import StorePlan, write_stores

WIDTH, BATCH, N_CLASSES, N_ROUNDS = 768, 4096, 1000, 9
FILE_ROWS = 16_384


def rows_of(n_rows: int, first: int, last: int) -> Tensor:
    """Sorted by class; what is within a class is half of the variance."""
    generator = torch.Generator().manual_seed(first)
    centres = torch.randn(N_CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(first, last) * N_CLASSES // n_rows
    noise = torch.randn(last - first, WIDTH, generator=generator)
    return (centres.index_select(0, classes) + noise).half()


def parts_of(n_rows: int) -> Iterator[Tensor]:
    """The same rows for everybody, in files' worth of them."""
    for first in range(0, n_rows, FILE_ROWS):
        yield rows_of(n_rows, first, min(n_rows, first + FILE_ROWS))


def write(folder: Path, n_rows: int, order: str, *, dtype: str = "float16") -> ActivationStore:
    """Images of one token each."""
    source = torch.cat(list(parts_of(n_rows)))

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(BATCH):
            yield ReadBatch(part, {"x": {"x": source.index_select(0, part)}}, [])

    keys = [f"{image:08d}" for image in range(n_rows)]
    plan = StorePlan(folder, {"made by": "benchmark"}, {"x": Column(dtype, WIDTH)})
    start = time.perf_counter()
    store = write_stores({"x": plan}, keys, read, order=order)["x"]
    seconds = time.perf_counter() - start
    print(f"written, {order} {dtype}: {n_rows / seconds / 1e6:6.2f} M rows/s")
    return store


def stream_of(store: ActivationStore, fields: tuple[str, ...] = ("x",)) -> ActivationStream:
    """One epoch per iteration."""
    length = store.n_rows // BATCH
    return ActivationStream(store, batch_size=BATCH, seed=0, length=length, fields=fields)


def quality(store: ActivationStore) -> float:
    """Over eight epochs."""
    stream = stream_of(store)
    means = [batch[0].double().mean(dim=0) for _ in range(8) for batch in stream]
    x = torch.zeros(WIDTH, dtype=torch.float64)
    square = torch.zeros(WIDTH, dtype=torch.float64)
    for (rows,) in EvaluationStream(store, batch_size=FILE_ROWS):
        x += rows.double().sum(dim=0)
        square += rows.double().square().sum(dim=0)
    mean = x / store.n_rows
    # Rows are drawn without replacement, which makes the variance a little smaller.
    wanted = (square / store.n_rows - mean**2) / BATCH * (1 - BATCH / store.n_rows)
    return float(((torch.stack(means) - mean).square().mean(dim=0) / wanted).mean())


def overcomplete_loader(folder: Path, n_rows: int) -> Iterable[Tensor]:
    """Shuffles within a file, and the files."""
    from overcomplete.data import AsyncTensorDataset

    folder.mkdir()
    for number, rows in enumerate(parts_of(n_rows)):
        torch.save(rows, folder / f"{number:06d}.pt")
    return AsyncTensorDataset(str(folder), batch_size=BATCH)


def saev_loader(folder: Path, n_rows: int) -> Iterable[dict[str, Tensor]]:
    """A reservoir that threads fill, in a process of its own."""
    from saev.data import Metadata, ShuffledConfig, ShuffledDataLoader
    from saev.data.shards import Shard, ShardInfo

    root = folder / "saev" / "shards"
    root.mkdir(parents=True)
    metadata = Metadata(
        family="clip",
        ckpt="benchmark",
        layers=(0,),
        content_tokens_per_example=1,
        cls_token=False,
        d_model=WIDTH,
        n_examples=n_rows,
        max_tokens_per_shard=FILE_ROWS,
        data="",
        dataset=folder,
    )
    metadata.dump(root)
    shards = root / metadata.hash
    info = ShardInfo()
    for number, rows in enumerate(parts_of(n_rows)):
        name = f"acts{number:06}.bin"
        content = np.zeros((FILE_ROWS, WIDTH), dtype=np.float32)
        content[: len(rows)] = rows.float().numpy()
        content.tofile(shards / name)
        info.append(Shard(name=name, n_examples=len(rows)))
    info.dump(shards)
    return ShuffledDataLoader(ShuffledConfig(shards=shards, layer=0, batch_size=BATCH))


def rate(loader: Iterable[object], n_rows: int) -> float:
    """Rows per second of one iteration."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return n_rows / (time.perf_counter() - start)


def main() -> None:
    """Print all rates, their ratios and the shuffle quality."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    n_rows = arguments.rows // FILE_ROWS * FILE_ROWS
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(Path(name), n_rows)


def measure(folder: Path, n_rows: int) -> None:
    """In a folder of its own."""
    store = write(folder / "mixed", n_rows, "mixed")
    full = write(folder / "full", n_rows, "mixed", dtype="float32")
    loaders: dict[str, Iterable[object]] = {
        "clipattr": stream_of(store),
        "clipattr, with image and token of each row": stream_of(
            store, fields=("x", "images", "tokens")
        ),
        "clipattr, float32": stream_of(full),
        "clipattr, evaluation": EvaluationStream(store, batch_size=BATCH),
    }
    peers: dict[str, Callable[[Path, int], Iterable[object]]] = {
        "overcomplete": overcomplete_loader,
        "saev": saev_loader,
    }
    for name, make in peers.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed")
        else:
            loaders[name] = make(folder / name, n_rows)
    rates = {name: [] for name in loaders}
    for _ in range(N_ROUNDS):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, n_rows))
    # One row at a time, in memory: so slow that one round will do.
    rows = DataLoader(TensorDataset(store.load()), batch_size=BATCH, shuffle=True)
    rates["torch DataLoader over a tensor in memory"] = [rate(rows, n_rows)]
    best = statistics.median(rates["clipattr"])
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:45} {median / 1e6:6.2f} M rows/s, clipattr is {best / median:6.1f} x")
    print(f"shuffle quality                {quality(store):6.2f}")
    print(f"in the order of the source     {quality(write(folder / 's', n_rows, 'source')):6.2f}")


if __name__ == "__main__":
    main()
