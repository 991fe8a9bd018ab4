import pytest
import torch

from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.metrics.top_examples import TopExamples

N_ROWS, N_LATENTS, N_ACTIVE, N_EXAMPLES = 90, 12, 4, 5


@pytest.fixture
def codes() -> SparseCodes:
    """Codes with many ties (five different values), padding, and a latent that never fires."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(N_ROWS, N_LATENTS, generator=generator)
    weights[:, 7] = -1  # never active
    weights[3:, 8] = -1  # fires at most three times
    indices = weights.topk(N_ACTIVE, dim=1).indices
    values = torch.randint(0, 6, (N_ROWS, N_ACTIVE), generator=generator) / 3
    indices[values == 0] = 7  # what padding names has no meaning
    return SparseCodes(indices, values, N_LATENTS)


@pytest.fixture
def ids() -> torch.Tensor:
    """Row ids up to the largest one allowed, in no order."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(N_ROWS, generator=generator) * 40_000_000
    ids[0] = 2**32 - 1
    return ids


def plain_best(codes: SparseCodes, ids: torch.Tensor) -> list[list[tuple[float, int]]]:
    """Sorting of the dense codes: value descending, id ascending."""
    dense = codes.to_dense()
    result = []
    for latent in range(N_LATENTS):
        pairs = [(dense[row, latent].item(), int(ids[row])) for row in range(N_ROWS)]
        pairs = sorted((p for p in pairs if p[0] > 0), key=lambda p: (-p[0], p[1]))[:N_EXAMPLES]
        result.append(pairs + [(0.0, -1)] * (N_EXAMPLES - len(pairs)))
    return result


def found_best(metric: TopExamples) -> list[list[tuple[float, int]]]:
    ids, values = metric.compute()
    assert ids.shape == values.shape == (N_LATENTS, N_EXAMPLES)
    return [
        list(zip(v.tolist(), i.tolist(), strict=True)) for v, i in zip(values, ids, strict=True)
    ]


def make_metric() -> TopExamples:
    return TopExamples(n_latents=N_LATENTS, n_examples=N_EXAMPLES)


@pytest.mark.parametrize("batch_size", [1, 7, N_ROWS])
def test_equals_sorted_dense_codes_in_any_order(
    codes: SparseCodes, ids: torch.Tensor, batch_size: int
):
    expected = plain_best(codes, ids)
    assert expected[7] == [(0.0, -1)] * N_EXAMPLES
    for seed in range(3):
        order = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(seed))
        metric = make_metric()
        for rows in order.split(batch_size):
            metric.update(codes.select(rows), ids[rows])
        assert found_best(metric) == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_merged_processes_equal_one(codes: SparseCodes, ids: torch.Tensor):
    merged = make_metric()
    for rows in torch.arange(N_ROWS).split(50):
        part = make_metric()
        part.update(codes.select(rows), ids[rows])
        merged.merge_state(part)
    merged.merge_state(make_metric())  # a process without rows
    assert found_best(merged) == plain_best(codes, ids)


def test_empty_batch_and_silent_batch_change_nothing(codes: SparseCodes, ids: torch.Tensor):
    metric = make_metric()
    metric.update(codes, ids)
    before = found_best(metric)
    metric.update(codes.select(torch.arange(0)), ids[:0])
    metric.update(SparseCodes(codes.indices, codes.values * 0, N_LATENTS), ids)
    assert found_best(metric) == before


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_ids_that_do_not_fit_are_refused(codes: SparseCodes, wrong: int):
    with pytest.raises(DataError, match=r"allowed is \[0, 4294967295\]"):
        make_metric().update(codes.select(torch.arange(2)), torch.tensor([0, wrong]))


def test_reset(codes: SparseCodes, ids: torch.Tensor):
    metric = make_metric()
    metric.update(codes, ids)
    metric.reset()
    metric.update(codes.select(torch.arange(5)), ids[:5])
    fresh = make_metric()
    fresh.update(codes.select(torch.arange(5)), ids[:5])
    assert found_best(metric) == found_best(fresh)
