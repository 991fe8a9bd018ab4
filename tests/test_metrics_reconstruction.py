import pytest
import torch
from sklearn.metrics import explained_variance_score, r2_score
from torch.nn import functional

from clipattr.codes import SparseCodes
from clipattr.metrics.reconstruction import Reconstruction, merge_moments, moments

D_MODEL, N_LATENTS = 5, 10


def make_rows(n_rows: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, SparseCodes]:
    """Rows, reconstructions with some error, and codes over latents 0-7 with padded slots."""
    generator = torch.Generator().manual_seed(n_rows)
    x = offset + torch.randn(n_rows, D_MODEL, generator=generator, dtype=torch.float64)
    recon = x + 0.3 * torch.randn(n_rows, D_MODEL, generator=generator, dtype=torch.float64)
    indices = torch.rand(n_rows, 8, generator=generator).topk(3, dim=1).indices
    values = (torch.rand(n_rows, 3, generator=generator) - 0.3).relu()
    indices[values == 0] = 9  # what padding names has no meaning
    return x, recon, SparseCodes(indices, values, N_LATENTS)


def make_metric() -> Reconstruction:
    return Reconstruction(d_model=D_MODEL, n_latents=N_LATENTS)


def update_in_batches(
    metric: Reconstruction, x: torch.Tensor, recon: torch.Tensor, codes: SparseCodes, size: int
) -> None:
    for rows in torch.arange(len(x)).split(size):
        metric.update(x[rows], recon[rows], codes.select(rows))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_fvu_equals_sklearn_at_any_mean(offset: float):
    x, recon, codes = make_rows(101, offset)
    metric = make_metric()
    update_in_batches(metric, x, recon, codes, size=8)
    result = metric.compute()
    expected = r2_score(x - offset, recon - offset, multioutput="variance_weighted")
    assert result.explained_variance.item() == pytest.approx(expected, rel=1e-6)
    assert (result.fvu + result.explained_variance).item() == pytest.approx(1.0)


def test_a_constant_error_counts():
    # sklearn's explained variance forgives a bias, the FVU must not.
    x, _, codes = make_rows(50)
    metric = make_metric()
    metric.update(x, x + 2, codes)
    assert explained_variance_score(x, x + 2) == pytest.approx(1.0)
    assert metric.compute().fvu > 1


def test_mean_predictor_and_identity():
    x, _, codes = make_rows(64, offset=50.0)
    for recon, expected in ((x.mean(0).expand_as(x), 1.0), (x, 0.0)):
        metric = make_metric()
        update_in_batches(metric, x, recon, codes, size=7)
        assert metric.compute().fvu.item() == pytest.approx(expected, abs=1e-12)


def test_counts_and_cosine_equal_plain_loop():
    x, recon, codes = make_rows(40)
    metric = make_metric()
    update_in_batches(metric, x, recon, codes, size=9)
    result = metric.compute()
    firings = [0] * N_LATENTS
    for row in range(40):
        for slot in range(3):
            if codes.values[row, slot] > 0:
                firings[int(codes.indices[row, slot])] += 1
    assert result.firing_counts.tolist() == firings
    assert result.firing_counts.dtype == torch.int64
    assert result.l0.item() == pytest.approx(sum(firings) / 40)
    assert result.dead_fraction.item() == pytest.approx(2 / 10)
    assert result.n_rows.item() == 40
    cosines = [functional.cosine_similarity(x[i], recon[i], dim=0).item() for i in range(40)]
    assert result.cosine.item() == pytest.approx(sum(cosines) / 40)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_merged_processes_equal_one():
    x, recon, codes = make_rows(60, offset=100.0)
    whole = make_metric()
    whole.update(x, recon, codes)
    parts = [make_metric() for _ in range(3)]  # the last one sees nothing
    for part, rows in zip(parts, torch.arange(60).split(41), strict=False):
        part.update(x[rows], recon[rows], codes.select(rows))
    merged = make_metric()
    for part in parts:
        merged.merge_state(part)
    for found, expected in zip(merged.compute(), whole.compute(), strict=True):
        torch.testing.assert_close(found, expected)
    assert parts[2].compute().fvu.isnan()


def test_merge_moments_of_one_stack():
    # What a gather over processes hands over: all parts at once, one of them empty.
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack = torch.stack([moments(x[:7]), moments(x[:0]), moments(x[7:])])
    torch.testing.assert_close(merge_moments(stack), moments(x))
    assert moments(x)[1].item() == pytest.approx(x.var(0, correction=0).sum().item() * 30)


def test_token_axis():
    x, recon, codes = make_rows(24)
    flat, tokens = make_metric(), make_metric()
    flat.update(x, recon, codes)
    shaped = SparseCodes(codes.indices.reshape(4, 6, 3), codes.values.reshape(4, 6, 3), N_LATENTS)
    tokens.update(x.reshape(4, 6, D_MODEL), recon.reshape(4, 6, D_MODEL), shaped)
    for found, expected in zip(tokens.compute(), flat.compute(), strict=True):
        torch.testing.assert_close(found, expected)
