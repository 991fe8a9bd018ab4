"""Settings of a probe: what it reads, how it is built, by what it is fitted, and on what chosen."""

from dataclasses import dataclass, field

from clipattr.config.choices import (
    ClassWeight,
    Criterion,
    Feature,
    GroupMethod,
    HeadKind,
    Init,
    Solver,
    TokenPool,
    Tokens,
)
from clipattr.config.fields import format_value
from clipattr.config.inputs import DataConfig, ModelConfig, SiteConfig
from clipattr.config.limits import check_divides, check_label, check_positive
from clipattr.config.sae import Many
from clipattr.config.trainer import TrainerConfig
from clipattr.errors import ConfigError


@dataclass
class ProbeConfig:
    """A head on frozen features."""

    label: Many[str] = "cls"
    """sample field that holds the class: cls, or json:<key>; a list: each is true or not"""
    classes: list[str] = field(default_factory=list)
    """class names, in the order of the labels; at least two, or one for each of several labels"""
    features: list[Feature] = field(default_factory=lambda: [Feature.embedding])
    """embedding (L2-normalised), embedding_raw, site (`site`), codes (`sae`): side by side"""
    pool: TokenPool = TokenPool.max
    """what the activations of a latent at the tokens of an image become: max, mean or sum"""
    standardise: bool = False
    """shift and scale every feature to mean 0 and variance 1; the saved head takes raw ones"""
    head: HeadKind = HeadKind.linear
    """linear, mlp, attention (over the tokens of `site`) or sparse (on codes)"""
    hidden: int = 256
    """width of the hidden layer (mlp)"""
    n_heads: int = 4
    """learned queries (attention)"""
    solver: Solver = Solver.sgd
    """sgd: AdamW in batches, any head; lbfgs: the minimum itself, linear (L2) and sparse (L1)"""
    C: list[float] = field(default_factory=lambda: [1.0])
    """inverse strength of the penalty (lbfgs); several are a path, chosen on `validation`"""
    lr: Many[float] = 0.01
    """peak learning rate of AdamW, cosine to zero (sgd); a list trains a grid of linear probes"""
    weight_decay: Many[float] = 1e-4
    """on the weights (sgd); a list as of lr"""
    batch_size: int = 512
    """rows per step, over all devices"""
    class_weight: ClassWeight = ClassWeight.none
    """balanced: the rows of every class count as much in all"""
    init: Init = Init.zero
    """where sgd starts: zero, or text, the head of the prompts of the classes"""
    prompts: list[str] = field(default_factory=list)
    """prompts in the order of the classes, without templates; empty: the class names in them"""
    templates: str = "simple"
    """imagenet_80, imagenet_7, simple, none, a text file (one a line), or one such as 'a {}'"""
    wise_ft: list[float] = field(default_factory=list)
    """shares of the probe between the text head (0) and the probe (1), chosen on `validation`"""
    method: GroupMethod = GroupMethod.erm
    """erm: all rows alike; balanced, group_dro, dfr, jtt: for the worst group (lbfgs)"""
    groups: str | None = None
    """json:<field> or json:<field>=<value>, the cue: groups are label x cue"""
    groups_latents: list[int] = field(default_factory=list)
    """latents of `sae` whose firing stands for the cue, where no field says it"""
    criterion: Criterion | None = None
    """what is chosen by on `validation`; none: accuracy, worst_group with a method for groups"""

    @property
    def labels(self) -> list[str]:
        """The fields of the labels."""
        return self.label if isinstance(self.label, list) else [self.label]

    @property
    def is_multilabel(self) -> bool:
        """Whether a class is true or not, whatever the others are."""
        return isinstance(self.label, list)

    @property
    def class_names(self) -> list[str]:
        """Of several labels without names the fields."""
        return list(self.classes) or [one.removeprefix("json:") for one in self.labels]

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(lr, weight_decay) of every point, the strongest penalty first."""
        rates, decays = (
            value if isinstance(value, list) else [value] for value in (self.lr, self.weight_decay)
        )
        return [(rate, decay) for decay in sorted(decays, reverse=True) for rate in sorted(rates)]

    @property
    def has_groups(self) -> bool:
        """Whether images have a cue."""
        return self.groups is not None or bool(self.groups_latents)

    @property
    def chosen_by(self) -> Criterion:
        """The criterion, said or not."""
        if self.criterion is not None:
            return self.criterion
        is_for_groups = self.method is not GroupMethod.erm
        return Criterion.worst_group if is_for_groups else Criterion.accuracy

    @property
    def needs_text(self) -> bool:
        """Whether the prompts of the classes are read."""
        return self.init is Init.text or bool(self.wise_ft)

    @property
    def needs_choice(self) -> bool:
        """Whether there are several to choose from."""
        n_fits = len(self.C) if self.solver is Solver.lbfgs else len(self.grid)
        return n_fits > 1 or len(self.wise_ft) > 1 or self.method is GroupMethod.jtt

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        check_positive(self, "probe", "batch_size", "hidden", "n_heads")
        self._check_lists()
        for label in self.labels:
            check_label("probe", label)
        self._check_classes()
        self._check_head()
        self._check_solver()
        self._check_groups()
        self._check_text()

    def _check_lists(self) -> None:
        for name in ("features", "C", "lr", "weight_decay", "label", "wise_ft", "groups_latents"):
            values = getattr(self, name)
            values = values if isinstance(values, list) else [values]
            may_be_empty = name in ("wise_ft", "groups_latents")
            if len(set(values)) < len(values) or not (values or may_be_empty):
                raise ConfigError(
                    f"probe.{name}={format_value(values)}: name at least one value, each once"
                )
        if any(value <= 0 for value in [*self.C, *(rate for rate, _ in self.grid)]):
            raise ConfigError(f"probe.C={self.C}, probe.lr={self.lr}: must be greater than 0")
        if any(decay < 0 for _, decay in self.grid):
            raise ConfigError(f"probe.weight_decay={self.weight_decay}: must be 0 or greater")
        if any(not 0.0 <= alpha <= 1.0 for alpha in self.wise_ft):
            raise ConfigError(f"probe.wise_ft={self.wise_ft}: each must lie between 0 and 1")
        if any(latent < 0 for latent in self.groups_latents):
            raise ConfigError(f"probe.groups_latents={self.groups_latents}: must be 0 or greater")

    def _check_classes(self) -> None:
        if not self.is_multilabel and len(self.classes) < 2:
            raise ConfigError(f"probe.classes={self.classes}: name at least two classes")
        if self.is_multilabel and len(self.classes) not in (0, len(self.labels)):
            raise ConfigError(
                f"probe.classes={self.classes}: of the {len(self.labels)} labels of probe.label "
                "each needs a name, or none"
            )
        if len(set(self.class_names)) < len(self.class_names):
            raise ConfigError(f"probe.classes={self.class_names}: name each class once")
        numbers = [(n, one) for n, one in enumerate(self.classes) if one.isdecimal()]
        if not self.is_multilabel and any(int(one) != n for n, one in numbers):
            raise ConfigError(
                f"probe.classes={self.classes}: a label that is a number counts the classes from "
                "0, so that a name that is one must stand at its own place"
            )
        if self.is_multilabel and "cls" in self.labels:
            raise ConfigError(f"probe.label={self.label}: several labels are fields, json:<key>")

    def _check_head(self) -> None:
        is_sparse = Feature.codes in self.features
        if is_sparse != (self.head is HeadKind.sparse):
            raise ConfigError(
                f"probe.features={format_value(self.features)} probe.head={self.head.name}: codes "
                "are read by a sparse head, and a sparse head reads codes"
            )
        if self.head is HeadKind.attention and self.features != [Feature.site]:
            raise ConfigError(
                f"probe.features={format_value(self.features)}: an attention head reads the tokens "
                "of a site and nothing else, probe.features='[site]'"
            )
        for name, kind in (("hidden", HeadKind.mlp), ("n_heads", HeadKind.attention)):
            value = getattr(self, name)
            if self.head is not kind and value != getattr(ProbeConfig, name):
                raise ConfigError(f"probe.{name}={value} does nothing without head={kind.name}")
        if is_sparse and self.standardise:
            raise ConfigError("probe.standardise=true: codes that are shifted are not sparse")
        if not is_sparse and self.pool is not ProbeConfig.pool:
            raise ConfigError(f"probe.pool={self.pool.name} does nothing without codes")

    def _check_solver(self) -> None:
        if self.solver is Solver.lbfgs:
            if self.head not in (HeadKind.linear, HeadKind.sparse):
                raise ConfigError(
                    f"probe.solver=lbfgs: solves linear and sparse heads; probe.head="
                    f"{self.head.name} is trained by sgd"
                )
            if self.is_multilabel and self.head is HeadKind.sparse:
                raise ConfigError("probe.solver=lbfgs: a sparse head has one label; use sgd")
            if self.is_multilabel and self.class_weight is ClassWeight.balanced:
                raise ConfigError(
                    "probe.class_weight=balanced: of several labels needs probe.solver=sgd"
                )
            return
        if self.C != ProbeConfig().C:
            raise ConfigError(f"probe.C={self.C} does nothing without probe.solver=lbfgs")
        if len(self.grid) > 1 and self.head is not HeadKind.linear:
            raise ConfigError(
                f"probe.lr={self.lr} probe.weight_decay={self.weight_decay}: a grid is of linear "
                f"heads; train one probe.head={self.head.name} at a time"
            )

    def _check_groups(self) -> None:
        if self.groups is not None and self.groups_latents:
            raise ConfigError("probe.groups and probe.groups_latents: the cue is one of them")
        if self.groups is not None and not self.groups.startswith("json:"):
            raise ConfigError(
                f"probe.groups={self.groups!r}: write json:<field> or json:<field>=<value>"
            )
        if self.is_multilabel and self.has_groups:
            raise ConfigError("probe.groups: a group is one label with a cue, not several labels")
        if self.criterion is Criterion.worst_group and not self.has_groups:
            raise ConfigError(
                "probe.criterion=worst_group: say what the groups are, probe.groups=json:<field>"
            )
        if self.method is GroupMethod.erm:
            return
        name = f"probe.method={self.method.name}"
        if self.solver is not Solver.lbfgs or self.head is not HeadKind.linear:
            raise ConfigError(f"{name}: needs probe.solver=lbfgs and probe.head=linear")
        if not self.has_groups:
            raise ConfigError(f"{name}: say what the groups are, probe.groups=json:<field>")
        if self.class_weight is ClassWeight.balanced:
            raise ConfigError(f"{name}: balances groups, so that probe.class_weight must be none")

    def _check_text(self) -> None:
        if not self.needs_text:
            if self.prompts or self.templates != ProbeConfig.templates:
                raise ConfigError(
                    f"probe.prompts={self.prompts} probe.templates={self.templates!r}: do nothing "
                    "without probe.init=text or probe.wise_ft"
                )
            return
        name = "probe.init=text" if self.init is Init.text else "probe.wise_ft"
        is_embedding = self.features == [Feature.embedding] and self.head is HeadKind.linear
        if not is_embedding or self.is_multilabel:
            raise ConfigError(
                f"{name}: a text head is linear on the normalised embedding, with one label; "
                "probe.features='[embedding]' probe.head=linear"
            )
        if self.init is Init.text and self.solver is Solver.lbfgs:
            raise ConfigError(
                "probe.init=text: lbfgs finds the same minimum from any start; use sgd, or "
                "probe.wise_ft"
            )
        if self.init is Init.text and self.standardise:
            raise ConfigError(
                "probe.init=text: the text head reads the embedding as it is, not standardised"
            )
        if self.prompts and len(self.prompts) != len(self.classes):
            raise ConfigError(
                f"probe.prompts={self.prompts}: one for each of the classes {self.classes}"
            )


@dataclass
class ProbeQuestion:
    """Of which model and images, and on which others it is chosen."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: str | None = None
    """shards of other images, on which one of several fits is chosen, and measured"""
    site: SiteConfig | None = None
    """where the tower is cut for the feature site: site.layer=6 site.tokens=spatial"""
    sae: str | None = None
    """folder with sae.safetensors and sae.json, for codes and groups_latents"""
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def check_question(self, trainer: TrainerConfig) -> None:
        """Raise ConfigError when a combination cannot work."""
        probe = self.probe
        self._check_inputs()
        if self.validation is None and probe.needs_choice:
            raise ConfigError(
                "validation=null: several fits are asked for (C, lr, weight_decay, wise_ft or the "
                "settings of jtt), and one is chosen on images of their own: validation=SHARDS"
            )
        if self.validation is not None and self.validation == self.data.shards:
            raise ConfigError(
                f"validation={self.validation!r}: are the images of the fit; name others"
            )
        if probe.solver is Solver.sgd:
            check_divides(probe.batch_size, "probe.batch_size", trainer.devices)
        elif trainer.devices > 1:
            raise ConfigError(
                f"trainer.devices={trainer.devices}: probe.solver=lbfgs runs in one process; "
                "trainer.devices=1 (cache_activations can fill the cache on many)"
            )

    def _check_inputs(self) -> None:
        has_site = Feature.site in self.probe.features
        if has_site != (self.site is not None):
            raise ConfigError(
                "site: goes with the feature site, probe.features='[site]' site.layer=-1"
            )
        if self.probe.head is HeadKind.attention:
            assert self.site is not None, "checked above"
            if self.site.tokens is Tokens.cls:
                raise ConfigError(
                    "site.tokens=cls: an attention head weighs many tokens; spatial or all"
                )
        needs_sae = Feature.codes in self.probe.features or bool(self.probe.groups_latents)
        if needs_sae != (self.sae is not None):
            raise ConfigError(
                "sae: goes with probe.features='[codes]' and probe.groups_latents, sae=FOLDER"
            )
