"""Sparse products and their gradients, against dense float64 autograd."""

import pytest
import torch
from torch import Tensor

from clipattr.codes import SparseCodes, combine_transposed
from clipattr.sae.kernels import choose, pre_activations

N_ROWS, WIDTH, N_LATENTS, K = 7, 5, 40, 3


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def case(n_rows: int = N_ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, biases, and chosen latents of which some are chosen by several rows."""
    x, weights, bias = normal(n_rows, WIDTH, seed=0), normal(N_LATENTS, WIDTH, seed=1), None
    bias = normal(N_LATENTS, seed=2)
    indices = normal(n_rows, 8, seed=3).topk(K, dim=1).indices * 4
    return x, weights, bias, indices


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a loss that weighs every number of the output differently."""
    loss = (output * normal(*output.shape, seed=9)).square().sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("n_rows", [N_ROWS, 1])
def test_choose_has_the_gradient_of_the_dense_product(n_rows: int):
    x, weights, bias, indices = case(n_rows)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weights, bias)]
    dense = (inputs[0] @ inputs[1].T + inputs[2]).gather(1, indices)
    pre = pre_activations(*inputs)
    assert not pre.requires_grad
    chosen = choose(pre, indices, *inputs)
    torch.testing.assert_close(chosen, dense, rtol=1e-13, atol=1e-13)
    for found, wanted in zip(gradients(chosen, *inputs), gradients(dense, *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_rows", [N_ROWS, 1])
def test_decode_has_the_gradient_of_the_dense_product(n_rows: int):
    _, weights, _, indices = case(n_rows)
    values = normal(n_rows, K, seed=4).requires_grad_()
    weights.requires_grad_()
    codes = SparseCodes(indices, values, N_LATENTS)
    dense = codes.to_dense() @ weights
    found = codes.decode(weights)
    torch.testing.assert_close(found, dense, rtol=1e-13, atol=1e-13)
    inputs = (values, weights)
    for ours, theirs in zip(gradients(found, *inputs), gradients(dense, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    x, weights, bias, indices = case()
    weights.requires_grad_()
    chosen = choose(pre_activations(x, weights, bias), indices, x, weights, bias)
    (found,) = gradients(chosen, weights)
    assert found.shape == weights.shape
    codes = SparseCodes(indices, normal(N_ROWS, K, seed=4), N_LATENTS)
    assert codes.decode(weights.detach()).requires_grad is False


def test_a_second_derivative_is_refused_and_not_wrong():
    _, weights, _, indices = case()
    values = normal(N_ROWS, K, seed=4).requires_grad_()
    output = SparseCodes(indices, values, N_LATENTS).decode(weights).square().sum()
    (first,) = torch.autograd.grad(output, values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_latent_that_a_row_chooses_twice_counts_twice():
    indices = torch.tensor([[2, 2], [0, 2]])
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=torch.float64)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for row in range(2):
        for place in range(2):
            expected[indices[row, place]] += values[row, place] * rows[row]
    assert torch.equal(combine_transposed(values, indices, rows, 4), expected)
