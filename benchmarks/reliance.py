"""Mean attribution of every latent to every class: closed form against one backward pass per class.

    python benchmarks/reliance.py

Both in one run on the same synthetic rows (ViT-B/32 sizes), medians of five; the ratio is the
result. The floor of the closed form is reading the codes and one [classes, latents] matrix.
Then what a data set costs, in CPU time of one thread: the sums, and the count of positive
attributions, for 1,000 classes and 30,000 latents; and the long table of their matrix.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import layer_norm, normalize

from clipattr.attribution import (
    HeadScore,
    LastLayerHead,
    Reliance,
    RelianceOrigin,
    add_reliance,
    attribution_patching,
    build_lens_table,
    class_attributions,
    count_positive,
    empty_reliance,
    reliance_matrix,
)
from clipattr.codes import SparseCodes
from clipattr.report.reliance import write_reliance_parquet

N_ROWS, D_MODEL, D_EMBED, K = 512, 768, 512, 64


def median_seconds(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median of five runs after a warm-up."""
    function()
    times = []
    for _ in range(5):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


class Scene(NamedTuple):
    """Random rows, codes, directions and head."""

    head: LastLayerHead
    x: torch.Tensor
    codes: SparseCodes
    W_dec: torch.Tensor


def draw_scene(n_latents: int, n_classes: int) -> Scene:
    """Seeded."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W_dec = draw(N_ROWS, D_MODEL), normalize(draw(n_latents, D_MODEL), dim=1)
    indices = torch.stack(
        [torch.randperm(n_latents, generator=generator)[:K] for _ in range(N_ROWS)]
    )
    codes = SparseCodes(indices, draw(N_ROWS, K).abs(), n_latents)
    weights = normalize(draw(n_classes, D_EMBED), dim=1)
    gamma, beta, projection = draw(D_MODEL), draw(D_MODEL), draw(D_MODEL, D_EMBED)
    head = LastLayerHead(gamma, beta, 1e-5, projection, torch.zeros(D_EMBED), weights)
    return Scene(head, x, codes, W_dec)


def compare() -> None:
    """Print both times, their ratio, and the largest difference."""
    n_latents, n_classes = 8192, 40
    head, x, codes, W_dec = draw_scene(n_latents, n_classes)
    table = build_lens_table(head, W_dec)

    def suffix(rows: torch.Tensor) -> torch.Tensor:
        normed = layer_norm(rows, (D_MODEL,), head.gamma, head.beta, head.eps)
        return normed @ head.projection

    def closed() -> torch.Tensor:
        return reliance_matrix(head, table, x, codes, W_dec)

    def backward() -> torch.Tensor:
        total = torch.zeros(n_classes, n_latents, dtype=torch.float64)
        for target in range(n_classes):
            score = HeadScore(suffix, head.weights, torch.full((N_ROWS,), target))
            attribution = attribution_patching(score, x, codes, W_dec).double()
            total[target].scatter_add_(0, codes.indices.flatten(), attribution.flatten())
        return total

    difference = float((closed() - backward()).abs().max())
    fast, slow = median_seconds(closed), median_seconds(backward)
    print(f"closed form            {N_ROWS / fast:10.0f} images/s, all {n_classes} classes")
    print(f"one backward per class {N_ROWS / slow:10.0f} images/s")
    print(f"ratio {slow / fast:.1f}, largest difference {difference:.1e}")


def measure_data_set() -> None:
    """Print images per CPU second of one thread, and what the long table takes."""
    torch.set_num_threads(1)
    n_latents, n_classes = 30_000, 1_000
    scene = draw_scene(n_latents, n_classes)
    table = build_lens_table(scene.head, scene.W_dec)
    arguments = (scene.head, table, *scene[1:])
    sums, counts = empty_reliance(table), torch.zeros(n_latents, n_classes, dtype=torch.int32)
    kept = (scene.head, table, scene.x[:64], scene.codes.select(torch.arange(64)), scene.W_dec)
    for name, n_rows, function in (
        ("sums of attributions", N_ROWS, lambda: add_reliance(sums, *arguments)),
        ("counts of positive ones", N_ROWS, lambda: count_positive(counts, *arguments)),
        ("attributions, kept", 64, lambda: class_attributions(*kept)),
    ):
        seconds = median_seconds(function, time.process_time)
        print(f"{name:24s} {n_rows / seconds:8.0f} images per CPU second, {n_classes} classes")
    origin = RelianceOrigin(
        [str(number) for number in range(n_classes)],
        [N_ROWS] * n_classes,
        "all images",
        {},
        {},
        "",
        {},
    )
    mean = sums.matrix(scene.head, table).contiguous()
    share = torch.rand(n_latents)
    found = Reliance(mean, share, (counts.T / N_ROWS).contiguous(), origin)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reliance.parquet"
        start = time.perf_counter()
        write_reliance_parquet(found, path)
        seconds, size = time.perf_counter() - start, path.stat().st_size
    print(f"long table of {mean.numel():,} rows: {seconds:.1f} s, {size / 1e6:.0f} MB")


def main() -> None:
    """Both parts."""
    compare()
    measure_data_set()


if __name__ == "__main__":
    main()
