"""Scores, attribution patching, integrated gradients and exact patching against oracles."""

from typing import NamedTuple

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from clipattr.attribution.baselines import (
    act_times_logit_lens,
    energy,
    logit_lens,
    logit_lens_table,
    random_scores,
)
from clipattr.attribution.exact import exact_patching
from clipattr.attribution.gradients import (
    attribution_patching,
    integrated_gradients,
    project_on_decoder,
    score_gradient,
)
from clipattr.attribution.score import HeadScore, clean_scores
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError

BATCH, MODEL, EMBED, LATENTS, ACTIVE, CLASSES = 5, 12, 7, 30, 4, 6


class Case(NamedTuple):
    score: HeadScore
    x: Tensor
    codes: SparseCodes
    W_dec: Tensor


def random_codes(generator: torch.Generator, *rows: int) -> SparseCodes:
    """Distinct latents per row, positive values, and the last slot of the first row inactive."""
    noise = torch.rand(*rows, LATENTS, generator=generator)
    values = torch.rand(*rows, ACTIVE, generator=generator, dtype=torch.float64) + 0.2
    values[(0,) * len(rows)][-1] = 0.0
    return SparseCodes(noise.argsort(dim=-1)[..., :ACTIVE], values, LATENTS)


def build_case(*site: int, tower: nn.Module | None = None) -> Case:
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(generator, BATCH, *site)
    W_dec = torch.randn(LATENTS, MODEL, generator=generator, dtype=torch.float64)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    rest = torch.randn(BATCH, *site, MODEL, generator=generator, dtype=torch.float64)
    weights = torch.randn(CLASSES, EMBED, generator=generator, dtype=torch.float64)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.tensor([2, 0, 5, 2, 1])
    score = HeadScore(tower or build_tower(), weights, targets, bias)
    return Case(score, rest + codes.decode(W_dec), codes, W_dec)


def build_tower() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.LayerNorm(MODEL), nn.Linear(MODEL, EMBED, bias=False)).double()


class TokenTower(nn.Module):
    """Tokens talk to each other before they are pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.head = build_tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * x.softmax(dim=1)).sum(dim=1))


class LinearScore:
    """y = x . direction of the image's target, summed over the site."""

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions

    def __call__(self, x: Tensor, images: Tensor) -> Tensor:
        return (x.flatten(1, -2).sum(1) if x.ndim > 2 else x).mul(self.directions[images]).sum(-1)


def slots_of(codes: SparseCodes) -> list[tuple[int, ...]]:
    return [tuple(slot) for slot in codes.is_active.nonzero().tolist()]


def delete_one(case: Case, slot: tuple[int, ...]) -> Tensor:
    edited = case.x.clone()
    edited[slot[:-1]] -= case.codes.values[slot] * case.W_dec[case.codes.indices[slot]]
    return edited


def test_head_score_is_cosine_plus_bias():
    case = build_case()
    embeddings = case.score.suffix(case.x)
    for image in range(BATCH):
        target = case.score.targets[image]
        e, w = embeddings[image], case.score.weights[target]
        expected = e @ w / e.norm() + case.score.bias[target]
        torch.testing.assert_close(clean_scores(case.score, case.x)[image], expected)


def test_head_score_of_repeated_images_equals_one_by_one():
    case = build_case()
    images = torch.tensor([4, 0, 0, 2, 4, 1])
    together = case.score(case.x[images], images)
    single = [case.score(case.x[[i]], torch.tensor([i]))[0] for i in images.tolist()]
    torch.testing.assert_close(together, torch.stack(single), rtol=1e-12, atol=0)


@pytest.mark.parametrize("site", [(), (3,)])
def test_attribution_patching_is_exact_on_a_linear_score(site: tuple[int, ...]):
    case = build_case(*site)
    generator = torch.Generator().manual_seed(2)
    score = LinearScore(torch.randn(BATCH, MODEL, generator=generator, dtype=torch.float64))
    estimate = attribution_patching(score, case.x, case.codes, case.W_dec)
    effect = exact_patching(score, case.x, case.codes, case.W_dec)
    torch.testing.assert_close(estimate, effect, rtol=1e-6, atol=1e-12)
    assert estimate.abs().max() > 0.1


@pytest.mark.parametrize("site", [(), (3,)])
def test_attribution_patching_equals_autograd_through_the_codes(site: tuple[int, ...]):
    case = build_case(*site, tower=TokenTower() if site else None)
    rest = case.x - case.codes.decode(case.W_dec)
    dense = case.codes.to_dense().requires_grad_()
    scores = clean_scores(case.score, rest + dense @ case.W_dec)
    (gradient,) = torch.autograd.grad(scores.sum(), dense)
    expected = case.codes.values * gradient.gather(-1, case.codes.indices)
    actual = attribution_patching(case.score, case.x, case.codes, case.W_dec)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-12)


def test_gradients_work_under_no_grad_and_leave_nothing_behind():
    case = build_case()
    parameters = list(case.score.suffix.parameters())  # pyright: ignore[reportFunctionMemberAccess]
    with torch.no_grad():
        gradient = score_gradient(case.score, case.x)
    assert gradient.abs().max() > 0
    assert not gradient.requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    assert case.x.grad is None


