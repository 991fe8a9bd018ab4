"""Mean attribution of every latent to every class: closed form against one backward pass per class.

    python benchmarks/reliance.py

Both in one run on the same synthetic rows (ViT-B/32 sizes), medians of five; the ratio is the
result. The floor of the closed form is reading the codes and one [classes, latents] matrix.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import layer_norm, normalize

from clipattr.attribution import HeadScore, LastLayerHead, attribution_patching, reliance_matrix
from clipattr.attribution.closed_form import build_lens_table
from clipattr.codes import SparseCodes

N_ROWS, D_MODEL, D_EMBED, N_LATENTS, K, N_CLASSES = 512, 768, 512, 8192, 64, 40


def median_seconds(function: Callable[[], object]) -> float:
    """Median of five runs after a warm-up."""
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print both times, their ratio, and the largest difference."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W_dec = draw(N_ROWS, D_MODEL), normalize(draw(N_LATENTS, D_MODEL), dim=1)
    indices = torch.stack(
        [torch.randperm(N_LATENTS, generator=generator)[:K] for _ in range(N_ROWS)]
    )
    codes = SparseCodes(indices, draw(N_ROWS, K).abs(), N_LATENTS)
    weights = normalize(draw(N_CLASSES, D_EMBED), dim=1)
    gamma, beta, projection = draw(D_MODEL), draw(D_MODEL), draw(D_MODEL, D_EMBED)
    head = LastLayerHead(gamma, beta, 1e-5, projection, torch.zeros(D_EMBED), weights)
    table = build_lens_table(head, W_dec)

    def suffix(rows: torch.Tensor) -> torch.Tensor:
        return layer_norm(rows, (D_MODEL,), gamma, beta, 1e-5) @ projection

    def closed() -> torch.Tensor:
        return reliance_matrix(head, table, x, codes, W_dec)

    def backward() -> torch.Tensor:
        total = torch.zeros(N_CLASSES, N_LATENTS, dtype=torch.float64)
        for target in range(N_CLASSES):
            score = HeadScore(suffix, weights, torch.full((N_ROWS,), target))
            attribution = attribution_patching(score, x, codes, W_dec).double()
            total[target].scatter_add_(0, indices.flatten(), attribution.flatten())
        return total

    difference = float((closed() - backward()).abs().max())
    fast, slow = median_seconds(closed), median_seconds(backward)
    print(f"closed form            {N_ROWS / fast:10.0f} images/s, all {N_CLASSES} classes")
    print(f"one backward per class {N_ROWS / slow:10.0f} images/s")
    print(f"ratio {slow / fast:.1f}, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
