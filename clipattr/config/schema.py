"""Every job and what it can be told. Imports no torch: a typo must die in under a second.

One dataclass per section, one docstring line per field (`--help` prints them). A YAML file opens
with `job: <name>`, which selects the class in `JOBS`; it holds what differs from the defaults.
`inputs.py` has the model, the site and the data, `sae.py` the dictionaries, `evaluation.py` what an
evaluation computes, `attribution.py` which scores are attributed, `explain.py` what is asked about
one image, `atlas.py` what latents mean, `find.py` what is looked for among them, `shortcuts.py`
which cues a probe leans on, `predict.py` which pictures are classified, `world.py` the planted
world, `trainer.py` where and how long a job computes.
"""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from clipattr.config.atlas import AtlasQuestion
from clipattr.config.attribution import AttributionQuestion
from clipattr.config.evaluation import EvaluationConfig, PromptsConfig, ZeroshotConfig
from clipattr.config.explain import Question
from clipattr.config.find import Search
from clipattr.config.finetune import FinetuneTask
from clipattr.config.inputs import (
    DataConfig,
    ModelConfig,
    ReadConfig,
    SiteConfig,
    TrainingImagesConfig,
    check_target,
)
from clipattr.config.learners import ClipConfig
from clipattr.config.limits import check_divides
from clipattr.config.predict import PredictTask
from clipattr.config.probe import ProbeQuestion
from clipattr.config.sae import SaeConfig
from clipattr.config.shortcuts import ShortcutsQuestion
from clipattr.config.trainer import (
    DeviceConfig,
    DevicesConfig,
    SaeTrainerConfig,
    TrainerConfig,
)
from clipattr.config.training_faithfulness import TrainingFaithfulnessConfig
from clipattr.config.world import WorldConfig
from clipattr.errors import ConfigError


@dataclass
class JobConfig:
    """What every job has."""

    job: str = MISSING
    """which job this file is"""
    name: str = MISSING
    """run name: results go to <runs>/<name>/"""
    runs: str = "runs"
    """folder of all runs"""
    seed: int = 0
    """seed of weights, order and rendering"""

    def paths(self) -> dict[str, str]:
        """Settings that name a file or a folder which has to exist, by their dotted name."""
        found: dict[str, str] = {}
        model, data = getattr(self, "model", None), getattr(self, "data", None)
        if isinstance(model, ModelConfig) and model.name.startswith("local-dir:"):
            found["model.name"] = model.name
        if isinstance(data, DataConfig):
            found["data.shards"] = data.shards
        for name in ("held_out", "world", "sae", "probe", "atlas"):
            value = getattr(self, name, None)
            if isinstance(value, str):
                found[name] = value
        return found

    def check_paths(self) -> None:
        """Raise ConfigError for a path that is not there; brace patterns are expanded later."""
        for name, path in self.paths().items():
            place = path.removeprefix("local-dir:")
            if not set(place) & set("{}:") and not Path(place).exists():
                raise ConfigError(f"{name}={path!r}: {place} does not exist")

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        parts = self.name.split("/")
        if not self.name or self.name.startswith("/") or {".", "..", ""} & set(parts):
            raise ConfigError(f"name={self.name!r}: must be a plain folder name inside {self.runs}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be between 0 and {2**32 - 1}")
        sections = (
            "site",
            "data",
            "trainer",
            "sae",
            "probe",
            "clip",
            "finetune",
            "world",
            "evaluation",
            "zeroshot",
            "atlas",
        )
        for section_name in sections:
            section = getattr(self, section_name, None)
            if section is not None and hasattr(section, "check"):
                section.check()


@dataclass
class TrainClip(JobConfig):
    """train_clip: train a small open_clip model from scratch on captioned shards."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    data: TrainingImagesConfig = field(default_factory=TrainingImagesConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        check_divides(self.data.batch_size, "data.batch_size", self.trainer.devices)


@dataclass
class TrainSae(JobConfig):
    """train_sae: train sparse autoencoders, one or a grid, on activations of a frozen CLIP."""

    model: ModelConfig = field(default_factory=ModelConfig)
    site: SiteConfig = field(default_factory=SiteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    held_out: str = MISSING
    """shards on which the SAE's final metrics are measured"""
    target: SiteConfig | None = None
    """the site that a transcoder reconstructs, fields as of `site`: target.stream=mlp"""
    sae: SaeConfig = field(default_factory=SaeConfig)
    faithfulness: TrainingFaithfulnessConfig | None = None
    """how faithful attribution is as training goes on: faithfulness.classes='[cat, dog]'"""
    trainer: SaeTrainerConfig = field(default_factory=SaeTrainerConfig)

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self._check_target()
        if self.faithfulness is not None:
            self.faithfulness.check()
            self.faithfulness.check_training(
                self.trainer.steps,
                is_transcoder=self.sae.is_transcoder,
                shard_latents=self.trainer.shard_latents,
            )
        if self.trainer.shard_latents:
            self.sae.check_shards(self.trainer.devices)
        else:
            check_divides(self.sae.batch_size, "sae.batch_size", self.trainer.devices)
        for member in self.sae.members().values():
            if member.k_start is not None and member.k_steps > 0.8 * self.trainer.steps:
                raise ConfigError(
                    f"sae.k_steps={member.k_steps}: k must have fallen to sae.k within four fifths "
                    f"of trainer.steps={self.trainer.steps}"
                )

    def _check_target(self) -> None:
        if self.target is None:
            if self.sae.is_transcoder:
                raise ConfigError(
                    "target=null: sae.architecture=transcoder needs the site that it reconstructs, "
                    "for example site.stream=residual_middle target.stream=mlp"
                )
            return
        if not self.sae.is_transcoder:
            raise ConfigError(
                "target: is for sae.architecture=transcoder; the others reconstruct the site itself"
            )
        self.target.check("target")
        check_target(self.site, self.target)


