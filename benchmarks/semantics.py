"""What the scores of a large dictionary cost: time and memory, each step in a process of its own.

    python benchmarks/semantics.py [--threads 1] [--latents 30000] [--images 50000] [--words 100000]

Made-up codes (k = 64), embeddings of width 512, directions of width 768, 20 examples per latent.
Seconds on the clock and of the processor; the second do not suffer from others on the machine.
Peak is that of the step above what its inputs take (Linux); codes and embeddings of a batch are
made outside of the clock. The last line is monosemanticity the plain way, every pair of images
with the weights of all latents, on fewer images and latents, beside ours on the same.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from clipattr.codes import SparseCodes
from clipattr.metrics.class_spread import ClassSpread
from clipattr.metrics.monosemanticity import Monosemanticity
from clipattr.semantics.clarity import clarity
from clipattr.semantics.directions import direction_map, nearest_directions
from clipattr.semantics.labels import top_labels
from clipattr.semantics.two_means import two_means

K, D_EMBED, D_MODEL, BATCH, N_EXAMPLES, N_CLASSES = 64, 512, 768, 2048, 20, 1000
PLAIN_IMAGES, PLAIN_LATENTS = 2000, 2000
Found = tuple[float, float, float]


def peak() -> float:
    """Largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def batches(n_images: int, n_latents: int) -> Iterator[tuple[SparseCodes, Tensor, Tensor]]:
    """Codes of k different latents, embeddings and classes."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n_images, BATCH):
        n_rows = min(BATCH, n_images - start)
        steps = torch.randint(1, n_latents // K, (n_rows, K), generator=generator)
        values = torch.rand(n_rows, K, generator=generator)
        embeddings = torch.randn(n_rows, D_EMBED, generator=generator)
        labels = torch.randint(N_CLASSES, (n_rows,), generator=generator)
        yield SparseCodes(steps.cumsum(1), values, n_latents), embeddings, labels


def clocks() -> Tensor:
    """Seconds on the clock and of the processor."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def timed(function: Callable[[], object]) -> Found:
    """Seconds, twice, and GB of one run."""
    before, start = peak(), clocks()
    function()
    wall, processor = (clocks() - start).tolist()
    return wall, processor, peak() - before


def stream(build: Callable[[], Metric], sizes: argparse.Namespace, of_images: int) -> Found:
    """One pass over all images, and the result; `of_images` says what is taken beside the codes."""
    before, spent = peak(), torch.zeros(2, dtype=torch.float64)
    metric = build()
    for codes, *images in batches(sizes.images, sizes.latents):
        start = clocks()
        metric.update(codes, images[of_images])
        spent += clocks() - start
    start = clocks()
    metric.compute()
    wall, processor = (spent + clocks() - start).tolist()
    return wall, processor, peak() - before


def monosemanticity(sizes: argparse.Namespace) -> Found:
    """MS of each latent."""
    return stream(lambda: Monosemanticity(n_latents=sizes.latents, d_embed=D_EMBED), sizes, 0)


def class_spread(sizes: argparse.Namespace) -> Found:
    """Counts by class and their entropy."""
    return stream(lambda: ClassSpread(n_latents=sizes.latents, n_classes=N_CLASSES), sizes, 1)


def labels(sizes: argparse.Namespace) -> Found:
    """Five labels of each latent."""
    means, texts = torch.randn(sizes.latents, D_EMBED), torch.randn(sizes.words, D_EMBED)
    return timed(lambda: top_labels(means, texts, texts[0], n=5))


def heaps(sizes: argparse.Namespace, score: Callable[[Tensor, Tensor], object]) -> Found:
    """Clarity or two means of the examples of each latent."""
    embeddings = torch.randn(sizes.images, D_EMBED)
    examples = torch.randint(sizes.images, (sizes.latents, N_EXAMPLES))
    return timed(lambda: score(embeddings, examples))


def directions(sizes: argparse.Namespace, score: Callable[[Tensor], object]) -> Found:
    """Redundancy or the map of the directions."""
    W_dec = torch.randn(sizes.latents, D_MODEL)
    return timed(lambda: score(W_dec))


def plain(activations: Tensor, embeddings: Tensor) -> Tensor:
    """Monosemanticity by all pairs of images."""
    scaled = activations / activations.amax(0)
    units = normalize(embeddings, dim=1)
    above = below = torch.zeros(activations.shape[1])
    for image in range(len(units) - 1):
        weights = scaled[image] * scaled[image + 1 :]
        above = above + (units[image + 1 :] @ units[image]) @ weights
        below = below + weights.sum(0)
    return above / below


def comparison(_: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of the processor of the plain way and of ours, and the largest difference."""
    parts = list(batches(PLAIN_IMAGES, PLAIN_LATENTS))
    dense = torch.cat([codes.to_dense() for codes, _, _ in parts])
    embeddings = torch.cat([each for _, each, _ in parts])
    metric = Monosemanticity(n_latents=PLAIN_LATENTS, d_embed=D_EMBED)
    start = time.process_time()
    expected = plain(dense, embeddings)
    middle = time.process_time()
    for codes, each, _ in parts:
        metric.update(codes, each)
    found = metric.compute()
    end = time.process_time()
    # A latent that never fires has none.
    difference = (found - expected)[expected.isfinite()].abs().max()
    return middle - start, end - middle, float(difference)


STEPS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "monosemanticity": monosemanticity,
    "class spread": class_spread,
    "labels": labels,
    "clarity": partial(heaps, score=clarity),
    "two means": partial(heaps, score=two_means),
    "redundancy": partial(directions, score=nearest_directions),
    "map": partial(directions, score=direction_map),
}


def main() -> None:
    """Print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("latents", 30_000), ("images", 50_000), ("words", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--threads", type=int, default=1)
    sizes = parser.parse_args()
    print(
        f"{sizes.latents} latents, {sizes.images} images, {sizes.words} words, "
        f"{sizes.threads} threads"
    )
    # A child runs one step, because peak memory never falls; forked, to import torch once.
    fork, threads = get_context("fork"), (sizes.threads,)
    with fork.Pool(1, torch.set_num_threads, threads, maxtasksperchild=1) as pool:
        for name, step in STEPS.items():
            wall, processor, memory = pool.apply(step, (sizes,))
            print(f"{name:16}{wall:8.1f} s{processor:8.1f} s{memory:7.2f} GB", flush=True)
        slow, fast, difference = pool.apply(comparison, (sizes,))
    print(
        f"all pairs, {PLAIN_IMAGES} images and {PLAIN_LATENTS} latents: {slow:.2f} s, ours "
        f"{fast:.3f} s, {slow / fast:.0f} times, largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
