"""Triton's kernels without a GPU: interpreted, and compiled for one; with one: as they are used.

Each in a process of its own: whether Triton interprets is decided when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

ROOT = Path(__file__).parents[1]


def run(cache: Path, *arguments: str, **environment: str) -> None:
    # Triton warns that a default will change, where warnings are errors.
    given = {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


CHECKS = ("pytest", "-q", "-p", "no:cacheprovider", "tests/triton_checks.py")


def test_kernels_are_right_when_interpreted(tmp_path: Path):
    run(tmp_path, *CHECKS, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu(tmp_path: Path):
    run(tmp_path, "tests.triton_compile")


@pytest.mark.gpu
def test_kernels_are_right_when_compiled(tmp_path: Path):
    run(tmp_path, *CHECKS, CLIPATTR_CHECK_DEVICE="cuda")
