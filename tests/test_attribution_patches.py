"""Reads of the class token divided among tokens: complete, and equal to loops and removals."""

from functools import partial

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.attribution import attribute_reads
from clipattr.attribution.gradients import path_points

BATCH, LAYERS, TOKENS, WIDTH, PAIRS = 3, 2, 5, 4, 6
IMAGES = torch.tensor([0, 2, 2, 1, 0, 2])


def draw(*shape: int, seed: int) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


READS = draw(BATCH, LAYERS, TOKENS, WIDTH, seed=0)
WEIGHTS = draw(PAIRS, LAYERS, WIDTH, seed=1)


def linear(totals: Tensor, pairs: Tensor) -> Tensor:
    return (totals * WEIGHTS[pairs].to(totals)).sum(dim=(1, 2)) + pairs + 0.5


def curved(totals: Tensor, pairs: Tensor) -> Tensor:
    return linear(totals, pairs) + linear(totals, pairs) ** 3 / 20 + totals[:, 0].tanh().sum(dim=1)


def test_of_a_linear_value_each_part_is_what_removal_takes_away():
    """And one point is enough."""
    found = attribute_reads(linear, READS, IMAGES, n_points=1)
    for pair, image in enumerate(IMAGES.tolist()):
        for token in range(TOKENS):
            without = READS[image].clone()
            without[:, token] = 0
            number = torch.tensor([pair])
            removed = linear(READS[[image]].sum(2), number) - linear(without.sum(1)[None], number)
            assert float(found.per_token[pair, token]) == pytest.approx(float(removed), abs=1e-5)
    expected = torch.arange(PAIRS) + 0.5
    assert found.nothing.tolist() == pytest.approx(expected.tolist())


def test_equals_a_loop_over_points_and_pairs():
    found = attribute_reads(curved, READS, IMAGES, n_points=7)
    for pair, image in enumerate(IMAGES.tolist()):
        reads = READS[image].float()
        expected = torch.zeros(TOKENS)
        for alpha, weight in path_points(7):
            leaf = (alpha * reads).requires_grad_()
            value = curved(leaf.sum(dim=1)[None], torch.tensor([pair]))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            expected += weight * (gradient * reads).sum(dim=(0, 2))
        torch.testing.assert_close(found.per_token[pair], expected, rtol=1e-4, atol=1e-5)


def test_complete():
    found = attribute_reads(curved, READS, IMAGES)
    change = found.everything - found.nothing
    torch.testing.assert_close(found.per_token.sum(dim=1), change, rtol=1e-4, atol=1e-4)
    few = attribute_reads(curved, READS, IMAGES, n_points=1)
    assert (few.per_token.sum(dim=1) - change).abs().max() > 1e-2


@pytest.mark.parametrize("planted", [0, 3])
def test_a_planted_token_has_it_all(planted: int):
    """The value looks at a direction in which one token alone has written."""
    reads = READS.clone()
    reads[..., 0] = 0
    reads[:, :, planted, 0] = 2.0

    def value(totals: Tensor, pairs: Tensor) -> Tensor:
        return (totals[:, :, 0].sum(dim=1) - 1).relu()

    found = attribute_reads(value, reads, IMAGES)
    is_other = torch.arange(TOKENS) != planted
    assert not found.per_token[:, is_other].any()
    assert found.per_token[:, planted].tolist() == pytest.approx([3.0] * PAIRS, rel=0.05)


def test_no_pairs_and_no_gradient_left_behind():
    weights = WEIGHTS.clone().requires_grad_()

    def value(totals: Tensor, pairs: Tensor) -> Tensor:
        return (totals * weights[pairs].to(totals)).sum(dim=(1, 2))

    run = partial(attribute_reads, value, READS)
    assert run(IMAGES[:0]).per_token.shape == (0, TOKENS)
    found = run(IMAGES)
    assert weights.grad is None
    assert not found.per_token.requires_grad
    assert not found.everything.requires_grad
