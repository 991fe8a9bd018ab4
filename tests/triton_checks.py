"""Triton's kernels against plain loops in float64. Run by test_triton.py in a process of its own.

On the CPU Triton's interpreter runs them, which has to be chosen before Triton is imported; with
CLIPATTR_CHECK_DEVICE=cuda they are compiled.
"""

import os

import pytest
import torch
from torch import Tensor

from clipattr.codes import SparseCodes, combine_transposed
from clipattr.sae import TopKSae, kernels
from clipattr.sparse import check, choice, triton_bags, triton_topk

DEVICE = torch.device(os.environ.get("CLIPATTR_CHECK_DEVICE", "cpu"))
# Small, so that a long bag is made of few pairs.
CHUNK = 16


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("clipattr.codes", "clipattr.sae.kernels", "clipattr.sparse.choice"):
        monkeypatch.setattr(f"{module}.kernels_for", lambda _: check.TRITON)
    monkeypatch.setattr(triton_bags, "CHUNK", CHUNK)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def assert_largest(pre: Tensor, k: int) -> None:
    """Against a stable sort, which keeps the lower latent first among equals."""
    wanted = pre.cpu().double().sort(dim=1, descending=True, stable=True)
    values, indices = triton_topk.top_k(pre, k)
    assert torch.equal(indices.cpu(), wanted.indices[:, :k])
    assert values.dtype == pre.dtype
    torch.testing.assert_close(
        values.cpu().double(), wanted.values[:, :k], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_rows", "n_latents", "k"),
    [(1, 1, 1), (3, 2, 2), (2, 7, 1), (3, 300, 64), (1, 70, 70), (2, 1025, 5), (1, 5000, 65)],
)
def test_top_k_is_that_of_a_stable_sort(n_rows: int, n_latents: int, k: int, dtype: torch.dtype):
    assert_largest(normal(n_rows, n_latents, seed=n_latents).to(dtype), k)


def awkward_rows() -> dict[str, Tensor]:
    """Of 3000 numbers; those where the largest are in few groups do not fit the list at first."""
    n, inf = 3000, float("inf")
    plain = normal(n, seed=0).float()
    few_groups = torch.zeros(n, device=DEVICE)
    for group in (5, 6, 900):
        few_groups[group::1024] = torch.arange(1.0, 4.0, device=DEVICE)[
            : len(few_groups[group::1024])
        ]
    clustered = plain.clone()
    clustered[torch.arange(n, device=DEVICE) % 1024 < 20] += 10
    return {
        "all equal": torch.ones(n, device=DEVICE),
        "all negative": plain.abs() * -1,
        "few different": plain.round(),
        "largest in few groups": few_groups,
        "many of the largest in few groups": clustered,
        "minus infinity": torch.full((n,), -inf, device=DEVICE),
        "nearly all minus infinity": plain.where(torch.arange(n, device=DEVICE) % 700 == 3, -inf),
        "infinity": plain.where(plain < 3, inf),
        "subnormal": plain * 1e-42,
        "zeros of both signs": torch.where(plain > 0, 0.0, -0.0),
    }


@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("name", awkward_rows())
def test_top_k_of_awkward_rows(name: str, k: int):
    assert_largest(awkward_rows()[name][None], k)


@pytest.mark.parametrize("n_nan", [1, 50])
def test_nan_comes_first(n_nan: int):
    pre = normal(1, 3000, seed=0).float()
    where = torch.arange(n_nan, device=DEVICE) * 59 + 4
    pre[0, where] = -torch.nan
    values, indices = triton_topk.top_k(pre, 8)
    n_first = min(n_nan, 8)
    assert values[0, :n_first].isnan().all()
    assert torch.equal(indices[0, :n_first], where[:n_first])
    assert values[0, n_first:].isfinite().all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 5 GB on a GPU")
