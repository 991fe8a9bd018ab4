"""Attribution and faithfulness beside the plain way: full forward passes with dense codes.

    python benchmarks/faithfulness.py
    python benchmarks/faithfulness.py --threads 2 --images 8 --rounds 5

ViT-B/32 with random weights, a TopK dictionary of 30,000 latents (k = 64), the class token behind
block 6 of 12 and behind the last. The table: six methods, deletion and insertion, ten steps.

The plain way is ours, after what published scripts do: the codes of all images as one dense matrix,
a hook on the block, and the whole model once per method, curve and step. Both must give the same
curves (asserted to 1e-4). Ours is timed from images (the prefix runs once) and, at the last layer,
also from cached rows. Seconds are CPU time of the process, so that a busy machine changes little;
medians over the rounds, the plain table once. The logit-lens table belongs to neither. With
several threads on a busy machine set OMP_WAIT_POLICY=passive, or waiting is counted as work.

Then rates at 1,000 classes from cached rows: per-image attributions that are kept, and sums over a
data set.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import open_clip
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import (
    HeadScore,
    LastLayerHead,
    LensTable,
    act_times_logit_lens,
    active_order,
    add_reliance,
    attribution_patching,
    both_curves,
    build_lens_table,
    class_attributions,
    closed_form_attribution,
    empty_reliance,
    energy,
    integrated_gradients,
    logit_lens,
    logit_lens_table,
    read_edits,
    steps_of,
)
from clipattr.attribution.curves import Curves
from clipattr.clip import Site, image_tower
from clipattr.clip.cut import Cut
from clipattr.codes import SparseCodes
from clipattr.sae import TopKSae

N_LATENTS, K, N_CLASSES = 30_000, 64, 1000
N_STEPS, IG_STEPS, TOLERANCE = 10, 8, 1e-4
METHODS = ("attribution patching", "integrated gradients", "act x lens", "lens", "energy", "random")


class Study(NamedTuple):
    """A model, a site and a dictionary."""

    model: Any
    cut: Cut
    sae: TopKSae
    images: Tensor
    weights: Tensor
    targets: Tensor
    lens: Tensor
    noise: Tensor  # of the random order, so that both sides draw the same
    head: LastLayerHead | None  # of the last layer, with its table
    table: LensTable | None

    @property
    def n_images(self) -> int:
        """How many are attributed."""
        return len(self.images)


def main() -> None:
    """Both sites, then rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="last,middle,rates", help="what to run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = options.only.split(",")
    for name, layer in (("last", 11), ("middle", 5)):
        if name in only:
            study = build_study(layer, options.images)
            print(f"\nclass token behind block {layer + 1} of 12, {options.images} images")
            compare_tables(study, options.rounds)
            compare_attribution(study, options.rounds)
    if "rates" in only:
        show_rates(options.rounds)


def build_study(layer: int, n_images: int) -> Study:
    """Everything is drawn; the dictionary's centre is that of the activations."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-B-32", load_weights=False).eval().requires_grad_(False)
    tower = image_tower(model)
    cut, last = tower.cut(Site(layer=layer)), tower.cut(Site(layer=-1))
    images = torch.randn(n_images, 3, 224, 224)
    sae = TopKSae(d_model=768, n_latents=N_LATENTS, k=K).requires_grad_(False)
    with torch.no_grad():
        sae.initialise_from(cut.read(images))
    weights = normalize(torch.randn(N_CLASSES, 512), dim=1)
    lens = logit_lens_table(last.suffix, sae.W_dec, weights)
    targets, noise = torch.randint(N_CLASSES, (n_images,)), torch.rand(n_images, K)
    head = LastLayerHead(*cut.last_layer(), weights) if cut.is_whole else None
    table = None if head is None else build_lens_table(head, sae.W_dec)
    return Study(model, cut, sae, images, weights, targets, lens, noise, head, table)


# The plain way.


@contextmanager
def written_at_site(study: Study, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A hook that puts `make(class token)` in the place of the class token."""
    block = study.model.visual.transformer.resblocks[study.cut.site.layer]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.cat([make(output[:, 0])[:, None], output[:, 1:]], dim=1)

    with block.register_forward_hook(hook):
        yield


