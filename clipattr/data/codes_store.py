"""Sparse codes of an activation store, cached beside it: k indices and k values per row.

Row r of the codes is row r of the activations, in blocks of the same sizes: the same stream of
batches serves both, and `images` and `tokens` say whose row it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from clipattr.codes import SparseCodes
from clipattr.data.chunks import Layout, OpenChunk, has_chunk
from clipattr.data.columns import Column
from clipattr.data.features import Ranks
from clipattr.data.store import ActivationStore, hash_json
from clipattr.data.writer import StorePlan, begin_store, check_begun, finish_store
from clipattr.errors import ConfigError, DataError

# The rows of an activation store, in float32 -> their codes.
EncodeRows = Callable[[Float[Tensor, "row width"]], SparseCodes]


def write_codes(
    store: ActivationStore,
    encode: EncodeRows,
    *,
    k: int,
    n_latents: int,
    folder: Path,
    made_from: Mapping[str, object],
    batch_size: int = 4096,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool = False,
) -> ActivationStore:
    """The store of the codes of all rows; what is missing of it is written first.

    Args:
        store: of the activations.
        encode: rows on `device` -> their codes, up to k of n_latents active.
        k: active latents that are stored per row.
        n_latents: size of the dictionary.
        folder: of all caches.
        made_from: what decides the codes besides the activations: the weights of the SAE.
        batch_size: rows per call of `encode`.
        dtype: of the stored values: float32, float16 or bfloat16.
        device: where encode runs.
        ranks: the processes that share the work, a file at a time.
        progress: show a bar.
    """
    fingerprint: dict[str, object] = {
        "activations": store.fingerprint,
        "rows": store.index_hash,  # which row is where, and in which numbers
        "codes": {**made_from, "k": k, "n_latents": n_latents},
    }
    columns = {"indices": Column("int32", k), "values": Column(dtype, k)}
    name = hash_json({**fingerprint, "dtype": dtype})[:16]
    plan = StorePlan(folder / name, fingerprint, columns, store.tokens)
    starts = store.chunk_starts.tolist()
    largest = int((store.starts[1:] - store.starts[:-1]).max())
    layout = Layout(store.n_images, len(starts) - 1, store.order, 0, largest)
    if ranks.rank == 0:
        begin_store(plan, layout, store.keys)
    ranks.barrier()
    is_done = check_begun(plan, layout) is None
    if not is_done:
        _write_missing(store, encode, plan, layout, batch_size, device, ranks, progress=progress)
    ranks.barrier()
    if ranks.rank == 0 and not is_done:
        finish_store(plan, layout)
    ranks.barrier()
    return ActivationStore.open(plan.folder, fingerprint)


@torch.no_grad()
def _write_missing(
    store: ActivationStore,
    encode: EncodeRows,
    plan: StorePlan,
    layout: Layout,
    batch_size: int,
    device: torch.device | str,
    ranks: Ranks,
    *,
    progress: bool,
) -> None:
    starts = store.chunk_starts.tolist()
    numbers = range(ranks.rank, layout.n_chunks, ranks.world_size)
    missing = [number for number in numbers if not has_chunk(plan.folder, number)]
    n_rows = sum(starts[number + 1] - starts[number] for number in missing)
    is_shown = progress and ranks.rank == 0
    with tqdm(total=n_rows, desc="codes", unit="row", disable=not is_shown) as bar:
        for number in missing:
            first, last = starts[number], starts[number + 1]
            chunk = OpenChunk(plan.folder, number, plan.columns, last - first, tokens=1)
            chunk.bad = store.bad if number == 0 else []
            for start in range(first, last, batch_size):
                rows = range(start, min(last, start + batch_size))
                x = _run(store, "x", rows).to(device).float()
                values = _pad(encode(x), plan)
                tokens = _run(store, "tokens", rows)
                chunk.add(_run(store, "images", rows).long(), {**values, "tokens": tokens})
                bar.update(len(rows))
            # The rows are mixed already.
            chunk.write(layout._replace(order="source"))


def _pad(codes: SparseCodes, plan: StorePlan) -> dict[str, Tensor]:
    """The columns of some rows; slots that did not fire hold index 0 and value 0."""
    k = plan.columns["indices"].width
    n_slots = codes.indices.shape[-1]
    if k is None or n_slots > k:
        raise ConfigError(f"k={k}: the codes have {n_slots} slots per row, which must fit")
    indices = codes.indices.where(codes.is_active, 0)
    missing = (0, k - n_slots)
    return {
        "indices": pad(indices, missing).to("cpu", torch.int32),
        "values": pad(codes.values, missing).cpu(),
    }


def read_codes(store: ActivationStore, rows: Int[Tensor, " row"] | range) -> SparseCodes:
    """The codes of any rows of a store that `write_codes` made; a range of them is read faster."""
    made_from = store.fingerprint.get("codes")
    if not isinstance(made_from, dict):
        raise DataError(f"{store.folder}: holds no codes, but {list(store.columns)}")
    if isinstance(rows, range):
        indices, values = (_run(store, name, rows) for name in ("indices", "values"))
    else:
        indices, values = (store.read(rows, name) for name in ("indices", "values"))
    return SparseCodes(indices.long(), values.float(), int(made_from["n_latents"]))


def _run(store: ActivationStore, name: str, rows: range) -> Tensor:
    out = store.column(name).empty(len(rows))
    store.read_run(name, rows.start, out)
    return out
