"""Seconds and memory of a training step of a TopK SAE, beside the peers; and what it learns.

    python benchmarks/sae.py [--batches 256 1024] [--dead 3000]
    python benchmarks/sae.py --quality [--rows FILE]

768 -> 30,000 latents, k = 64, one thread, float32. Every library takes the same rows in a process
of its own and does all that its training step does; what it lacks is listed. CPU time is beside
wall time, because machines are shared: ratios are of CPU time. `as shipped` is the library's own
optimiser; `tuned` is fused Adam and huge pages (THP_MEM_ALLOC_ENABLE=1 of torch) for everybody.
Memory is the peak above what was there before the SAE was built (Linux).

The floor of a step that is dense once is its encoder product and the top-k. `--dead` latents count
as dead in every step, so that AuxK has work. Seeds of data and of models differ: a dictionary drawn
like the truth would start as the truth.

--quality: 8 of 512 planted atoms in 64 dimensions, or the rows of a file (`sae_starts.py --write`
makes one), every library at several learning rates with the same warm-up and decay and the same
rows. The rate with the least FVU on a validation part is the best; what is shown is the FVU on
another part, over seeds of the model, and the mean over atoms of the largest |cosine|. BatchTopK
chooses among the rows of a batch there as well, so that all have the same L0. No latent counts as
dead: AuxK has nothing to do.
"""

import argparse
import json
import math
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
from sae_rivals import LACKS, ONLY_QUALITY, RIVALS, Rival, Task
from sae_rows import ACTIVE, ATOMS, DATA_SEED, Rows, batches, fvu, read_rows, recovered, synthetic
from torch import Tensor

D_MODEL, N_LATENTS, K = 768, 30_000, 64
MODEL_SEED = 1
WARM_UP, N_DIFFERENT = 2, 4

BATCH = 512
ROW_LATENTS, ROW_K = 512, 16
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


def learn(
    name: str, size: Task, n_seeds: int, where: str | None, lrs: list[float]
) -> list[dict[str, float]]:
    """What one library learns from the same rows, at every rate and seed."""
    rows = rows_to_learn(where, size.steps)
    found = []
    for lr in lrs:
        for seed in range(n_seeds):
            torch.manual_seed(MODEL_SEED + seed)
            task = size._replace(lr=lr, seed=MODEL_SEED + seed)
            rival = RIVALS[name](task)
            one = {"lr": lr, "before": closeness(rival, rows.atoms)}
            for i, batch in enumerate(batches(rows.train, task.steps, task.batch)):
                rival.step(i, batch)
            # First: an optimiser that averages puts the averaged weights in for this.
            one["validation"] = rival_fvu(rival, rows.validation)
            one["test"] = rival_fvu(rival, rows.test)
            found.append(one | {"after": closeness(rival, rows.atoms)})
    return found


def rows_to_learn(where: str | None, steps: int) -> Rows:
    """Those of a file, or synthetic ones."""
    return synthetic(steps * BATCH) if where is None else read_rows(Path(where))


@torch.no_grad()
def rival_fvu(rival: Rival, rows: Tensor) -> float:
    """In the batches of training: BatchTopK chooses in a batch."""
    return fvu(rows, torch.cat([rival.recon(batch) for batch in rows.split(BATCH)]))


def closeness(rival: Rival, atoms: Tensor | None) -> float:
    """Mean over the atoms of the largest |cosine| with a latent; nan where there is no truth."""
    return math.nan if atoms is None else float(recovered(rival.dictionary(), atoms).mean())


def ask(name: str, what: str, task: Task, n_seeds: int, threads: int, *learning: object) -> Any:
    """What a process of its own finds; None, with a line, where the library is not there."""
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
    if task.is_tuned:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    question = json.dumps([name, what, task, n_seeds, threads, *learning])
    command = [sys.executable, __file__, "--question", question]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name:22} not measured: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return None


def answer(question: str) -> None:
    """In the process of one library."""
    name, what, task, n_seeds, threads, *learning = json.loads(question)
    torch.set_num_threads(threads)
    match what:
        case "floor":
            found: object = time_floor(Task(*task))
        case "quality":
            found = learn(name, Task(*task), n_seeds, *learning)
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


def compare_quality(names: list[str], options: argparse.Namespace) -> None:
    """Every library at its best rate."""
    where, steps = options.rows, options.learn_steps
    n_latents, k = (ATOMS, ACTIVE) if where is None else (ROW_LATENTS, ROW_K)
    width = rows_to_learn(where, 1).width
    task = Task(width, n_latents, k, BATCH, steps, None, 50, True, 0, MODEL_SEED)
    print(f"\n{task.d_model} -> {task.n_latents}, k = {task.k}, after {task.steps * BATCH} rows")
    print("\n| | best lr | held-out FVU, mean [min, max] | cosine, start -> end | FVU at each lr |")
    print("|---|---|---|---|---|")
    for name in names:
        lrs = options.lrs or list(LRS[name])
        found = ask(name, "quality", task, options.seeds, options.threads, where, lrs)
        if found is not None:
            show_quality(name, found)


def show_quality(name: str, found: list[dict[str, float]]) -> None:
    """One line: the rate is chosen on the validation part, the rest is of the test part."""
    rates = sorted({one["lr"] for one in found})
    means = {lr: mean_of("validation", [one for one in found if one["lr"] == lr]) for lr in rates}
    best = min(means, key=means.__getitem__)
    chosen = [one for one in found if one["lr"] == best]
    values = [one["test"] for one in chosen]
    edge = " (edge)" if best in (rates[0], rates[-1]) else ""
    print(
        f"| {name} | {best:g}{edge} "
        f"| {mean_of('test', chosen):.4f} [{min(values):.4f}, {max(values):.4f}] "
        f"| {mean_of('before', chosen):.3f} -> {mean_of('after', chosen):.3f} "
        f"| {', '.join(f'{lr:g}: {mean:.4f}' for lr, mean in means.items())} |",
        flush=True,
    )


def mean_of(key: str, found: list[dict[str, float]]) -> float:
    """Over seeds."""
    return statistics.mean(one[key] for one in found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=6, help="timed ones")
    parser.add_argument("--dead", type=int, default=0, help="latents that AuxK works on")
    parser.add_argument("--only", nargs="+", choices=list(RIVALS), help="all that are there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, help="of --quality")
    parser.add_argument("--learn-steps", type=int, default=400, help="of --quality")
    parser.add_argument("--rows", help="of --quality: a .safetensors, .npy or .pt file of rows")
    parser.add_argument("--lrs", type=float, nargs="+", help="of --quality, for all libraries")
    parser.add_argument("--question", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.question:
        return answer(options.question)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    left_out = set() if options.quality else ONLY_QUALITY
    names = options.only or [name for name in RIVALS if name not in left_out]
    for name in names:
        print(f"{name:22} lacks {LACKS[name]}")
    if options.quality:
        return compare_quality(names, options)
    for batch in options.batches:
        compare_speed(batch, options.steps, options.dead, names, options.threads)
    return None


if __name__ == "__main__":
    main()
