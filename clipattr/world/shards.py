"""Write the planted world as WebDataset image shards, in the layout that img2dataset writes.

Each sample is key.jpg, key.txt (caption), key.json (every factor) and key.cls (the noun's number,
or intact 0 / cracked 1 in the task splits). A shard has its name only when it is complete.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm
from webdataset.writer import TarWriter

from clipattr.atomic import atomic_file, write_text
from clipattr.errors import DataError
from clipattr.world.captions import write_caption
from clipattr.world.factors import NOUNS, Scene, Sticker
from clipattr.world.render import draw_scene
from clipattr.world.sampling import RATES_OF_SPLIT, Split, generator_of, sample_scene

JPEG_QUALITY = 92
DRAWING_VERSION = 2
TASK_SPLITS = (Split.task_train, Split.task_test, Split.task_pairs)
PAIR_VARIANTS: dict[str, tuple[str, ...]] = {"none": ()} | {
    sticker.name: (sticker.name,) for sticker in Sticker
}


def write_split(
    folder: Path,
    split: Split,
    n_images: int,
    *,
    seed: int,
    shard_size: int,
    pool: Executor | None = None,
) -> list[Path]:
    """Draw `n_images` scenes of a split (each of the pair split gives three images).

    Shards that are already there are kept: they are complete, and `split.json` says that they were
    drawn with the same arguments. Otherwise they are drawn anew, in the pool's processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn_with: dict[str, object] = {
        "split": split.name,
        "seed": seed,
        "n_images": n_images,
        "shard_size": shard_size,
        "drawing": DRAWING_VERSION,
    }
    _remove_other(folder, drawn_with)
    ranges = [
        (start, min(start + shard_size, n_images)) for start in range(0, n_images, shard_size)
    ]
    paths = [folder / f"{number:06d}.tar" for number in range(len(ranges))]
    draw = partial(_write_shard, split=split, seed=seed)
    missing = [pair for pair in zip(paths, ranges, strict=True) if not pair[0].exists()]
    if missing:
        shards = (pool.map if pool else map)(draw, *zip(*missing, strict=True))
        for _ in tqdm(shards, total=len(missing), desc=f"drawing {split.name}", unit="shard"):
            pass
    return paths


def _remove_other(folder: Path, drawn_with: dict[str, object]) -> None:
    record = folder / "split.json"
    shards = sorted(folder.glob("*.tar"))
    if shards and not record.exists():
        raise DataError(f"{folder} holds {len(shards)} shards that render_world did not write")
    text = json.dumps(drawn_with)
    if record.exists() and record.read_text() == text:
        return
    for path in shards:
        path.unlink()
    write_text(record, text)


def _write_shard(path: Path, indices: tuple[int, int], *, split: Split, seed: int) -> None:
    with (
        atomic_file(path) as file,
        TarWriter(file, encoder=False, mtime=0, user="clipattr", group="clipattr") as writer,
    ):
        for index in range(*indices):
            for sample in draw_samples(split, index, seed=seed):
                writer.write(sample)


def draw_samples(split: Split, index: int, *, seed: int) -> Iterator[dict[str, object]]:
    """The sample of one index; for the pair split the same scene without and with each sticker."""
    rng = generator_of(seed, split, index)
    scene = sample_scene(rng, RATES_OF_SPLIT[split])
    caption = write_caption(rng, scene)
    key = f"{split.name}-{index:07d}"
    if split is not Split.task_pairs:
        yield _sample(key, scene, caption, split, {})
        return
    for variant, stickers in PAIR_VARIANTS.items():
        extra = {"pair": index, "variant": variant}
        yield _sample(f"{key}-{variant}", replace(scene, stickers=stickers), caption, split, extra)


def _sample(
    key: str, scene: Scene, caption: str, split: Split, extra: dict[str, object]
) -> dict[str, object]:
    picture = io.BytesIO()
    draw_scene(scene).save(picture, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    label = int(scene.is_cracked) if split in TASK_SPLITS else NOUNS.index(scene.noun)
    factors = {"key": key, "caption": caption} | scene.to_json() | extra
    return {
        "__key__": key,
        "jpg": picture.getvalue(),
        "txt": caption.encode(),
        "cls": str(label).encode(),
        "json": json.dumps(factors).encode(),
    }


def split_fingerprint(paths: list[Path]) -> str:
    """sha256 over the shards' names and bytes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
