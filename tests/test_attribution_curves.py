"""Orders, deletion and insertion curves, area and completeness against plain loops."""

import pytest
import torch
from torch import Tensor, nn

from clipattr.attribution.curves import (
    area_under,
    both_curves,
    completeness_gap,
    deletion_curve,
    insertion_curve,
)
from clipattr.attribution.exact import exact_patching
from clipattr.attribution.gradients import attribution_patching, integrated_gradients
from clipattr.attribution.ranking import active_order, steps_of
from clipattr.attribution.score import HeadScore, clean_scores
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError

BATCH, MODEL, EMBED, LATENTS, ACTIVE = 4, 10, 6, 25, 5
Case = tuple[HeadScore, Tensor, SparseCodes, Tensor]


class PooledTower(nn.Module):
    """Not linear before it pools, so it matters at which position an edit lands."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.projection = nn.LayerNorm(MODEL), nn.Linear(MODEL, EMBED, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.norm(x.reshape(x.shape[0], -1, MODEL).tanh().mean(dim=1)))


def build_case(*site: int) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        indices = torch.rand(BATCH, *site, LATENTS).argsort(dim=-1)[..., :ACTIVE]
        values = torch.rand(BATCH, *site, ACTIVE, dtype=torch.float64) + 0.2
        values[1].view(-1, ACTIVE)[0, 2:] = 0.0
        codes = SparseCodes(indices, values, LATENTS)
        W_dec = torch.randn(LATENTS, MODEL, dtype=torch.float64)
        x = codes.decode(W_dec) + torch.randn(BATCH, *site, MODEL, dtype=torch.float64)
        weights = torch.randn(3, EMBED, dtype=torch.float64)
        tower = PooledTower().double().requires_grad_(False)
        score = HeadScore(tower, weights, torch.tensor([0, 2, 1, 2]), torch.rand(3).double())
        return score, x, codes, W_dec


def contribution(codes: SparseCodes, W_dec: Tensor, image: int, slot: int) -> tuple[int, Tensor]:
    """Position in the flattened site and a_s v_s of one flattened slot."""
    value, index = codes.values[image].flatten()[slot], codes.indices[image].flatten()[slot]
    return slot // codes.values.shape[-1], value * W_dec[index]


def looped_curve(case: Case, start: Tensor, sign: int, order: Tensor, n_steps: int) -> Tensor:
    """Every point from scratch, one image at a time."""
    score, _, codes, W_dec = case
    curve = torch.zeros(BATCH, n_steps + 1, dtype=torch.float64)
    for image in range(BATCH):
        for step in range(n_steps + 1):
            edited = start[[image]].clone()
            for slot in order[image, :step].tolist():
                position, vector = contribution(codes, W_dec, image, slot)
                edited.view(-1, MODEL)[position] += sign * vector
            curve[image, step] = score(edited, torch.tensor([image]))
    return curve


def test_order_is_highest_first_and_inactive_last():
    values = torch.tensor([[0.5, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 0.0]])
    codes = SparseCodes(torch.arange(8).view(2, 4), values, 8)
    attributions = torch.tensor([[-3.0, 0.0, -1.0, 4.0], [0.5, 0.7, 0.5, 9.0]])
    assert active_order(attributions, codes).tolist() == [[3, 2, 0, 1], [1, 0, 2, 3]]


@pytest.mark.parametrize("site", [(), (3,)])
def test_curves_equal_a_plain_loop(site: tuple[int, ...]):
    case = build_case(*site)
    score, x, codes, W_dec = case
    order = active_order(attribution_patching(*case), codes)
    rest = x - codes.decode(W_dec)
    deleted = deletion_curve(*case, order, n_steps=4)
    inserted = insertion_curve(*case, order, n_steps=4)
    torch.testing.assert_close(deleted, looped_curve(case, x, -1, order, 4))
    torch.testing.assert_close(inserted, looped_curve(case, rest, 1, order, 4))


def test_curves_end_where_the_other_starts():
    score, x, codes, W_dec = case = build_case()
    order = active_order(codes.values, codes)
    clean, rest = clean_scores(score, x), clean_scores(score, x - codes.decode(W_dec))
    deleted, inserted = deletion_curve(*case, order, ACTIVE), insertion_curve(*case, order, ACTIVE)
    torch.testing.assert_close(deleted[:, 0], clean, rtol=0, atol=0)
    torch.testing.assert_close(deleted[:, -1], rest)
    torch.testing.assert_close(inserted[:, 0], rest)
    torch.testing.assert_close(inserted[:, -1], clean)
    assert (clean - rest).abs().min() > 1e-3
    assert deleted[1, 2:].eq(deleted[1, 2]).all()  # image 1 has two active latents


def test_first_deletion_is_the_exact_effect_of_the_top_latent():
    score, x, codes, W_dec = case = build_case()
    effects = exact_patching(*case)
    order = active_order(effects, codes)
    curve = deletion_curve(*case, order, n_steps=1)
    top = effects.gather(1, order[:, :1])[:, 0]
    torch.testing.assert_close(curve[:, 0] - curve[:, 1], top)


def test_curves_leave_the_activations_alone():
    _, x, codes, _ = case = build_case()
    before = x.clone()
    deletion_curve(*case, active_order(codes.values, codes), n_steps=3)
    insertion_curve(*case, active_order(codes.values, codes), n_steps=3)
    assert torch.equal(x, before)


def test_a_curve_without_a_step_is_refused():
    _, _, codes, _ = case = build_case()
    with pytest.raises(ConfigError, match="n_steps=0"):
        deletion_curve(*case, active_order(codes.values, codes), n_steps=0)


def test_curves_stay_flat_where_no_latent_is_left():
    """Image 1 has two active latents, the others five: what ReLU and BatchTopK SAEs give."""
    score, x, codes, W_dec = case = build_case()
    order = active_order(codes.values, codes)
    deleted = deletion_curve(*case, order, n_steps=ACTIVE + 3)
    inserted = insertion_curve(*case, order, n_steps=ACTIVE + 3)
    assert deleted.shape == inserted.shape == (BATCH, ACTIVE + 4)
    for curve, end in ((deleted, x - codes.decode(W_dec)), (inserted, x)):
        assert curve[:, ACTIVE:].eq(curve[:, [ACTIVE]]).all()
        torch.testing.assert_close(curve[:, -1], clean_scores(score, end))
        assert curve[1, 2:].eq(curve[1, 2]).all()


def test_several_orders_share_what_they_have_in_common():
    score, x, codes, W_dec = case = build_case()
    calls: list[int] = []

    def counted(rows: Tensor, images: Tensor) -> Tensor:
        calls.append(len(rows))
        return score(rows, images)

    first = active_order(codes.values, codes)
    swapped = first[:, [1, 0, 2, 3, 4]]
    orders = torch.stack([first, swapped, first])
    curves = both_curves(counted, x, codes, W_dec, steps_of(orders), n_steps=ACTIVE, chunk_rows=7)
    for number, order in enumerate(orders):
        torch.testing.assert_close(curves.deletion[number], deletion_curve(*case, order, ACTIVE))
        torch.testing.assert_close(curves.insertion[number], insertion_curve(*case, order, ACTIVE))
    # Of one image: 6 + 6 points, of which both ends are the same; the second order differs after
    # one step alone, in both curves; with two active latents there are four sets.
    assert curves.n_run == sum(calls) == 3 * 12 + 4
    assert curves.n_points == 3 * 2 * BATCH * (ACTIVE + 1)
    assert max(calls) <= 7


def test_area_under_is_the_trapezoid_divided_by_the_steps():
    curve = torch.tensor([[1.0, 0.5, 0.0], [2.0, 2.0, 2.0], [0.0, 1.0, 0.0]])
    area = area_under(curve)
    assert area.dtype == torch.float64
    assert area.tolist() == [0.5, 2.0, 0.5]


def test_completeness_gap_by_hand():
    codes = SparseCodes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]), 4)
    attributions = torch.tensor([[0.25, 0.5], [0.5, 99.0]])
    gap = completeness_gap(attributions, codes, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert gap.missing.tolist() == [0.25, 1.5]
    assert gap.change.tolist() == [1.0, 1.0]
    assert gap.ratio.tolist() == [0.25, 1.5]


def test_integrated_gradients_is_complete_where_attribution_patching_is_not():
    score, x, codes, W_dec = case = build_case()
    clean, rest = clean_scores(score, x), clean_scores(score, x - codes.decode(W_dec))
    integrated = integrated_gradients(*case, n_steps=64)
    assert completeness_gap(integrated, codes, clean, rest).ratio.max() < 0.01
    patched = attribution_patching(*case)
    assert completeness_gap(patched, codes, clean, rest).ratio.min() > 0.01
