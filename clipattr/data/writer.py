"""Write activation stores: every image is read once for all sites together, by any number of ranks.

The images are permuted and cut into chunks, and the rows of a chunk are mixed before they are cut
into blocks: neighbours in a file are strangers in the source, so that a reader needs a small window
only. What a chunk holds does not depend on who writes it, and it has its name only when it is
complete: a killed pass, or one on another number of ranks, goes on with those that are missing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from clipattr.atomic import sweep_temporary, write_bytes, write_text
from clipattr.data.chunks import Layout, OpenChunk, Read, Source, has_chunk, sidecar_name
from clipattr.data.columns import Column
from clipattr.data.shards import BadSample, check_bad
from clipattr.data.store import (
    BAD,
    FORMAT,
    KEYS,
    PLAN,
    STORE,
    ActivationStore,
    check_format,
    check_same,
    hash_json,
    read_json,
)
from clipattr.errors import DataError


class StorePlan(NamedTuple):
    """One store to write.

    Attributes:
        folder: where; it may hold a part of the store, or all of it.
        fingerprint: what decides the values (weights, site, preprocessing, precision, source
            index) as plain JSON. A store made from something else is refused.
        columns: what is stored per row, such as {"x": Column("float16", 768)}.
        tokens: rows per image.
    """

    folder: Path
    fingerprint: dict[str, object]
    columns: dict[str, Column]
    tokens: int = 1


def write_stores(
    plans: Mapping[str, StorePlan],
    keys: Sequence[str],
    read: Read,
    *,
    order: str = "mixed",
    seed: int = 0,
    chunk_images: int = 8192,
    chunk_rows: int = 262_144,
    block_rows: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    max_bad_fraction: float = 0.0,
    progress: bool = False,
) -> dict[str, ActivationStore]:
    """Open the stores; what is not there yet is written first, in one pass over the images.

    Every rank calls this with the same arguments, but its rank. A finished store is opened whatever
    its seed and sizes are; an unfinished one must have been begun with the same, but for files that
    are smaller because it was begun along with others: files of another size take another pass.

    Args:
        plans: name -> store.
        keys: of all source images, in the order of the source.
        read: images (rows of the source) -> their batches, in the same order, with the values of
            all unfinished stores. Called once for a pass, so that workers can decode ahead.
        order: "mixed", or "source" to keep the order of the source.
        seed: of the mixing.
        chunk_images: the largest number of images per file: the work that a kill can cost.
        chunk_rows: the largest number of rows per file, over all stores that are begun together;
            twice as many are held in memory.
        block_rows: the largest number of rows per block.
        rank: of this process.
        world_size: the number of processes.
        barrier: returns when every process has called it.
        max_bad_fraction: share of images that cannot be read above which the pass stops.
        progress: show a bar.
    """
    if not keys:
        raise DataError("there is no image to store the activations of")

    def layout_of(tokens: int) -> Layout:
        per_chunk = max(1, min(chunk_images, chunk_rows // tokens))
        return Layout(len(keys), -(-len(keys) // per_chunk), order, seed, block_rows)

    if rank == 0:
        _begin_together(plans, layout_of, keys)
    barrier()
    passes = _passes(plans, layout_of)
    for layout, together in passes.items():
        chunks = range(rank, layout.n_chunks, world_size)
        _write_missing(together, layout, read, chunks, max_bad_fraction, progress=progress)
    barrier()
    for layout, together in passes.items():
        _judge(together, layout, max_bad_fraction, is_first=rank == 0, barrier=barrier)
    if rank == 0:
        _finish_all(passes)
    barrier()
    return {name: _open(plan, max_bad_fraction) for name, plan in plans.items()}


def _begin_together(
    plans: Mapping[str, StorePlan], layout_of: Callable[[int], Layout], keys: Sequence[str]
) -> None:
    """The new ones share a layout, so that they take one pass."""
    new = [plan for plan in plans.values() if not (plan.folder / PLAN).exists()]
    layout = layout_of(max(1, sum(plan.tokens for plan in new)))
    for plan in plans.values():
        begin_store(plan, layout, keys)


def _finish_all(passes: Mapping[Layout, Mapping[str, StorePlan]]) -> None:
    for layout, together in passes.items():
        for plan in together.values():
            finish_store(plan, layout)


def _passes(
    plans: Mapping[str, StorePlan], layout_of: Callable[[int], Layout]
) -> dict[Layout, dict[str, StorePlan]]:
    """The stores that are not finished, by the layout that they were begun with."""
    passes: dict[Layout, dict[str, StorePlan]] = {}
    for name, plan in plans.items():
        layout = check_begun(plan, layout_of(plan.tokens))
        if layout is not None:
            passes.setdefault(layout, {})[name] = plan
    return passes


def _open(plan: StorePlan, max_bad_fraction: float) -> ActivationStore:
    store = ActivationStore.open(plan.folder, plan.fingerprint)
    check_bad(store.bad, store.n_images, max_bad_fraction)
    if store.n_rows == 0:
        raise DataError(f"none of the {store.n_images} images can be read")
    return store


def _describe(plan: StorePlan, layout: Layout) -> dict[str, object]:
    asked = {"fingerprint": plan.fingerprint, "columns": plan.columns, "tokens": plan.tokens}
    return json.loads(json.dumps(asked | layout._asdict()))


def begin_store(plan: StorePlan, layout: Layout, keys: Sequence[str]) -> None:
    """Note what the folder is for, before anything else is written into it."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{plan.folder}: cannot be made: {error}") from error
    sweep_temporary(plan.folder)
    if (plan.folder / PLAN).exists():
        return
    text = "".join(f"{key}\n" for key in keys)
    if text.count("\n") != len(keys):
        raise DataError("the key of an image holds a line break")
    content = text.encode("utf-8", "surrogateescape")
    write_bytes(plan.folder / KEYS, content)
    start = {"format": FORMAT, "keys_sha256": hashlib.sha256(content).hexdigest()}
    _write_json(plan.folder / PLAN, start | _describe(plan, layout))


