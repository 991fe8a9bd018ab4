"""Speed of SAE training on one GPU: every kernel beside its floor, whole steps beside the peers.

    python benchmarks/sae_gpu.py --out sae_gpu.md [--batches 4096 16384] [--dead 3000]

768 -> 30,000 latents, k = 64, bf16-mixed, on rows that are on the device. The floor of a kernel is
the longer of its bytes at the bandwidth of a large copy and its operations at the rate of a large
product, both measured in the same run; rows that are read again count once, as if the cache had
them. A step is all of one: AuxK on `--dead` latents, projection, clipping, fused Adam, renormalised
decoder. Every library has a process of its own. `as shipped` is its own precision and optimiser;
`tuned` is bf16 autocast, TF32 and fused Adam for everybody. Times are medians of CUDA events.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from sae_rivals import LACKS, ONLY_QUALITY, RIVALS, Task

D_MODEL, N_LATENTS, K = 768, 30_000, 64
WARM_UP, TIMED, N_DIFFERENT = 10, 30, 4
DATA_SEED, MODEL_SEED = 12_345, 1
NAMES = [name for name in RIVALS if name not in ONLY_QUALITY]


class Sizes(NamedTuple):
    """Of the matrices of a step."""

    batch: int
    d_model: int = D_MODEL
    n_latents: int = N_LATENTS
    k: int = K


class Work(NamedTuple):
    """What a kernel cannot do without."""

    bytes: float
    operations: float = 0.0  # of matrix units

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds."""
        return max(self.bytes / bandwidth, self.operations / rate)


