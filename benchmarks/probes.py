"""A path of 10 values of C against scikit-learn, and a grid of probes against one of them.

    python benchmarks/probes.py path [--rows 50000] [--width 512] [--classes 100] [--no-sklearn]
    python benchmarks/probes.py together [--rows 20000] [--rounds 3]
    python benchmarks/probes.py grid [--rows 50000] [--rounds 3]

`path`: unit-norm features of overlapping classes, as embeddings are. scikit-learn fits each C as a
user would (tol 1e-4 of the gradient), then with the tol at which its objective comes within about
1e-3 of ours, then so along the path with warm_start. The differences of the objectives, in float64,
are printed with each.
`together`: all C in each pass against C after C, for several sizes: which of them `solve_path`
takes.
`grid`: a run of Lightning on rows of an activation store, for one probe and for several.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from clipattr.config.schema import TrainerConfig
from clipattr.data import ActivationStore
from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.writer import StorePlan, write_stores
from clipattr.probes.linear import LinearProbe
from clipattr.probes.logistic import Solution, solve_path
from clipattr.training.activations import ActivationDataModule
from clipattr.training.probe_grid import GridPoint, ProbeGridModule
from clipattr.training.trainer import build_trainer, fit

STEPS = 60
CS = [float(C) for C in np.logspace(-2, 3, 10)]


def make_rows(n_rows: int, width: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Features with a decaying spectrum and a common mean, and class numbers."""
    draw = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(n_classes, width, generator=draw)
    labels = torch.randint(n_classes, (n_rows,), generator=draw)
    spectrum = torch.arange(1, width + 1).float() ** -0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    rows = (centres[labels] + 20 * torch.randn(n_rows, width, generator=draw)) * spectrum @ turn
    return normalize(rows + 0.5 * torch.randn(width, generator=draw), dim=1), labels


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def objective(x: Tensor, y: Tensor, C: float, weight: np.ndarray, bias: np.ndarray) -> float:
    """In float64."""
    W, b = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    loss = sum(
        float(cross_entropy(rows.double() @ W.T + b, labels, reduction="sum"))
        for rows, labels in zip(x.split(4096), y.split(4096), strict=True)
    )
    return C * loss + float(W.square().sum()) / 2


def accuracy(x: Tensor, y: Tensor, weight: np.ndarray, bias: np.ndarray) -> float:
    """Share of right rows."""
    logits = x @ torch.as_tensor(weight).float().T + torch.as_tensor(bias).float()
    return float((logits.argmax(1) == y).float().mean())


def path(arguments: argparse.Namespace) -> None:
    """Seconds for ten C, ours and scikit-learn's."""
    x, y = make_rows(arguments.rows, arguments.width, arguments.classes)
    start = time.perf_counter()
    solved = [one for (one,) in solve_path(x, y, CS, n_classes=arguments.classes)]
    ours = time.perf_counter() - start
    iterations = [one.n_iterations for one in solved]
    print(f"clipattr: {ours:.1f} s, {iterations} iterations, {torch.get_num_threads()} threads")
    if arguments.no_sklearn:
        return
    starts = [1e-4] * len(CS)
    tols = scikit_learn("scikit-learn", x, y, solved, starts, ours, warm_start=False)
    scikit_learn("scikit-learn, tol as needed", x, y, solved, tols, ours, warm_start=False)
    scikit_learn("the same, warm_start", x, y, solved, tols, ours, warm_start=True)


