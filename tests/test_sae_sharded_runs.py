"""Runs with divided latents: the file of one process, kills, and checkpoints for any number."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.sae import TopKSae, load_sae
from clipattr.training.checkpoints import newest_valid
from tests.observed_run import Processes, rows_of_the_store
from tests.stores import store_of
from tests.test_demo import Demo, message_of
from tests.test_processes import train

TOLERANCE = 1e-5
DEAD = (0, 1, 2, 5, 20)


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the SAE; the history of a part is that of its own latents."""
    state = torch.load(folder / "weights.pt", weights_only=True)
    return {name: value for name, value in state.items() if ".sae." in name}


def run(folder: Path, n_processes: int) -> dict[str, Tensor]:
    sharded = n_processes > 1
    processes = Processes(folder, n_processes, shard_latents=sharded, dead=DEAD)
    assert processes.exit_codes() == [0] * n_processes
    return weights(folder)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=name)


def wait_until(is_true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_behind(folder: Path, n_processes: int, step: int) -> Path:
    """SIGKILL to all, once there is a checkpoint of that step."""
    sharded = n_processes > 1
    processes = Processes(folder, n_processes, pause=0.05, shard_latents=sharded, dead=DEAD)
    wait_until(lambda: bool(list(folder.glob(f"checkpoints/step={step}*.ckpt"))))
    processes.kill()
    assert processes.exit_codes() == [-9] * n_processes
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    store_of(rows_of_the_store(), folder / "store")
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Tensor]:
    return run(root / "alone", 1)


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, Tensor]:
    return run(root / "whole", 2)


@pytest.fixture(scope="module")
def killed(root: Path) -> Path:
    return kill_behind(root / "killed", 2, 20)


def test_two_processes_end_where_one_does(
    root: Path, alone: dict[str, Tensor], whole: dict[str, Tensor]
):
    assert_close(whole, alone)
    first, second = (
        {path.stem[-1]: path.read_text() for path in (root / "whole").glob("rows-*.jsonl")}[rank]
        for rank in "01"
    )
    assert first == second  # both were given every row
    steps = [json.loads(line) for line in first.splitlines()]
    assert [len(rows) for _, rows in steps] == [32] * 40


def test_a_checkpoint_is_that_of_one_process(
    root: Path, alone: dict[str, Tensor], whole: dict[str, Tensor]
):
    """Weights, moments and the history, all of them whole."""
    expected, found = (
        torch.load(newest_valid(root / name / "checkpoints"), weights_only=True)
        for name in ("alone", "whole")
    )
    assert found["global_step"] == expected["global_step"] == 40
    history = "members.0.history.rows_since_fired"
    assert torch.equal(found["state_dict"][history], expected["state_dict"][history])
    assert (expected["state_dict"][history] >= 64).nonzero().flatten().tolist() == list(DEAD)
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=TOLERANCE)
    for index, moments in expected["optimizer_states"][0]["state"].items():
        for name, value in moments.items():
            other = found["optimizer_states"][0]["state"][index][name]
            torch.testing.assert_close(other, value, rtol=1e-3, atol=TOLERANCE, msg=name)
    sizes = [len(state["exp_avg"]) for state in found["optimizer_states"][0]["state"].values()]
    assert sorted(sizes) == [8, 24, 24, 24]


def test_a_killed_run_ends_with_the_bits_of_a_whole_one(
    root: Path, whole: dict[str, Tensor], killed: Path
):
    folder = shutil.copytree(killed, root / "resumed")
    resumed = run(folder, 2)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    again = run(folder, 2)  # it is at its end: nothing is trained, and all is gathered
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_checkpoint_of_two_goes_on_alone(root: Path, alone: dict[str, Tensor], killed: Path):
    assert_close(run(shutil.copytree(killed, root / "two to one"), 1), alone)


def test_a_checkpoint_of_one_goes_on_with_two(root: Path, alone: dict[str, Tensor]):
    assert_close(run(kill_behind(root / "one to two", 1, 20), 2), alone)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    made = Demo(tmp_path_factory.mktemp("demo"))
    assert made.run("world") == 0
    return made


SHARDED = ("trainer.devices=2", "trainer.shard_latents=true", "sae.dead_after=100")


def test_the_job_ends_with_the_file_of_one_process(demo: Demo):
    """A grid too: its members share the rows, and each divides its own latents."""
    grid = ("sae.k=[4,6]", "sae.ema=0.9")
    process = train(demo, "name=demo/parts", *SHARDED, *grid)
    _, message = process.communicate(timeout=200)
    assert process.returncode == 0, message[-2000:]
    assert demo.run("sae", "name=demo/alone", "sae.dead_after=100", *grid) == 0
    for name in ("k=4", "k=6"):
        found, record = load_sae(demo.runs / "demo" / "parts" / name)
        expected, other = load_sae(demo.runs / "demo" / "alone" / name)
        assert type(found) is TopKSae
        assert found.settings == expected.settings
        assert_close(found.state_dict(), expected.state_dict())
        assert record.metrics == pytest.approx(other.metrics, rel=1e-4)


@pytest.mark.slow
def test_a_killed_job_ends_with_the_bytes_of_a_whole_one(demo: Demo):
    options = (*SHARDED, "trainer.steps=400", "trainer.checkpoint_every=20")
    killed = train(demo, "name=demo/killed", *options)
    folder = demo.runs / "demo" / "killed"
    wait_until(lambda: bool(list(folder.glob("checkpoints/step=*.ckpt"))))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (folder / "sae.json").exists()
    for name in ("killed", "straight"):
        process = train(demo, f"name=demo/{name}", *options)
        _, message = process.communicate(timeout=200)
        assert process.returncode == 0, message[-2000:]
    again, straight = (
        (demo.runs / "demo" / name / "sae.safetensors").read_bytes()
        for name in ("killed", "straight")
    )
    assert again == straight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("trainer.devices=1",), "there is nothing to divide on trainer.devices=1"),
        (("sae.architecture=[topk,batch_topk]",), "sae.architecture=batch_topk cannot be divided"),
        (("sae.n_latents=49",), "sae.n_latents=49 does not divide by trainer.devices=2"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    demo: Demo, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
):
    names = {option.split("=")[0] for option in options}
    kept = [option for option in SHARDED if option.split("=")[0] not in names]
    assert message in message_of(demo, capsys, "sae", *kept, *options)


def test_other_jobs_do_not_have_the_setting(demo: Demo, capsys: pytest.CaptureFixture[str]):
    message = message_of(demo, capsys, "probe", "trainer.shard_latents=true")
    assert "shard_latents" in message
