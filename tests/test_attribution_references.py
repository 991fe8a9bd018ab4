"""What latents are compared with, several tokens, and rankings, against plain loops."""

import pytest
import torch
from torch import Tensor, nn

from clipattr.attribution import (
    HeadScore,
    active_order,
    at_reference,
    attribution_patching,
    both_curves,
    clean_scores,
    exact_patching,
    global_steps,
    gradient_only,
    integrated_gradients,
    merge_tokens,
    minus_counterfactual,
    minus_mean,
    score_gradient,
    steps_of,
    two_point,
)
from clipattr.codes import SparseCodes

BATCH, TOKENS, MODEL, EMBED, LATENTS, ACTIVE = 4, 3, 10, 6, 12, 4


class Tower(nn.Module):
    """Not linear before it pools, so it matters at which token an edit lands."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.projection = nn.LayerNorm(MODEL), nn.Linear(MODEL, EMBED, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.norm(x.reshape(x.shape[0], -1, MODEL).tanh().mean(dim=1)))


def draw_codes(seed: int, *site: int) -> SparseCodes:
    generator = torch.Generator().manual_seed(seed)
    rows = (BATCH, *site)
    indices = torch.rand(*rows, LATENTS, generator=generator).argsort(dim=-1)[..., :ACTIVE]
    values = 0.2 + torch.rand(*rows, ACTIVE, generator=generator, dtype=torch.float64)
    values[1].view(-1, ACTIVE)[0, 2:] = 0.0
    return SparseCodes(indices, values, LATENTS)


def build_case(*site: int) -> tuple[HeadScore, Tensor, SparseCodes, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codes = draw_codes(0, *site)
        W_dec = torch.randn(LATENTS, MODEL, dtype=torch.float64)
        x = codes.decode(W_dec) + torch.randn(BATCH, *site, MODEL, dtype=torch.float64)
        tower = Tower().double().requires_grad_(False)
        weights = torch.randn(3, EMBED, dtype=torch.float64)
        return HeadScore(tower, weights, torch.tensor([0, 2, 1, 2])), x, codes, W_dec


@pytest.mark.parametrize("site", [(), (TOKENS,)])
def test_union_with_a_counterfactual_is_the_difference_of_dense_codes(site: tuple[int, ...]):
    codes, other = draw_codes(0, *site), draw_codes(7, *site)
    change = minus_counterfactual(codes, other)
    torch.testing.assert_close(change.to_dense(), codes.to_dense() - other.to_dense())
    assert change.indices.shape[-1] == 2 * ACTIVE
    own = (codes.indices[..., None] == other.indices[..., None, :]).any()
    assert own, "no latent in both would prove nothing"
    # Each latent once: a shared one must not be edited in two parts.
    for row in change._replace(values=change.is_active.double()).to_dense().flatten(0, -2):
        assert row.max() <= 1


def test_padding_that_names_an_active_latent_changes_nothing():
    codes = SparseCodes(torch.tensor([[3, 3, 5]]), torch.tensor([[1.0, 0.0, 2.0]]), LATENTS)
    other = SparseCodes(torch.tensor([[3, 5, 3, 8]]), torch.tensor([[0.5, 0.0, 0.0, 4.0]]), LATENTS)
    change = minus_counterfactual(codes, other)
    active = change.is_active[0]
    assert change.indices[0, active].tolist() == [3, 5, 8]
    assert change.values[0, active].tolist() == [0.5, 2.0, -4.0]


def test_mean_reference_leaves_inactive_latents_alone():
    score, x, codes, W_dec = build_case()
    means = torch.linspace(0.1, 0.5, LATENTS, dtype=torch.float64)
    change = minus_mean(codes, means)
    found = attribution_patching(score, x, change, W_dec)
    effects = exact_patching(score, x, change, W_dec)
    gradient = score_gradient(score, x)
    clean = clean_scores(score, x)
    for image in range(BATCH):
        for slot, latent in enumerate(codes.indices[image].tolist()):
            value = codes.values[image, slot]
            moved = (value - means[latent]) if value != 0 else torch.zeros(()).double()
            first_order = moved * (W_dec[latent] @ gradient[image])
            torch.testing.assert_close(found[image, slot], first_order)
            edited = x[[image]] - moved * W_dec[latent]
            effect = clean[image] - score(edited, torch.tensor([image]))[0]
            torch.testing.assert_close(effects[image, slot], effect)


def test_counterfactual_attribution_at_the_clean_and_at_the_corrupted_activation():
    score, x, codes, W_dec = build_case()
    other = draw_codes(7)
    change = minus_counterfactual(codes, other)
    dense = codes.to_dense() - other.to_dense()
    corrupted = x - dense @ W_dec
    torch.testing.assert_close(at_reference(x, change, W_dec), corrupted)
    for where in (x, corrupted):
        found = attribution_patching(score, where, change, W_dec)
        expected = dense * (score_gradient(score, where) @ W_dec.T)
        actual = change._replace(values=found).to_dense()
        torch.testing.assert_close(actual, expected)
    integrated = integrated_gradients(score, x, change, W_dec, n_steps=32)
    difference = clean_scores(score, x) - clean_scores(score, corrupted)
    torch.testing.assert_close(integrated.sum(dim=1), difference, rtol=1e-6, atol=1e-9)


def test_gradient_only_and_two_point_by_hand():
    score, x, codes, W_dec = build_case()
    directions = W_dec[codes.indices]
    ends = [score_gradient(score, each) for each in (x, x - codes.to_dense() @ W_dec)]
    slopes = [torch.einsum("bkd,bd->bk", directions, each) for each in ends]
    found = gradient_only(score, x, codes, W_dec)
    torch.testing.assert_close(found, slopes[0] * codes.is_active)
    mean = codes.values * (slopes[0] + slopes[1]) / 2
    torch.testing.assert_close(two_point(score, x, codes, W_dec), mean)


def test_two_point_is_complete_on_a_quadratic_score():
    _, x, codes, W_dec = build_case()

    def square(x: Tensor, images: Tensor) -> Tensor:
        return x.square().sum(dim=-1)

    total = two_point(square, x, codes, W_dec).sum(dim=1)
    rest = at_reference(x, codes, W_dec)
    torch.testing.assert_close(total, x.square().sum(dim=1) - rest.square().sum(dim=1))


def test_merged_tokens_equal_a_dictionary_of_sums():
    codes = draw_codes(0, TOKENS)
    attributions = torch.randn(codes.values.shape, dtype=torch.float64)
    merged = merge_tokens(codes)
    sums = merged.sum_over_tokens(attributions)
    for image in range(BATCH):
        expected: dict[int, float] = {}
        activations: dict[int, float] = {}
        for token, slot in codes.is_active[image].nonzero().tolist():
            latent = int(codes.indices[image, token, slot])
            expected[latent] = expected.get(latent, 0.0) + float(attributions[image, token, slot])
            value = float(codes.values[image, token, slot])
            activations[latent] = activations.get(latent, 0.0) + value
        is_there = merged.codes.is_active[image]
        latents = merged.codes.indices[image][is_there].tolist()
        assert latents == sorted(expected)
        assert sums[image][is_there].tolist() == pytest.approx([expected[j] for j in latents])
        found = merged.codes.values[image][is_there].tolist()
        assert found == pytest.approx([activations[j] for j in latents])
        assert sums[image][~is_there].eq(0).all()
    assert merged.codes.indices.shape[1] < TOKENS * ACTIVE, "some latent is at several tokens"


def test_a_latent_is_deleted_at_all_its_tokens():
    score, x, codes, W_dec = build_case(TOKENS)
    merged = merge_tokens(codes)
    sums = merged.sum_over_tokens(attribution_patching(score, x, codes, W_dec))
    order = active_order(sums, merged.codes)
    steps = merged.per_token(steps_of(order))
    curves = both_curves(score, x, codes, W_dec, steps[None], n_steps=3)
    dense = codes.to_dense()
    for image in range(BATCH):
        for step in range(4):
            gone = merged.codes.indices[image, order[image, :step]]
            deleted = torch.zeros_like(dense[image])
            deleted[:, gone] = dense[image][:, gone]
            kept = dense[image] - deleted
            for curve, removed in ((curves.deletion, deleted), (curves.insertion, kept)):
                edited = x[[image]] - removed @ W_dec
                expected = score(edited, torch.tensor([image]))[0]
                torch.testing.assert_close(curve[0, image, step], expected)


@pytest.mark.parametrize("site", [(), (TOKENS,)])
def test_global_steps_delete_the_same_latents_in_every_image(site: tuple[int, ...]):
    score, x, codes, W_dec = build_case(*site)
    ranking = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(3))
    curves = both_curves(score, x, codes, W_dec, global_steps(ranking, codes)[None], n_steps=5)
    for step in range(6):
        dense = codes.to_dense()
        dense[..., ranking[step:]] = 0
        expected = clean_scores(score, x - dense @ W_dec)
        torch.testing.assert_close(curves.deletion[0, :, step], expected)
    # A step whose latent did not fire in an image costs no row.
    assert curves.n_run < curves.n_points - 2 * BATCH


def test_steps_are_the_inverse_of_the_order():
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert steps_of(order).tolist() == [[1, 2, 0], [2, 0, 1]]
