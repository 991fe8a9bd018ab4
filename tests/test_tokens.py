"""Several sites in one pass, and which tokens of an image are kept."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from clipattr.data import ActivationStore, ShardIndex, SiteRows, cache_activations
from clipattr.data.draw import draw_tokens
from tests.test_data_features import PIXELS, WEIGHT, array_of, index_of, png_of, write_shard

N_TOKENS, WIDTH = 9, 5
KEYS = [f"folder/{number}" for number in range(6000)]


def splitmix64(state: int) -> int:
    """In whole numbers, step by step."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_draw_equals_a_plain_loop():
    """Values that must never change: caches are named by the number of drawn tokens alone."""
    keys = ["a", "folder/b", "\udce4"]
    for row, key in zip(draw_tokens(keys, 50, 7).tolist(), keys, strict=True):
        digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        start = int.from_bytes(digest, "little")
        hashes = [
            splitmix64((start + (token + 1) * 0x9E3779B97F4A7C15) % 2**64) for token in range(50)
        ]
        assert row == sorted(sorted(range(50), key=hashes.__getitem__)[:7])
    assert draw_tokens(["a"], 50, 4).tolist() == [[6, 14, 22, 49]]


@pytest.mark.parametrize("n_drawn", [1, 4, 8])
def test_every_token_is_drawn_equally_often(n_drawn: int):
    drawn = draw_tokens(KEYS, N_TOKENS, n_drawn)
    assert all(len(set(row)) == n_drawn for row in drawn.tolist())
    assert chisquare(drawn.flatten().bincount(minlength=N_TOKENS).numpy()).pvalue > 0.01
    # Neighbours in the source are independent of each other.
    is_drawn = torch.zeros(len(KEYS), N_TOKENS).scatter_(1, drawn, 1.0)
    is_both = is_drawn[:-1] * is_drawn[1:]
    spread = np.sqrt((n_drawn / N_TOKENS) ** 2 / is_both.numel())
    assert abs(is_both.mean() - (n_drawn / N_TOKENS) ** 2) < 4 * spread


def test_draw_of_all_is_all_and_draws_are_nested():
    assert draw_tokens(KEYS[:3], 5, 5).tolist() == [[0, 1, 2, 3, 4]] * 3
    for few, many in zip(draw_tokens(KEYS, 9, 2), draw_tokens(KEYS, 9, 6), strict=True):
        assert set(few.tolist()) < set(many.tolist())


