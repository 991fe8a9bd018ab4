"""Images as activations at a site with all that the suffix needs: no image enters CLIP twice."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clipattr.callbacks.base import Batch
from clipattr.clip import Clip, Cut
from clipattr.clip.cut import Rest
from clipattr.config.inputs import DataConfig
from clipattr.data import BadSample, ImageBatch, Ranks, image_loader, load_features
from clipattr.data.pixels import Pixels
from clipattr.jobs.model import FrozenClip, SiteTokens, read_activations
from clipattr.jobs.shards import Images, count_workers


class CachedStates:
    """Rows of the activation cache: enough where one row per image decides the embedding."""

    def __init__(
        self,
        clip: Clip,
        cut: Cut,
        images: Images,
        data: DataConfig,
        *,
        n_mean: int,
        ranks: Ranks = Ranks(),  # noqa: B008  immutable
        progress: bool,
    ) -> None:
        """`n_mean` images, spread over the set, are those of `mean`; `ranks` write together."""
        frozen = FrozenClip(clip, SiteTokens(cut, 1, None))
        store = read_activations(frozen, images.usable, data, ranks=ranks, progress=progress)
        self.bad = images.add_bad(store.bad, data.max_bad_fraction)
        x, rows = load_features(store)
        chosen = spread(len(x), min(n_mean, len(x)))
        self.mean: Float[Tensor, " model"] = x[chosen].double().mean(dim=0)
        self._loader = DataLoader(TensorDataset(x, rows), batch_size=data.batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return ((x, rows, Rest()) for x, rows in self._loader)


class FreshStates:
    """Images that are decoded and go through the prefix; to be iterated once.

    The images of the mean come first, and wait with their states until it is known.
    """

    def __init__(
        self, clip: Clip, cut: Cut, images: Images, data: DataConfig, *, n_mean: int
    ) -> None:
        """Reads the images of `mean`, `n_mean` of them, spread over the set."""
        self._clip, self._cut, self._images, self._data = clip, cut, images, data
        n_images = len(images.usable)
        self._n_mean = min(n_mean, n_images)
        first = spread(n_images, self._n_mean)
        others = np.setdiff1d(np.arange(n_images), first, assume_unique=True)
        self._order = np.concatenate([first, others])
        self._pixels = Pixels(clip.preprocess, data.decode.name)
        self._loader = image_loader(
            images.usable.select(self._order),
            self._pixels,
            batch_size=data.batch_size,
            workers=count_workers(data),
        )
        self._undecodable: list[BadSample] = []
        self._batches = self._run(self._loader)
        self._waiting: deque[Batch] = deque()
        self.mean: Float[Tensor, "*token model"] = self._measure_mean()

    @property
    def bad(self) -> list[BadSample]:
        """What was left out so far."""
        return self._images.add_bad(self._undecodable, self._data.max_bad_fraction)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        while self._waiting:
            yield self._waiting.popleft()
        yield from self._batches

    def _run(self, loader: Iterable[ImageBatch]) -> Iterator[Batch]:
        order = torch.from_numpy(self._order)
        for batch in loader:
            if batch.bad:
                self._undecodable += batch.bad
                self._images.add_bad(self._undecodable, self._data.max_bad_fraction)
            if len(batch.rows):
                yield self._read(batch, order[batch.rows])

    @torch.no_grad()
    def _read(self, batch: ImageBatch, rows: Tensor) -> Batch:
        pixels = self._pixels.normalise(batch.images.to(self._clip.device))
        state = self._cut.prefix(pixels)
        return state.x.float(), rows, state.rest

    def _measure_mean(self) -> Tensor:
        wanted = torch.from_numpy(self._order[: self._n_mean])
        total, n_images = torch.zeros(()), 0
        n_read = 0
        for batch in self._batches:
            self._waiting.append(batch)
            x, rows, _ = batch
            is_wanted = torch.isin(rows, wanted)
            total = total + x[is_wanted.to(x.device)].double().sum(dim=0)
            n_images += int(is_wanted.sum())
            n_read += len(rows)
            if n_read + len(self._undecodable) >= self._n_mean:
                break
        return total / n_images


def spread(n: int, chosen: int) -> np.ndarray:
    """`chosen` of the numbers below n, evenly spaced: shards may be sorted by class."""
    return np.arange(chosen) * n // chosen


class OwnRows:
    """The part of each batch that one of several processes takes: each image once over all."""

    def __init__(self, batches: Iterable[Batch], rank: int, world_size: int) -> None:
        self._batches = batches
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        for x, rows, rest in self._batches:
            chosen = torch.arange(self._rank, len(rows), self._world_size, device=rows.device)
            if len(chosen):
                yield x[chosen], rows[chosen], rest.rows(chosen)