def is_finished(plan: StorePlan) -> bool:
    """Whether nothing of a store has to be written any more."""
    return (plan.folder / STORE).exists()


def check_begun(plan: StorePlan, layout: Layout) -> Layout | None:
    """Compare the plan with what the folder is for; the layout it goes on with, if it does.

    Once it is finished its sizes do not matter.
    """
    found, wanted = read_json(plan.folder / PLAN), _describe(plan, layout)
    check_format(plan.folder / PLAN, found)
    is_done = is_finished(plan)
    content = ("fingerprint", "columns", "tokens", "n_images", "order")
    for field in content if is_done else wanted:
        if field != "n_chunks" or found[field] < layout.n_chunks:
            check_same(plan.folder, field, found[field], wanted[field])
    return None if is_done else layout._replace(n_chunks=found["n_chunks"])


def _write_missing(
    plans: Mapping[str, StorePlan],
    layout: Layout,
    read: Read,
    chunks: range,
    max_bad_fraction: float,
    *,
    progress: bool,
) -> None:
    missing = [
        number
        for number in chunks
        if not all(has_chunk(plan.folder, number) for plan in plans.values())
    ]
    if not missing:
        return
    images = layout.images()
    wanted = [images[slice(*layout.bounds(number))] for number in missing]
    source = Source(read, np.concatenate(wanted))
    bad: list[BadSample] = []
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, thread_name_prefix="store") as pool,
        tqdm(
            total=len(source.wanted), desc="activations", unit="image", disable=not progress
        ) as bar,
    ):
        for number, part in zip(missing, wanted, strict=True):
            opened = {
                name: OpenChunk(plan.folder, number, plan.columns, len(part), plan.tokens)
                for name, plan in plans.items()
                if not has_chunk(plan.folder, number)
            }
            for batch in source.take(len(part)):
                bad += batch.bad
                for name, chunk in opened.items():
                    chunk.add(batch.images, batch.values[name])
                    chunk.bad += batch.bad
                bar.update(len(batch.images) + len(batch.bad))
            if writing is not None:
                writing.result()
            try:
                check_bad(bad, layout.n_images, max_bad_fraction)
            except DataError:
                _forget_bad(plans, chunks)
                raise
            writing = pool.submit(_write_chunks, list(opened.values()), layout)
        if writing is not None:
            writing.result()


def _judge(
    plans: Mapping[str, StorePlan],
    layout: Layout,
    max_bad_fraction: float,
    *,
    is_first: bool,
    barrier: Callable[[], object],
) -> None:
    """All ranks, each of which saw a part of the bad images, come to one verdict."""
    chunks = range(layout.n_chunks)
    try:
        check_bad(_list_bad(plans, chunks), layout.n_images, max_bad_fraction)
    except DataError:
        barrier()
        if is_first:
            _forget_bad(plans, chunks)
        raise


def _list_bad(plans: Mapping[str, StorePlan], chunks: Iterable[int]) -> list[BadSample]:
    sidecars = [
        plan.folder / sidecar_name(number)
        for plan in plans.values()
        for number in chunks
        if has_chunk(plan.folder, number)
    ]
    bad = [BadSample(*entry) for sidecar in sidecars for entry in read_json(sidecar)["bad"]]
    return list(dict.fromkeys(bad))


def _forget_bad(plans: Mapping[str, StorePlan], chunks: Iterable[int]) -> None:
    """Images that stop the pass will be repaired: their chunks are read again."""
    for plan in plans.values():
        for number in chunks:
            sidecar = plan.folder / sidecar_name(number)
            if has_chunk(plan.folder, number) and read_json(sidecar)["bad"]:
                sidecar.unlink()


def _write_chunks(chunks: list[OpenChunk], layout: Layout) -> None:
    for chunk in chunks:
        chunk.write(layout)


def finish_store(plan: StorePlan, layout: Layout) -> None:
    """Write what makes a store of the files: `store.json`, last."""
    start = read_json(plan.folder / PLAN)
    chunks = [read_json(plan.folder / sidecar_name(n)) for n in range(layout.n_chunks)]
    bad = [BadSample(*entry) for chunk in chunks for entry in chunk.pop("bad")]
    lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in bad)
    write_text(plan.folder / BAD, lines)
    content = start | {"chunks": chunks, "sha256": None}
    _write_json(plan.folder / STORE, content | {"sha256": hash_json(content)})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text(path, json.dumps(content) + "\n")
