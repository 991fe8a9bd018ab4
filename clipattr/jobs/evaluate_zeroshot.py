"""Zero-shot accuracy of a CLIP, per factor of the planted world."""

import logging

import torch
from torch.nn.functional import normalize

from clipattr.config.schema import EvaluateZeroshot, SiteConfig
from clipattr.data.shards import read_json
from clipattr.jobs.model import load_frozen, read_features
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.jobs.world_zeroshot import zeroshot_accuracy

logger = logging.getLogger(__name__)


def evaluate_zeroshot(config: EvaluateZeroshot, command: list[str]) -> None:
    """Write `zeroshot.<factor>.accuracy`: share of images nearest to the true prompt."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, ("metrics.json",))
    if plan.is_finished():
        return
    frozen = load_frozen(config.model, SiteConfig(), config.trainer.accelerator)
    features = read_features(
        frozen, config.data.shards, config.data, ("json",), progress=config.trainer.progress
    )
    with torch.no_grad():
        x = features.store.x.to(frozen.clip.device)
        embeddings = normalize(frozen.tower.suffix(x), dim=-1)
    factors = [read_json(sample) for sample in features.samples]
    accuracy = zeroshot_accuracy(frozen.clip, embeddings, factors)
    for name, share in accuracy.items():
        logger.info("zero-shot %-10s %.3f  (%d images)", name, share, len(factors))
    run = plan.open()
    run.update_manifest(data=features.store.fingerprint)
    metrics = {name: {"accuracy": share} for name, share in accuracy.items()}
    run.write_metrics({"zeroshot": metrics})
    run.finish()
