"""Ten million rows over two processes that are killed every second or so: none lost, none doubled.

    python benchmarks/soak.py [--rows 10000000] [--seconds-between-kills 1] [--seed 0]

First two processes write an activation store while SIGKILL ends both of them again and again; then
processes train on it (two, now and then one), and are killed again and again. Each notes the rows
of every batch that it is given, and proves that their numbers are those of their images. At the
end the notes of all are compared with the plan of every batch, computed here by plain numpy, and
the sum that was trained with that of the plan. Exit code 1 when anything differs.
"""

import argparse
import multiprocessing
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.store import ActivationStore
from clipattr.data.stream import ActivationStream
from clipattr.data.writer import StorePlan, write_stores
from clipattr.training.checkpoints import AtomicCheckpointIO, newest_valid

WIDTH, BATCH, LANES, WINDOW = 16, 256, 32, 65_536
CHECKPOINT_EVERY = 200
N_EPOCHS = 4
MISMATCH = 3  # exit code of a process that was given wrong numbers


class Work(NamedTuple):
    """What the processes are told."""

    folder: Path
    n_images: int
    n_steps: int
    seed: int


class Life(NamedTuple):
    """One start of the processes: its number, and which process of how many this is."""

    number: int
    rank: int
    world_size: int
    port: int


class Keys(Sequence[str]):
    """The names of the images, without a list of millions."""

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, image):  # noqa: ANN001, ANN204
        return f"{image:08d}" if image < self.n_images else self._end()

    def _end(self) -> str:
        raise IndexError


def values_of(images: Tensor) -> Tensor:
    """[image, WIDTH]: whole numbers below 2048, which float16 holds exactly."""
    mixed = images.long()[:, None] * 2_654_435_761 + torch.arange(WIDTH) * 40_503
    return (mixed >> 7 & 2047).half()


# What the processes do


def meet(life: Life) -> None:
    """Join the other processes of this life."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{life.port}",
        rank=life.rank,
        world_size=life.world_size,
    )


def write(work: Work, life: Life) -> None:
    """This process's part of the store, or what is missing of it."""
    meet(life)
    # tqdm's own lock is one of the system, which a kill would leave behind.
    tqdm.set_lock(threading.RLock())

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(1024):
            yield ReadBatch(part, {"x": {"x": values_of(part)}}, [])

    plan = StorePlan(work.folder / "store", {"made by": "soak"}, {"x": Column("float16", WIDTH)})
    write_stores(
        {"x": plan},
        Keys(work.n_images),
        read,
        seed=work.seed,
        rank=life.rank,
        world_size=life.world_size,
        barrier=distributed.barrier,
    )


def train(work: Work, life: Life) -> None:
    """From the newest checkpoint on; what is trained is sum_t (t + 1) sum(rows of batch t)."""
    meet(life)
    stream = ActivationStream(
        ActivationStore.open(work.folder / "store"),
        batch_size=BATCH,
        seed=work.seed,
        length=work.n_steps,
        lanes=LANES,
        window=WINDOW,
        rank=life.rank,
        world_size=life.world_size,
        fields=("x", "images"),
    )
    total = torch.zeros(WIDTH, dtype=torch.int64)
    newest = newest_valid(work.folder / "checkpoints")
    if newest is not None:
        saved = torch.load(newest, weights_only=True)
        stream.load_state_dict(saved["stream"])
        total = saved["total"]
    if stream.t < work.n_steps:
        take_steps(work, life, stream, total)


def take_steps(work: Work, life: Life, stream: ActivationStream, total: Tensor) -> None:
    """To the end, unless a kill comes before it."""
    notes = work.folder / "notes" / f"{life.number:04d}-{life.world_size}-{life.rank}.bin"
    with notes.open("xb", buffering=0) as file:
        for x, images in stream:
            if not torch.equal(x, values_of(images)):
                sys.exit(MISMATCH)
            # A kill of the process does not lose what the system has; one write is one batch.
            file.write(np.int64(stream.t - 1).tobytes() + images.numpy().tobytes())
            step = x.long().sum(dim=0) * stream.t
            distributed.all_reduce(step)
            total += step
            if stream.t % CHECKPOINT_EVERY == 0 or stream.t == work.n_steps:
                distributed.barrier()
                if life.rank == 0:
                    state = {"stream": stream.state_dict(), "total": total}
                    path = work.folder / "checkpoints" / f"step={stream.t}.ckpt"
                    AtomicCheckpointIO().save_checkpoint(state, path)


