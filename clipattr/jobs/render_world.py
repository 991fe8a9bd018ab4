"""Draw the planted world as image shards, one folder per split."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from clipattr.config.schema import RenderWorld
from clipattr.data.parallel import end_with_parent
from clipattr.runs import open_run
from clipattr.world.sampling import Split
from clipattr.world.shards import split_fingerprint, write_split


def render_world(config: RenderWorld, command: list[str]) -> None:
    """Write every split that is not there yet."""
    world = config.world
    sizes = {split: int(getattr(world, split.name)) for split in Split}
    run = open_run(config, command)
    fingerprints: dict[str, str] = {}
    # spawn: fork would copy the locks of threads that the caller has used.
    with ProcessPoolExecutor(world.workers, get_context("spawn"), end_with_parent) as pool:
        for split, n_images in sizes.items():
            paths = write_split(
                Path(world.out) / split.name,
                split,
                n_images,
                seed=config.seed,
                shard_size=world.shard_size,
                pool=pool if world.workers > 1 else None,
            )
            fingerprints[split.name] = split_fingerprint(paths)
    run.update_manifest(data=fingerprints)
    run.write_metrics({"world": {split.name: float(size) for split, size in sizes.items()}})
    run.finish()
