"""The arithmetic of benchmarks/sae_gpu.py, and that it says what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sae_gpu

    return sae_gpu


def test_floors_are_those_of_tensors_of_these_sizes(bench):
    rows, width, latents, k = sizes = bench.Sizes(6, 5, 40, 3)
    found = bench.works(sizes)

    def size(*tensors: torch.Tensor) -> int:
        return sum(each.nbytes for each in tensors)

    half = torch.bfloat16
    x, weights = torch.empty(rows, width, dtype=half), torch.empty(latents, width, dtype=half)
    pre = torch.empty(rows, latents, dtype=half)
    indices, values = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    recon, gradient = torch.empty(rows, width), torch.empty(latents, width)
    assert found["product"].bytes == size(x, weights, pre)
    assert found["product"].operations == 2 * rows * width * latents
    assert found["top_k"].bytes == size(pre, indices, values.to(half))
    assert found["decode"].bytes == size(values, indices, weights, recon)
    assert found["transposed"].bytes == size(values, indices, x, gradient)
    # Of two matrices: the gradient is read; weights and both moments are read and written.
    assert found["Adam"].bytes == 2 * 7 * size(gradient)


def test_the_floor_is_the_slower_of_memory_and_arithmetic(bench):
    assert bench.Work(8.0, 6.0).floor(bandwidth=4.0, rate=6.0) == 2.0
    assert bench.Work(8.0, 18.0).floor(bandwidth=4.0, rate=6.0) == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sae_gpu.py")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs a CUDA device, and torch sees none")
