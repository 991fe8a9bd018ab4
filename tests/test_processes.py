"""Two processes on this machine (gloo) train what one process trains."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.test_demo import Demo

ROOT = Path(__file__).parents[1]


def test_two_processes_train_the_sae_of_one(tmp_path):
    demo = Demo(tmp_path)
    assert demo.run("world") == 0
    fvu, weights = {}, {}
    for devices in (1, 2):
        name = f"demo/sae-{devices}"
        overrides = [f"name={name}", f"trainer.devices={devices}", "trainer.steps=60"]
        command = [sys.executable, "train.py", *demo.arguments("sae", *overrides)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads((demo.runs / name / "metrics.json").read_text())
        fvu[devices] = metrics["sae"]["fvu"]
        weights[devices] = load_file(demo.runs / name / "sae.safetensors")
    for name, tensor in weights[1].items():
        difference = (tensor - weights[2][name]).norm() / tensor.norm()
        assert difference < 1e-5, name
    assert fvu[2] == pytest.approx(fvu[1], rel=1e-5)


def train(demo: Demo, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", *demo.arguments("sae", *overrides)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def child_of(process: subprocess.Popen[str]) -> int:
    """The process of rank 1, which Lightning started with the same command."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[1]
            command = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if int(parent) == process.pid and b"train.py" in b" ".join(command):
            return int(path.name)
    raise AssertionError("rank 1 was not found")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Demo:
    demo = Demo(tmp_path_factory.mktemp("processes"))
    assert demo.run("world") == 0
    return demo


@pytest.mark.parametrize(
    ("devices", "asked", "number"),
    [
        (1, "rank 0", signal.SIGUSR1),
        (2, "rank 1", signal.SIGTERM),
        pytest.param(1, "rank 0", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, "rank 0", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, "all ranks", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(drawn, devices, asked, number):
    """And the same command goes on, to the bits of a run that nobody stopped."""
    run = f"stopped-{devices}-{asked[-1]}-{number}"
    options = [f"name=demo/{run}", f"trainer.devices={devices}", "trainer.steps=400"]
    options.append("trainer.checkpoint_every=100000")
    process = train(drawn, *options)
    curves = drawn.runs / "demo" / run / "curves" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not curves.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    match asked:
        case "rank 0":
            process.send_signal(number)
        case "rank 1":
            os.kill(child_of(process), number)
        case _:
            os.killpg(process.pid, number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143, message[-2000:]
    assert "the same command goes on from there" in message
    assert len(list((drawn.runs / "demo" / run / "checkpoints").glob("step=*.ckpt"))) == 1
    assert not (drawn.runs / "demo" / run / "sae.json").exists()
    again = train(drawn, *options)
    _, message = again.communicate(timeout=120)
    assert again.returncode == 0, message[-2000:]
    whole = train(drawn, f"name=demo/whole-{devices}", *options[1:])
    _, message = whole.communicate(timeout=120)
    assert whole.returncode == 0, message[-2000:]
    stopped, straight = (
        (drawn.runs / "demo" / name / "sae.safetensors").read_bytes()
        for name in (run, f"whole-{devices}")
    )
    assert stopped == straight
