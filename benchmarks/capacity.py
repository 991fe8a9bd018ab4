"""Capacity on paper: bytes, hours and memory of large stores; the tables of docs/capacity.md.

    python benchmarks/capacity.py

Nothing is measured here. MEASURED numbers come from the other benchmarks, on two cores of a cloud
machine; ASSUMED ones are stated so that they can be replaced.
"""

from collections.abc import Iterable
from typing import NamedTuple

# Measured: benchmarks/data.py (rows of 768 float16 from the page cache, one process), and decoding,
# resizing and cropping of a JPEG of 500 x 375 by open_clip's own preprocessing and by the fast one.
READ_BYTES = 3.9e6 * 768 * 2
EXACT_IMAGES, FAST_IMAGES = 430, 690

# Assumed: peak of an A100 and an H100 in bf16, of which 40 % are reached; machines of 8 GPUs, each
# with 16 cores, a disk of 2 GB/s and 256 GB for the page cache; a dictionary of 32 d latents, k=64.
PEAK = {"A100": 312e12, "H100": 989e12}
REACHED = 0.4
GPUS_PER_MACHINE, CORES_PER_GPU = 8, 16
DISK_BYTES, CACHE_BYTES = 2e9, 256e9
EXPANSION, K = 32, 64

# As the code has them: clipattr.data.writer, .stream, .training.activations.
BLOCK_ROWS, WINDOW_ROWS, AHEAD, CHUNK_ROWS = 8192, 65_536, 4, 262_144
KEY_BYTES, FIELDS = 9, 3  # "000012345" with jpg, txt and json
BATCH = 16_384

N_GPUS = (1, 8, 64)
IMAGENET, LARGE = 1_281_167, 400_000_000