def plain_score(study: Study, make: Callable[[Tensor], Tensor]) -> Tensor:
    """One forward pass of the whole model."""
    with written_at_site(study, make):
        unit = normalize(study.model.encode_image(study.images), dim=-1)
    return (unit * study.weights[study.targets]).sum(dim=1)


def plain_read(study: Study) -> tuple[SparseCodes, Tensor, Tensor]:
    """Codes, the same as a dense matrix, and the error term."""
    seen: list[Tensor] = []
    with torch.no_grad():
        plain_score(study, lambda x: seen.append(x) or x)
        codes = study.sae.encode(seen[0])
    dense = codes.to_dense()
    return codes, dense, seen[0] - dense @ study.sae.W_dec


def plain_gradient(study: Study, dense: Tensor, error: Tensor) -> Tensor:
    """Derivative of the score with respect to the dense codes."""
    leaf = dense.detach().clone().requires_grad_()
    score = plain_score(study, lambda _: leaf @ study.sae.W_dec + error)
    return torch.autograd.grad(score.sum(), leaf)[0]


def plain_attributions(
    study: Study, codes: SparseCodes, dense: Tensor, error: Tensor
) -> list[Tensor]:
    """The six methods on dense codes."""
    lens = study.lens[study.targets]
    integrated = torch.zeros_like(dense)
    for place, weight in zip(*leggauss(IG_STEPS), strict=True):
        integrated += weight / 2 * plain_gradient(study, (place + 1) / 2 * dense, error)
    noise = torch.zeros_like(dense).scatter_(1, codes.indices, study.noise)
    return [
        dense * plain_gradient(study, dense, error),
        dense * integrated,
        dense * lens,
        lens,
        dense * study.sae.W_dec.norm(dim=1),
        noise,
    ]


