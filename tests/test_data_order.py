from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipattr.data.order import rows_of_step

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def batched(draw: st.DrawFn) -> tuple[int, int]:
    """Row count and batch size, at least one whole batch."""
    n_rows = draw(st.integers(1, 60))
    return n_rows, draw(st.integers(1, n_rows))


@given(batched(), SEEDS, st.integers(0, 5))
def test_epoch_covers_each_row_at_most_once(sizes: tuple[int, int], seed: int, epoch: int):
    n_rows, batch_size = sizes
    per_epoch = n_rows // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    rows = list(
        chain.from_iterable(rows_of_step(n_rows, batch_size, seed, t).tolist() for t in steps)
    )
    assert len(rows) == len(set(rows)) == n_rows - n_rows % batch_size
    assert set(rows) <= set(range(n_rows))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 30), SEEDS, st.integers(0, 50))
def test_ranks_share_the_batch_of_one_device(
    world_size: int, share: int, n_extra: int, seed: int, step: int
):
    batch_size = world_size * share
    n_rows = batch_size + n_extra
    parts = [
        rows_of_step(n_rows, batch_size, seed, step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [len(part) for part in parts] == [share] * world_size
    assert torch.equal(torch.cat(parts), rows_of_step(n_rows, batch_size, seed, step))


@given(batched(), SEEDS, st.lists(st.integers(0, 40), min_size=2, max_size=8))
def test_rows_depend_on_the_step_alone(sizes: tuple[int, int], seed: int, steps: list[int]):
    """In whatever order steps are asked for, and whatever a caller does to its batch."""
    expected = {step: rows_of_step(*sizes, seed, step).tolist() for step in sorted(set(steps))}
    for step in steps:
        rows = rows_of_step(*sizes, seed, step)
        assert rows.tolist() == expected[step]
        rows.zero_()


@pytest.mark.parametrize("step", [0, 3, 4, 11])
def test_rows_are_slices_of_numpy_s_permutation(step: int):
    """19 rows in batches of 4: four steps per epoch, three rows left over."""
    epoch, position = divmod(step, 4)
    generator = np.random.Generator(np.random.Philox(key=[7, epoch]))
    expected = generator.permutation(19)[4 * position : 4 * position + 4]
    rows = rows_of_step(19, 4, 7, step)
    assert rows.dtype == torch.int64
    assert rows.tolist() == expected.tolist()


def test_epochs_and_seeds_differ_and_no_row_is_left_out_for_good():
    def epoch_of(number: int, seed: int) -> list[int]:
        steps = range(3 * number, 3 * number + 3)
        return [row for t in steps for row in rows_of_step(31, 10, seed, t).tolist()]

    assert epoch_of(0, 0) != epoch_of(1, 0)
    assert epoch_of(0, 0) != epoch_of(0, 1)
    left_over = [set(range(31)) - set(epoch_of(number, 0)) for number in range(8)]
    assert all(len(rows) == 1 for rows in left_over)
    assert len(set.union(*left_over)) > 1


def test_rows_are_shuffled_evenly():
    """Each row comes first about equally often: 600 epochs of 6 rows, four standard deviations."""
    first = torch.cat([rows_of_step(6, 6, 0, epoch)[:1] for epoch in range(600)])
    counts = torch.bincount(first, minlength=6)
    assert (counts - 100).abs().max() <= 4 * np.sqrt(600 * (1 / 6) * (5 / 6))
