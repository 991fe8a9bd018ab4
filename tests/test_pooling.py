"""Activations of images made of those at their tokens, against dense codes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipattr.codes import Pool, SparseCodes, pool_tokens

N_LATENTS, N_ACTIVE = 9, 4
LAST = N_LATENTS - 1
DENSE: dict[Pool, Callable[[Tensor], Tensor]] = {
    "max": lambda dense: dense.amax(dim=1),
    "mean": lambda dense: dense.mean(dim=1),
    "sum": lambda dense: dense.sum(dim=1),
}


def draw_codes(*rows: int, is_signed: bool = False) -> SparseCodes:
    """Codes with padding, whose last latent is below zero everywhere if they are signed."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(*rows, N_LATENTS, generator=generator, dtype=torch.float64)
    if is_signed:
        weights[..., LAST] += 1
    indices = weights.topk(N_ACTIVE, dim=-1).indices
    values = torch.rand(indices.shape, generator=generator, dtype=torch.float64)
    if is_signed:
        values = torch.where(indices == LAST, -values, values - 0.5)
    is_padding = (torch.rand(values.shape, generator=generator) < 0.3) & (indices != LAST)
    return SparseCodes(indices, values.masked_fill(is_padding, 0), N_LATENTS)


@pytest.mark.parametrize("pool", list(DENSE))
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("site", [(1,), (6,), (2, 3)])
def test_equals_dense_codes(pool: Pool, is_signed: bool, site: tuple[int, ...]):
    codes = draw_codes(7, *site, is_signed=is_signed)
    pooled = pool_tokens(codes, pool)
    assert pooled.indices.ndim == 2
    assert pooled.indices.shape[1] <= N_LATENTS
    expected = DENSE[pool](codes.to_dense().flatten(1, -2))
    torch.testing.assert_close(pooled.to_dense(), expected)
    if is_signed and pool == "max":
        assert expected[:, LAST].lt(0).all()


def test_what_padding_names_changes_nothing():
    codes = draw_codes(4, 6)
    other = codes.indices.masked_fill(~codes.is_active, 3)
    for pool in DENSE:
        pooled = pool_tokens(codes._replace(indices=other), pool)
        torch.testing.assert_close(pooled.to_dense(), pool_tokens(codes, pool).to_dense())


def test_one_token_needs_no_pooling():
    codes = draw_codes(5)
    assert pool_tokens(codes, "mean") is codes


def test_silent_images_and_no_images():
    codes = draw_codes(3, 6)
    silent = pool_tokens(codes._replace(values=codes.values * 0), "max")
    assert silent.is_active.logical_not().all()
    assert pool_tokens(codes.select(torch.arange(0)), "sum").indices.shape == (0, 1)


def test_half_precision_is_summed_in_single():
    """A thousand tokens of 1 + 1/128: in bfloat16 the sum would stop at 256."""
    values = torch.full((1, 1000, 1), 1 + 1 / 128, dtype=torch.bfloat16)
    codes = SparseCodes(torch.zeros(1, 1000, 1, dtype=torch.int64), values, N_LATENTS)
    assert float(pool_tokens(codes, "sum").values) == pytest.approx(1000 * (1 + 1 / 128))
