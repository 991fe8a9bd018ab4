"""Settings of fine-tuning: the last blocks of an image tower, with a linear head on top."""

from dataclasses import dataclass, field
from typing import ClassVar

from clipattr.config.choices import ClassWeight, Init, Mode, WeightPrecision
from clipattr.config.evaluation import ClassesConfig
from clipattr.config.inputs import ModelConfig, TrainingImagesConfig
from clipattr.config.limits import check_divides, check_label, check_not_negative, check_positive
from clipattr.config.trainer import TrainerConfig
from clipattr.errors import ConfigError


@dataclass
class FinetuneConfig(ClassesConfig):
    """What learns, from where it starts, and how fast."""

    section: ClassVar[str] = "finetune"

    label: str = "cls"
    """sample field that holds the number or the name of the class: cls, or json:<key>"""
    blocks: int = 1
    """last blocks of the image tower that learn, with the norm and projection behind them"""
    init: Init = Init.zero
    """what the head starts from: zero, or text (the prompts of the classes)"""
    start: str | None = None
    """folder of a linear probe that the head starts from, trained on the same model"""
    lr: float = 1e-5
    """peak learning rate of the blocks, AdamW, cosine to zero"""
    head_lr: float = 1e-3
    """peak learning rate of the head"""
    weight_decay: float = 0.1
    """on matrices only"""
    warmup: int = 100
    """steps of linear warm-up"""
    class_weight: ClassWeight = ClassWeight.none
    """none, or balanced: every class counts the same, whatever its number of images"""
    wise_ft: float = 1.0
    """place on the line of weights from the start (0) to the end of the training (1)"""

    def check(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        super().check()
        check_label("finetune", self.label)
        check_positive(self, "finetune", "lr", "head_lr")
        check_not_negative(self, "finetune", "blocks", "weight_decay", "warmup")
        if self.start is not None and self.init is Init.text:
            raise ConfigError(
                f"finetune.start={self.start!r} and finetune.init=text: the head starts from one "
                "of them; leave out the other"
            )
        if not 0.0 <= self.wise_ft <= 1.0:
            raise ConfigError(f"finetune.wise_ft={self.wise_ft}: must be between 0 and 1")
        if self.wise_ft < 1.0 and self.start is None and self.init is Init.zero:
            raise ConfigError(
                f"finetune.wise_ft={self.wise_ft}: the line begins at a head of zeros, which knows "
                "no class; use finetune.init=text or finetune.start=FOLDER"
            )


@dataclass
class FinetuneTask:
    """A model, the labelled images that it learns from, and what of it learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: TrainingImagesConfig = field(default_factory=TrainingImagesConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    held_out: str | None = None
    """labelled shards on which the quality of the finished model is measured; none: nowhere"""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check_task(self) -> None:
        """Raise ConfigError when a combination cannot work."""
        check_divides(self.data.batch_size, "data.batch_size", self.trainer.devices)
        if self.model.precision is not WeightPrecision.fp32:
            raise ConfigError(
                f"model.precision={self.model.precision.name}: weights learn in fp32, because a "
                "small step is lost in fewer bits; trainer.precision=bf16 makes the steps fast"
            )
        if self.held_out is not None and self.held_out == self.data.shards:
            raise ConfigError(
                f"held_out={self.held_out!r}: are the images of the training; name others"
            )
        is_balanced = self.finetune.class_weight is ClassWeight.balanced
        if is_balanced and self.data.mode is not Mode.indexed:
            raise ConfigError(
                "finetune.class_weight=balanced: the images of a class are counted before the "
                "training, which needs data.mode=indexed"
            )
