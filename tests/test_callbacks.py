"""Evaluation callbacks through a real Trainer.test, each number against a plain float64 loop."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks import (
    ExamplesCallback,
    FaithfulnessCallback,
    ReconstructionCallback,
    RelianceCallback,
)
from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.choices import Method
from clipattr.config.schema import DeviceConfig
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule, rows_loader
from clipattr.training.trainer import build_tester
from tests.tiny import save_tiny_clip

N_IMAGES, N_LATENTS, K = 30, 24, 4
# Of every class, where an area is divided by the score.
BIAS = 2.0


class Scene(NamedTuple):
    spliced: Spliced
    x: Tensor
    weights: Tensor


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    clip = load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(N_IMAGES, 32, generator=generator) + 1
    sae = TopKSae(d_model=32, n_latents=N_LATENTS, k=K, generator=generator)
    sae.initialise_from(x)
    sae.requires_grad_(False)
    weights = normalize(torch.randn(3, 16, generator=generator), dim=1)
    return Scene(Spliced(image_tower(clip.model).cut(Site()), sae), x, weights)


def run(scene: Scene, folder, *callbacks) -> None:
    settings = DeviceConfig(progress=False, accelerator="cpu")
    trainer = build_tester(settings, folder, callbacks=list(callbacks))
    # A batch size that does not divide the set: the last batch is short.
    trainer.test(SplicedModule(scene.spliced), rows_loader(scene.x, batch_size=8), verbose=False)


def plain_score(scene: Scene, x: Tensor, target: int) -> float:
    """Cosine of one activation with one row of the weights, written out."""
    layer = scene.spliced.cut.last_layer(torch.float64)
    x = x.double()
    bar = (x - x.mean()) / ((x - x.mean()).square().mean() + layer.eps).sqrt()
    embedding = (layer.gamma * bar + layer.beta) @ layer.projection + layer.bias
    return float(embedding @ scene.weights[target].double() / embedding.norm())


def contributions(scene: Scene, image: int) -> dict[int, Tensor]:
    """Latent -> a_j v_j of the image's active latents."""
    codes = scene.spliced.sae.encode(scene.x[image])
    return {
        int(j): a.double() * scene.spliced.sae.W_dec[j].double()
        for j, a in zip(codes.indices, codes.values, strict=True)
        if a > 0
    }


def plain_deletion(scene: Scene, image: int, target: int, order: list[int]) -> list[float]:
    parts = contributions(scene, image)
    x = scene.x[image].double()
    curve = [plain_score(scene, x, target)]
    for j in order:
        x = x - parts[j]
        curve.append(plain_score(scene, x, target))
    return curve + [curve[-1]] * (K + 1 - len(curve))


def exact_effects(scene: Scene, image: int, target: int) -> dict[int, float]:
    x, parts = scene.x[image].double(), contributions(scene, image)
    clean = plain_score(scene, x, target)
    return {j: clean - plain_score(scene, x - part, target) for j, part in parts.items()}


def faithfulness(scene: Scene, targets: Tensor, **changes) -> FaithfulnessCallback:
    options = {
        "methods": list(Method),
        "n_steps": K,
        "ig_steps": 64,
        "overlap_top": 2,
        "resamples": 50,
        "seed": 0,
        "bias": torch.full((3,), BIAS),
    }
    return FaithfulnessCallback(scene.spliced, scene.weights, targets, **(options | changes))


def test_faithfulness_equals_a_plain_loop(scene, tmp_path):
    n_images = 11
    targets = torch.arange(n_images) % 3
    callback = faithfulness(scene, targets)
    run(scene, tmp_path, callback)
    area, clean = 0.0, 0.0
    for image in range(n_images):
        effects = exact_effects(scene, image, int(targets[image]))
        order = sorted(effects, key=lambda j: -effects[j])
        curve = [BIAS + each for each in plain_deletion(scene, image, int(targets[image]), order)]
        area += sum((a + b) / 2 for a, b in zip(curve[:-1], curve[1:], strict=True)) / K
        clean += curve[0]
    result = callback.results[Method.exact]
    assert result.deletion_auc.mean == pytest.approx(area / clean, rel=1e-4)
    assert result.spearman_exact.mean == pytest.approx(1.0)
    assert result.overlap_exact.mean == 1.0
    assert result.deletion_curve[0] == pytest.approx(clean / n_images, rel=1e-4)


