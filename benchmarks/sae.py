"""Seconds and memory of a training step of a TopK SAE, beside the peers; and what it learns.

    python benchmarks/sae.py [--batches 256 1024] [--dead 3000]
    python benchmarks/sae.py --quality

768 -> 30,000 latents, k = 64, one thread, float32. Every library takes the same rows in a process
of its own and does all that its training step does; what it lacks is listed. CPU time is beside
wall time, because machines are shared: ratios are of CPU time. `as shipped` is the library's own
optimiser; `tuned` is fused Adam and huge pages (THP_MEM_ALLOC_ENABLE=1 of torch) for everybody.
Memory is the peak above what was there before the SAE was built (Linux).

The floor of a step that is dense once is its encoder product and the top-k. `--dead` latents count
as dead in every step, so that AuxK has work. Seeds of data and of models differ: a dictionary drawn
like the truth would start as the truth.

--quality: 8 of 512 planted atoms in 64 dimensions, every library at several learning rates with the
same warm-up and decay and the same rows; held-out FVU, and mean over atoms of the largest |cosine|.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_rivals import LACKS, RIVALS, Rival, Task
from torch import Tensor
from torch.nn.functional import normalize

D_MODEL, N_LATENTS, K = 768, 30_000, 64
DATA_SEED, MODEL_SEED = 12_345, 1
WARM_UP, N_DIFFERENT = 2, 4

ATOMS, WIDTH, ACTIVE = 512, 64, 8
STEPS, BATCH, HELD_OUT = 400, 512, 8192
LRS = dict.fromkeys(RIVALS, (5e-3, 1e-2, 2e-2, 4e-2)) | {
    "sparsify, signum": (1e-2, 3e-2, 6e-2, 1e-1),
    "SAELens": (1e-2, 2e-2, 3e-2, 5e-2),
    "SAELens, sparse": (1e-2, 2e-2, 3e-2, 5e-2),
}


def rows_of(batch: int) -> list[Tensor]:
    """A few batches of activations with a mean, to be taken in turn."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    return [2 * torch.randn(batch, D_MODEL, generator=generator) + 1 for _ in range(N_DIFFERENT)]


def time_steps(name: str, task: Task) -> dict[str, Any]:
    """Of one library, in this process."""
    rows = rows_of(task.batch)
    make_importable(name)
    before = resident()
    torch.manual_seed(task.seed)
    rival = RIVALS[name](task)
    times = [seconds(lambda i=i: rival.step(i, rows[i % len(rows)])) for i in range(task.steps)]
    cpu, wall = zip(*times[WARM_UP:], strict=True)
    return {"cpu": cpu, "wall": wall, "peak": peak() - before}


def make_importable(name: str) -> None:
    """Load the library, so that its size is not counted as that of its SAE."""
    RIVALS[name](Task(8, 16, 2, 4, 10, None, 0, False, 0, MODEL_SEED))


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of the processor and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak() -> float:
    """GB of this process, the most there has been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident() -> float:
    """GB of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def time_floor(task: Task) -> dict[str, Any]:
    """What no step with one dense product can do without."""
    (x, *_), weights = rows_of(task.batch), torch.randn(N_LATENTS, D_MODEL)
    bias, half = torch.zeros(N_LATENTS), weights.bfloat16()
    pre = torch.addmm(bias, x, weights.T)
    parts: dict[str, Callable[[], object]] = {
        "product": lambda: torch.addmm(bias, x, weights.T),
        "topk": lambda: pre.topk(K, dim=-1),
        "bf16 product": lambda: x.bfloat16() @ half.T,
        "bf16 weights": weights.bfloat16,
    }
    return {name: median_cpu(run) for name, run in parts.items()}


def median_cpu(run: Callable[[], object]) -> float:
    """After a warm-up."""
    run()
    return statistics.median(seconds(run)[0] for _ in range(5))


