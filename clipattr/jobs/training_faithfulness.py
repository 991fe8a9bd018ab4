"""What the faithfulness of a training is measured on: held-out images, and what they are."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from clipattr.callbacks import HeldOut, TrainingFaithfulness
from clipattr.config.schema import TrainSae
from clipattr.config.training_faithfulness import TrainingFaithfulnessConfig
from clipattr.jobs.attribution_inputs import Head, predict, read_chosen
from clipattr.jobs.class_head import load_classes
from clipattr.jobs.model import FrozenClip
from clipattr.jobs.shards import find_images
from clipattr.jobs.site_states import OwnRows
from clipattr.training.activations import ranks_of


def watch_faithfulness(config: TrainSae, frozen: FrozenClip) -> list[Callback]:
    """The callback, if the config asks for it."""
    settings = config.faithfulness
    if settings is None:
        return []

    def open_held_out(trainer: L.Trainer) -> HeldOut:
        return _read_held_out(config, settings, frozen, trainer)

    return [TrainingFaithfulness(open_held_out, every=settings.every, n_steps=settings.steps)]


def _read_held_out(
    config: TrainSae,
    settings: TrainingFaithfulnessConfig,
    frozen: FrozenClip,
    trainer: L.Trainer,
) -> HeldOut:
    """The images of this process, each for the class that CLIP itself predicts."""
    progress = config.trainer.progress
    images = find_images(config.held_out, config.data, setting="held_out", progress=progress)
    clip, cut = frozen.clip, frozen.cut
    found = read_chosen(
        clip,
        cut,
        images,
        config.data,
        n_chosen=settings.images,
        ranks=ranks_of(trainer),
        progress=progress,
    )
    text = load_classes(settings).head(clip, config.data.cache, progress=progress)
    head = Head(text.names, text.weights.to(clip.device), None, None)
    targets = predict(cut, found.batches, head, len(found.samples))
    own = OwnRows(found.batches, trainer.global_rank, trainer.world_size)
    return HeldOut(cut, list(own), head.weights, targets)
