"""What caching activations costs over the bare CLIP forward, and three sites over one.

    python benchmarks/caching.py [--images 256] [--rounds 3] [--model ViT-B-32]

Random weights, float32, the default number of threads; the same pictures, decoded beforehand, in
batches of 32. Both normalise them on the model's device; caching collates, encodes, checks, mixes
and writes float16 through the path that every job takes. They take turns; the medians, and the
medians of the ratios within a turn, are the result. "without the forward" is the same path with
activations that are there already: what is left when the model costs nothing.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from webdataset.writer import TarWriter

from clipattr.clip import Site, Tower, image_tower
from clipattr.data import ShardIndex, SiteRows, build_index, cache_activations
from clipattr.data.pixels import Pixels

BATCH, SIDE = 32, 224
ONE = {"cls": (Site(-1), None)}
THREE = {
    "cls": (Site(-1), None),
    "patches": (Site(8, "residual", "spatial"), None),
    "drawn": (Site(5, "residual", "all"), 8),
}


class Decoded(Pixels):
    """Pictures that lie in memory: a file is the number of one."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(Compose([ToTensor(), Normalize([0.5] * 3, [0.25] * 3)]))
        self.images = images

    def read(self, content: bytes, edit: object = None) -> Tensor:
        """The pixels of a picture."""
        return self.images[int.from_bytes(content, "little")]


def index_of(n_images: int, folder: Path) -> ShardIndex:
    """A shard of numbers."""
    path = folder / "numbers.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for number in range(n_images):
            writer.write({"__key__": f"{number:08d}", "jpg": number.to_bytes(4, "little")})
    return build_index([path], cache=None)


def rows_of(tower: Tower, sites: Mapping[str, tuple[Site, int | None]]) -> dict[str, SiteRows]:
    """What is stored at each site."""
    return {
        name: SiteRows(
            {"site": site.to_json()},
            tower.cut(site).d_site,
            tower.count_tokens(site.tokens),
            drawn,
        )
        for name, (site, drawn) in sites.items()
    }


class Benchmark:
    """One model, its pictures, and the ways to run it over them."""

    def __init__(self, name: str, n_images: int, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (n_images, 3, SIDE, SIDE)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.pixels = Decoded(self.images)
        self.index = index_of(n_images, folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logging.disable(logging.WARNING)  # random weights are wanted
        self.model = open_clip.create_model(name).eval().to(device)
        self.device = device
        self.tower = image_tower(self.model)
        self.folder = folder

    @torch.no_grad()
    def bare(self) -> None:
        """The model's own forward on every picture; the embeddings come back."""
        embeddings = [
            self.model.encode_image(self.pixels.normalise(batch.to(self.device)))
            for batch in self.images.split(BATCH)
        ]
        torch.cat(embeddings).cpu()

    def cache(self, sites: Mapping[str, tuple[Site, int | None]]) -> None:
        """The same pictures, written to new stores."""

        def encode(images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
            found = self.tower.capture(images, [sites[name][0] for name in names])
            return {name: found[sites[name][0]] for name in names}

        self._write(sites, encode)

    def machinery(self, sites: Mapping[str, tuple[Site, int | None]]) -> Callable[[], None]:
        """As `cache`, with activations that are there already."""
        rows = rows_of(self.tower, sites)
        ready = {
            name: torch.randn(
                BATCH, *([each.tokens] if sites[name][0].tokens != "cls" else []), each.width
            ).to(self.device)
            for name, each in rows.items()
        }

        def encode(images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
            return {name: ready[name][: len(images)] for name in names}

        return lambda: self._write(sites, encode)

    def _write(
        self,
        sites: Mapping[str, tuple[Site, int | None]],
        encode: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]],
    ) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            cache_activations(
                self.index,
                encode,
                self.pixels,
                sites=rows_of(self.tower, sites),
                dtype="float16",
                folder=Path(folder),
                batch_size=BATCH,
                workers=0,
                max_bad_fraction=0.0,
                device=self.device,
                progress=False,
            )


def seconds(run: Callable[[], None]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print seconds per 1000 images and the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options.model, options.images, Path(folder))
        runs: dict[str, Callable[[], None]] = {
            "bare forward": benchmark.bare,
            "caching, one site": lambda: benchmark.cache(ONE),
            "caching, three sites": lambda: benchmark.cache(THREE),
            "one site without the forward": benchmark.machinery(ONE),
            "three sites without the forward": benchmark.machinery(THREE),
        }
        benchmark.bare()  # what is allocated once is not counted
        turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(options.rounds)]
    print(f"{options.model}, {options.images} images, {torch.get_num_threads()} threads")
    for name in runs:
        took = statistics.median(turn[name] for turn in turns)
        ratio = statistics.median(turn[name] / turn["bare forward"] for turn in turns)
        rate = options.images / took
        print(f"{name:32} {rate:10.1f} images/s, {ratio:6.3f} of the bare forward")


if __name__ == "__main__":
    main()
