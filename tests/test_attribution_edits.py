"""Closed forms of curves, exact patching and path methods against suffix calls and plain loops."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from clipattr.attribution import (
    HeadScore,
    LastLayerEdits,
    LastLayerHead,
    active_order,
    attribution_patching,
    both_curves,
    build_lens_table,
    exact_patching,
    integrated_gradients,
    minus_counterfactual,
    read_edits,
    score_gradient,
    steps_of,
    two_point,
)
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError

BATCH, MODEL, EMBED, LATENTS, ACTIVE, CLASSES = 5, 16, 9, 40, 6, 7
TARGETS = torch.tensor([2, 0, 6, 2, 3])
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


class Case:
    """One head and one batch, with the suffix as torch computes it."""

    def __init__(self, *, has_bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.head = LastLayerHead(
            gamma=1 + 0.3 * draw(MODEL),
            beta=0.5 * draw(MODEL),
            eps=0.05,
            projection=draw(MODEL, EMBED),
            bias=draw(EMBED),
            weights=draw(CLASSES, EMBED),
            class_bias=draw(CLASSES) if has_bias else None,
        )
        self.W_dec = draw(LATENTS, MODEL) + 0.2
        self.codes = self.draw_codes(generator, dtype)
        # The counterfactual shares some of the latents of the image.
        other = self.draw_codes(generator, dtype)
        other.indices[:, :2] = self.codes.indices[:, 1:3]
        self.other = other
        self.x = draw(BATCH, MODEL) + 3 + self.codes.decode(self.W_dec)
        self.score = HeadScore(self.suffix, self.head.weights, TARGETS, self.head.class_bias)

    def draw_codes(self, generator: torch.Generator, dtype: torch.dtype) -> SparseCodes:
        indices = torch.rand(BATCH, LATENTS, generator=generator).argsort(dim=1)[:, :ACTIVE]
        values = 0.1 + torch.rand(BATCH, ACTIVE, generator=generator, dtype=torch.float64)
        values[3, 2:] = 0.0
        return SparseCodes(indices, values.to(dtype), LATENTS)

    def suffix(self, x: Tensor) -> Tensor:
        normed = layer_norm(x, (MODEL,), self.head.gamma, self.head.beta, self.head.eps)
        return normed @ self.head.projection + self.head.bias

    def edits(self, codes: SparseCodes) -> LastLayerEdits:
        table = build_lens_table(self.head, self.W_dec)
        return read_edits(self.head, table, self.x, codes, self.W_dec, TARGETS)


@pytest.fixture(params=["probe", "prompts", "counterfactual"])
def drawn(request: pytest.FixtureRequest) -> tuple[Case, SparseCodes]:
    case = Case(has_bias=request.param != "prompts")
    if request.param == "counterfactual":
        return case, minus_counterfactual(case.codes, case.other)
    return case, case.codes


def test_scores_of_edits_equal_a_plain_loop(drawn: tuple[Case, SparseCodes]):
    case, codes = drawn
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 4, codes.values.shape[1])
    coefficients = torch.randn(*shape, generator=generator, dtype=torch.float64)
    found = case.edits(codes).scores(coefficients)
    for image in range(BATCH):
        for edit in range(4):
            x = case.x[image].clone()
            for slot, latent in enumerate(codes.indices[image].tolist()):
                x += coefficients[image, edit, slot] * case.W_dec[latent]
            expected = case.score(x[None], torch.tensor([image]))[0]
            torch.testing.assert_close(found[image, edit], expected, **CLOSE)


def test_gradient_of_an_edit_equals_autograd(drawn: tuple[Case, SparseCodes]):
    case, codes = drawn
    edits = case.edits(codes)
    coefficients = -0.3 * codes.values
    x = case.x + codes._replace(values=coefficients).decode(case.W_dec)
    gradient = score_gradient(case.score, x)
    expected = torch.einsum("bkd,bd->bk", case.W_dec[codes.indices], gradient)
    found = edits.gradient(coefficients[:, None])[:, 0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_methods_equal_those_that_call_the_suffix(drawn: tuple[Case, SparseCodes]):
    case, codes = drawn
    edits, arguments = case.edits(codes), (case.score, case.x, codes, case.W_dec)
    pairs = [
        (edits.attribution_patching(), attribution_patching(*arguments)),
        (edits.two_point(), two_point(*arguments)),
        (edits.integrated_gradients(5), integrated_gradients(*arguments, n_steps=5)),
        (edits.exact_patching(), exact_patching(*arguments)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, **CLOSE)
        assert found.abs().max() > 1e-2
    for number, (one, _) in enumerate(pairs):
        assert all(not torch.allclose(one, other, rtol=1e-3) for other, _ in pairs[number + 1 :])


def test_curves_equal_those_that_call_the_suffix(drawn: tuple[Case, SparseCodes]):
    case, codes = drawn
    orders = [
        active_order(attribution_patching(case.score, case.x, codes, case.W_dec), codes),
        active_order(codes.values, codes),
        active_order(-codes.values, codes),
    ]
    steps = steps_of(torch.stack(orders))
    found = case.edits(codes).curves(steps, n_steps=5)
    expected = both_curves(case.score, case.x, codes, case.W_dec, steps, n_steps=5)
    torch.testing.assert_close(found.deletion, expected.deletion, **CLOSE)
    torch.testing.assert_close(found.insertion, expected.insertion, **CLOSE)
    assert found.n_points == expected.n_points == 2 * 3 * BATCH * 6
    assert found.n_run == 0


def test_integrated_gradients_is_complete():
    case = Case()
    edits = case.edits(case.codes)
    ends = torch.stack([torch.zeros_like(case.codes.values), -case.codes.values], dim=1)
    clean, rest = edits.scores(ends).unbind(dim=1)
    total = edits.integrated_gradients(24).sum(dim=1)
    torch.testing.assert_close(total, clean - rest, rtol=1e-8, atol=1e-10)


def test_float32_activations_lose_little():
    """Inner products of float32 vectors; the edits themselves are added up in float64."""
    rough, exact = Case(dtype=torch.float32), Case()
    for name in ("attribution_patching", "exact_patching", "two_point"):
        found = getattr(rough.edits(rough.codes), name)()
        expected = getattr(exact.edits(exact.codes), name)()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    steps = steps_of(active_order(exact.codes.values, exact.codes))[None]
    found = rough.edits(rough.codes).curves(steps, n_steps=ACTIVE)
    expected = exact.edits(exact.codes).curves(steps, n_steps=ACTIVE)
    torch.testing.assert_close(found.deletion, expected.deletion, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.insertion, expected.insertion, rtol=0, atol=2e-6)


def test_a_curve_without_a_step_is_refused():
    case = Case()
    steps = steps_of(active_order(case.codes.values, case.codes))[None]
    with pytest.raises(ConfigError, match="n_steps=0"):
        case.edits(case.codes).curves(steps, n_steps=0)