def test_difference_to_logit_lens_is_that_of_the_means(scene, tmp_path):
    callback = faithfulness(scene, torch.zeros(N_IMAGES, dtype=torch.int64))
    run(scene, tmp_path, callback)
    lens = callback.results[Method.logit_lens]
    assert lens.minus_logit_lens is None
    for method in set(Method) - {Method.logit_lens}:
        result = callback.results[method]
        expected = result.deletion_auc.mean - lens.deletion_auc.mean
        assert result.minus_logit_lens.mean == pytest.approx(expected, abs=1e-9)
        low, high = result.minus_logit_lens.low, result.minus_logit_lens.high
        assert low <= result.minus_logit_lens.mean <= high


def test_every_method_is_another_one(scene, tmp_path):
    callback = faithfulness(scene, torch.zeros(N_IMAGES, dtype=torch.int64))
    run(scene, tmp_path, callback)
    curves = {method: tuple(callback.results[method].deletion_curve) for method in Method}
    assert len(set(curves.values())) >= len(curves) - 1  # two orders may agree on 30 images
    assert curves[Method.random] != curves[Method.exact]
    assert callback.completeness_gap < 0.01


def test_all_methods_end_where_every_latent_is_gone(scene, tmp_path):
    callback = faithfulness(scene, torch.zeros(N_IMAGES, dtype=torch.int64))
    run(scene, tmp_path, callback)
    ends = [callback.results[method].deletion_curve[-1] for method in Method]
    starts = [callback.results[method].insertion_curve[0] for method in Method]
    assert max(ends) - min(ends) < 1e-5
    assert starts == pytest.approx(ends, abs=1e-5)


def test_reliance_is_the_mean_of_single_gradients(scene, tmp_path):
    callback = RelianceCallback(scene.spliced, scene.weights)
    run(scene, tmp_path, callback)
    expected = torch.zeros(3, N_LATENTS, dtype=torch.float64)
    for image in range(N_IMAGES):
        parts = contributions(scene, image)
        for target in range(3):
            x = scene.x[image].clone().requires_grad_()
            unit = normalize(scene.spliced.cut.suffix(x[None]), dim=1)[0]
            (gradient,) = torch.autograd.grad(unit @ scene.weights[target], x)
            for j, part in parts.items():
                expected[target, j] += part @ gradient.double() / N_IMAGES
    torch.testing.assert_close(callback.mean_attribution, expected, atol=1e-6, rtol=1e-4)


def test_reconstruction_and_identity_splice(scene, tmp_path):
    callback = ReconstructionCallback(scene.spliced)
    run(scene, tmp_path, callback)
    x = scene.x.double()
    codes = scene.spliced.sae.encode(scene.x)
    recon = scene.spliced.sae.decode(codes).double()
    fvu = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    assert callback.sae["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert callback.sae["l0"] == pytest.approx(float(codes.is_active.sum(1).double().mean()))
    fired = {int(j) for j in codes.indices[codes.is_active]}
    assert callback.sae["dead_fraction"] == pytest.approx(1 - len(fired) / N_LATENTS)
    assert callback.splice["max_error"] < 1e-5


def test_identity_splice_is_measured_not_assumed(scene, tmp_path, monkeypatch):
    clean = Spliced.embed
    monkeypatch.setattr(
        Spliced, "embed", lambda self, codes, error, rest: clean(self, codes, 0 * error, rest)
    )
    callback = ReconstructionCallback(scene.spliced)
    run(scene, tmp_path, callback)
    assert callback.splice["max_error"] > 1e-2


def test_examples_are_the_largest_activations(scene, tmp_path):
    callback = ExamplesCallback(n_latents=N_LATENTS, n_examples=3)
    run(scene, tmp_path, callback)
    dense = scene.spliced.sae.encode(scene.x).to_dense()
    for latent in range(N_LATENTS):
        order = dense[:, latent].argsort(descending=True, stable=True)[:3]
        expected = [int(i) if dense[i, latent] > 0 else -1 for i in order]
        assert callback.result.ids[latent].tolist() == expected


def test_an_edit_is_the_edit_of_the_activation(scene):
    rows = torch.arange(N_IMAGES)
    readout = scene.spliced.read(scene.x, rows)
    halved = readout.codes._replace(values=readout.codes.values / 2)
    edited = scene.spliced.embed(halved, readout.error)
    x = scene.x - readout.codes.decode(scene.spliced.sae.W_dec) / 2
    torch.testing.assert_close(edited, scene.spliced.cut.suffix(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_rows_without_padding(scene, world_size):
    seen: list[int] = []
    for rank in range(world_size):
        for x, rows in rows_loader(scene.x, batch_size=7, rank=rank, world_size=world_size):
            assert torch.equal(x, scene.x[rows])
            seen += rows.tolist()
    assert sorted(seen) == list(range(N_IMAGES))