def planted(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a few atoms each, with uneven frequencies, a mean and a little noise; the atoms."""
    drawn = torch.Generator().manual_seed(DATA_SEED)
    atoms = normalize(torch.randn(ATOMS, WIDTH, generator=drawn), dim=1)
    mean = torch.randn(WIDTH, generator=drawn)
    generator = torch.Generator().manual_seed(DATA_SEED + 1 + seed)
    frequency = 1 / torch.arange(1, ATOMS + 1).sqrt()
    chosen = torch.multinomial(frequency.expand(n_rows, -1), ACTIVE, generator=generator)
    sizes = 0.5 + torch.rand(n_rows, ACTIVE, generator=generator)
    noise = 0.02 * torch.randn(n_rows, WIDTH, generator=generator)
    return (atoms[chosen] * sizes[..., None]).sum(1) + mean + noise, atoms


def learn(name: str, n_seeds: int) -> list[dict[str, float]]:
    """FVU and recovered atoms of one library at every rate and seed, on the same rows."""
    rows, atoms = planted(STEPS * BATCH, seed=0)
    held_out, _ = planted(HELD_OUT, seed=1)
    found = []
    for lr in LRS[name]:
        for seed in range(n_seeds):
            torch.manual_seed(MODEL_SEED + seed)
            task = Task(WIDTH, ATOMS, ACTIVE, BATCH, STEPS, lr, 50, True, 0, MODEL_SEED + seed)
            rival = RIVALS[name](task)
            start = recovered(rival, atoms)
            for i, batch in enumerate(rows.split(BATCH)):
                rival.step(i, batch)
            cosine = {"before": start, "after": recovered(rival, atoms)}
            found.append({"lr": lr, "fvu": fvu(rival, held_out), **cosine})
    return found


@torch.no_grad()
def fvu(rival: Rival, rows: Tensor) -> float:
    """Against the mean of these rows."""
    error = (rows - rival.recon(rows)).square().sum()
    return float(error / (rows - rows.mean(0)).square().sum())


@torch.no_grad()
def recovered(rival: Rival, atoms: Tensor) -> float:
    """Mean over the atoms of the largest |cosine| with a latent."""
    return float((atoms @ normalize(rival.dictionary(), dim=1).T).abs().amax(1).mean())


def ask(name: str, what: str, task: Task, n_seeds: int, threads: int) -> Any:
    """What a process of its own finds; None, with a line, where the library is not there."""
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
    if task.is_tuned:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    question = json.dumps([name, what, task, n_seeds, threads])
    command = [sys.executable, __file__, "--question", question]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name:22} not measured: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return None


def answer(question: str) -> None:
    """In the process of one library."""
    name, what, task, n_seeds, threads = json.loads(question)
    torch.set_num_threads(threads)
    match what:
        case "floor":
            found: object = time_floor(Task(*task))
        case "quality":
            found = learn(name, n_seeds)
        case _:
            found = time_steps(name, Task(*task))
    print(json.dumps(found))


def compare_speed(batch: int, n_timed: int, n_dead: int, names: list[str], threads: int) -> None:
    """One table for a batch size."""
    steps = WARM_UP + n_timed
    task = Task(D_MODEL, N_LATENTS, K, batch, steps, None, 0, False, n_dead, MODEL_SEED)
    print(f"\nbatch {batch}, {n_dead} latents dead; CPU s per step, median [quartiles]")
    print(f"{'':22}{'':11}{'CPU s':>7}{'quartiles':>16}{'wall s':>8}{'ratio':>7}{'peak GB':>9}")
    ours: dict[bool, float] = {}
    for is_tuned in (False, True):
        for name in names:
            if is_tuned and "signum" in name:
                continue  # tuned is Adam
            found = ask(name, "speed", task._replace(is_tuned=is_tuned), 0, threads)
            if found is not None:
                median = statistics.median(found["cpu"])
                ours.setdefault(is_tuned, median)
                show_speed(name, is_tuned, found, median / ours[is_tuned])
    for is_tuned, median in ours.items():
        show_floor(task._replace(is_tuned=is_tuned), names[0], median, threads)


def show_speed(name: str, is_tuned: bool, found: dict[str, Any], ratio: float) -> None:
    """One line."""
    low, median, high = statistics.quantiles(found["cpu"], n=4, method="inclusive")
    print(
        f"{name:22}{'tuned' if is_tuned else 'as shipped':11}{median:7.3f}"
        f"{f'{low:.3f}-{high:.3f}':>16}{statistics.median(found['wall']):8.3f}{ratio:7.2f}"
        f"{found['peak']:9.2f}",
        flush=True,
    )


def show_floor(task: Task, name: str, median: float, threads: int) -> None:
    """How far the first line is from what it cannot do without."""
    found = ask("", "floor", task, 0, threads)
    floor = found["product"] + found["topk"]
    low = found["bf16 product"] + found["bf16 weights"] + found["topk"]
    print(
        f"floor, {'tuned' if task.is_tuned else 'as shipped'}: product {found['product']:.3f} + "
        f"top-k {found['topk']:.3f} = {floor:.3f} s, {name} takes {median / floor:.2f} x; "
        f"in bf16 (product {found['bf16 product']:.3f}, weights {found['bf16 weights']:.3f}) it "
        f"would be {low:.3f} s, and the step about {median - floor + low:.3f} s"
    )


def compare_quality(names: list[str], n_seeds: int, threads: int) -> None:
    """Every library at its best rate."""
    n_rows = STEPS * BATCH
    print(f"\n{ATOMS} atoms in {WIDTH} dimensions, {ACTIVE} per row, after {n_rows} rows")
    print(f"{'':22}{'best lr':>9}{'FVU (seeds)':>26}{'cosine before -> after':>26}")
    task = Task(WIDTH, ATOMS, ACTIVE, BATCH, STEPS, None, 0, True, 0, MODEL_SEED)
    for name in names:
        found = ask(name, "quality", task, n_seeds, threads)
        if found is None:
            continue
        rates = sorted({one["lr"] for one in found})
        means = {
            lr: statistics.mean(one["fvu"] for one in found if one["lr"] == lr) for lr in rates
        }
        best = min(means, key=means.__getitem__)
        chosen = [one for one in found if one["lr"] == best]
        values = sorted(one["fvu"] for one in chosen)
        before, after = (statistics.mean(one[key] for one in chosen) for key in ("before", "after"))
        edge = " (at the edge)" if best in (rates[0], rates[-1]) else ""
        spread = f"{means[best]:.4f} [{values[0]:.4f}-{values[-1]:.4f}]"
        print(f"{name:22}{best:9.0e}{spread:>26}{f'{before:.3f} -> {after:.3f}':>26}{edge}")
        print(f"{'':22}all: {', '.join(f'{lr:.0e} {mean:.4f}' for lr, mean in means.items())}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=6, help="timed ones")
    parser.add_argument("--dead", type=int, default=0, help="latents that AuxK works on")
    parser.add_argument("--only", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=2, help="of --quality")
    parser.add_argument("--question", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.question:
        return answer(options.question)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    for name in options.only:
        print(f"{name:22} lacks {LACKS[name]}")
    if options.quality:
        return compare_quality(options.only, options.seeds, options.threads)
    for batch in options.batches:
        compare_speed(batch, options.steps, options.dead, options.only, options.threads)
    return None


if __name__ == "__main__":
    main()