@torch.no_grad()
def plain_table(study: Study) -> Tensor:
    """Curves [deletion or insertion, method, image, point]: one forward pass for each point."""
    codes, dense, error = plain_read(study)
    with torch.enable_grad():
        methods = plain_attributions(study, codes, dense, error)
    curves = torch.zeros(2, len(methods), len(dense), N_STEPS + 1)
    for number, attribution in enumerate(methods):
        ranked = attribution.masked_fill(dense == 0, -torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        for step in range(N_STEPS + 1):
            front = torch.zeros_like(dense).scatter_(1, order[:, :step], 1.0)
            for curve, kept in enumerate((1 - front, front)):
                edited = dense * kept @ study.sae.W_dec + error
                curves[curve, number, :, step] = plain_score(study, lambda _, x=edited: x)
    return curves


# Ours.


def read(study: Study) -> tuple[HeadScore, Tensor]:
    """The images through the first half of the tower, and the score behind it."""
    with torch.no_grad():
        x, rest = study.cut.prefix(study.images)
    return HeadScore(study.cut.suffix, study.weights, study.targets, rest=rest), x


def our_table(study: Study, score: HeadScore, x: Tensor) -> Curves:
    """The same table from the activations at the site."""
    codes = study.sae.encode(x)
    others = [
        act_times_logit_lens(study.lens, study.targets, codes),
        logit_lens(study.lens, study.targets, codes),
        energy(codes, study.sae.W_dec),
        study.noise,
    ]
    if study.head is not None and study.table is not None:
        edits = read_edits(study.head, study.table, x, codes, study.sae.W_dec, study.targets)
        first = [edits.attribution_patching(), edits.integrated_gradients(IG_STEPS)]
        return edits.curves(steps_of_all(first + others, codes), N_STEPS)
    arguments = (score, x, codes, study.sae.W_dec)
    first = [attribution_patching(*arguments), integrated_gradients(*arguments, IG_STEPS)]
    return both_curves(*arguments, steps_of_all(first + others, codes), N_STEPS, chunk_rows=32)


def steps_of_all(methods: list[Tensor], codes: SparseCodes) -> Tensor:
    """[method, image, slot]."""
    return torch.stack([steps_of(active_order(method, codes)) for method in methods])


def our_attribution(study: Study, score: HeadScore, x: Tensor) -> Tensor:
    """Attribution patching by what is fastest at the site."""
    codes = study.sae.encode(x)
    if study.head is None:
        return attribution_patching(score, x, codes, study.sae.W_dec)
    return closed_form_attribution(study.head, x, codes, study.sae.W_dec, study.targets)


# What is printed.


def compare_tables(study: Study, rounds: int) -> None:
    """The whole faithfulness table: the same numbers, and what they cost."""
    start = time.process_time()
    expected = plain_table(study)
    plain = time.process_time() - start
    score, x = read(study)
    ours = our_table(study, score, x)
    difference = (torch.stack([ours.deletion, ours.insertion]) - expected).abs().max()
    assert difference < TOLERANCE, f"curves differ by {difference:.1e}"
    print(f"curves of both differ by {difference:.1e} at most")
    print(f"points {ours.n_points}, rows of the suffix {ours.n_run}")
    show("table, plain", study.n_images, plain, plain)
    seconds = cpu_seconds(lambda: our_table(study, *read(study)), rounds)
    show("table, ours from images", study.n_images, seconds, plain)
    seconds = cpu_seconds(lambda: our_table(study, score, x), rounds)
    show("table, ours from cached states", study.n_images, seconds, plain)


def compare_attribution(study: Study, rounds: int) -> None:
    """Attribution patching alone."""

    def plain_attribution() -> Tensor:
        codes, dense, error = plain_read(study)
        return (dense * plain_gradient(study, dense, error)).gather(1, codes.indices)

    score, x = read(study)
    difference = (plain_attribution() - our_attribution(study, score, x)).abs().max()
    assert difference < TOLERANCE, f"attributions differ by {difference:.1e}"
    plain = cpu_seconds(plain_attribution, rounds)
    show("attribution, plain", study.n_images, plain, plain)
    seconds = cpu_seconds(lambda: our_attribution(study, *read(study)), rounds)
    show("attribution, ours from images", study.n_images, seconds, plain)
    seconds = cpu_seconds(lambda: our_attribution(study, score, x), rounds)
    show("attribution, ours from cached states", study.n_images, seconds, plain)


def show_rates(rounds: int) -> None:
    """Cached rows to 1,000 classes."""
    torch.manual_seed(0)
    d_model, d_embed, n_rows = 768, 512, 2048
    norm = torch.randn(d_model), torch.randn(d_model), 1e-5
    weights = normalize(torch.randn(N_CLASSES, d_embed), dim=1)
    head = LastLayerHead(*norm, torch.randn(d_model, d_embed), torch.zeros(d_embed), weights)
    W_dec = normalize(torch.randn(N_LATENTS, d_model), dim=1)
    table = build_lens_table(head, W_dec)
    x = torch.randn(n_rows, d_model)
    indices = torch.stack([torch.randperm(N_LATENTS)[:K] for _ in range(n_rows)])
    codes = SparseCodes(indices, torch.rand(n_rows, K), N_LATENTS)
    sums = empty_reliance(table)
    few = torch.arange(256)
    small = x[few], codes.select(few)
    targets = torch.randint(N_CLASSES, (len(few),))
    print(f"\ncached rows, {N_CLASSES} classes, {N_LATENTS} latents, k = {K}")
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "sums for the reliance matrix": (
            n_rows,
            lambda: add_reliance(sums, head, table, x, codes, W_dec),
        ),
        "attribution to every class, kept": (
            len(few),
            lambda: class_attributions(head, table, *small, W_dec),
        ),
        "attribution to one class": (
            len(few),
            lambda: closed_form_attribution(head, *small, W_dec, targets),
        ),
        "exact patching, one class": (
            len(few),
            lambda: read_edits(head, table, *small, W_dec, targets).exact_patching(),
        ),
    }
    for name, (n, run) in runs.items():
        print(f"{name:40}{n / cpu_seconds(run, rounds):12.0f} images per CPU second")
    seconds = cpu_seconds(lambda: sums.matrix(head, table), 1)
    print(f"{'the matrix out of the sums, once':40}{seconds:12.2f} s")


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median CPU time of the process, after a warm-up."""
    run()
    times: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def show(name: str, n_images: int, seconds: float, plain: float) -> None:
    """Images per second, and how many times faster than the plain way."""
    print(f"{name:40}{n_images / seconds:12.2f} images/s{plain / seconds:10.1f} x")


if __name__ == "__main__":
    main()
