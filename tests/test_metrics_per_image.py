import pytest
import torch

from clipattr.errors import DataError
from clipattr.metrics.per_image import PerImage


def make_metric() -> PerImage:
    return PerImage(["deletion", "insertion"])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randperm(11, generator=torch.Generator().manual_seed(0)) + 2**40


@pytest.fixture
def columns() -> torch.Tensor:
    return torch.randn(11, 2, generator=torch.Generator().manual_seed(1))


def test_rows_come_back_sorted_in_float64(ids: torch.Tensor, columns: torch.Tensor):
    metric = make_metric()
    for rows in torch.arange(11).split(4):
        metric.update(ids[rows], columns[rows])
    result = metric.compute()
    expected = sorted(zip(ids.tolist(), columns.double().tolist(), strict=True))
    assert result.ids.tolist() == [identity for identity, _ in expected]
    assert result.values.tolist() == [row for _, row in expected]
    assert result.values.dtype == torch.float64
    assert result.ids.dtype == torch.int64


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_merged_with_a_process_without_rows(ids: torch.Tensor, columns: torch.Tensor):
    whole, merged, empty, part = (make_metric() for _ in range(4))
    whole.update(ids, columns)
    merged.update(ids[:3], columns[:3])
    part.update(ids[3:], columns[3:])
    merged.merge_state(empty)
    merged.merge_state(part)
    assert torch.equal(merged.compute().ids, whole.compute().ids)
    assert torch.equal(merged.compute().values, whole.compute().values)
    nothing = empty.compute()
    assert nothing.ids.shape == (0,)
    assert nothing.values.shape == (0, 2)


def test_an_image_given_twice_is_refused(ids: torch.Tensor, columns: torch.Tensor):
    metric = make_metric()
    metric.update(ids, columns)
    metric.update(ids[:1], columns[:1])
    with pytest.raises(DataError, match=f"1 images were given more than once.*id {ids[0]}"):
        metric.compute()


def test_wrong_columns(ids: torch.Tensor, columns: torch.Tensor):
    with pytest.raises(ValueError, match=r"1 columns given, expected 2: \['deletion', 'insertion'"):
        make_metric().update(ids, columns[:, :1])
    with pytest.raises(ValueError, match="differ"):
        PerImage(["same", "same"])
