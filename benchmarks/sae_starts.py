"""What an SAE should start from, at equal rows and k: quality alone, no times.

    python benchmarks/sae_starts.py [--only starts,normalisations]
    python benchmarks/sae_starts.py --shards runs/world/train --write runs/cls.safetensors
    python benchmarks/sae_starts.py --rows runs/cls.safetensors

Synthetic rows (8 of 512 planted atoms in 64 dimensions), or the rows of a file, which `--write`
makes of image shards: the bundled CLIP's tokens at a site. 80 % of the images are learned from, 10
% choose, 10 % are reported; the atoms and the order of the rows have seeds of their own.

Each setting is trained at every learning rate with the first seed of the model, and with the others
at the best rate. Tables have the FVU of the test part (mean [least, largest] over the seeds), and
the share of latents that are dead: they fire on none of 20,000 rows of training.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_rows import ACTIVE, Rows, batches, planted, read_rows, recovered, synthetic, write_rows
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.config.choices import Tokens
from clipattr.metrics.reconstruction import Reconstruction, ReconstructionResult
from clipattr.sae import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    NestedTopKSae,
    ReluSae,
    TopKSae,
)
from clipattr.sae.initial import Bias
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relu import L0
from clipattr.sae.sae import Sae
from clipattr.training.optim import warmup_hold_decay
from clipattr.training.sae_member import SaeMember

BATCH, WARM_UP, INIT_ROWS, DEAD_ROWS = 512, 50, 8192, 20_000
N_LATENTS, ROW_K = 512, 16
SMALL = (64, 32, 3)  # atoms, dimensions, active
L1_WEIGHT, L0_WEIGHT = 0.2, 0.003  # where the search for an L0 begins
TOLERANCE, MOST_TRIES = 0.05, 6


class Setting(NamedTuple):
    """What differs between two SAEs."""

    kind: type[Sae] = TopKSae
    options: Mapping[str, Any] = {}
    normalisation: Normalisation = Normalisation.scale
    bias: Bias = Bias.mean
    from_data: bool = False
    change: Callable[[Sae], object] = lambda _: None
    clip: float = 1.0  # the largest norm of the gradient; it is about 0.02 to 0.2
    weight: float | None = None  # of the penalty, to begin with, where an L0 has to be found


class Result(NamedTuple):
    """Of one SAE."""

    validation: float
    fvu: float
    l0: float
    dead: float
    weight: float | None = None  # of the penalty, where it was looked for


class Study(NamedTuple):
    """What all SAEs of a table have in common."""

    rows: Rows
    n_latents: int
    k: int
    steps: int
    lrs: Sequence[float]
    n_seeds: int

    def compare(self, title: str, settings: Mapping[str, Setting]) -> None:
        """Print a table."""
        print(f"\n### {title}\n")
        print("| | best lr | FVU | L0 | dead % | validation FVU at each lr |")
        print("|---|---|---|---|---|---|")
        for name, setting in settings.items():
            first: dict[float, Result] = {}
            for lr in self.lrs:
                first[lr] = self.learn(setting, lr, 0)
                setting = setting._replace(weight=first[lr].weight)
            best = min(first, key=lambda lr: first[lr].validation)
            others = [self.learn(setting, best, seed) for seed in range(1, self.n_seeds)]
            show(name, best, [first[best], *others], first)

    def learn(self, setting: Setting, lr: float, seed: int) -> Result:
        """Train one and measure it; one without k at the weight that makes k latents active."""
        if setting.weight is None:
            return self.measure(self.train(setting, lr, seed))
        tried: list[tuple[float, float]] = []
        result = None
        while len(tried) < MOST_TRIES and (result is None or abs(tried[-1][1]) > TOLERANCE):
            weight = next_weight(tried, setting.weight)
            options = {**setting.options, "sparsity": weight}
            sae = self.train(setting._replace(options=options), lr, seed)
            result = self.measure(sae)._replace(weight=weight)
            tried.append((math.log(weight), math.log(max(result.l0, 0.1) / self.k)))
        assert result is not None
        return result

    def train(self, setting: Setting, lr: float, seed: int) -> Sae:
        """As the job does, on one device."""
        sae = self.build(setting, seed)
        member = SaeMember(
            sae,
            lr=lr,
            warmup=WARM_UP,
            k_aux=self.rows.width // 2,
            aux_coefficient=1 / 32,
            dead_after=DEAD_ROWS,
            bias=setting.bias,
            from_data=setting.from_data,
        )
        (first,) = batches(self.rows.train, 1, INIT_ROWS)
        member.initialise_from(first)
        setting.change(sae)
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_hold_decay(WARM_UP, self.steps)
        )
        for rows in batches(self.rows.train, self.steps, BATCH):
            output, loss, _ = member(rows)
            member.take_in(output, 1)
            loss.total.backward()
            member.remove_parallel_gradient()
            assert member.clip_gradient(setting.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            member.after_step()
        return sae.eval()

    def build(self, setting: Setting, seed: int) -> Sae:
        """Before it has seen a row."""
        return setting.kind(
            d_model=self.rows.width,
            n_latents=self.n_latents,
            normalisation=setting.normalisation,
            generator=torch.Generator().manual_seed(1 + seed),
            **setting.options,
        )

    def measure(self, sae: Sae) -> Result:
        """In evaluation mode: BatchTopK has its threshold."""
        validation, test = (reconstruct(sae, part) for part in self.rows[1:3])
        dead = reconstruct(sae, self.rows.train[:DEAD_ROWS]).dead_fraction
        return Result(float(validation.fvu), float(test.fvu), float(test.l0), float(dead))

    def compare_starts(self) -> None:
        """The centre, the directions, the encoder, and how gradients reach Adam."""
        plain = Setting(options={"k": self.k})
        settings = {
            "mean, random, tied (ours)": plain,
            "b_dec: geometric median": plain._replace(bias=Bias.geometric_median),
            "b_dec: zeros": plain._replace(change=lambda sae: sae.b_dec.data.zero_()),
            "latents: from data": plain._replace(from_data=True),
            "encoder: untied, random": plain._replace(change=untie),
            "encoder: tied, half as long": plain._replace(
                change=lambda sae: sae.W_enc.data.mul_(0.5)
            ),
            "gradient: always of norm 0.01": plain._replace(clip=0.01),
        }
        self.compare("Starts", settings)

    def compare_normalisations(self) -> None:
        """Of the input."""
        settings = {
            how.value: Setting(options={"k": self.k}, normalisation=how) for how in Normalisation
        }
        self.compare("Normalisation", settings)

    def compare_architectures(self) -> None:
        """All at the L0 of TopK."""
        k, level = {"k": self.k}, self.k // 4
        settings = {
            "topk": Setting(TopKSae, k),
            "batch_topk": Setting(BatchTopKSae, k),
            "jump_relu, step": Setting(JumpReluSae, weight=L0_WEIGHT),
            "jump_relu, tanh": Setting(JumpReluSae, {"l0": L0.tanh}, weight=L0_WEIGHT),
            "gated": Setting(GatedSae, weight=L1_WEIGHT),
            "relu": Setting(ReluSae, weight=L1_WEIGHT),
            "matryoshka": Setting(MatryoshkaSae, k),
            "nested_topk": Setting(NestedTopKSae, {"ks": (level, 2 * level, self.k)}),
        }
        self.compare("Architectures", settings)


def next_weight(tried: Sequence[tuple[float, float]], start: float) -> float:
    """The secant rule on logarithms of weight and L0; an L0 about 1 / weight at first."""
    if not tried:
        return start
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(tried)]
    slope = min(max(slopes[-1], -3.0), -0.3) if slopes else -1.0
    return math.exp(tried[-1][0] - tried[-1][1] / slope)


@torch.no_grad()
def untie(sae: Sae) -> None:
    """An encoder of directions of its own."""
    generator = torch.Generator().manual_seed(0)  # those of the models begin at 1
    sae.W_enc.copy_(normalize(torch.randn(sae.W_enc.shape, generator=generator), dim=1))


@torch.no_grad()
def reconstruct(sae: Sae, rows: Tensor) -> ReconstructionResult:
    """Whole-set numbers."""
    metric = Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents)
    for part in rows.split(2048):
        output = sae(part)
        metric.update(part, output.recon, output.codes)
    return metric.compute()


def show(name: str, lr: float, found: Sequence[Result], first: Mapping[float, Result]) -> None:
    """One line."""
    values = [one.fvu for one in found]
    l0, dead = (statistics.mean(getattr(one, key) for one in found) for key in ("l0", "dead"))
    edge = " (edge)" if lr in (min(first), max(first)) else ""
    name += f", weight {found[0].weight:.2g}" if found[0].weight else ""
    rates = ", ".join(f"{rate:g}: {one.validation:.4f}" for rate, one in first.items())
    print(
        f"| {name} | {lr:g}{edge} "
        f"| {statistics.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}] "
        f"| {l0:.1f} | {100 * dead:.1f} | {rates} |",
        flush=True,
    )


def recover(lrs: Sequence[float], n_seeds: int) -> None:
    """Whether TopK finds the atoms of a small world."""
    n_atoms, width, k = SMALL
    print(
        f"\n### {n_atoms} planted atoms in {width} dimensions, {k} per row, {2 * n_atoms} latents"
    )
    print("\n| lr | seed | mean cosine | atoms with cosine >= 0.95 | FVU |\n|---|---|---|---|---|")
    parts = [planted(n_rows, seed, *SMALL) for seed, n_rows in enumerate((204_800, 8192, 8192))]
    train, validation, test = (rows for rows, _ in parts)
    atoms = parts[0][1]
    study = Study(Rows(train, validation, test, atoms), 2 * n_atoms, k, len(train) // BATCH, (), 1)
    setting = Setting(options={"k": k})
    for lr, seed in product(lrs, range(n_seeds)):
        sae = study.train(setting, lr, seed)
        start, end = (recovered(one.W_dec, atoms) for one in (study.build(setting, seed), sae))
        shares = [100 * float((one >= 0.95).double().mean()) for one in (start, end)]
        print(
            f"| {lr:g} | {seed} | {start.mean():.3f} -> {end.mean():.3f} "
            f"| {shares[0]:.1f} % -> {shares[1]:.1f} % | {study.measure(sae).fvu:.4f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    questions: dict[str, Callable[[Study], None]] = {
        "starts": Study.compare_starts,
        "normalisations": Study.compare_normalisations,
        "architectures": Study.compare_architectures,
        "recovery": lambda study: recover(study.lrs, study.n_seeds),
    }
    parser.add_argument("--only", default=",".join(questions), help=f"of {', '.join(questions)}")
    parser.add_argument("--rows", type=Path, help="a .safetensors, .npy or .pt file")
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} rows")
    parser.add_argument("--lrs", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shards", help="images to read rows from, for --write")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--tokens", choices=[one.name for one in Tokens], default="cls")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--write", type=Path, help="where the rows of --shards are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        write_rows(options.shards, options.layer, options.tokens, options.cache, options.write)
        return
    n_rows = options.steps * BATCH
    rows, k = (read_rows(options.rows), ROW_K) if options.rows else (synthetic(n_rows), ACTIVE)
    study = Study(rows, N_LATENTS, k, options.steps, options.lrs, options.seeds)
    print(f"{options.rows or 'synthetic'}: {rows.width} -> {N_LATENTS}, k = {k}, {n_rows} rows")
    for name in options.only.split(","):
        questions[name](study)


if __name__ == "__main__":
    main()