# Starting and killing them


class Killer:
    """Starts the processes of a job until they come to its end, and kills them before."""

    def __init__(self, work: Work, draw: random.Random, seconds: float) -> None:
        self.work = work
        self.draw = draw
        self.seconds = seconds
        self.world_sizes: list[int] = []

    def run(
        self, job: Callable[[Work, Life], None], n_done: Callable[[], int], *, alone: float
    ) -> None:
        """A kill comes at a random time after `n_done` grew; a share of lives has one process."""
        while True:
            world_size = 1 if self.draw.random() < alone else 2
            before = n_done()
            processes = self._start(job, world_size)
            self.world_sizes.append(world_size)
            deadline = time.monotonic() + 60
            while n_done() <= before and any(one.is_alive() for one in processes):
                if time.monotonic() > deadline:
                    raise SystemExit("no progress for a minute")
                time.sleep(0.01)
            processes[0].join(self.draw.uniform(0, 2 * self.seconds))
            is_at_its_end = all(not one.is_alive() for one in processes)
            for process in self.draw.sample(processes, len(processes)):
                process.kill()
            for process in processes:
                process.join()
            codes = [process.exitcode for process in processes]
            if MISMATCH in codes or (is_at_its_end and any(codes)):
                raise SystemExit(f"FAILED: processes ended with {codes}")
            if not any(codes):
                return

    @property
    def n_kills(self) -> int:
        """All lives but the last ended in one."""
        return len(self.world_sizes) - 1

    def _start(self, job: Callable[[Work, Life], None], world_size: int) -> Sequence[BaseProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Its server has imported everything once: a life begins within a tenth of a second.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["clipattr.data", "clipattr.training.checkpoints"])
        lives = [Life(len(self.world_sizes), rank, world_size, port) for rank in range(world_size)]
        processes = [context.Process(target=job, args=(self.work, life)) for life in lives]
        for process in processes:
            process.start()
        return processes


# What must have come out


def check_store(work: Work) -> ActivationStore:
    """Checksums, and each image exactly once with its numbers."""
    store = ActivationStore.open(work.folder / "store")
    store.verify()
    images = store.load("images")
    expect(torch.equal(images.sort().values, torch.arange(work.n_images).int()), "each image once")
    expect(torch.equal(store.load(), values_of(images)), "each image with its own numbers")
    return store


def plan_of(store: ActivationStore, seed: int, epoch: int) -> np.ndarray:
    """[step, row of the batch]: the images of an epoch, by the text of clipattr.data.lanes."""

    def draw(*counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, *counter]))

    n_rows, share = store.n_rows, BATCH // LANES
    n_steps, per_window = n_rows // BATCH, WINDOW // BATCH
    blocks = np.split(np.arange(n_rows), store.starts[1:-1])
    circle = np.concatenate([blocks[number] for number in draw(0, 0, 0).permutation(len(blocks))])
    circle = np.roll(circle, -draw(1, 0, 0).integers(n_rows))[: n_steps * BATCH]
    rows = np.empty((n_steps, LANES, share), dtype=np.int64)
    for lane, mine in enumerate(circle.reshape(LANES, n_steps * share)):
        for number, first in enumerate(range(0, n_steps, per_window)):
            last = min(n_steps, first + per_window)
            window = mine[first * share : last * share]
            order = draw(2, lane, number).permutation(len(window))
            rows[first:last, lane] = window[order].reshape(-1, share)
    return store.load("images").numpy()[rows.reshape(n_steps, BATCH)]


