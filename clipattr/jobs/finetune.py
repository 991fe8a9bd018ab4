"""Fine-tune the last blocks of an image tower with a linear head, and save both."""

import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Clip, load_clip
from clipattr.clip.names import LOCAL_DIR
from clipattr.clip.saving import save_clip
from clipattr.config.choices import ClassWeight, Init, Mode
from clipattr.config.schema import Finetune
from clipattr.data import load_features
from clipattr.data.pixels import Pixels
from clipattr.data.shards import number_of_class
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.apart import check_apart, check_shards
from clipattr.jobs.class_head import Classes, load_classes, needed_fields
from clipattr.jobs.images import TrainingImages, open_training_images
from clipattr.jobs.model import choose_device, load_model, read_embeddings
from clipattr.jobs.shards import Images, find_images, locate_shards
from clipattr.jobs.start import (
    Plan,
    check_not_inside,
    describe_files,
    describe_model,
    describe_shards,
)
from clipattr.metrics.quality import measure_quality
from clipattr.probes.files import ProbeRecord, load_probe, save_probe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.text import text_probe
from clipattr.runs import RunFolder
from clipattr.training.finetune_module import FinetuneModule
from clipattr.training.trainer import build_trainer, fit

logger = logging.getLogger(__name__)

OUTPUTS = ("model", "probe.json", "probe.safetensors")
# Of `measure_quality`, what is defined without a cue.
MEASURED = ("accuracy", "balanced_accuracy", "auroc", "ece")


def finetune(config: Finetune, command: list[str]) -> None:
    """Train; save `<run>/model`, which `local-dir:` loads, and the probe on its embedding."""
    settings = config.finetune
    if settings.start is not None:
        check_not_inside(config, "finetune.start", settings.start)
    classes = load_classes(settings)
    plan = Plan(config, command, _describe(config, classes), OUTPUTS)
    if plan.is_finished():
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    held_out = _find_held_out(config, classes)
    class_weight = _count_classes(config, classes)
    clip = load_model(config.model, config.trainer.accelerator)
    module = FinetuneModule(
        clip,
        _start(config, classes, clip),
        blocks=settings.blocks,
        lr=settings.lr,
        head_lr=settings.head_lr,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        n_steps=config.trainer.steps,
        class_weight=class_weight,
    )
    images = _open_images(config, classes, clip)
    if held_out is not None:
        _check_apart(config, held_out[0])
    run = plan.open()
    trainer = build_trainer(config.trainer, run.path, callbacks=[images.limit])
    fit(trainer, module, images.data, run.path)
    if trainer.is_global_zero:
        if not module.is_finite():
            raise ConfigError(
                "the model is not finite: the training diverged, choose a smaller finetune.lr or "
                "finetune.head_lr"
            )
        module.move_back(settings.wise_ft)
        quality = _save(config, classes, clip, module.probe, images, run, held_out)
        run.update_manifest(data=images.fingerprint)
        counts = {"steps": config.trainer.steps, "n_images": images.n_images}
        run.write_metrics({"train": counts, "held_out": quality})
        run.finish()