def test_gradient_of_an_image_does_not_depend_on_the_batch_size():
    case = build_case()
    alone = HeadScore(
        case.score.suffix, case.score.weights, case.score.targets[:1], case.score.bias
    )
    torch.testing.assert_close(
        score_gradient(alone, case.x[:1]), score_gradient(case.score, case.x)[:1]
    )


def test_project_on_decoder_is_the_inner_product():
    case = build_case(3)
    expected = torch.einsum("btd,btkd->btk", case.x, case.W_dec[case.codes.indices])
    torch.testing.assert_close(project_on_decoder(case.x, case.codes, case.W_dec), expected)


def test_integrated_gradients_equals_captum():
    case = build_case()
    rest = case.x - case.codes.decode(case.W_dec)

    def forward(dense: Tensor, rest: Tensor, images: Tensor) -> Tensor:
        return case.score(rest + dense @ case.W_dec, images)

    captum = IntegratedGradients(forward, multiply_by_inputs=True).attribute(
        case.codes.to_dense(),
        additional_forward_args=(rest, torch.arange(BATCH)),
        method="gausslegendre",
        n_steps=16,
    )
    ours = integrated_gradients(case.score, case.x, case.codes, case.W_dec, n_steps=16)
    expected = captum.gather(1, case.codes.indices) * case.codes.is_active
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_integrated_gradients_needs_few_points_on_a_smooth_path():
    """Gauss-Legendre with four points; the midpoint rule needs hundreds for the same error."""
    case = build_case()
    difference = clean_scores(case.score, case.x)
    difference = difference - clean_scores(case.score, case.x - case.codes.decode(case.W_dec))
    found = integrated_gradients(case.score, case.x, case.codes, case.W_dec, n_steps=4)
    torch.testing.assert_close(found.sum(dim=1), difference.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_steps", [0, -1])
def test_a_path_without_a_point_is_refused(n_steps: int):
    case = build_case()
    with pytest.raises(ConfigError, match=f"n_steps={n_steps}"):
        integrated_gradients(case.score, case.x, case.codes, case.W_dec, n_steps=n_steps)


@pytest.mark.parametrize("chunk_rows", [1, 3, 8192])
@pytest.mark.parametrize("site", [(), (3,)])
def test_exact_patching_equals_deleting_one_latent(site: tuple[int, ...], chunk_rows: int):
    case = build_case(*site, tower=TokenTower() if site else None)
    effects = exact_patching(case.score, case.x, case.codes, case.W_dec, chunk_rows=chunk_rows)
    clean = clean_scores(case.score, case.x)
    expected = torch.zeros_like(case.codes.values)
    for slot in slots_of(case.codes):
        expected[slot] = (clean - clean_scores(case.score, delete_one(case, slot)))[slot[0]]
    torch.testing.assert_close(effects, expected.detach(), rtol=1e-9, atol=1e-12)
    assert effects[~case.codes.is_active].eq(0).all()


def test_logit_lens_is_a_cosine_for_unnormalised_weights():
    case = build_case()
    table = logit_lens_table(case.score.suffix, case.W_dec, case.score.weights)
    e, w = case.score.suffix(case.W_dec[11]), case.score.weights[4]
    torch.testing.assert_close(table[4, 11], (e @ w / (e.norm() * w.norm())).detach())
    lens = logit_lens(table, case.score.targets, case.codes)
    for image, slot in slots_of(case.codes):
        latent = case.codes.indices[image, slot]
        assert lens[image, slot] == table[case.score.targets[image], latent]
    assert lens[0, -1] == 0


def test_logit_lens_with_a_token_axis_uses_the_image_target():
    case = build_case(3)
    table = torch.randn(CLASSES, LATENTS, dtype=torch.float64)
    lens = logit_lens(table, case.score.targets, case.codes)
    latent = case.codes.indices[2, 1, 0]
    assert lens.shape == case.codes.values.shape
    assert lens[2, 1, 0] == table[5, latent]


def test_energy_is_activation_times_decoder_length():
    case = build_case()
    W_dec = case.W_dec * torch.linspace(0.5, 2.0, LATENTS)[:, None]
    image, slot = 3, 2
    expected = case.codes.values[image, slot] * W_dec[case.codes.indices[image, slot]].norm()
    torch.testing.assert_close(energy(case.codes, W_dec)[image, slot], expected)
    negative = case.codes._replace(values=-case.codes.values)
    assert torch.equal(energy(negative, W_dec), energy(case.codes, W_dec))


def test_random_scores_follow_the_generator():
    codes = build_case().codes
    first, again, other = (
        random_scores(codes, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_two_methods_return_equal_tensors():
    case = build_case()
    table = logit_lens_table(case.score.suffix, case.W_dec, case.score.weights)
    arguments = (case.score, case.x, case.codes, case.W_dec)
    results = [
        attribution_patching(*arguments),
        integrated_gradients(*arguments, n_steps=8),
        exact_patching(*arguments),
        logit_lens(table, case.score.targets, case.codes),
        act_times_logit_lens(table, case.score.targets, case.codes),
        energy(case.codes, case.W_dec * 1.5),
        random_scores(case.codes, torch.Generator().manual_seed(0)),
    ]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert not torch.allclose(one, other.to(one.dtype), rtol=1e-3)
