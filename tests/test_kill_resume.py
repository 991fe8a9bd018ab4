"""Runs that are killed (SIGKILL) and resumed, on as many processes and on others.

What each process really got is compared, row by row, and the weights at the end.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from clipattr.atomic import sweep_temporary
from clipattr.data.lanes import LaneOrder
from clipattr.training.checkpoints import newest_valid
from tests.observed_run import BATCH, N_ROWS, Processes, rows_of_the_store, save_for_ever
from tests.stores import store_of

N_STEPS, PER_EPOCH = 40, N_ROWS // BATCH


def wait_until(is_true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def delivered(folder: Path, known: frozenset[Path] = frozenset()) -> list[dict[int, list[int]]]:
    """Rank -> step -> rows, in the files that are not known yet."""
    found: list[dict[int, list[int]]] = [{}, {}]
    for path in set(folder.glob("rows-*.jsonl")) - known:
        rank = int(path.stem[-1])
        for line in path.read_text().split("\n")[:-1]:  # behind the last line break is a torn one
            step, rows = json.loads(line)
            assert step not in found[rank]
            found[rank][step] = rows
    return found


def files(folder: Path) -> frozenset[Path]:
    return frozenset(folder.glob("rows-*.jsonl"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


class Killed:
    """The folder of a run of two processes that were killed behind step 21, and what they got."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "killed"
        processes = Processes(self.folder, 2, pause=0.05)
        wait_until(lambda: min(map(len, delivered(self.folder))) > 22)
        processes.kill()
        assert processes.exit_codes() == [-9, -9]
        self.rows = delivered(self.folder)
        self.start = int(newest_valid(self.folder / "checkpoints").stem.removeprefix("step="))

    def copy(self, name: str) -> Path:
        folder = self.folder.with_name(name)
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    store_of(rows_of_the_store(), folder / "store")
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    assert Processes(root / "whole", 2).exit_codes() == [0, 0]
    return root / "whole"


@pytest.fixture(scope="module")
def killed(root: Path) -> Killed:
    return Killed(root)


