"""The closed form at the last layer and the logit-lens identity against autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from clipattr.attribution.closed_form import (
    LastLayerHead,
    build_lens_table,
    class_attributions,
    closed_form_attribution,
    lens_parts,
)
from clipattr.attribution.gradients import attribution_patching
from clipattr.attribution.reliance import add_reliance, empty_reliance, reliance_matrix
from clipattr.attribution.score import HeadScore
from clipattr.codes import SparseCodes

BATCH, MODEL, EMBED, LATENTS, ACTIVE, CLASSES = 6, 16, 9, 40, 5, 7
Activations = tuple[Tensor, SparseCodes, Tensor]


@pytest.fixture
def head() -> LastLayerHead:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # A large eps and rows of any length: neither may be assumed away.
    return LastLayerHead(
        gamma=1 + 0.3 * draw(MODEL),
        beta=0.5 * draw(MODEL),
        eps=0.05,
        projection=draw(MODEL, EMBED),
        bias=draw(EMBED),
        weights=draw(CLASSES, EMBED),
    )


@pytest.fixture
def activations() -> Activations:
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(LATENTS, MODEL, generator=generator, dtype=torch.float64) + 0.2
    indices = torch.rand(BATCH, LATENTS, generator=generator).argsort(dim=1)[:, :ACTIVE]
    values = torch.rand(BATCH, ACTIVE, generator=generator, dtype=torch.float64) + 0.1
    values[2, 3:] = 0.0
    codes = SparseCodes(indices, values, LATENTS)
    rest = torch.randn(BATCH, MODEL, generator=generator, dtype=torch.float64)
    return rest + codes.decode(W_dec), codes, W_dec


def autograd_attribution(head: LastLayerHead, activations: Activations, targets: Tensor) -> Tensor:
    """Attribution patching on torch's own layer norm."""

    def suffix(x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, (MODEL,), head.gamma, head.beta, head.eps)
        return normed @ head.projection + head.bias

    bias = torch.zeros(CLASSES, dtype=torch.float64)
    return attribution_patching(HeadScore(suffix, head.weights, targets, bias), *activations)


def test_closed_form_equals_autograd(head: LastLayerHead, activations: Activations):
    targets = torch.tensor([0, 3, 6, 3, 1, 2])
    expected = autograd_attribution(head, activations, targets)
    actual = closed_form_attribution(head, *activations, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert actual[2, 3:].eq(0).all()
    assert actual.abs().max() > 0.01


def test_identity_equals_autograd_for_every_class(head: LastLayerHead, activations: Activations):
    table = build_lens_table(head, activations[2])
    together = class_attributions(head, table, *activations)
    for target in range(CLASSES):
        expected = autograd_attribution(head, activations, torch.full((BATCH,), target))
        torch.testing.assert_close(together[..., target], expected, rtol=1e-9, atol=1e-12)


def test_reliance_matrix_equals_a_loop_over_rows_and_slots(
    head: LastLayerHead, activations: Activations
):
    x, codes, W_dec = activations
    table = build_lens_table(head, W_dec)
    expected = torch.zeros(CLASSES, LATENTS, dtype=torch.float64)
    for target in range(CLASSES):
        attributions = autograd_attribution(head, activations, torch.full((BATCH,), target))
        for image in range(BATCH):
            for slot in range(ACTIVE):
                expected[target, codes.indices[image, slot]] += attributions[image, slot]
    actual = reliance_matrix(head, table, x, codes, W_dec)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_parts_of_the_lens_add_up_and_the_lens_is_image_free_up_to_a_scale(
    head: LastLayerHead, activations: Activations
):
    x, codes, W_dec = activations
    targets = torch.tensor([0, 3, 6, 3, 1, 2])
    table = build_lens_table(head, W_dec)
    parts = lens_parts(head, table, x, codes, W_dec, targets)
    expected = autograd_attribution(head, activations, targets)
    found = parts.lens - parts.along_embedding - parts.along_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for image in range(BATCH):
        centred = W_dec[codes.indices[image]]
        centred = centred - centred.mean(dim=1, keepdim=True)
        row = head.weights[targets[image]]
        lens = codes.values[image] * ((centred * head.gamma) @ head.projection @ row)
        normed = layer_norm(x[image], (MODEL,), head.gamma, head.beta, head.eps)
        embedding = normed @ head.projection + head.bias
        scale = (x[image].var(correction=0) + head.eps).sqrt() * embedding.norm()
        torch.testing.assert_close(parts.lens[image], lens / scale)
    # Latents along the embedding and along the state are where the lens is wrong.
    assert min(part.abs().max() for part in parts) > 0.01


def test_reliance_of_another_head_needs_no_second_pass(
    head: LastLayerHead, activations: Activations
):
    x, codes, W_dec = activations
    sums = empty_reliance(build_lens_table(head, W_dec))
    for rows in torch.arange(BATCH).split(4):
        few = build_lens_table(head._replace(weights=head.weights[:1]), W_dec)
        add_reliance(sums, head, few, x[rows], codes.select(rows), W_dec)
    other = head._replace(weights=head.weights.flip(0)[:3])
    found = sums.matrix(other, build_lens_table(other, W_dec))
    expected = reliance_matrix(head, build_lens_table(head, W_dec), x, codes, W_dec)
    torch.testing.assert_close(found, expected.flip(0)[:3], rtol=1e-10, atol=1e-13)


def test_reliance_touches_the_rows_of_active_latents_alone(
    head: LastLayerHead, activations: Activations
):
    x, codes, W_dec = activations
    table = build_lens_table(head, W_dec)
    sums = empty_reliance(table)
    add_reliance(sums, head, table, x, codes, W_dec)
    active = set(codes.indices[codes.is_active].tolist())
    for latent in range(LATENTS):
        assert bool(sums.state[latent].abs().sum() > 0) == (latent in active)
        assert bool(sums.scale[latent] > 0) == (latent in active)


def test_reliance_matrices_of_batches_add_up(head: LastLayerHead, activations: Activations):
    x, codes, W_dec = activations
    table = build_lens_table(head, W_dec)
    parts = [
        reliance_matrix(head, table, x[rows], codes.select(rows), W_dec)
        for rows in torch.arange(BATCH).split(4)
    ]
    whole = reliance_matrix(head, table, x, codes, W_dec)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


def test_float32_inputs_give_a_float64_sum_close_to_the_exact_one(
    head: LastLayerHead, activations: Activations
):
    x, codes, W_dec = activations
    single = LastLayerHead(*(p.float() if isinstance(p, Tensor) else p for p in head))
    codes_single = codes._replace(values=codes.values.float())
    table = build_lens_table(single, W_dec.float())
    rough = reliance_matrix(single, table, x.float(), codes_single, W_dec.float())
    exact = reliance_matrix(head, build_lens_table(head, W_dec), x, codes, W_dec)
    assert rough.dtype == torch.float64
    torch.testing.assert_close(rough, exact, rtol=1e-3, atol=1e-5)
