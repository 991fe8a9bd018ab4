"""The SAEs of a config, as modules."""

import torch

from clipattr.config.choices import Architecture
from clipattr.config.sae import SaeConfig
from clipattr.sae.initial import Bias
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.prefixes import LevelWeights, MatryoshkaSae, NestedTopKSae
from clipattr.sae.relu import L0, GatedSae, JumpReluSae, ReluSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import BatchTopKSae, TopKSae
from clipattr.sae.transcoder import Transcoder
from clipattr.training.sae_member import SaeMember

# These leave 20 to 40 latents active on the planted world. An L0 counts latents, an L1 is in units
# of the spread of the rows.
L1_WEIGHT, L0_WEIGHT = 0.2, 0.003


def build_member(
    settings: SaeConfig, d_model: int, seed: int, d_out: int | None = None
) -> SaeMember:
    """One SAE of the grid; all draw from the seed as if they were alone."""
    return SaeMember(
        build_sae(settings, d_model, seed, d_out),
        lr=settings.lr,
        warmup=settings.warmup,
        k_aux=settings.k_aux or (d_out or d_model) // 2,
        aux_coefficient=settings.aux_coefficient,
        dead_after=settings.dead_after,
        bias=Bias[settings.bias.name],
        from_data=settings.from_data,
        k_start=settings.k_start,
        k_steps=settings.k_steps,
        ema=settings.ema,
    )


def build_sae(settings: SaeConfig, d_model: int, seed: int, d_out: int | None = None) -> Sae:
    """Of the architecture, with what it needs; `d_out` is the width of a transcoder's target."""
    shared = {
        "d_model": d_model,
        "n_latents": settings.n_latents,
        "normalisation": Normalisation[settings.normalisation.name],
        "generator": torch.Generator().manual_seed(seed),
    }
    match settings.architecture:
        case Architecture.topk:
            return TopKSae(**shared, k=settings.k)
        case Architecture.batch_topk:
            return BatchTopKSae(**shared, k=settings.k)
        case Architecture.relu:
            return ReluSae(**shared, sparsity=_weight(settings, L1_WEIGHT))
        case Architecture.gated:
            return GatedSae(**shared, sparsity=_weight(settings, L1_WEIGHT))
        case Architecture.jump_relu:
            return JumpReluSae(
                **shared,
                sparsity=_weight(settings, L0_WEIGHT),
                bandwidth=settings.bandwidth,
                l0=L0[settings.l0.name],
            )
        case Architecture.matryoshka:
            return MatryoshkaSae(
                **shared,
                k=settings.k,
                fractions=settings.fractions,
                over_batch=settings.over_batch,
            )
        case Architecture.nested_topk:
            return NestedTopKSae(
                **shared, ks=settings.ks, weights=LevelWeights[settings.level_weights.name]
            )
        case Architecture.transcoder:
            assert d_out is not None, "a transcoder has a target"
            return Transcoder(**shared, d_out=d_out, k=settings.k, skip=settings.skip)


def _weight(settings: SaeConfig, default: float) -> float:
    return default if settings.sparsity is None else settings.sparsity
