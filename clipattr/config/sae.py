"""Settings of the dictionaries that one run trains: each may be a list, and the grid is trained."""

import itertools
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from clipattr.config.choices import L0, Architecture, Bias, LevelWeights, Normalisation
from clipattr.config.fields import format_value
from clipattr.config.limits import check_not_negative, check_positive
from clipattr.errors import ConfigError

if TYPE_CHECKING:
    Value = TypeVar("Value")
    # What a member of the grid has; nothing but `members` reads a list.
    Many = Annotated[Value, "or a list"]
else:

    class Many:
        """A value, or a list of values: one SAE for each."""

        def __class_getitem__(cls, value: Any) -> Any:
            return value | list[value]


# Settings that some architectures need and the others do not have.
NEEDS = {
    Architecture.topk: {"k", "k_start", "k_steps"},
    Architecture.batch_topk: {"k", "k_start", "k_steps"},
    Architecture.relu: {"sparsity"},
    Architecture.jump_relu: {"sparsity", "bandwidth", "l0"},
    Architecture.gated: {"sparsity"},
    Architecture.matryoshka: {"k", "k_start", "k_steps", "fractions", "over_batch"},
    Architecture.nested_topk: {"ks", "level_weights"},
    Architecture.transcoder: {"k", "k_start", "k_steps", "skip"},
}
_OF_SOME = set().union(*NEEDS.values())
_SINGLE_LISTS = {"fractions", "ks"}