def test_rows_that_begin_beyond_two_to_the_31():
    pre = torch.zeros(75_000, 30_000, dtype=torch.bfloat16, device=DEVICE)
    pre[-1] = normal(30_000, seed=0).bfloat16()
    assert pre.numel() > 2**31
    _, indices = triton_topk.top_k(pre, 64)
    assert torch.equal(indices[-1:], triton_topk.top_k(pre[-1:], 64)[1])
    assert_largest(pre[-1:], 64)
    first, many = torch.zeros(1, device=DEVICE, dtype=torch.int64), len(pre) - 1
    index, starts = first + many, torch.tensor([0, 1], device=DEVICE)
    value = torch.ones(1, device=DEVICE)
    found = triton_bags.sum_bags(value, index, starts, pre, None)
    assert torch.equal(found, pre[-1:].float())
    found = triton_bags.dot(found, pre, index, starts, first)
    torch.testing.assert_close(found, pre[-1].float().square().sum()[None])


def bags_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Where they start, and the bag of each pair."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return starts.to(DEVICE), torch.arange(len(lengths)).repeat_interleave(
        torch.tensor(lengths)
    ).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "width"),
    [
        ((3, 0, 1, 9), 1),
        ((0, 0, 8, 16), 5),
        ((17,), 100),
        ((5, 2), 300),
        ((0, CHUNK, 1, CHUNK + 1, 0), 5),
        ((3, 3 * CHUNK + 7, CHUNK - 9), 7),
        ((CHUNK - 1, CHUNK + 1, 2 * CHUNK, 1), 5),
    ],
)
def test_sums_and_products_are_those_of_a_loop(
    lengths: tuple[int, ...], width: int, dtype: torch.dtype
):
    starts, bags = bags_of(*lengths)
    n_pairs, n_places = len(bags), 11
    index = torch.arange(n_pairs, device=DEVICE) * 7 % n_places
    values, left = normal(n_pairs, seed=1), normal(len(lengths), width, seed=2)
    matrix = normal(n_places, width, seed=3).to(dtype)
    total, product = torch.zeros_like(left), torch.zeros_like(values)
    for pair in range(n_pairs):
        row = matrix[index[pair]].double()
        total[bags[pair]] += values[pair] * row
        product[pair] = left[bags[pair]] @ row
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-5}
    )
    values, left = values.to(precision), left.to(precision)
    for given in (None, bags, bags.int()):
        found = triton_bags.sum_bags(values, index, starts, matrix, given)
        assert found.dtype == precision
        torch.testing.assert_close(found.double(), total, **tolerance)
    found = triton_bags.dot(left, matrix, index, starts, bags)
    torch.testing.assert_close(found.double(), product, **tolerance)


