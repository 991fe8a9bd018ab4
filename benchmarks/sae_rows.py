"""Rows that SAEs learn from and are measured on, for `sae.py` and `sae_starts.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

DATA_SEED = 12_345
ATOMS, WIDTH, ACTIVE = 512, 64, 8
HELD_OUT = 8192
HELD_OUT_SHARE = 0.1


class Rows(NamedTuple):
    """Settings are chosen on the validation part and reported on the test part."""

    train: Tensor
    validation: Tensor
    test: Tensor
    atoms: Tensor | None  # the truth, where it is known

    @property
    def width(self) -> int:
        """Of a row."""
        return self.train.shape[1]


def synthetic(n_train: int) -> Rows:
    """Sparse sums of planted atoms, every row a new one."""
    train, atoms = planted(n_train, seed=0)
    validation, test = (planted(HELD_OUT, seed=seed)[0] for seed in (1, 2))
    return Rows(train, validation, test, atoms)


def planted(
    n_rows: int, seed: int, n_atoms: int = ATOMS, width: int = WIDTH, n_active: int = ACTIVE
) -> tuple[Tensor, Tensor]:
    """Rows of a few atoms each, with uneven frequencies, a mean and a little noise; the atoms."""
    drawn = torch.Generator().manual_seed(DATA_SEED)
    atoms = normalize(torch.randn(n_atoms, width, generator=drawn), dim=1)
    mean = torch.randn(width, generator=drawn)
    generator = torch.Generator().manual_seed(DATA_SEED + 1 + seed)
    frequency = 1 / torch.arange(1, n_atoms + 1).sqrt()
    chosen = torch.multinomial(frequency.expand(n_rows, -1), n_active, generator=generator)
    sizes = 0.5 + torch.rand(n_rows, n_active, generator=generator)
    noise = 0.02 * torch.randn(n_rows, width, generator=generator)
    return (atoms[chosen] * sizes[..., None]).sum(1) + mean + noise, atoms


def read_rows(path: Path) -> Rows:
    """A file of [row, d], or of [image, token, d], whose images stay together."""
    x = read_tensor(path).float()
    if x.dim() == 2:
        x = x[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(DATA_SEED))
    held_out = round(HELD_OUT_SHARE * len(x))
    validation, test, train = (
        x[part].flatten(0, 1) for part in order.tensor_split((held_out, 2 * held_out))
    )
    return Rows(train, validation, test, None)


def write_rows(shards: str, layer: int, tokens: str, cache: str, out: Path) -> None:
    """The bundled CLIP's tokens of every image, [image, token, d]."""
    from clipattr.config.choices import Tokens
    from clipattr.config.schema import ModelConfig, ReadConfig, SiteConfig
    from clipattr.jobs.model import load_frozen, read_activations
    from clipattr.jobs.shards import find_images

    site = SiteConfig(layer=layer, tokens=Tokens[tokens])
    frozen = load_frozen(ModelConfig(), site, "cpu")
    data = ReadConfig(cache=cache)
    images = find_images(shards, data, progress=False)
    store = read_activations(frozen, images.usable, data, progress=False)
    x = store.read(store.rows_by_image()).unflatten(0, (-1, store.tokens))
    safetensors.torch.save_file({"x": x.contiguous()}, out)
    print(f"{list(x.shape)} from {frozen.cut.site} -> {out}")


def read_tensor(path: Path) -> Tensor:
    """The only tensor of a .safetensors, .npy or .pt file."""
    match path.suffix:
        case ".safetensors":
            (found,) = safetensors.torch.load_file(path).values()
        case ".npy":
            found = torch.from_numpy(np.load(path))
        case _:
            found = torch.load(path, weights_only=True)
    return found


def batches(train: Tensor, steps: int, size: int) -> Iterator[Tensor]:
    """The same for everybody, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        yield train[order[:size]]
        order = order[size:]


@torch.no_grad()
def fvu(rows: Tensor, recon: Tensor) -> float:
    """Against the mean of these rows."""
    rows, recon = rows.double(), recon.double()
    return float((rows - recon).square().sum() / (rows - rows.mean(0)).square().sum())


@torch.no_grad()
def recovered(dictionary: Tensor, atoms: Tensor) -> Tensor:
    """Of each atom the largest |cosine| with a latent."""
    return (atoms @ normalize(dictionary, dim=1).T).abs().amax(1)
