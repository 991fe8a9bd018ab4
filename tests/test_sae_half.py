"""Half precision chooses, and what is chosen is computed in full: under autocast, on the CPU."""

import pytest
import torch
from torch import Tensor

from clipattr.sae import TopKSae
from clipattr.sae.kernels import choose, pre_activations, top_k

N_ROWS, WIDTH, N_LATENTS, K = 12, 32, 200, 6


def case() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(N_ROWS, WIDTH, generator=generator),
        torch.randn(N_LATENTS, WIDTH, generator=generator).requires_grad_(),
        torch.randn(N_LATENTS, generator=generator).requires_grad_(),
    )


def test_what_was_chosen_in_half_precision_is_exact():
    x, weights, bias = case()
    with torch.autocast("cpu", torch.bfloat16):
        pre = pre_activations(x, weights, bias)
        indices = top_k(pre, K)
        chosen = choose(pre, indices, x, weights, bias)
    assert pre.dtype == torch.bfloat16
    assert chosen.dtype == torch.float32
    exact = (x.double() @ weights.double().T + bias.double()).gather(1, indices)
    torch.testing.assert_close(chosen.double(), exact, rtol=1e-6, atol=1e-6)
    assert (pre.double().gather(1, indices) - exact).abs().max() > 1e-3
    wanted = torch.autograd.grad(exact.square().sum(), (weights, bias))
    found = torch.autograd.grad(chosen.square().sum(), (weights, bias))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_in_full_precision_they_are_the_same_numbers():
    x, weights, bias = case()
    pre = pre_activations(x, weights, bias)
    indices = top_k(pre, K)
    assert torch.equal(choose(pre, indices, x, weights, bias), pre.gather(1, indices))


def test_rows_in_half_precision_stay_so():
    x, weights, bias = (each.detach().bfloat16() for each in case())
    pre = pre_activations(x, weights, bias)
    assert choose(pre, top_k(pre, K), x, weights, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_one_that_is_not(bad: float):
    sae = TopKSae(
        d_model=WIDTH, n_latents=N_LATENTS, k=K, generator=torch.Generator().manual_seed(1)
    )
    x = case()[0]
    x[3, 0] = bad
    for is_half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            recon = sae(x).recon
        assert not recon[3].isfinite().all()
        assert recon[:3].isfinite().all()