def test_no_pairs_and_no_rows():
    starts, bags = bags_of(0, 0)
    nothing, matrix = torch.zeros(0, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    found = triton_bags.sum_bags(nothing, bags, starts, matrix, bags)
    assert torch.equal(found, torch.zeros(2, 4, device=DEVICE))
    empty = SparseCodes(bags.view(0, 5), nothing.view(0, 5), 3)
    assert empty.decode(matrix).shape == (0, 4)
    assert triton_topk.top_k(matrix[:0], 2)[0].shape == (0, 2)


N_ROWS, WIDTH, N_LATENTS, K = 2 * CHUNK + 9, 5, 40, 3


def case() -> tuple[Tensor, ...]:
    """Every row chooses latent 0, whose pairs are then a long bag; odd latents are never chosen."""
    others = normal(N_ROWS, 19, seed=3).topk(K - 1, dim=1).indices * 2 + 2
    indices = torch.cat([torch.zeros_like(others[:, :1]), others], dim=1)
    x, weights = normal(N_ROWS, WIDTH, seed=0), normal(N_LATENTS, WIDTH, seed=1)
    return x, weights, normal(N_LATENTS, seed=2), normal(N_ROWS, K, seed=4), indices


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    loss = (output * normal(*output.shape, seed=9)).square().sum()
    return torch.autograd.grad(loss, inputs)


def test_gradients_are_those_of_the_dense_products():
    x, weights, bias, values, indices = case()
    inputs = [each.requires_grad_() for each in (x, weights, bias)]
    pre = kernels.pre_activations(x, weights, bias)
    dense = (x @ weights.T + bias).gather(1, indices)
    chosen = kernels.choose(pre, indices, x, weights, bias)
    for found, wanted in zip(gradients(chosen, *inputs), gradients(dense, *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    codes = SparseCodes(indices, values.requires_grad_(), N_LATENTS)
    dense, found = codes.to_dense() @ weights, codes.decode(weights)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, values, weights), gradients(dense, values, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parts_are_those_of_the_reference():
    _, weights, _, values, indices = case()
    part = (indices + torch.arange(N_ROWS, device=DEVICE)[:, None]) % 4
    found = SparseCodes(indices, values, N_LATENTS).decode_parts(part, 4, weights)
    for i in range(4):
        alone = SparseCodes(indices, values * (part == i), N_LATENTS).to_dense() @ weights
        torch.testing.assert_close(found[i], alone, rtol=1e-12, atol=1e-12)


def test_the_same_bits_every_time():
    x, _, _, values, indices = case()
    found = [combine_transposed(values.float(), indices, x.float(), N_LATENTS) for _ in range(2)]
    assert torch.equal(*found)


def test_half_precision_is_chosen_from_and_the_gradient_is_that_of_what_was_read():
    x, weights, bias, _, indices = (
        each.float() if each.is_floating_point() else each for each in case()
    )
    inputs = [each.requires_grad_() for each in (x, weights, bias)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pre = kernels.pre_activations(*inputs)
        chosen = kernels.choose(pre, indices, *inputs)
        recon = SparseCodes(indices, chosen, N_LATENTS).decode(weights)
    assert pre.dtype == torch.bfloat16
    assert chosen.dtype == recon.dtype == torch.float32
    halved = weights.detach().bfloat16().double().requires_grad_()
    exact = [x.detach().double().requires_grad_(), halved, bias.detach().double().requires_grad_()]
    dense = (exact[0] @ halved.T + exact[2]).gather(1, indices)
    decoded = SparseCodes(indices, dense, N_LATENTS).to_dense() @ halved
    torch.testing.assert_close(chosen.double(), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recon.double(), decoded, rtol=1e-5, atol=1e-4)
    for found, wanted in zip(gradients(recon, *inputs), gradients(decoded, *exact), strict=True):
        assert found.dtype == torch.float32
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 2**-8, error


def test_a_step_of_an_sae_is_that_of_the_reference(monkeypatch: pytest.MonkeyPatch):
    sae = TopKSae(d_model=6, n_latents=50, k=4, generator=torch.Generator().manual_seed(0))
    sae = sae.double().to(DEVICE)
    x = normal(20, 6, seed=5)

    def step() -> list[Tensor]:
        sae.zero_grad()
        output = sae(x)
        (x - output.recon).square().sum().backward()
        return [output.codes.indices, output.recon, *(one.grad for one in sae.parameters())]

    found = step()
    for module in ("clipattr.codes", "clipattr.sae.kernels"):
        monkeypatch.setattr(f"{module}.kernels_for", lambda _: choice.EAGER)
    for ours, theirs in zip(found, step(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_check_passes():
    assert check.difference(check.TRITON, choice.EAGER, DEVICE) is None


def sorted_top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k].clone(), indices[:, :k].clone()


RIGHT = choice.Kernels(
    sorted_top_k,
    lambda values, index, starts, matrix, bags: choice.EAGER.sum_bags(
        values, index, starts, matrix.float(), bags
    ),
    lambda left, right, *rest: choice.EAGER.dot(left, right.float(), *rest),
)


@pytest.mark.parametrize("name", check.TRITON._fields)
def test_the_check_sees_a_broken_kernel(name: str):
    assert check.difference(RIGHT, choice.EAGER, DEVICE) is None

    def broken(*arguments: object) -> object:
        result = getattr(RIGHT, name)(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        first.view(-1)[-1] += 0.1
        return result

    fault = check.difference(RIGHT._replace(**{name: broken}), choice.EAGER, DEVICE)
    assert fault is not None
    assert fault.startswith(name)