@dataclass
class SaeConfig:
    """Sparse autoencoder with AuxK; a list as value trains one for each, side by side."""

    architecture: Many[Architecture] = Architecture.topk
    """what makes codes sparse; transcoder: reads `site` and reconstructs `target`"""
    n_latents: Many[int] = 512
    """size of the dictionary"""
    k: Many[int] = 16
    """active latents per row, or on average over a batch (batch_topk, matryoshka)"""
    k_start: Many[int | None] = None
    """k of the first step, from which it falls to k: more latents learn at first; k when not set"""
    k_steps: Many[int] = 1000
    """steps in which it falls, linearly (where there is a k_start)"""
    ks: list[int] = field(default_factory=lambda: [8, 16, 32])
    """active latents per row of each level, ascending (nested_topk)"""
    level_weights: Many[LevelWeights] = LevelWeights.uniform
    """what levels count in the loss: all the same, or the sparser the more (nested_topk)"""
    fractions: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5625])
    """shares of the groups of the dictionary, which add up to 1 (matryoshka)"""
    over_batch: Many[bool] = True
    """choose k per row on average over the batch, and not in each row (matryoshka)"""
    skip: Many[bool] = False
    """a linear map from the site to the target beside the latents (transcoder)"""
    sparsity: Many[float | None] = None
    """weight beside the relative error of the L1 (relu, gated: 0.2) or the L0 (jump_relu: 0.003)"""
    bandwidth: Many[float] = 0.03
    """width in which thresholds get a gradient, in units of the input's scale (jump_relu)"""
    l0: Many[L0] = L0.step
    """what stands for the L0: a step, or tanh, which pushes activations as well (jump_relu)"""
    normalisation: Many[Normalisation] = Normalisation.scale
    """what is done to an activation before the encoder; codes stay in units of the activation"""
    bias: Many[Bias] = Bias.mean
    """where the decoder's bias starts; the geometric median ignores rows of enormous norm"""
    from_data: Many[bool] = False
    """latents start at rows of the data, and not at random"""
    k_aux: Many[int | None] = None
    """dead latents that model the residual; half the width of what is reconstructed when not set"""
    aux_coefficient: Many[float] = 1 / 32
    """weight of the auxiliary loss"""
    dead_after: Many[int] = 20000
    """rows without firing after which a latent counts as dead"""
    lr: Many[float] = 1e-3
    """peak learning rate of Adam, linear decay over the last fifth"""
    warmup: Many[int] = 100
    """steps of linear warm-up"""
    ema: Many[float | None] = None
    """decay of a running mean of the weights, which is saved in their place (0.999); none: off"""
    batch_size: int = 1024
    """rows per step, over all devices"""

    def members(self) -> dict[str, "SaeConfig"]:
        """Every SAE of the grid by its name, such as 'k=8,lr=0.001'; '' when there is one.

        A setting that an architecture does not have is left out, so that none is trained twice.
        """
        lists = self._lists()
        found: dict[str, SaeConfig] = {}
        for values in itertools.product(*lists.values()):
            member = replace(self, **dict(zip(lists, values, strict=True)))
            foreign = _OF_SOME - NEEDS[member.architecture]
            words = [
                f"{name}={format_value(value)}"
                for name, value in zip(lists, values, strict=True)
                if len(lists[name]) > 1 and name not in foreign
            ]
            found.setdefault(",".join(words), member)
        return found

    @property
    def is_transcoder(self) -> bool:
        """Whether another site than the one that is read is reconstructed."""
        return Architecture.transcoder in self._architectures()

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "sae", "batch_size")
        for name, values in self._lists().items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ConfigError(
                    f"sae.{name}={format_value(values)}: name at least one value, each once"
                )
        if self.is_transcoder and len(self._architectures()) > 1:
            others = ", ".join(
                one.name for one in self._architectures() if one is not Architecture.transcoder
            )
            raise ConfigError(
                f"sae.architecture: transcoder and {others} in one grid; a transcoder reconstructs "
                "`target` and the others the site itself, so they need runs of their own"
            )
        self._check_needed()
        if self.k_start is None and self.k_steps != SaeConfig.k_steps:
            raise ConfigError(
                f"sae.k_steps={format_value(self.k_steps)} does nothing without sae.k_start"
            )
        for member in self.members().values():
            member._check_one()

    def check_shards(self, devices: int) -> None:
        """Raise ConfigError when the latents cannot be divided among the devices."""
        setting = "trainer.shard_latents=true"
        if devices == 1:
            raise ConfigError(f"{setting}: there is nothing to divide on trainer.devices=1")
        for member in self.members().values():
            if member.architecture is not Architecture.topk:
                raise ConfigError(
                    f"{setting}: sae.architecture={member.architecture.name} cannot be divided "
                    "among devices; topk can"
                )
            if member.n_latents % devices:
                raise ConfigError(
                    f"{setting}: sae.n_latents={member.n_latents} does not divide by "
                    f"trainer.devices={devices}; every device has the same number of latents"
                )

    def _lists(self) -> dict[str, list[Any]]:
        entries = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: value
            for name, value in entries.items()
            if isinstance(value, list) and name not in _SINGLE_LISTS
        }

    def _architectures(self) -> list[Architecture]:
        return self._lists().get("architecture", [self.architecture])

    def _check_needed(self) -> None:
        """What was set must be read: a foreign setting is a mistake."""
        chosen = self._architectures()
        read = set().union(*(NEEDS[one] for one in chosen))
        default = SaeConfig()
        for name in sorted(_OF_SOME - read):
            value = getattr(self, name)
            if value != getattr(default, name):
                owners = ", ".join(one.name for one, needs in NEEDS.items() if name in needs)
                raise ConfigError(
                    f"sae.{name}={format_value(value)} is a setting of {owners}, and not of "
                    f"sae.architecture={', '.join(one.name for one in chosen)}: leave it out"
                )

    def _check_one(self) -> None:
        check_positive(self, "sae", "n_latents", "lr", "dead_after")
        check_not_negative(self, "sae", "aux_coefficient", "warmup")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"sae.ema={self.ema}: must lie between 0 and 1, such as 0.999")
        is_over_batch = self.architecture is Architecture.matryoshka and self.over_batch
        if self.ema is not None and (self.architecture is Architecture.batch_topk or is_over_batch):
            raise ConfigError(
                f"sae.ema={self.ema} with sae.architecture={self.architecture.name}: its threshold "
                "is that of the weights that were trained, and not of their mean; leave it out"
            )
        if self.k_aux is not None:
            check_positive(self, "sae", "k_aux")
        needs = NEEDS[self.architecture]
        if "k" in needs:
            check_positive(self, "sae", "k")
            self._check_fits("k", self.k)
            self._check_start()
        if "sparsity" in needs and self.sparsity is not None:
            check_not_negative(self, "sae", "sparsity")
        if "bandwidth" in needs:
            check_positive(self, "sae", "bandwidth")
        if "ks" in needs:
            self._check_levels()
        if "fractions" in needs:
            self._check_groups()

    def _check_start(self) -> None:
        check_not_negative(self, "sae", "k_steps")
        if self.k_start is not None:
            self._check_fits("k_start", self.k_start)
            if self.k_start < self.k:
                raise ConfigError(
                    f"sae.k_start={self.k_start} is smaller than sae.k={self.k}, to which it falls"
                )

    def _check_fits(self, name: str, k: int) -> None:
        if k > self.n_latents:
            raise ConfigError(
                f"sae.{name}={k} is larger than sae.n_latents={self.n_latents}: "
                "k active latents are chosen out of n_latents"
            )

    def _check_levels(self) -> None:
        if not self.ks or self.ks[0] < 1 or self.ks != sorted(set(self.ks)):
            raise ConfigError(
                f"sae.ks={self.ks}: positive numbers are needed, in ascending order, each once"
            )
        self._check_fits("ks", self.ks[-1])

    def _check_groups(self) -> None:
        ends = [round(share * self.n_latents) for share in itertools.accumulate(self.fractions)]
        sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
        if not sizes or min(sizes) < 1 or not math.isclose(sum(self.fractions), 1):
            raise ConfigError(
                f"sae.fractions={self.fractions} of sae.n_latents={self.n_latents}: groups of "
                f"{sizes} latents; fractions must add up to 1 and leave no group empty"
            )
