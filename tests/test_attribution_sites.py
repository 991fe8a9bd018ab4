"""Attribution inside a tower: the rest of the image, several tokens, both heads, against raw hooks.

The oracle knows nothing of cuts: it runs the whole model with a hook that edits one activation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from clipattr.attribution import (
    HeadScore,
    at_reference,
    attribution_patching,
    both_curves,
    clean_scores,
    contrast,
    corrected_patching,
    error_attribution,
    exact_patching,
    integrated_gradients,
    minus_counterfactual,
    neuron_codes,
    score_gradient,
    steps_of,
)
from clipattr.clip import Site, image_tower, load_clip
from clipattr.clip.cut import Cut, State
from clipattr.codes import SparseCodes
from tests.tiny import save_tiny_clip

BATCH, LATENTS, ACTIVE, CLASSES = 3, 24, 3, 5
TOKENS = {"cls": slice(0, 1), "spatial": slice(1, None), "all": slice(None)}
SITES = [
    ("residual", "cls"),
    ("residual", "spatial"),
    ("residual", "all"),
    ("mlp", "cls"),
    ("neurons", "spatial"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    name = save_tiny_clip(tmp_path_factory.mktemp("sites") / "clip")
    return load_clip(name).model.double()


class Case(NamedTuple):
    cut: Cut
    images: Tensor
    state: State
    codes: SparseCodes
    W_dec: Tensor
    weights: Tensor
    bias: Tensor
    targets: Tensor

    @property
    def score(self) -> HeadScore:
        rest = self.state.rest
        return HeadScore(self.cut.suffix, self.weights, self.targets, self.bias, rest)

    @property
    def arguments(self) -> tuple[HeadScore, Tensor, SparseCodes, Tensor]:
        return self.score, self.state.x, self.codes, self.W_dec


def build_case(model: nn.Module, stream: str = "residual", tokens: str = "all") -> Case:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = draw(BATCH, 3, 32, 32)
    cut = image_tower(model).cut(Site(layer=0, stream=stream, tokens=tokens))
    with torch.no_grad():
        state = cut.prefix(images)
    rows = state.x.shape[:-1]
    noise = torch.rand(*rows, LATENTS, generator=generator)
    values = 0.1 + torch.rand(*rows, ACTIVE, generator=generator, dtype=torch.float64)
    values[1, ..., -1] = 0.0
    codes = SparseCodes(noise.argsort(dim=-1)[..., :ACTIVE], values, LATENTS)
    W_dec = nn.functional.normalize(draw(LATENTS, cut.d_site), dim=1)
    head = draw(CLASSES, 16), draw(CLASSES), torch.tensor([4, 0, 2])
    return Case(cut, images, state, codes, W_dec, *head)


def hooked(model: Any, case: Case, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores of the whole model, with `edit` at the site's tokens."""
    block = model.visual.transformer.resblocks[0]
    module = {"residual": block, "mlp": block.mlp, "neurons": block.mlp.gelu}
    chosen = TOKENS[case.cut.site.tokens]

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        edited = output.clone()
        edited[:, chosen] = edit(output[:, chosen])
        return edited

    with module[case.cut.site.stream].register_forward_hook(hook), torch.no_grad():
        unit = nn.functional.normalize(model.encode_image(case.images), dim=-1)
    rows = case.weights[case.targets]
    return (unit * rows).sum(dim=1) + case.bias[case.targets]


