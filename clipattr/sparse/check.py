"""Triton's kernels beside torch's own, on small data of awkward sizes. Imports Triton."""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from clipattr.sparse import triton_bags, triton_topk
from clipattr.sparse.choice import Kernels

N_ROWS, N_LATENTS, WIDTH, K = 7, 3001, 300, 40
LONG_BAG = 2 * triton_bags.CHUNK + 11
TOLERANCE = 1e-5


def _where_it_is(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton starts on the current device, which need not be that of the tensors."""

    @functools.wraps(kernel)
    def start(first: Tensor, *rest: object) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return kernel(first, *rest)

    return start


TRITON = Kernels(
    _where_it_is(triton_topk.top_k),
    _where_it_is(triton_bags.sum_bags),
    _where_it_is(triton_bags.dot),
)


@torch.no_grad()
def difference(found: Kernels, wanted: Kernels, device: torch.device) -> str | None:
    """What the two do differently, or None."""
    with torch.autocast(device.type, enabled=False):
        for name, ours, theirs in _results(found, wanted, device):
            gap = float((ours.double() - theirs.double()).abs().max())
            if not gap <= TOLERANCE * float(theirs.abs().max()):
                return f"{name} is off by {gap:.1e}"
    return None


def _results(
    found: Kernels, wanted: Kernels, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Results of both for each kernel and precision."""
    generator = Generator().manual_seed(0)
    lengths = torch.tensor([K, 0, LONG_BAG, 1, K, K, K])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    bags = torch.arange(N_ROWS).repeat_interleave(lengths)
    index = torch.randint(N_LATENTS, (len(bags),), generator=generator)
    values = torch.randn(len(bags), generator=generator)
    left = torch.randn(N_ROWS, WIDTH, generator=generator)
    matrix = torch.randn(N_LATENTS, WIDTH, generator=generator)
    starts, bags, index, values, left, matrix = (
        each.to(device) for each in (starts, bags, index, values, left, matrix)
    )
    for dtype in (torch.float32, torch.bfloat16):
        pre = (left @ matrix.T).to(dtype)
        pre[-1] = 1.0
        # A stable sort, because torch's top-k takes any of the equal numbers.
        theirs = pre.sort(dim=1, descending=True, stable=True)
        for ours, sorted_ones in zip(found.top_k(pre, K), theirs, strict=True):
            yield f"top_k of {dtype}", ours, sorted_ones[:, :K]
        rows, same = matrix.to(dtype), matrix.to(dtype).float()
        for given in (None, bags):
            yield (
                f"sum_bags of {dtype}",
                found.sum_bags(values, index, starts, rows, given),
                wanted.sum_bags(values, index, starts, same, given),
            )
        yield (
            f"dot of {dtype}",
            found.dot(left, rows, index, starts, bags),
            wanted.dot(left, same, index, starts, bags),
        )
