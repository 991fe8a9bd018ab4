"""Zero-shot accuracy of a CLIP, per factor of the planted world."""

import logging

import torch
from torch.nn.functional import normalize

from clipattr.clip import embed_prompts
from clipattr.config.schema import EvaluateZeroshot, SiteConfig
from clipattr.data.shards import read_json
from clipattr.errors import DataError
from clipattr.jobs.model import load_frozen, read_features
from clipattr.jobs.start import describe_shards, start
from clipattr.world.prompts import ZEROSHOT

logger = logging.getLogger(__name__)


def evaluate_zeroshot(config: EvaluateZeroshot, command: list[str]) -> None:
    """Write `zeroshot.<factor>.accuracy`: share of images nearest to the true prompt."""
    inputs: dict[str, object] = {"shards": describe_shards(config.data.shards)}
    run = start(config, command, inputs)
    if run is None:
        return
    frozen = load_frozen(config.model, SiteConfig(), config.trainer.accelerator)
    features = read_features(
        frozen, config.data.shards, config.data, ("json",), progress=config.trainer.progress
    )
    with torch.no_grad():
        x = features.store.x.to(frozen.clip.device)
        embeddings = normalize(frozen.tower.suffix(x), dim=-1)
    factors = [read_json(sample) for sample in features.samples]
    metrics: dict[str, object] = {}
    for name, task in ZEROSHOT.items():
        unknown = {row.get(task.field) for row in factors} - set(task.values)
        if unknown:
            raise DataError(
                f"{config.data.shards}: the JSON field {task.field!r} holds "
                f"{sorted(map(str, unknown))}, allowed are {list(task.values)}; "
                "this job reads shards of the planted world"
            )
        truth = torch.tensor([task.values.index(str(row[task.field])) for row in factors])
        scores = embeddings @ embed_prompts(frozen.clip, list(task.prompts)).T
        accuracy = float((scores.argmax(dim=1).cpu() == truth).double().mean())
        metrics[name] = {"accuracy": accuracy}
        logger.info("zero-shot %-10s %.3f  (%d images)", name, accuracy, len(truth))
    run.update_manifest(data=features.store.fingerprint)
    run.write_metrics({"zeroshot": metrics})
    run.finish()