def scikit_learn(
    name: str,
    x: Tensor,
    y: Tensor,
    solved: list[Solution],
    tols: list[float],
    ours: float,
    *,
    warm_start: bool,
) -> list[float]:
    """Print seconds and differences; the tolerances that give our objective within 1e-3."""
    model = LogisticRegression(max_iter=5000, warm_start=warm_start)
    total, counts, worst, points, needed = 0.0, [], [], [], []
    for one, tol in zip(solved, tols, strict=True):
        model.set_params(C=one.C, tol=tol)
        total += seconds(partial(model.fit, x.numpy(), y.numpy()))
        counts.append(int(model.n_iter_[0]))
        own = objective(x, y, one.C, one.weight.numpy(), one.bias.numpy())
        theirs = objective(x, y, one.C, model.coef_, model.intercept_)
        worst.append((own - theirs) / theirs)
        right = accuracy(x, y, one.weight.numpy(), one.bias.numpy())
        points.append(100 * (right - accuracy(x, y, model.coef_, model.intercept_)))
        # The gap goes with the square of the gradient, to which the tolerance applies.
        excess = max((theirs - own) / own / 1e-3, 1.0)
        needed.append(tol / (1.5 * excess) ** 0.5 if excess > 1 else tol)
    print(f"{name}: {total:.1f} s = {total / ours:.2f}x, {counts} iterations")
    print("  objective, (ours - theirs) / theirs:", " ".join(f"{one:.1e}" for one in worst))
    print("  accuracy on the rows, ours - theirs:", " ".join(f"{one:.2f}" for one in points))
    return needed


def together(arguments: argparse.Namespace) -> None:
    """Seconds of both orders of work."""
    for n_classes, n_tasks in ((2, 1), (5, 5), (20, 20), (4, None), (16, None)):
        x, y = make_rows(arguments.rows, arguments.width, n_classes)
        targets = one_hot(y, n_classes).float()[:, :n_tasks] if n_tasks else y
        solve = partial(solve_path, x, targets, CS, n_classes=None if n_tasks else n_classes)
        times = [
            statistics.median(
                seconds(partial(solve, together=order)) for _ in range(arguments.rounds)
            )
            for order in (True, False)
        ]
        kind = f"{n_tasks} binary tasks" if n_tasks else f"{n_classes} classes"
        print(f"{kind}: together {times[0]:.2f} s, in turn {times[1]:.2f} s")


def grid(arguments: argparse.Namespace) -> None:
    """Seconds of whole runs: Lightning, rows of a store in float16, batches of 4,096."""
    with tempfile.TemporaryDirectory() as folder:
        for n_classes in (2, 10, 100):
            x, y = make_rows(arguments.rows, arguments.width, n_classes)
            data = ActivationDataModule(
                partial(_open_store, x, Path(folder) / str(n_classes)),
                batch_size=4096,
                seed=0,
                n_steps=STEPS,
                fields=("x", "images"),
                finish=partial(_with_labels, y),
            )
            times: dict[int, list[float]] = {1: [], 8: [], 16: []}
            for turn in range(arguments.rounds + 1):
                for size, found in times.items():
                    run = _seconds_of_run(data, Path(folder), size, arguments.width, n_classes)
                    found += [run] * (turn > 0)
            one, *more = (statistics.median(found) for found in times.values())
            ratios = ", ".join(
                f"{size} members {seconds / one:.2f}x"
                for size, seconds in zip((8, 16), more, strict=True)
            )
            print(f"{n_classes} classes: one {1000 * one / STEPS:.1f} ms a step; {ratios}")


def _open_store(x: Tensor, folder: Path, ranks: object) -> ActivationStore:
    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield ReadBatch(images, {"s": {"x": x[images].half()}}, [])

    plan = StorePlan(folder, {"benchmark": "probes"}, {"x": Column("float16", x.shape[1])}, 1)
    keys = [f"{image:08d}" for image in range(len(x))]
    return write_stores({"s": plan}, keys, read)["s"]


def _with_labels(y: Tensor, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    return normalize(x.float(), dim=1), y[images.long()]


def _seconds_of_run(
    data: ActivationDataModule, folder: Path, size: int, width: int, n_classes: int
) -> float:
    points = [GridPoint(10 ** (-i / 4), 1e-4) for i in range(size)]
    module = ProbeGridModule([LinearProbe(width, n_classes) for _ in points], points, n_steps=STEPS)
    settings = TrainerConfig(steps=STEPS, progress=False, accelerator="cpu", checkpoint_every=STEPS)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        trainer = build_trainer(settings, Path(run))
        return seconds(lambda: fit(trainer, module, data, Path(run)))


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["path", "together", "grid"])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-sklearn", action="store_true")
    warnings.simplefilter("ignore", ConvergenceWarning)
    arguments = parser.parse_args()
    {"path": path, "together": together, "grid": grid}[arguments.what](arguments)


if __name__ == "__main__":
    main()
