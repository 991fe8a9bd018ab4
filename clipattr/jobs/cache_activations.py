"""Cache the activations of a frozen CLIP at several sites: one pass over the images for all."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from clipattr.atomic import write_text
from clipattr.clip import Clip, Tower, image_tower
from clipattr.config.schema import CacheActivations, DevicesConfig, SiteConfig
from clipattr.data import ActivationStore, Ranks
from clipattr.data.shards import BadSample
from clipattr.data.store import STORE, hash_json
from clipattr.errors import ConfigError
from clipattr.jobs.model import (
    SiteEncoder,
    SiteTokens,
    find_site,
    load_model,
    read_sites,
)
from clipattr.jobs.shards import find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.runs import RunFolder, read_json
from clipattr.training.trainer import choose_accelerator

logger = logging.getLogger(__name__)

STORES = "stores.json"
MB = 10**6


class Pass(NamedTuple):
    """One pass over the images: what is there now, and what it took."""

    stores: dict[str, ActivationStore]
    n_images: int
    bad: list[BadSample]
    n_encoded: int
    seconds: float


def cache_activations(config: CacheActivations, command: list[str]) -> None:
    """Write the stores into `data.cache`; jobs that read such a site find them there."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, (STORES,))
    if _are_there(Path(config.runs) / config.name) and plan.is_finished():
        return
    fabric = launch(config.trainer)
    clip = load_model(config.model, config.trainer.accelerator)
    sites = find_sites(image_tower(clip.model), config.sites)
    run = plan.open()
    done = _read(fabric, clip, sites, config)
    if fabric.is_global_zero:
        _record(run, done)
        run.finish()


def launch(settings: DevicesConfig) -> Fabric:
    """Start the other processes, as a trainer does."""
    # A rank may wait that long for another one's part of the images.
    several = DDPStrategy(timeout=timedelta(minutes=30))
    fabric = Fabric(
        accelerator=choose_accelerator(settings.accelerator),
        devices=settings.devices,
        strategy="auto" if settings.devices == 1 else several,
    )
    fabric.launch()
    return fabric


def find_sites(tower: Tower, sites: Sequence[SiteConfig]) -> dict[str, SiteTokens]:
    """The sites of a config by a name of their own, such as residual-3-cls."""
    found: dict[str, SiteTokens] = {}
    for number, settings in enumerate(sites):
        try:
            site = find_site(tower, settings)
        except ConfigError as error:
            raise ConfigError(f"sites[{number}]: {error}") from error
        place = site.cut.site
        name = f"{place.stream}-{place.layer}-{place.tokens}"
        name += "" if site.drawn is None else f"-{site.drawn}"
        if name in found:
            raise ConfigError(f"sites[{number}]: {name} is named twice in sites")
        found[name] = site
    return found


def _are_there(run: Path) -> bool:
    """Whether nobody has deleted a cache that this run has written."""
    stores = read_json(run / STORES) or {}
    return all((Path(entry["folder"]) / STORE).exists() for entry in stores.values())


def _read(
    fabric: Fabric, clip: Clip, sites: Mapping[str, SiteTokens], config: CacheActivations
) -> Pass:
    progress = config.trainer.progress
    images = find_images(config.data.shards, config.data, progress=progress)
    ranks = Ranks(fabric.global_rank, fabric.world_size, fabric.barrier, config.trainer.devices)
    encode = SiteEncoder(sites)
    start = time.perf_counter()
    stores = read_sites(clip, encode, images.usable, config.data, ranks=ranks, progress=progress)
    seconds = time.perf_counter() - start
    n_here = torch.tensor(encode.n_images, device=fabric.device)
    n_encoded = fabric.all_reduce(n_here, reduce_op="sum")
    assert isinstance(n_encoded, Tensor), "as it was given"
    undecodable = next(iter(stores.values())).bad
    bad = images.add_bad(undecodable, config.data.max_bad_fraction)
    return Pass(stores, len(images.usable), bad, int(n_encoded), seconds)


def _record(run: RunFolder, done: Pass) -> None:
    rate = done.n_encoded / done.seconds
    logger.info("%d images encoded, %.0f per second", done.n_encoded, rate)
    for name, store in done.stores.items():
        size = store.n_bytes / MB
        logger.info("%s: %d rows, %.1f MB in %s", name, store.n_rows, size, store.folder)
    places = {name: {"folder": str(store.folder)} for name, store in done.stores.items()}
    write_text(run.path / STORES, json.dumps(places, indent=2) + "\n")
    run.write_bad([one._asdict() for one in done.bad])
    run.update_manifest(
        data={name: hash_json(store.fingerprint) for name, store in done.stores.items()}
    )
    sizes = {
        name: {"rows": store.n_rows, "bytes": store.n_bytes} for name, store in done.stores.items()
    }
    run.write_metrics({"cache": sizes, "images": done.n_images, "bad": len(done.bad)})
