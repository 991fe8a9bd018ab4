"""Photos per second of one core, from a JPEG to the pixels of ViT-B/32.

    python benchmarks/images.py [--shards DIR] [--rounds 9]

Ways take turns; medians, and their ratios to open_clip's own preprocessing, are the
result: of photos that the benchmark draws (quality 90, 500 x 375 and 2000 x 1500) and of those in
--shards, if given. Then what `ImageStream` adds to decoding and resizing the same bytes in a plain
loop. Grey levels are the distance from the exact pixels: the largest, and the mean over all.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter

from clipattr.data.image_stream import ImageStream
from clipattr.data.index import ShardIndex, build_index, select_usable
from clipattr.data.pixels import Pixels
from clipattr.data.shards import find_shards

BATCH, MOST_PHOTOS = 32, 256
TRANSFORM = open_clip.image_transform(224, is_train=False)
EXACT, FAST, DRAFT = Pixels(TRANSFORM), Pixels(TRANSFORM, "fast"), Pixels(TRANSFORM, "draft")


def draw_photo(width: int, height: int, seed: int) -> bytes:
    """Soft shapes of all sizes and some noise: about as many bytes as a photo has."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        coarse = generator.integers(0, 256, (cells * 3 // 4, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer.filter(ImageFilter.GaussianBlur(1))) * (2 / cells**0.5)
    pixels = pixels / 1.9 + generator.normal(0, 5, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(folder: Path, width: int, height: int, n_photos: int) -> ShardIndex:
    """Of a number of drawn photos."""
    path = folder / f"{width}x{height}.tar"
    with tarfile.open(path, "w") as shard:
        for seed in range(n_photos):
            content = draw_photo(width, height, seed)
            member = tarfile.TarInfo(f"{seed:06d}.jpg")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return build_index([path], cache=None)


def seconds(run: Callable[[], object]) -> float:
    """Of the processor, for one call: what others do on the machine counts less."""
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; the first is warmed up by an extra turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    next(iter(ways.values()))()
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(seconds(run))
    return {name: statistics.median(found) for name, found in times.items()}


def show(times: dict[str, float], n_photos: int) -> None:
    """Rates, and how many times that of the first."""
    first = next(iter(times.values()))
    for name, found in times.items():
        print(f"  {name:42} {n_photos / found:7.0f} /s, {first / found:5.2f} x")


def distance(contents: Sequence[bytes], pixels: Pixels) -> str:
    """From the exact pixels."""
    largest, total = 0, 0.0
    for content in contents:
        levels = (EXACT.read(content).int() - pixels.read(content).int()).abs()
        largest = max(largest, int(levels.max()))
        total += float(levels.float().mean())
    return f"largest {largest}, mean {total / len(contents):.5f} grey levels"


def measure(title: str, index: ShardIndex, rounds: int) -> None:
    """One kind of photos."""
    samples = [index[row] for row in range(min(len(index), MOST_PHOTOS) // BATCH * BATCH)]
    contents = [sample.read(sample.image_field or "") for sample in samples]
    size = sum(map(len, contents)) / len(contents) / 1000
    print(f"{title}: {len(contents)} photos of {size:.0f} kB")

    def open_clip_s(content: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(content)) as image:
            return TRANSFORM(image)

    readers: dict[str, Callable[[bytes], object]] = {
        "open_clip's preprocessing": open_clip_s,
        "exact": EXACT.read,
        "fast": FAST.read,
        "draft": DRAFT.read,
    }
    ways = {
        name: lambda read=read: [read(content) for content in contents]
        for name, read in readers.items()
    }
    show(in_turns(ways, rounds), len(contents))
    print(f"  fast:  {distance(contents, FAST)}\n  draft: {distance(contents, DRAFT)}")
    chosen = index.select(np.arange(len(contents)))
    for name, pixels in (("exact", EXACT), ("fast", FAST)):
        stream = ImageStream(
            chosen, pixels, batch_size=BATCH, seed=0, length=len(contents) // BATCH
        )
        times = in_turns(
            {
                f"{name}, plain loop over bytes in memory": lambda pixels=pixels: [
                    pixels.read(content) for content in contents
                ],
                f"{name}, ImageStream": lambda stream=stream: list(stream),
            },
            rounds,
        )
        show(times, len(contents))


def main() -> None:
    """Print rates, ratios and distances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", help="photos of your own, as data.shards names them")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        measure("500 x 375", write_shard(Path(name), 500, 375, 128), arguments.rounds)
        measure("2000 x 1500", write_shard(Path(name), 2000, 1500, 32), arguments.rounds)
    if arguments.shards:
        index = build_index(find_shards(arguments.shards), cache=None)
        measure(arguments.shards, select_usable(index, (), 1.0)[0], arguments.rounds)


if __name__ == "__main__":
    main()