def _describe(config: Finetune, classes: Classes) -> dict[str, object]:
    """What the job reads."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
        "classes": classes.fingerprint,
    }
    if config.held_out is not None:
        inputs["held_out"] = describe_shards(config.held_out, "held_out")
    if config.finetune.start is not None:
        folder = Path(config.finetune.start)
        inputs["start"] = describe_files([folder / "probe.json", folder / "probe.safetensors"])
    return inputs


def _open_images(config: Finetune, classes: Classes, clip: Clip) -> TrainingImages:
    label = config.finetune.label
    return open_training_images(
        config.data,
        Pixels(clip.preprocess, config.data.decode.name),
        {"label": partial(read_class, label, classes.names.names)},
        needed=needed_fields(label),
        folder=Path(config.runs) / config.name,
        seed=config.seed,
        n_steps=config.trainer.steps,
        progress=config.trainer.progress,
    )


def read_class(label: str, names: tuple[str, ...], sample: Mapping[str, bytes]) -> Int[Tensor, ""]:
    """The class of a sample, of its raw fields."""
    if label == "cls":
        text = sample["cls"].decode("utf-8", "replace").strip()
    else:
        content, key = json.loads(sample["json"]), label.removeprefix("json:")
        if not isinstance(content, dict) or key not in content:
            raise DataError(f"its JSON has no key {key!r}")
        text = str(content[key])
    number = number_of_class(text, names)
    if number is None:
        raise DataError(
            f"{label} is {text!r}; allowed are 0 to {len(names) - 1} and the names of the classes"
        )
    return torch.tensor(number)


def _start(config: Finetune, classes: Classes, clip: Clip) -> LinearProbe:
    """The head before the first step."""
    settings, names = config.finetune, classes.names.names
    if settings.start is not None:
        model = {"name": clip.name, "weights_sha256": clip.weights_sha256}
        probe, record = load_probe(settings.start, expected_model=model)
        if record.class_names != list(names):
            raise ConfigError(
                f"finetune.start={settings.start!r}: its classes are {record.class_names}, those "
                f"of finetune.classes {list(names)}; they must be the same in the same order"
            )
        return probe
    if settings.init is Init.text:
        head = classes.head(clip, config.data.cache, progress=config.trainer.progress)
        return text_probe(head.weights.cpu(), clip.logit_scale)
    return LinearProbe(clip.d_embed, len(names))


def _count_classes(config: Finetune, classes: Classes) -> Float[Tensor, " class"] | None:
    """What an image of each class counts: n / (n_classes n_c), 1 on average over the images."""
    settings, names = config.finetune, classes.names.names
    if settings.class_weight is ClassWeight.none:
        return None
    progress = config.trainer.progress
    needed = needed_fields(settings.label)
    found = find_images(config.data.shards, config.data, needed, progress=progress).usable
    counts = torch.bincount(classes.read_labels(found, settings.label), minlength=len(names))
    if missing := [name for name, count in zip(names, counts.tolist(), strict=True) if not count]:
        raise DataError(
            f"finetune.class_weight=balanced: {config.data.shards} has no image of the classes "
            f"{', '.join(missing)}"
        )
    return counts.sum() / (len(names) * counts.float())


def _find_held_out(config: Finetune, classes: Classes) -> tuple[Images, Tensor] | None:
    """Images and labels, before anything is trained: a wrong label must not cost a training."""
    if config.held_out is None:
        return None
    label, progress = config.finetune.label, config.trainer.progress
    needed = needed_fields(label)
    images = find_images(
        config.held_out, config.data, needed, setting="held_out", progress=progress
    )
    return images, classes.read_labels(images.usable, label)


def _check_apart(config: Finetune, held_out: Images) -> None:
    """Streamed shards are not indexed: of them the names alone are compared."""
    where = f"data.shards={config.data.shards} and held_out={config.held_out}"
    rule = "quality is measured on images that the training has not seen"
    if config.data.mode is not Mode.indexed:
        check_shards(locate_shards(config.data.shards, config.data), held_out.usable, where, rule)
        return
    needed, progress = needed_fields(config.finetune.label), config.trainer.progress
    training = find_images(config.data.shards, config.data, needed, progress=progress)
    check_apart(training.usable, held_out.usable, where, rule)


def _save(
    config: Finetune,
    classes: Classes,
    clip: Clip,
    probe: LinearProbe,
    images: TrainingImages,
    run: RunFolder,
    held_out: tuple[Images, Tensor] | None,
) -> dict[str, float]:
    """The model and the head; what is measured is the model that was read back."""
    save_clip(clip, config.model.pretrained, run.path / "model")
    name = f"{LOCAL_DIR}{run.path / 'model'}"
    saved = load_clip(name, device=choose_device(config.trainer.accelerator))
    quality = {} if held_out is None else _measure(config, saved, probe, *held_out)
    record = ProbeRecord(
        class_names=list(classes.names.names),
        model={"name": name, "weights_sha256": saved.weights_sha256},
        label_field=config.finetune.label,
        data_fingerprint=images.fingerprint or "streamed",
        metrics={name: value for name, value in quality.items() if math.isfinite(value)},
        preprocess=Pixels(saved.preprocess, config.data.decode.name).fingerprint,
    )
    save_probe(probe, run.path, record)
    return quality


@torch.no_grad()
def _measure(
    config: Finetune, clip: Clip, probe: LinearProbe, images: Images, labels: Int[Tensor, " image"]
) -> dict[str, float]:
    """Quality on the held-out images, whose embeddings stay in the cache."""
    store = read_embeddings(clip, images.usable, config.data, progress=config.trainer.progress)
    images.add_bad(store.bad, config.data.max_bad_fraction)
    features = load_features(store)
    logits = probe.cpu()(normalize(features.x.cpu().float(), dim=-1))
    found = measure_quality(logits, labels[features.images])._asdict()
    quality = {name: found[name] for name in MEASURED}
    words = ", ".join(f"{name} {value:.3f}" for name, value in quality.items())
    logger.info("held out: %d images, %s", len(features.images), words)
    return quality
