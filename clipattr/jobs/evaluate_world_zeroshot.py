"""Zero-shot accuracy of a CLIP, per factor of the planted world."""

import logging

from torch.nn.functional import normalize

from clipattr.config.schema import EvaluateWorldZeroshot
from clipattr.data import load_features
from clipattr.data.shards import read_json
from clipattr.data.store import hash_json
from clipattr.jobs.model import load_model, read_embeddings
from clipattr.jobs.shards import find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.jobs.world_zeroshot import zeroshot_accuracy

logger = logging.getLogger(__name__)


def evaluate_world_zeroshot(config: EvaluateWorldZeroshot, command: list[str]) -> None:
    """Write `zeroshot.<factor>.accuracy`: share of images nearest to the true prompt."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, ("metrics.json",))
    if plan.is_finished():
        return
    progress = config.trainer.progress
    found = find_images(config.data.shards, config.data, ("json",), progress=progress)
    index = found.usable
    clip = load_model(config.model, config.trainer.accelerator)
    store = read_embeddings(clip, index, config.data, progress=progress)
    bad = found.add_bad(store.bad, config.data.max_bad_fraction)
    x, images = load_features(store)
    embeddings = normalize(x.to(clip.device), dim=-1)
    factors = [read_json(index[row]) for row in images.tolist()]
    accuracy = zeroshot_accuracy(clip, embeddings, factors)
    for name, share in accuracy.items():
        logger.info("zero-shot %-10s %.3f  (%d images)", name, share, len(factors))
    run = plan.open()
    run.write_bad([one._asdict() for one in bad])
    run.update_manifest(data=hash_json(store.fingerprint))
    metrics = {name: {"accuracy": share} for name, share in accuracy.items()}
    run.write_metrics({"zeroshot": metrics})
    run.finish()