class Tower:
    """Token t of an image is its projection plus t; says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        self.asked.append((len(images), tuple(names)))
        cls = images.flatten(1) @ WEIGHT
        patches = cls[:, None] + torch.arange(N_TOKENS)[:, None]
        return {"cls": cls, "all": patches, "some": patches, "other": -patches}

    @property
    def n_images(self) -> int:
        return sum(n_images for n_images, _ in self.asked)


SITES = {
    "cls": SiteRows({"weights": "w", "site": "cls"}, WIDTH),
    "all": SiteRows({"weights": "w", "site": "all"}, WIDTH, N_TOKENS),
    "some": SiteRows({"weights": "w", "site": "all"}, WIDTH, N_TOKENS, drawn=3),
    "other": SiteRows({"weights": "w", "site": "other"}, WIDTH, N_TOKENS, drawn=N_TOKENS),
}


def cache(
    index: ShardIndex,
    tower: Tower,
    folder: Path,
    *names: str,
    batch_size: int = 4,
    dtype: str = "float32",
    max_bad_fraction: float = 0.0,
) -> dict[str, ActivationStore]:
    return cache_activations(
        index,
        tower,
        PIXELS,
        sites={name: SITES[name] for name in names},
        dtype=dtype,
        folder=folder,
        batch_size=batch_size,
        workers=0,
        max_bad_fraction=max_bad_fraction,
        progress=False,
    )


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return index_of(write_shard(tmp_path / "a.tar", {f"{n}": png_of(n) for n in range(10)}))


def expected(number: int) -> Tensor:
    """Oracle: numpy in float64, all tokens of an image."""
    pixels = array_of(number).transpose(2, 0, 1).reshape(-1) / 255
    return torch.from_numpy(pixels @ WEIGHT.double().numpy()) + torch.arange(N_TOKENS)[:, None]


def contents(store: ActivationStore) -> dict[tuple[str, int], Tensor]:
    owners, tokens = store.load("images").tolist(), store.load("tokens").tolist()
    rows = store.load("x").double()
    found = {
        (store.keys[image], token): x for image, token, x in zip(owners, tokens, rows, strict=True)
    }
    assert len(found) == store.n_rows
    return found


def test_one_pass_for_all_sites_that_are_missing(index: ShardIndex, tmp_path: Path):
    tower, folder = Tower(), tmp_path / "cache"
    cache(index, tower, folder, "all")
    assert set(tower.asked) == {(4, ("all",)), (2, ("all",))}
    stores = cache(index, tower, folder, "cls", "all", "some")
    assert tower.n_images == 20
    assert {names for _, names in tower.asked[3:]} == {("cls", "some")}
    again = cache(index, tower, folder, "some", "cls", "all")
    assert tower.n_images == 20
    assert {name: store.folder for name, store in again.items()} == {
        name: store.folder for name, store in stores.items()
    }
    assert {name: store.n_rows for name, store in stores.items()} == {
        "cls": 10,
        "all": 10 * N_TOKENS,
        "some": 10 * 3,
    }
    for (key, token), x in contents(stores["all"]).items():
        torch.testing.assert_close(x, expected(int(key))[token], atol=1e-5, rtol=0)
    for (key, _), x in contents(stores["cls"]).items():
        torch.testing.assert_close(x, expected(int(key))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["some", "other"])
def test_drawn_rows_are_those_of_their_tokens(index: ShardIndex, tmp_path: Path, name: str):
    store = cache(index, Tower(), tmp_path / "cache", name)[name]
    rows, n_drawn = contents(store), SITES[name].drawn
    assert n_drawn is not None
    keys = [f"{n}" for n in range(10)]
    draws = draw_tokens(keys, N_TOKENS, n_drawn).tolist()
    assert set(rows) == {
        (key, token) for key, row in zip(keys, draws, strict=True) for token in row
    }
    sign = -1 if name == "other" else 1
    for (key, token), x in rows.items():
        torch.testing.assert_close(sign * x, expected(int(key))[token], atol=1e-5, rtol=0)


def test_an_image_has_the_same_tokens_in_any_company(index: ShardIndex, tmp_path: Path):
    """Other batches, other images, another order, and a broken neighbour."""
    images = {f"{n}": png_of(n) for n in (7, 2, 4)} | {"broken": b""}
    few = index_of(write_shard(tmp_path / "b.tar", images))
    whole = contents(cache(index, Tower(), tmp_path / "1", "some")["some"])
    single = contents(cache(index, Tower(), tmp_path / "2", "some", batch_size=1)["some"])
    store = cache(few, Tower(), tmp_path / "3", "some", max_bad_fraction=0.5)["some"]
    assert set(single) == set(whole)
    assert set(contents(store)) == {place for place in whole if place[0] in ("7", "2", "4")}
    assert [bad.key for bad in store.bad] == ["broken"]


def test_the_number_of_drawn_tokens_is_part_of_the_fingerprint(index: ShardIndex, tmp_path: Path):
    stores = cache(index, Tower(), tmp_path / "cache", "all", "some")
    assert "tokens_per_image" not in stores["all"].fingerprint
    assert stores["some"].fingerprint == stores["all"].fingerprint | {"tokens_per_image": 3}


def test_half_precision_is_rounded_once(index: ShardIndex, tmp_path: Path):
    exact = contents(cache(index, Tower(), tmp_path / "1", "some")["some"])
    half = contents(cache(index, Tower(), tmp_path / "2", "some", dtype="float16")["some"])
    for place, x in exact.items():
        assert torch.equal(half[place], x.half().double())