def test_processes_get_the_rows_of_the_plan(whole: Path, root: Path):
    store = store_of(rows_of_the_store(), root / "store")
    order = LaneOrder(store.starts, batch_size=BATCH, seed=0, lanes=32, window=65_536)
    images = store.load("images").numpy()
    first, second = delivered(whole)
    assert list(first) == list(second) == list(range(N_STEPS))
    for step in range(N_STEPS):
        assert first[step] + second[step] == images[order.rows_of_batch(step, range(32))].tolist()
    assert N_STEPS > 4 * PER_EPOCH
    for epoch in range(N_STEPS // PER_EPOCH):
        steps = range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        rows = [row for step in steps for part in (first, second) for row in part[step]]
        assert len(set(rows)) == len(rows) == N_ROWS // BATCH * BATCH


def test_the_kill_was_inside_an_epoch_and_behind_a_checkpoint(killed: Killed, whole: Path):
    last = max(killed.rows[0])
    assert PER_EPOCH < killed.start < last < N_STEPS - 1
    assert killed.start % PER_EPOCH
    expected = delivered(whole)
    for rank, steps in enumerate(killed.rows):
        assert steps == {step: expected[rank][step] for step in steps}


def test_two_processes_go_on_to_the_same_bits(killed: Killed, whole: Path):
    folder = killed.copy("again")
    known = files(folder)
    assert Processes(folder, 2).exit_codes() == [0, 0]
    expected = delivered(whole)
    for rank, steps in enumerate(delivered(folder, known)):
        assert list(steps) == list(range(killed.start, N_STEPS))
        assert steps == {step: expected[rank][step] for step in steps}
    found, wanted = weights(folder), weights(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_one_process_goes_on_with_the_same_batches(killed: Killed, whole: Path):
    """Its sums have another order: the weights are equal to rounding."""
    folder = killed.copy("alone")
    known = files(folder)
    assert Processes(folder, 1).exit_codes() == [0]
    expected, (found, none) = delivered(whole), delivered(folder, known)
    assert none == {}
    assert list(found) == list(range(killed.start, N_STEPS))
    assert found == {step: expected[0][step] + expected[1][step] for step in found}
    wanted, trained = weights(whole), weights(folder)
    start = torch.load(newest_valid(killed.folder / "checkpoints"), weights_only=True)["state_dict"]
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-5)
    moved = (wanted["members.0.sae.W_enc"] - start["members.0.sae.W_enc"]).abs().max()
    assert moved > 1e-3  # a hundred times what is allowed


# Kills while a checkpoint is written


BESIDE, ELSEWHERE = "beside", "another file system"


@pytest.fixture(params=[BESIDE, ELSEWHERE])
def temporary(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """TMPDIR, in which Lightning's own writer would stage; nothing is ever left in it."""
    if request.param == BESIDE:
        folder = tmp_path / "temporary"
        folder.mkdir()
        yield folder
        assert list(folder.iterdir()) == []
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == []


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.stem.split("=")[1]) if checkpoint else 0


def test_a_kill_at_any_byte_of_a_checkpoint(tmp_path: Path, temporary: Path):
    """Every file of that name is whole, and what was once saved is not lost."""
    draw, n_left, before = random.Random(0), 0, 0
    for _ in range(16):
        process = Processes(tmp_path, 1, save_for_ever, temporary=temporary)
        n_saved = (tmp_path / "saved").stat().st_size if before else 0
        wait_until(lambda n=n_saved: (tmp_path / "saved").exists() and saved(tmp_path) > n)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.exit_codes() == [-9]
        steps = [step_of(path) for path in tmp_path.glob("*.ckpt")]
        for path in tmp_path.glob("*.ckpt"):
            content = torch.load(path, weights_only=True)
            assert content["step"] == step_of(path)
            assert torch.equal(content["x"], torch.full((2_000_000,), float(step_of(path))))
        assert step_of(newest_valid(tmp_path)) == max(steps) >= max(before, saved(tmp_path))
        assert len(steps) <= 3  # a kill may come before the third is removed
        before = max(steps)
        left = list(tmp_path.glob(".step=*.tmp-*"))
        n_left += len(left)
        sweep_temporary(tmp_path)
        assert not list(tmp_path.glob(".*.tmp-*"))
    assert n_left > 3  # or no kill met a write


def saved(folder: Path) -> int:
    return (folder / "saved").stat().st_size


@pytest.mark.parametrize(
    "temporary", [ELSEWHERE, pytest.param(BESIDE, marks=pytest.mark.slow)], indirect=True
)
def test_kills_at_random_end_with_the_same_bits(root: Path, tmp_path: Path, temporary: Path):
    """With a checkpoint after each step, in a run of two processes."""
    shutil.copytree(root / "store", tmp_path / "store")
    options = {"checkpoint_every": 1, "n_steps": 100, "pause": 0.005, "temporary": temporary}
    assert Processes(tmp_path / "whole", 2, **options).exit_codes() == [0, 0]
    folder, draw, n_kills, step = tmp_path / "killed", random.Random(1), 0, 0
    while True:
        known = files(folder)
        processes = Processes(folder, 2, **options)
        wait_until(lambda p=processes, k=known: len(files(folder) - k) == 2 or not p.are_running())
        time.sleep(draw.uniform(0, 0.3))
        processes.kill()
        codes = processes.exit_codes()
        if codes == [0, 0]:
            break
        assert -9 in codes, codes
        n_kills += 1
        newest = step_of(newest_valid(folder / "checkpoints"))
        assert newest >= step
        step = newest
    assert n_kills > 2
    assert not list((folder / "checkpoints").glob(".*.tmp-*"))
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 2
    found, wanted = weights(folder), weights(tmp_path / "whole")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
