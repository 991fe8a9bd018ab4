"""Zero-shot accuracy of any CLIP on any labelled shards."""

import logging
from collections.abc import Iterator

from torch import Tensor

from clipattr.clip import TextHead
from clipattr.config.schema import EvaluateZeroshot
from clipattr.data import Features, load_features
from clipattr.data.store import hash_json
from clipattr.jobs.class_head import load_classes, needed_fields
from clipattr.jobs.model import load_model, read_embeddings
from clipattr.jobs.shards import find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.metrics.accuracy import Accuracy, measure_accuracy

logger = logging.getLogger(__name__)

_ROWS = 1024
_LISTED = 5


def evaluate_zeroshot(config: EvaluateZeroshot, command: list[str]) -> None:
    """Write `zeroshot`: top-1, top-5 and the accuracy of every class, into metrics.json."""
    label, data = config.zeroshot.label, config.data
    classes = load_classes(config.zeroshot)
    names = classes.names.names
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(data.shards, "data.shards"),
        "prompts": classes.fingerprint,
    }
    plan = Plan(config, command, inputs, ("metrics.json",))
    if plan.is_finished():
        return
    # All labels before the model runs: a wrong one must not cost a forward of every image.
    progress = config.trainer.progress
    images = find_images(data.shards, data, needed_fields(label), progress=progress)
    labels = classes.read_labels(images.usable, label)
    clip = load_model(config.model, config.trainer.accelerator)
    head = classes.head(clip, data.cache, progress=progress)
    store = read_embeddings(clip, images.usable, data, progress=progress)
    bad = images.add_bad(store.bad, data.max_bad_fraction)
    batches = _score(head, load_features(store), labels)
    accuracy = measure_accuracy(batches, len(names))
    _log(accuracy, names, n_skipped=len(bad))
    run = plan.open()
    run.write_bad([one._asdict() for one in bad])
    run.update_manifest(data=hash_json(store.fingerprint))
    run.write_metrics({"zeroshot": _collect(accuracy, names)})
    run.finish()


def _score(head: TextHead, features: Features, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    truths = labels[features.images]
    for x, truth in zip(features.x.split(_ROWS), truths.split(_ROWS), strict=True):
        yield head.scores(x.to(head.weights.device)), truth


def _collect(accuracy: Accuracy, names: tuple[str, ...]) -> dict[str, object]:
    return {
        "images": sum(accuracy.images),
        "classes_without_images": accuracy.images.count(0),
        "top1": accuracy.top1._asdict(),
        "top5": accuracy.top5._asdict() if accuracy.top5 else None,
        "mean_per_class": accuracy.mean_per_class,
        "per_class": {
            name: {"accuracy": share, "images": images}
            for name, share, images in zip(names, accuracy.per_class, accuracy.images, strict=True)
        },
    }


def _log(accuracy: Accuracy, names: tuple[str, ...], *, n_skipped: int) -> None:
    rows = zip(names, accuracy.per_class, accuracy.images, strict=True)
    seen = [(share, name, images) for name, share, images in rows if share is not None]
    logger.info("zero-shot: %d images of %d classes", sum(accuracy.images), len(seen))
    for title, interval in (("top-1", accuracy.top1), ("top-5", accuracy.top5)):
        if interval is not None:
            logger.info("  %-24s %.3f  [%.3f, %.3f]", title, *interval)
    logger.info("  %-24s %.3f", "mean per class", accuracy.mean_per_class)
    for share, name, images in sorted(seen)[:_LISTED]:
        logger.info("  worst: %-17s %.3f  (%d images)", name, share, images)
    empty = [name for name, images in zip(names, accuracy.images, strict=True) if not images]
    if empty:
        more = ", ..." if len(empty) > _LISTED else ""
        listed = ", ".join(empty[:_LISTED]) + more
        logger.info("  %d classes have no image and no accuracy: %s", len(empty), listed)
    if n_skipped:
        logger.info("  %d broken samples were left out: bad_samples.jsonl names them", n_skipped)