def works(sizes: Sizes) -> dict[str, Work]:
    """Of every kernel of a step in bf16-mixed: read in 2 bytes, added in 4, latents in 8."""
    rows, width, latents, k = sizes
    pairs = rows * k
    product = 2 * (rows * width + latents * width + rows * latents)
    return {
        "product": Work(product, 2.0 * rows * width * latents),
        "top_k": Work(2 * rows * latents + (2 + 8) * pairs),
        "decode": Work((4 + 8) * pairs + 2 * latents * width + 4 * rows * width),
        "dot": Work((4 + 8) * pairs + 2 * latents * width + 4 * rows * width),
        "sort by latent": Work((8 + 4 + 8 + 8) * pairs),
        "transposed": Work((4 + 8) * pairs + 2 * rows * width + 4 * latents * width),
        "Adam": Work(28 * 2 * latents * width),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Median of CUDA events, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure_device() -> tuple[float, float]:
    """Bytes per second of a copy, and operations per second of a product in bf16."""
    one = torch.empty(2**30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(one)
    bandwidth = 2 * len(one) / milliseconds(lambda: other.copy_(one)) * 1e3
    n = 8192
    square = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * n**3 / milliseconds(lambda: square @ square) * 1e3


def kernels_of(sizes: Sizes, *, is_eager: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kernels of a step, on data of their sizes."""
    from clipattr.codes import equal_bags, rows_of_bags, transpose
    from clipattr.sparse.choice import EAGER, kernels_for

    rows, width, latents, k = sizes
    torch.manual_seed(DATA_SEED)
    x = torch.randn(rows, width, device="cuda")
    weights, bias = torch.randn(latents, width, device="cuda"), torch.zeros(latents, device="cuda")
    half_x, half, half_bias = (each.bfloat16() for each in (x, weights, bias))
    pre = torch.addmm(half_bias, half_x, half.T)
    kernels = EAGER if is_eager else kernels_for(x)
    # Torch's own add in the precision of what they read.
    place, given = (weights, x) if kernels is EAGER else (half, half_x)
    indices = pre.topk(k).indices
    values = torch.rand(rows * k, device="cuda")
    pairs, starts = indices.flatten(), equal_bags(indices)
    bags = rows_of_bags(starts, len(pairs))
    yield "product", lambda: torch.addmm(half_bias, half_x, half.T)
    yield "top_k", lambda: kernels.top_k(pre, k)
    yield "decode", lambda: kernels.sum_bags(values, pairs, starts, place, None)
    yield "dot", lambda: kernels.dot(x, place, pairs, starts, bags)
    yield "sort by latent", lambda: transpose(pairs, bags, latents)
    sorted_pairs = transpose(pairs, bags, latents)
    args = (values[sorted_pairs.order], sorted_pairs.rows, sorted_pairs.starts, given)
    yield "transposed", lambda: kernels.sum_bags(*args, sorted_pairs.latents)
    both = [torch.zeros_like(weights).requires_grad_() for _ in range(2)]
    for one in both:
        one.grad = torch.ones_like(one)
    adam = torch.optim.Adam(both, fused=True)
    yield "Adam", adam.step


def compare_kernels(batch: int) -> Iterator[str]:
    """One table."""
    bandwidth, rate = measure_device()
    yield (
        f"batch {batch}: a copy moves {bandwidth / 1e12:.2f} TB/s, a bf16 product does "
        f"{rate / 1e12:.0f} TFLOP/s\n"
    )
    yield "| kernel | ms | floor ms | times the floor | TB/s | torch's own ms |"
    yield "|---|---|---|---|---|---|"
    sizes = Sizes(batch)
    found = {name: milliseconds(run) for name, run in kernels_of(sizes, is_eager=False)}
    eager = {name: milliseconds(run) for name, run in kernels_of(sizes, is_eager=True)}
    for name, work in works(sizes).items():
        ours, floor = found[name], 1e3 * work.floor(bandwidth, rate)
        yield (
            f"| {name} | {ours:.3f} | {floor:.3f} | {ours / floor:.1f} "
            f"| {work.bytes / ours / 1e9:.2f} | {eager[name]:.3f} |"
        )


def time_step(name: str, task: Task) -> float:
    """Milliseconds of one library's step, in this process."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    rows = [
        (2 * torch.randn(task.batch, D_MODEL, generator=generator) + 1).cuda()
        for _ in range(N_DIFFERENT)
    ]
    if task.is_tuned:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(task.seed)
    rival = RIVALS[name](task)
    # Ours takes its own forward pass under autocast, as Lightning does.
    is_wrapped = task.is_tuned and not task.is_half
    done = iter(range(task.steps))

    def step() -> None:
        i = next(done)
        with torch.autocast("cuda", torch.bfloat16, enabled=is_wrapped):
            rival.step(i, rows[i % N_DIFFERENT])

    return milliseconds(step)


def ask(name: str, task: Task) -> float | str:
    """What a process of its own finds, or why nothing."""
    command = [sys.executable, __file__, "--question", json.dumps([name, task])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.splitlines()[-1])
    return (done.stderr.splitlines() or ["no message"])[-1]


def compare_steps(batch: int, n_dead: int, names: list[str]) -> Iterator[str]:
    """One table; ours first, always in mixed precision."""
    yield f"\nbatch {batch}, {n_dead} latents dead\n"
    yield "| library | | ms | million rows/s | ours is faster by | lacks |"
    yield "|---|---|---|---|---|---|"
    steps = WARM_UP + TIMED
    task = Task(D_MODEL, N_LATENTS, K, batch, steps, None, 5, False, n_dead, MODEL_SEED, "cuda")
    ours = None
    for name in names:
        is_ours = name == "clipattr"
        for is_tuned in (True,) if is_ours else (False, True):
            found = ask(name, task._replace(is_tuned=is_tuned, is_half=is_ours))
            how = "bf16-mixed" if is_ours else "tuned" if is_tuned else "as shipped"
            if isinstance(found, str):
                yield f"| {name} | {how} | not measured: {found} | | | |"
                continue
            ours = found if is_ours else ours
            ratio = "" if ours is None else f"{found / ours:.1f} x"
            rate = batch / found / 1e3
            yield f"| {name} | {how} | {found:.2f} | {rate:.2f} | {ratio} | {LACKS[name]} |"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("sae_gpu.md"))
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dead", type=int, nargs="+", default=[0, 3000])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--question", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/sae_gpu.py needs a CUDA device, and torch sees none")
    if options.question:
        name, task = json.loads(options.question)
        print(time_step(name, Task(*task)))
        return
    title = f"# {torch.cuda.get_device_name()}, torch {torch.__version__}\n"
    with options.out.open("w") as out:
        for line in itertools.chain([title], tables(options)):
            print(line, flush=True)
            print(line, file=out, flush=True)


def tables(options: argparse.Namespace) -> Iterator[str]:
    """All of them."""
    for batch in options.batches:
        yield from compare_kernels(batch)
        torch.cuda.empty_cache()
        for n_dead in options.dead:
            yield from compare_steps(batch, n_dead, options.only)


if __name__ == "__main__":
    main()