class Vit(NamedTuple):
    """An image tower."""

    name: str
    width: int
    layers: int
    patch: int
    size: int = 224

    @property
    def tokens(self) -> int:
        """The patches and the class token."""
        return (self.size // self.patch) ** 2 + 1

    @property
    def flops(self) -> float:
        """Of one image: 24 n d^2 + 4 n^2 d in each layer, and the patches; 2 per multiply-add."""
        n, d = self.tokens, self.width
        return self.layers * (24 * n * d**2 + 4 * n**2 * d) + 6 * self.patch**2 * d * (n - 1)


TOWERS = (Vit("B/32", 768, 12, 32), Vit("B/16", 768, 12, 16), Vit("L/14", 1024, 24, 14))


def sets_of(tower: Vit) -> list[tuple[str, int, int]]:
    """Name, images, rows per image."""
    return [
        ("ImageNet-1k, CLS", IMAGENET, 1),
        ("ImageNet-1k, all tokens", IMAGENET, tower.tokens),
        ("400 M, CLS", LARGE, 1),
        ("400 M, 16 tokens", LARGE, 16),
    ]


def row_bytes(width: int) -> float:
    """float16, image (4), token (2), and a block's three members: a header and half a tar block."""
    return width * 2 + 4 + 2 + 3 * (512 + 128 + 256) / BLOCK_ROWS


def machines(n_gpus: int) -> int:
    """That hold so many GPUs."""
    return -(-n_gpus // GPUS_PER_MACHINE)


def images_per_second(tower: Vit, gpu: str = "A100") -> float:
    """The forward pass of one GPU."""
    return REACHED * PEAK[gpu] / tower.flops


def cache_hours(tower: Vit, n_images: int, n_gpus: int, rows: int) -> float:
    """The slowest of forward pass, decoding and writing."""
    per_second = min(images_per_second(tower), CORES_PER_GPU * FAST_IMAGES) * n_gpus
    written = n_images * rows * row_bytes(tower.width) / (DISK_BYTES * machines(n_gpus))
    return max(n_images / per_second, written) / 3600


def sae_flops(width: int) -> float:
    """Of one row: 2 d n in the encoder and 2 d k in the decoder; three times with the gradients."""
    return 3 * (2 * width * EXPANSION * width + 2 * width * K)


def read_seconds(width: int, n_rows: int, n_gpus: int) -> float:
    """From memory when the machines' page caches hold the store, else from their disks."""
    x, kept = n_rows * width * 2, CACHE_BYTES * machines(n_gpus)
    from_memory = x / (READ_BYTES * n_gpus)
    return from_memory if x < kept else max(from_memory, x / (DISK_BYTES * machines(n_gpus)))


def sae_seconds(width: int, n_rows: int, n_gpus: int) -> float:
    """Of an epoch, were the rows there."""
    return n_rows * sae_flops(width) / (REACHED * PEAK["A100"] * n_gpus)


def index_bytes(n_images: int) -> int:
    """Of the image shards' index in each process: key, shard, and offset and size of each field."""
    return n_images * (KEY_BYTES + 4 + 16 * FIELDS)


def name_bytes(n_images: int) -> int:
    """Of the names as Python has them while a store is written: string, place in a list, order."""
    return n_images * (49 + KEY_BYTES + 8 + 8)


def window_bytes(width: int, n_gpus: int) -> float:
    """Of a training process: its share of the window, and the batches read ahead."""
    return (WINDOW_ROWS + (AHEAD + 1) * BATCH) / n_gpus * width * 2


def chunk_bytes(width: int) -> float:
    """Of a writing process: the file that is filled and the one on its way to the disk."""
    return 2 * CHUNK_ROWS * row_bytes(width)


def size_of(n_bytes: float) -> str:
    """With three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}" if n_bytes < 1000 else f"{n_bytes:.0f} {unit}"


def hours_of(hours: float) -> str:
    """Seconds, minutes or hours."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.3g} h"


def count_of(number: float) -> str:
    """In millions."""
    return f"{number / 1e6:,.3g} M" if number < 1e9 else f"{number / 1e6:,.0f} M"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """In markdown."""
    head = list(head)
    rows = [head, ["---"] * len(head), *map(list, lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def store_table() -> str:
    """What lies on the disk, and what it takes to write it."""
    lines = []
    for tower in TOWERS:
        for name, n_images, rows in sets_of(tower):
            n_rows = n_images * rows
            hours = [hours_of(cache_hours(tower, n_images, n, rows)) for n in N_GPUS]
            size = size_of(n_rows * row_bytes(tower.width))
            lines.append([tower.name, name, count_of(n_rows), size, *hours])
    head = ["tower", "set", "rows", "store", *(f"cached by {n}" for n in N_GPUS)]
    return table(head, lines)


def tower_table() -> str:
    """What the GPUs ask of the cores and of the disk."""
    lines = []
    for tower in TOWERS:
        rates = [images_per_second(tower, gpu) for gpu in PEAK]
        cores = [f"{rate / FAST_IMAGES:.0f} / {rate / EXACT_IMAGES:.0f}" for rate in rates]
        written = [size_of(rates[0] * rows * row_bytes(tower.width)) for rows in (1, tower.tokens)]
        lines.append(
            [
                tower.name,
                f"{tower.flops / 1e9:.1f}",
                *(f"{rate:,.0f}" for rate in rates),
                *cores,
                *(f"{size}/s" for size in written),
            ]
        )
    head = ["tower", "GFLOP per image", *(f"images/s, {gpu}" for gpu in PEAK)]
    head += [f"cores per {gpu}, fast / exact" for gpu in PEAK]
    return table([*head, "CLS written, A100", "all tokens written, A100"], lines)


def training_table() -> str:
    """An epoch of an SAE: the larger of reading and computing, and which it is."""
    lines = []
    for tower in (TOWERS[1], TOWERS[2]):
        for name, n_images, rows in sets_of(tower):
            epochs = []
            for n_gpus in N_GPUS:
                read = read_seconds(tower.width, n_images * rows, n_gpus)
                computed = sae_seconds(tower.width, n_images * rows, n_gpus)
                which = "reading" if read > computed else "SAE"
                epochs.append(f"{hours_of(max(read, computed) / 3600)} ({which})")
            memory = size_of(window_bytes(tower.width, 1))
            lines.append([str(tower.width), name, *epochs, memory, size_of(index_bytes(n_images))])
    head = ["d", "set", *(f"epoch on {n}" for n in N_GPUS), "rows held, 1 process", "index"]
    return table(head, lines)


def tables() -> list[str]:
    """All of them, in the order of the page."""
    return [store_table(), tower_table(), training_table()]


if __name__ == "__main__":
    print("\n".join(tables()))