def read_notes(path: Path, share: int) -> np.ndarray:
    """What a process noted, without a record that it was killed in; it may have come to none."""
    record = np.dtype([("t", "<i8"), ("images", "<i4", (share,))])
    if not path.exists():
        return np.zeros(0, record)
    return np.fromfile(path, record, count=path.stat().st_size // record.itemsize)


def check_notes(work: Work, plan: np.ndarray) -> int:
    """Every step by every life that took it; the number of rows that were delivered in all."""
    n_complete, n_delivered = 0, 0
    delivered = np.full_like(plan, -1)
    lives = sorted({path.name[:6] for path in (work.folder / "notes").iterdir()})
    for life in lives:
        parts = np.split(np.arange(BATCH), int(life[5:]))
        steps = []
        for rank, columns in enumerate(parts):
            notes = read_notes(work.folder / "notes" / f"{life}-{rank}.bin", len(columns))
            first = notes["t"][0] if len(notes) else 0
            expect(np.array_equal(notes["t"], first + np.arange(len(notes))), "step after step")
            delivered[np.ix_(notes["t"], columns)] = notes["images"]
            is_same = np.array_equal(notes["images"], plan[np.ix_(notes["t"], columns)])
            expect(is_same, f"life {life}: the rows of every step are those of the plan")
            steps.append(notes["t"])
            n_delivered += notes["images"].size
        if all(len(each) for each in steps):
            expect(len({each[0] for each in steps}) == 1, "all processes begin with one step")
            expect(steps[0][0] % CHECKPOINT_EVERY == 0, f"life {life}: begins at a checkpoint")
            expect(steps[0][0] <= n_complete, f"life {life}: no step was left out")
            n_complete = max(n_complete, 1 + min(each[-1] for each in steps))
    expect(n_complete == work.n_steps, "the last step was taken")
    per_epoch = work.n_images // BATCH
    for epoch in range(N_EPOCHS):
        images = delivered[epoch * per_epoch : (epoch + 1) * per_epoch]
        n_once = len(np.unique(images[images >= 0]))
        expect(n_once == per_epoch * BATCH, f"epoch {epoch}: no row twice")
        expect(work.n_images - n_once == work.n_images % BATCH, f"epoch {epoch}: no row is lost")
    return n_delivered


def check_total(work: Work, plan: np.ndarray) -> None:
    """What was trained, through all checkpoints."""
    newest = newest_valid(work.folder / "checkpoints")
    expect(newest is not None, "there is a checkpoint")
    wanted = torch.zeros(WIDTH, dtype=torch.int64)
    for t, images in enumerate(torch.from_numpy(plan)):
        wanted += values_of(images).long().sum(dim=0) * (t + 1)
    saved = torch.load(str(newest), weights_only=True)
    expect(saved["stream"]["t"] == work.n_steps, "the last checkpoint is of the last step")
    expect(torch.equal(saved["total"], wanted), "each batch was trained on once, in its place")


def expect(is_true: bool, what: str) -> None:
    """End with exit code 1 where it does not hold."""
    if not is_true:
        raise SystemExit(f"FAILED: {what}")


def main() -> None:
    """Write, train, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="to be delivered")
    parser.add_argument("--seconds-between-kills", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the kills")
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        # A few rows more than the epochs need, so that some are left out of each.
        n_images = arguments.rows // N_EPOCHS + 600
        n_steps = N_EPOCHS * (n_images // BATCH)
        soak(Work(Path(name), n_images, n_steps, arguments.seed), arguments.seconds_between_kills)


def soak(work: Work, seconds: float) -> None:
    """In a folder of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # removes the folder
    draw = random.Random(work.seed)
    store_folder, notes = work.folder / "store", work.folder / "notes"
    notes.mkdir()
    start = time.perf_counter()
    writer = Killer(work, draw, seconds / 4)
    writer.run(write, lambda: len(list(store_folder.glob("act-*.json"))), alone=0.0)
    store = check_store(work)
    n_left = len(list(store_folder.glob(".*.tmp-*")))
    print(
        f"writing: {store.n_rows} rows, {writer.n_kills} kills, {n_left} files left half-written, "
        f"each image exactly once, checksums fit; {time.perf_counter() - start:.0f} s"
    )
    start = time.perf_counter()
    trainer = Killer(work, draw, seconds)
    trainer.run(train, lambda: len(list(notes.iterdir())), alone=0.2)
    elapsed = time.perf_counter() - start
    plan = np.concatenate([plan_of(store, work.seed, epoch) for epoch in range(N_EPOCHS)])
    n_delivered = check_notes(work, plan)
    check_total(work, plan)
    print(
        f"training: {plan.size} rows in {work.n_steps} steps and {N_EPOCHS} epochs, "
        f"{trainer.n_kills} kills, {len(trainer.world_sizes)} starts "
        f"({trainer.world_sizes.count(1)} with one process), "
        f"{n_delivered - plan.size} rows delivered again after a kill; "
        f"{elapsed:.0f} s, {plan.size / elapsed / 1e3:.0f} k rows/s with all restarts"
    )
    print(f"in each epoch {work.n_images % BATCH} of {work.n_images} rows are left out")
    print("nothing lost, nothing doubled")


if __name__ == "__main__":
    main()
