"""Top-100 images of 30,000 latents from cached codes: the table of keys against dense codes.

    python benchmarks/examples.py

Both in one run on the same synthetic codes (20,000 rows, 64 active latents each), whose latents
fire with frequencies from log-normal to uniform; the ratio is the result. The dense way: of each
block of rows the dense codes beside the best so far, and `topk`, or `argsort`, over the rows of
each latent. Its blocks are of 2,000 rows: 0.24 GB.
"""

import time

import torch

from clipattr.codes import SparseCodes
from clipattr.metrics.random_examples import RandomExamples
from clipattr.metrics.top_examples import TopExamples

N_ROWS, N_LATENTS, K, N_EXAMPLES = 20_000, 30_000, 64, 100
BATCHES = (1000, 4000, 8000)
DENSE_BLOCK = 2000


def draw_codes(spread: float) -> SparseCodes:
    """Codes whose latents fire with log-normal frequencies; at spread 0 all alike."""
    generator = torch.Generator().manual_seed(0)
    frequency = (spread * torch.randn(N_LATENTS, generator=generator)).exp()
    indices = torch.cat(
        [
            frequency.expand(1000, -1).multinomial(K, generator=generator)
            for _ in range(N_ROWS // 1000)
        ]
    )
    strength = torch.rand(N_LATENTS, generator=generator)[indices]
    noise = torch.randn(N_ROWS, K, generator=generator).exp()
    return SparseCodes(indices, strength * noise, N_LATENTS)


def dense_examples(codes: SparseCodes, *, is_full_sort: bool) -> tuple[torch.Tensor, float]:
    """Values of the best rows of each latent, found with their ids; and the seconds it took."""
    start = time.perf_counter()
    values = torch.zeros(N_LATENTS, N_EXAMPLES)
    ids = torch.full((N_LATENTS, N_EXAMPLES), -1)
    for block in torch.arange(N_ROWS).split(DENSE_BLOCK):
        dense = codes.select(block).to_dense().T
        every = torch.cat([values, dense], dim=1)
        every_id = torch.cat([ids, block.expand(N_LATENTS, -1)], dim=1)
        if is_full_sort:
            best = every.argsort(dim=1, descending=True)[:, :N_EXAMPLES]
        else:
            best = every.topk(N_EXAMPLES, dim=1).indices
        values, ids = every.gather(1, best), every_id.gather(1, best)
    return values, time.perf_counter() - start


def streamed_examples(
    metric: TopExamples | RandomExamples, codes: SparseCodes, batch: int
) -> tuple[torch.Tensor, float]:
    """Values of the examples of each latent, and the seconds it took."""
    start = time.perf_counter()
    for rows in torch.arange(N_ROWS).split(batch):
        metric.update(codes.select(rows), rows)
    return metric.compute().values, time.perf_counter() - start


def main() -> None:
    """Print times and ratios."""
    print(f"{torch.get_num_threads()} threads")
    for spread in (0.0, 1.5):
        codes = draw_codes(spread)
        sizes = {"n_latents": N_LATENTS, "n_examples": N_EXAMPLES}
        print(f"frequencies of the latents: exp({spread} z)")
        expected, by_topk = dense_examples(codes, is_full_sort=False)
        print(f"  dense, topk     {by_topk:8.2f} s")
        _, by_argsort = dense_examples(codes, is_full_sort=True)
        print(f"  dense, argsort  {by_argsort:8.2f} s")
        for batch in BATCHES:
            found, own = streamed_examples(TopExamples(**sizes), codes, batch)
            _, random = streamed_examples(RandomExamples(**sizes), codes, batch)
            print(
                f"  TopExamples, batches of {batch}: {own:.3f} s, {by_topk / own:.0f} times "
                f"topk, {by_argsort / own:.0f} times argsort, the same values: "
                f"{torch.equal(found, expected)}; RandomExamples: {random:.3f} s"
            )


if __name__ == "__main__":
    main()
