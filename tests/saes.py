"""One small float64 SAE of every architecture, with no parameter at a trivial value."""

from collections.abc import Callable

import torch
from torch import Tensor

from clipattr.sae import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    NestedTopKSae,
    ReluSae,
    TopKSae,
    Transcoder,
)
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.prefixes import LevelWeights
from clipattr.sae.relu import L0
from clipattr.sae.sae import Sae

N_ROWS, D_MODEL, D_OUT, N_LATENTS, K = 20, 6, 5, 16, 3
SIZES = {"d_model": D_MODEL, "n_latents": N_LATENTS}

BUILDERS: dict[str, Callable[..., Sae]] = {
    "topk": lambda **rest: TopKSae(**SIZES, k=K, **rest),
    "batch_topk": lambda **rest: BatchTopKSae(**SIZES, k=K, **rest),
    "relu": lambda **rest: ReluSae(**SIZES, sparsity=0.3, **rest),
    "jump_relu": lambda **rest: JumpReluSae(**SIZES, sparsity=0.3, bandwidth=0.7, **rest),
    "jump_relu_tanh": lambda **rest: JumpReluSae(
        **SIZES, sparsity=0.3, bandwidth=0.7, l0=L0.tanh, **rest
    ),
    "gated": lambda **rest: GatedSae(**SIZES, sparsity=0.3, **rest),
    "matryoshka": lambda **rest: MatryoshkaSae(**SIZES, k=K, **rest),
    "matryoshka_rows": lambda **rest: MatryoshkaSae(
        **SIZES, k=K, fractions=(0.25, 0.75), over_batch=False, **rest
    ),
    "nested": lambda **rest: NestedTopKSae(**SIZES, ks=(1, 2, 5), **rest),
    "nested_reverse": lambda **rest: NestedTopKSae(
        **SIZES, ks=(1, 2, 5), weights=LevelWeights.reverse, **rest
    ),
    "transcoder": lambda **rest: Transcoder(**SIZES, d_out=D_OUT, k=K, **rest),
    "transcoder_skip": lambda **rest: Transcoder(**SIZES, d_out=D_OUT, k=K, skip=True, **rest),
}
ALL = tuple(BUILDERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def small_rows() -> Tensor:
    """Far from zero mean, and each dimension with a spread of its own."""
    spreads = torch.linspace(0.5, 4, D_MODEL, dtype=torch.float64)
    return 5 + spreads * normal(N_ROWS, D_MODEL, seed=1)


def small_targets() -> Tensor:
    return 2 * normal(N_ROWS, D_OUT, seed=5) - 3


def target_of(sae: Sae) -> Tensor:
    """What the SAE has to reconstruct when it reads `small_rows`."""
    return small_targets() if isinstance(sae, Transcoder) else small_rows()


def initialise(sae: Sae, **options: object) -> None:
    if isinstance(sae, Transcoder):
        sae.initialise_from(small_rows(), small_targets(), **options)
    else:
        sae.initialise_from(small_rows(), **options)


def small_sae(name: str, normalisation: Normalisation = Normalisation.scale) -> Sae:
    sae = BUILDERS[name](normalisation=normalisation, generator=seeded()).double()
    initialise(sae)
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=10 + seed))
        if isinstance(sae, BatchTopKSae):
            sae.threshold.fill_(0.8)
    return sae
