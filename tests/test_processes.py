"""Two processes on this machine (gloo) train what one process trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_demo import Demo

ROOT = Path(__file__).parents[1]


def test_two_processes_train_the_sae_of_one(tmp_path):
    demo = Demo(tmp_path)
    assert demo.run("world") == 0
    fvu = {}
    for devices in (1, 2):
        name = f"demo/sae-{devices}"
        overrides = [f"name={name}", f"trainer.devices={devices}", "trainer.steps=60"]
        command = [sys.executable, "train.py", *demo.arguments("sae", *overrides)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = json.loads((demo.runs / name / "metrics.json").read_text())
        fvu[devices] = metrics["sae"]["fvu"]
    # The loss is normalised by the variance of each rank's rows, so not to rounding.
    assert fvu[2] == pytest.approx(fvu[1], rel=0.05)