@dataclass
class CacheActivations(JobConfig):
    """cache_activations: store activations of a frozen CLIP at several sites, in one pass."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sites: list[SiteConfig] = field(default_factory=list)
    """where the tower is read: '[{layer: 3}, {layer: -1, tokens: spatial}]', fields as of `site`"""
    data: DataConfig = field(default_factory=DataConfig)
    trainer: DevicesConfig = field(default_factory=DevicesConfig)

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        if not self.sites:
            raise ConfigError("sites=[]: name at least one, for example sites='[{layer: -1}]'")
        for number, site in enumerate(self.sites):
            site.check(f"sites[{number}]")


@dataclass
class TrainProbe(ProbeQuestion, JobConfig):
    """train_probe: train a head on frozen CLIP features, and choose among several."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def paths(self) -> dict[str, str]:
        """As for every job, and the shards that it is chosen on."""
        chosen_on = {} if self.validation is None else {"validation": self.validation}
        return super().paths() | chosen_on

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_question(self.trainer)


@dataclass
class Finetune(FinetuneTask, JobConfig):
    """finetune: train the last blocks of a CLIP's image tower with a linear head."""

    def paths(self) -> dict[str, str]:
        """As for every job, and the probe that the head starts from."""
        start = self.finetune.start
        return super().paths() | ({} if start is None else {"finetune.start": start})

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_task()


@dataclass
class RenderWorld(JobConfig):
    """render_world: draw the planted world as WebDataset image shards."""

    world: WorldConfig = field(default_factory=WorldConfig)


@dataclass
class EvaluateZeroshot(JobConfig):
    """evaluate_zeroshot: zero-shot accuracy of any CLIP on any labelled shards."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    zeroshot: ZeroshotConfig = field(default_factory=ZeroshotConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class EvaluateSae(JobConfig):
    """evaluate_sae: what an SAE reconstructs, and what the model loses when it is spliced in."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: str = MISSING
    """folder with sae.safetensors and sae.json, which says at which site"""
    zeroshot: PromptsConfig = field(default_factory=PromptsConfig)
    mean_images: int = 512
    """images, spread over the shards, whose mean activation is that of the ablated model"""
    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        if self.mean_images < 1:
            raise ConfigError(f"mean_images={self.mean_images}: must be greater than 0")


@dataclass
class EvaluateWorldZeroshot(JobConfig):
    """evaluate_world_zeroshot: zero-shot accuracy of a CLIP per factor of the planted world."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class EvaluateWorld(JobConfig):
    """evaluate_world: faithfulness, scorecard and shortcut amplification, with a report page."""

    model: ModelConfig = field(default_factory=ModelConfig)
    world: str = "runs/world"
    """folder written by render_world"""
    data: ReadConfig = field(default_factory=ReadConfig)
    sae: str = MISSING
    """folder with sae.safetensors and sae.json"""
    probe: str = MISSING
    """folder with probe.safetensors and probe.json"""
    atlas: str | None = None
    """folder of the job atlas, whose list of unexpected reliance is graded; none: no list"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class EvaluateAttribution(AttributionQuestion, JobConfig):
    """evaluate_attribution: faithfulness of attribution, and which latents each class relies on."""

    trainer: DevicesConfig = field(default_factory=DevicesConfig)

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_question()


@dataclass
class Explain(Question, JobConfig):
    """explain: why one image has its score: latents, their attributions and where they are."""

    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def paths(self) -> dict[str, str]:
        """As for every job, and the image."""
        return {"image": self.image} | super().paths()

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_question()


@dataclass
class Atlas(AtlasQuestion, JobConfig):
    """atlas: what every latent means, and on which of them classes rely unexpectedly."""

    trainer: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass
class Find(Search, JobConfig):
    """find: latents of an atlas for words, an image, or like another latent."""

    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def paths(self) -> dict[str, str]:
        """As for every job, the atlas and the image."""
        asked = {"atlas": self.atlas} | ({} if self.image is None else {"image": self.image})
        return asked | super().paths()

    def check_paths(self) -> None:
        """As for every job; the atlas must be finished."""
        super().check_paths()
        self.check_atlas()

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_search()


@dataclass
class Shortcuts(ShortcutsQuestion, JobConfig):
    """shortcuts: which cues a probe leans on, how much more than prompts do, and repairs."""

    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_question()


@dataclass
class Predict(PredictTask, JobConfig):
    """predict: class probabilities of the pictures in a folder, by a probe."""

    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def paths(self) -> dict[str, str]:
        """As for every job, and the pictures."""
        return {"images": self.images} | super().paths()

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        self.check_task()


TRAIN_JOBS: dict[str, type[JobConfig]] = {
    "render_world": RenderWorld,
    "train_clip": TrainClip,
    "cache_activations": CacheActivations,
    "train_sae": TrainSae,
    "train_probe": TrainProbe,
    "finetune": Finetune,
}
EVALUATE_JOBS: dict[str, type[JobConfig]] = {
    "evaluate_zeroshot": EvaluateZeroshot,
    "evaluate_sae": EvaluateSae,
    "evaluate_world_zeroshot": EvaluateWorldZeroshot,
    "evaluate_world": EvaluateWorld,
    "evaluate_attribution": EvaluateAttribution,
    "explain": Explain,
    "atlas": Atlas,
    "find": Find,
    "predict": Predict,
    "shortcuts": Shortcuts,
}
JOBS = TRAIN_JOBS | EVALUATE_JOBS
