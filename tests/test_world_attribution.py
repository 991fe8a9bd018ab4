"""Parts of an attribution and estimates beside the exact effect, against plain float64 loops."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Site, image_tower, load_clip
from clipattr.jobs import world_attribution
from clipattr.jobs.untrained import build_untrained
from clipattr.jobs.world_attribution import (
    Estimates,
    compare_with_exact,
    measure_corrections,
    read_estimates,
)
from clipattr.jobs.world_tables import exact_result
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from tests.tiny import save_tiny_clip

N_IMAGES, N_LATENTS, K = 25, 24, 8
DRAW = {"resamples": 200, "seed": 0}


class Scene(NamedTuple):
    spliced: Spliced
    x: Tensor
    weights: Tensor
    targets: Tensor


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    clip = load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(N_IMAGES, 32, generator=generator) + 1
    sae = TopKSae(d_model=32, n_latents=N_LATENTS, k=K, generator=generator)
    sae.initialise_from(x)
    sae.requires_grad_(False)
    sae.b_enc -= 0.1  # so that some of the k do not fire, and slots are padded
    weights = normalize(torch.randn(3, 16, generator=generator), dim=1)
    targets = torch.randint(3, (N_IMAGES,), generator=generator)
    return Scene(Spliced(image_tower(clip.model).cut(Site()), sae), x, weights, targets)


@pytest.fixture(scope="module")
def estimates(scene) -> Estimates:
    return read_estimates(*scene)


def plain_embedding(scene: Scene, x: Tensor) -> Tensor:
    layer = scene.spliced.cut.last_layer(torch.float64)
    bar = (x - x.mean()) / ((x - x.mean()).square().mean() + layer.eps).sqrt()
    return (layer.gamma * bar + layer.beta) @ layer.projection + layer.bias


def plain_parts(scene: Scene, image: int, latent: int, activation: float) -> dict[str, float]:
    """Every number of one latent of one image, written out."""
    layer = scene.spliced.cut.last_layer(torch.float64)
    x = scene.x[image].double().requires_grad_()
    v = scene.spliced.sae.W_dec[latent].double()
    w = scene.weights[int(scene.targets[image])].double()

    def score(rows: Tensor) -> Tensor:
        return normalize(plain_embedding(scene, rows), dim=0) @ w

    (gradient,) = torch.autograd.grad(score(x), x)
    embedding = plain_embedding(scene, x)
    s = ((x - x.mean()).square().mean() + layer.eps).sqrt()
    unit, scale = embedding / embedding.norm(), activation / (s * embedding.norm())
    moved = ((v - v.mean()) * layer.gamma) @ layer.projection
    direct = normalize(plain_embedding(scene, v), dim=0) @ w
    found = {
        "exact": score(x) - score(x - activation * v),
        "attribution_patching": activation * (gradient @ v),
        "logit_lens": direct,
        "act_times_logit_lens": activation * direct,
        "lens": scale * (moved @ w),
        "along_embedding": scale * (moved @ unit) * score(x),
    }
    return {name: float(value.detach()) for name, value in found.items()}


@pytest.mark.parametrize("rows_at_a_time", [4, 256])
def test_estimates_equal_a_plain_loop(scene, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(world_attribution, "_ROWS_AT_A_TIME", rows_at_a_time)
    found = read_estimates(*scene)
    codes = scene.spliced.sae.encode(scene.x)
    assert not found.is_active.all()
    tables = found._asdict() | found.parts._asdict()
    for image, slot in found.is_active.nonzero().tolist():
        latent, activation = int(codes.indices[image, slot]), float(codes.values[image, slot])
        expected = plain_parts(scene, image, latent, activation)
        for name, value in expected.items():
            assert float(tables[name][image, slot]) == pytest.approx(value, abs=1e-5), name
        third = expected["lens"] - expected["along_embedding"] - expected["attribution_patching"]
        assert float(found.parts.along_state[image, slot]) == pytest.approx(third, abs=1e-5)
    for name in ("exact", "attribution_patching", "act_times_logit_lens"):
        assert (tables[name][~found.is_active] == 0).all()


def test_corrections_equal_a_plain_loop(estimates):
    found = measure_corrections(estimates, **DRAW)
    parts, is_active = estimates.parts, estimates.is_active
    whole = sum(abs(float(value)) for value in parts.lens[is_active])
    assert found.size.keys() == {"along_embedding", "along_state"}
    for name, size in found.size.items():
        expected = sum(abs(float(value)) for value in getattr(parts, name)[is_active]) / whole
        assert size.mean == pytest.approx(expected)
        assert size.low < expected < size.high
    steps = {
        "logit_lens": estimates.logit_lens,
        "act_times_logit_lens": estimates.act_times_logit_lens,
        "lens_part": parts.lens,
        "without_along_embedding": parts.lens - parts.along_embedding,
        "attribution_patching": parts.lens - parts.along_embedding - parts.along_state,
    }
    means = {}
    for name, step in steps.items():
        each = [
            spearmanr(step[image][chosen], estimates.exact[image][chosen]).statistic
            for image, chosen in enumerate(is_active)
            if chosen.sum() > 2
        ]
        means[name] = np.mean(each)
        assert found.agreement[name].mean == pytest.approx(means[name], abs=1e-9), name
    gain = means["attribution_patching"] - means["lens_part"]
    assert found.gain.mean == pytest.approx(gain, abs=1e-9)
    correlation = pearsonr(parts.lens[is_active], estimates.attribution_patching[is_active])
    assert found.lens_part_pearson.mean == pytest.approx(correlation.statistic, abs=1e-9)


def test_estimates_beside_the_exact_effect(estimates, monkeypatch):
    monkeypatch.setattr(world_attribution, "PAIRS_DRAWN", 40)
    found = compare_with_exact(estimates, **DRAW)
    is_active = estimates.is_active
    exact, patching, lens = (
        each[is_active].numpy()
        for each in (
            estimates.exact,
            estimates.attribution_patching,
            estimates.act_times_logit_lens,
        )
    )
    assert (found.n_images, found.n_pairs) == (N_IMAGES, len(exact))
    expected = [pearsonr(each, exact).statistic for each in (patching, lens)]
    assert [each.mean for each in found.pearson.values()] == pytest.approx(expected)
    assert found.difference.mean == pytest.approx(expected[0] - expected[1])
    (scale,) = np.linalg.lstsq(lens[:, None], exact, rcond=None)[0]
    assert found.lens_scale == pytest.approx(scale)
    pairs = {tuple(np.round(row, 9)) for row in zip(exact, patching, scale * lens, strict=True)}
    drawn = [tuple(np.round(row, 9)) for row in found.drawn.numpy()]
    assert len(drawn) == len(set(drawn)) == 40
    assert set(drawn) <= pairs
    torch.testing.assert_close(compare_with_exact(estimates, **DRAW).drawn, found.drawn)
    other = compare_with_exact(estimates, resamples=200, seed=1)
    assert not torch.equal(other.drawn, found.drawn)


def test_latents_that_never_fire_have_no_numbers(estimates):
    silent = estimates._replace(is_active=torch.zeros_like(estimates.is_active))
    found = measure_corrections(silent, **DRAW)
    for interval in (*found.size.values(), found.gain, found.lens_part_pearson):
        assert np.isnan(interval).all()
    against = compare_with_exact(silent, **DRAW)
    assert against.n_pairs == 0
    assert np.isnan(against.difference).all()
    assert exact_result(against) is None
    assert exact_result(compare_with_exact(estimates, **DRAW)) is not None


def test_a_sample_is_never_larger_than_what_there_is(estimates):
    assert len(compare_with_exact(estimates, **DRAW).drawn) == int(estimates.is_active.sum())


def test_an_untrained_dictionary_has_the_size_of_the_trained_one(scene):
    control = build_untrained(scene.spliced, scene.x, k=3, seed=5)
    assert control.cut is scene.spliced.cut
    assert control.sae.W_dec.shape == scene.spliced.sae.W_dec.shape
    assert control.sae.max_active == 3
    assert not any(parameter.requires_grad for parameter in control.sae.parameters())
    twin = build_untrained(scene.spliced, scene.x, k=3, seed=5)
    torch.testing.assert_close(twin.sae.W_dec, control.sae.W_dec)
    cosines = (control.sae.directions @ scene.spliced.sae.directions.T).abs()
    assert float(cosines.max()) < 0.95