def without(case: Case, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that removes the latents of the slots that are not kept."""
    dense = (case.codes.values * ~kept)[..., None] * case.W_dec[case.codes.indices]
    removed = dense.sum(dim=-2).reshape(BATCH, -1, case.cut.d_site)
    return lambda activation: activation - removed


@pytest.mark.parametrize(("stream", "tokens"), SITES)
def test_exact_patching_equals_a_hook_on_the_whole_model(model, stream: str, tokens: str):
    case = build_case(model, stream, tokens)
    effects = exact_patching(*case.arguments, chunk_rows=4)
    clean = hooked(model, case, lambda activation: activation)
    torch.testing.assert_close(clean_scores(case.score, case.state.x).detach(), clean)
    slots = case.codes.values[0].numel()
    for slot in range(0, slots, max(1, slots // 6)):
        kept = torch.ones_like(case.codes.values, dtype=torch.bool)
        kept.view(BATCH, -1)[:, slot] = False
        expected = clean - hooked(model, case, without(case, kept))
        actual = effects.reshape(BATCH, -1)[:, slot]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)
    assert effects.abs().max() > 1e-3


@pytest.mark.parametrize(("stream", "tokens"), SITES)
def test_attribution_patching_equals_finite_differences_of_hooks(model, stream: str, tokens: str):
    case = build_case(model, stream, tokens)
    found = attribution_patching(*case.arguments)
    step = 1e-5
    for slot in (0, case.codes.values[0].numel() - 1):
        moved = torch.zeros_like(case.codes.values)
        moved.view(BATCH, -1)[:, slot] = step * case.codes.values.reshape(BATCH, -1)[:, slot]
        one = case._replace(codes=case.codes._replace(values=moved))
        edit = without(one, torch.zeros_like(moved, dtype=torch.bool))
        back = hooked(model, case, edit)
        ahead = hooked(model, case, lambda a, edit=edit: 2 * a - edit(a))
        expected = (ahead - back) / (2 * step)
        actual = found.reshape(BATCH, -1)[:, slot]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("stream", "tokens"), SITES)
def test_curves_of_several_orders_equal_hooks(model, stream: str, tokens: str):
    case = build_case(model, stream, tokens)
    slots = case.codes.values[0].numel()
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(slots, generator=generator) for _ in range(2)])
    steps = steps_of(orders[:, None].expand(-1, BATCH, -1))
    steps = steps.view(2, *case.codes.values.shape)
    curves = both_curves(*case.arguments, steps, n_steps=2, chunk_rows=5)
    for order in range(2):
        for step in range(3):
            is_in_front = steps[order] < step
            deleted = hooked(model, case, without(case, ~is_in_front))
            inserted = hooked(model, case, without(case, is_in_front))
            torch.testing.assert_close(curves.deletion[order, :, step], deleted)
            torch.testing.assert_close(curves.insertion[order, :, step], inserted)


def test_contrast_is_the_difference_of_two_scores(model):
    case = build_case(model)
    one, other = torch.tensor([1, 3]), torch.tensor([2, 0])
    rows = contrast(case.weights, case.bias, one, other)
    which = torch.tensor([0, 1, 1])
    differs = HeadScore(case.cut.suffix, rows.weights, which, rows.bias, case.state.rest)
    found = attribution_patching(differs, *case.arguments[1:])
    single = [
        attribution_patching(case._replace(targets=pair[which]).score, *case.arguments[1:])
        for pair in (one, other)
    ]
    torch.testing.assert_close(found, single[0] - single[1])
    cat, dog = (
        clean_scores(case._replace(targets=pair[which]).score, case.state.x)
        for pair in (one, other)
    )
    torch.testing.assert_close(clean_scores(differs, case.state.x), cat - dog)
    without_bias = contrast(case.weights, None, one, other)
    assert without_bias.bias is None
    torch.testing.assert_close(without_bias.weights, rows.weights)


def test_error_and_latents_add_up_to_the_gradient(model):
    case = build_case(model)
    score, x, codes, W_dec = case.arguments
    gradient = score_gradient(score, x)
    error = at_reference(x, codes, W_dec)
    latents = attribution_patching(*case.arguments)
    whole = error_attribution(gradient, error) + latents.sum(dim=-1)
    torch.testing.assert_close(whole, (x * gradient).sum(dim=-1))
    assert whole.shape == x.shape[:-1]


@pytest.mark.parametrize("stream", ["residual", "neurons"])
def test_neurons_are_latents_with_unit_directions(model, stream: str):
    case = build_case(model, stream, "cls")
    means = case.state.x.mean(dim=0)
    codes, units = neuron_codes(case.state.x, means)
    gradient = score_gradient(case.score, case.state.x)
    change = case.state.x - means
    found = attribution_patching(case.score, case.state.x, codes, units)
    torch.testing.assert_close(found, change * gradient)
    # One neuron at its mean, by a hook on the whole model.
    neuron = 7

    def edit(activation: Tensor) -> Tensor:
        edited = activation.clone()
        edited[..., neuron] = means[neuron]
        return edited

    clean = hooked(model, case, lambda activation: activation)
    effects = exact_patching(case.score, case.state.x, codes, units, chunk_rows=50)
    torch.testing.assert_close(effects[:, neuron], clean - hooked(model, case, edit))


def test_neurons_of_all_tokens_have_zero_as_reference(model):
    case = build_case(model, "neurons", "all")
    codes, units = neuron_codes(case.state.x)
    found = attribution_patching(case.score, case.state.x, codes, units)
    gradient = score_gradient(case.score, case.state.x)
    torch.testing.assert_close(found, case.state.x * gradient)
    assert at_reference(case.state.x, codes, units).abs().max() == 0


def test_corrected_patching_is_exact_at_the_top_alone(model):
    case = build_case(model, "residual", "spatial")
    estimate = attribution_patching(*case.arguments)
    exact = exact_patching(*case.arguments)
    found = corrected_patching(*case.arguments, n_exact=4, chunk_rows=5)
    for image in range(BATCH):
        size = estimate[image].abs().flatten()
        top = set(size.argsort(descending=True)[:4].tolist())
        for slot in range(len(size)):
            source = exact if slot in top else estimate
            expected = source[image].flatten()[slot]
            torch.testing.assert_close(found[image].flatten()[slot], expected)
    whole = corrected_patching(*case.arguments, n_exact=10_000)
    torch.testing.assert_close(whole, exact)


class SplicedModel(nn.Module):
    """Images to scores through dense codes: what captum attributes to `codes`."""

    def __init__(self, case: Case, dense: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.case, self.dense = case, dense
        self.codes = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x, rest = self.case.cut.prefix(images)
        dense = self.dense(x).detach()
        error = (x - dense @ self.case.W_dec).detach()
        score = self.case._replace(state=State(x, rest)).score
        return clean_scores(score, error + self.codes(dense) @ self.case.W_dec)


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_captum_on_the_spliced_model_agrees(model, tokens: str):
    case = build_case(model, "residual", tokens)

    def dense(x: Tensor) -> Tensor:
        pre = x @ case.W_dec.T
        chosen = pre.topk(ACTIVE, dim=-1)
        return torch.zeros_like(pre).scatter(-1, chosen.indices, chosen.values.relu())

    def sparse(x: Tensor) -> SparseCodes:
        chosen = (x @ case.W_dec.T).topk(ACTIVE, dim=-1)
        return SparseCodes(chosen.indices, chosen.values.relu(), LATENTS)

    spliced = SplicedModel(case, dense)
    codes = sparse(case.state.x)
    gradient = LayerGradientXActivation(spliced, spliced.codes).attribute(case.images)
    found = attribution_patching(case.score, case.state.x, codes, case.W_dec)
    torch.testing.assert_close(to_dense(found, codes), gradient.detach(), rtol=1e-7, atol=1e-11)

    others = case.images.flip(0) + 0.3
    change = minus_counterfactual(codes, sparse(case.cut.prefix(others).x))
    integrated = LayerIntegratedGradients(spliced, spliced.codes).attribute(
        case.images,
        baselines=others,
        n_steps=6,
        method="gausslegendre",
        internal_batch_size=BATCH,
    )
    found = integrated_gradients(case.score, case.state.x, change, case.W_dec, n_steps=6)
    torch.testing.assert_close(to_dense(found, change), integrated.detach(), rtol=1e-6, atol=1e-10)


def to_dense(attributions: Tensor, codes: SparseCodes) -> Tensor:
    return codes._replace(values=attributions).to_dense().detach()
