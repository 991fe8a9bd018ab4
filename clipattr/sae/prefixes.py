"""Matryoshka and nested TopK: parts of the code must reconstruct by themselves."""

import itertools
import math
from collections.abc import Sequence
from enum import Enum

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.sae.topk import BatchTopKSae, TopKSae

PREFIX_FRACTIONS = (0.0625, 0.125, 0.25, 0.5625)


class MatryoshkaSae(BatchTopKSae):
    """The dictionary begins with a small one that reconstructs alone, and again with a larger one.

    x_hat_p = sum over j < m_p of a_j v_j + b_dec,   loss = mean over prefixes p of the error

    General latents come first, and do not split up as the dictionary grows. Codes are chosen from
    the whole dictionary, over the batch or in each row (`over_batch=False`), and each group is
    decoded once: a prefix adds its own group to the one before.
    Reference: Bussmann et al. 2025, Learning multi-level features with Matryoshka SAEs.
    """

    architecture = "matryoshka"
    SETTINGS = {**BatchTopKSae.SETTINGS, "fractions": tuple, "over_batch": bool}
    group_ends: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        k: int,
        fractions: Sequence[float] = PREFIX_FRACTIONS,
        over_batch: bool = True,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """`fractions` are the shares of the groups in the dictionary, and add up to one."""
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            k=k,
            normalisation=normalisation,
            generator=generator,
        )
        self.fractions = tuple(fractions)
        self.over_batch = over_batch
        ends = [round(share * n_latents) for share in itertools.accumulate(self.fractions)]
        sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
        if not math.isclose(sum(self.fractions), 1) or min(sizes) < 1:
            raise ConfigError(
                f"MatryoshkaSae(n_latents={n_latents}, fractions={self.fractions}): groups of "
                f"{sizes} latents; fractions must add up to one and leave no group empty"
            )
        self.register_buffer("group_ends", torch.tensor(ends), persistent=False)

    @property
    def max_active(self) -> int:
        """K, unless one row can take all."""
        return super().max_active if self.over_batch else self.k

    def choose(
        self, inputs: Float[Tensor, "row model"], pre: Float[Tensor, "row latent"]
    ) -> SparseCodes:
        """As BatchTopK or as TopK."""
        chooser = BatchTopKSae if self.over_batch else TopKSae
        return chooser.choose(self, inputs, pre)

    def reconstruct(self, codes: SparseCodes) -> Float[Tensor, "part row out"]:
        """Every prefix, the last of which is the whole dictionary."""
        group = torch.bucketize(codes.indices, self.group_ends, right=True)
        return _accumulate(self, codes, group, len(self.fractions))

    def part_weights(self) -> tuple[float, ...]:
        """Each prefix counts the same."""
        return (1.0,) * len(self.fractions)

    def update_statistics(self, output: SaeOutput) -> tuple[Tensor, ...]:
        """The threshold, if there is one."""
        return super().update_statistics(output) if self.over_batch else ()


class LevelWeights(Enum):
    """What the levels of a nested TopK count in the loss."""

    uniform = "uniform"
    """all the same"""
    reverse = "reverse"
    """n for the sparsest, down to 1 for the densest of n"""


class NestedTopKSae(TopKSae):
    """The same latents at several k: the largest of the larger choice are the smaller choice.

    x_hat_i = sum over TopK_{k_i}(z) of a_j v_j + b_dec,
    loss = sum_i w_i error_i / sum_i w_i,   as published k_i = 64 * 2^i

    Codes are those of the largest k; `at` gives the SAE of another. Each slot is decoded once.
    Reference: Zaigrajew, Baniecki, Biecek 2025, Interpreting CLIP with hierarchical sparse
    autoencoders.
    """

    architecture = "nested_topk"
    SETTINGS = {**Sae.SETTINGS, "ks": tuple, "weights": LevelWeights}
    levels: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        ks: Sequence[int],
        weights: LevelWeights = LevelWeights.uniform,
        normalisation: Normalisation = Normalisation.scale,
        generator: Generator | None = None,
    ) -> None:
        """`ks` in ascending order."""
        ks = tuple(ks)
        if not ks or ks[0] < 1 or list(ks) != sorted(set(ks)):
            raise ConfigError(
                f"NestedTopKSae(ks={ks}): positive numbers are needed, in ascending order"
            )
        super().__init__(
            d_model=d_model,
            n_latents=n_latents,
            k=ks[-1],
            normalisation=normalisation,
            generator=generator,
        )
        self.ks = ks
        self.weights = weights
        # Slots are sorted by activation: which level is the first to have each of them.
        levels = torch.bucketize(torch.arange(self.k), torch.tensor(self.ks), right=True)
        self.register_buffer("levels", levels, persistent=False)

    def reconstruct(self, codes: SparseCodes) -> Float[Tensor, "part row out"]:
        """Every level, the densest last."""
        return _accumulate(self, codes, self.levels.expand_as(codes.indices), len(self.ks))

    def part_weights(self) -> tuple[float, ...]:
        """One per level, the sparsest first."""
        count = len(self.ks)
        if self.weights is LevelWeights.uniform:
            return (1.0,) * count
        return tuple(float(count - level) for level in range(count))

    def at(self, k: int) -> TopKSae:
        """The TopK SAE of one of the levels, with the same parameters (not copies)."""
        if k not in self.ks:
            raise ConfigError(f"NestedTopKSae.at({k}): trained at k in {self.ks}")
        level = TopKSae(
            d_model=self.d_model,
            n_latents=self.n_latents,
            k=k,
            normalisation=self.normalisation,
            generator=Generator(),
        )
        level.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return level.train(self.training)


def _accumulate(sae: TopKSae, codes: SparseCodes, part: Tensor, n_parts: int) -> Tensor:
    own = codes.decode_parts(part, n_parts, sae.W_dec)
    return sae.in_raw_units(own).cumsum(0) + sae.b_dec
