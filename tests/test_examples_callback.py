"""Examples at a site with tokens, read through the tower, against dense codes."""

import pytest
import torch
from torch import Tensor

from clipattr.callbacks import ExamplesCallback, take_all
from clipattr.clip import Site, image_tower, load_clip
from clipattr.codes import Pool
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from tests.tiny import save_tiny_clip

N_IMAGES, N_LATENTS, N_EXAMPLES, N_SAMPLE = 11, 24, 4, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spliced, list]:
    """An SAE on the patches of layer 0, and two batches of states."""
    clip = load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    generator = torch.Generator().manual_seed(0)
    size = clip.model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    images = torch.randn(N_IMAGES, 3, side, side, generator=generator)
    cut = image_tower(clip.model).cut(Site(0, tokens="spatial"))
    with torch.no_grad():
        x, rest = cut.prefix(images)
        sae = TopKSae(d_model=x.shape[-1], n_latents=N_LATENTS, k=3, generator=generator)
        sae.initialise_from(x.flatten(0, 1))
        sae.requires_grad_(False)
        spliced = Spliced(cut, sae)
        batches = []
        for rows in torch.randperm(N_IMAGES, generator=generator).split(6):
            x, rest = cut.prefix(images[rows])
            batches.append((x, rows, rest))
    return spliced, batches


def dense_codes(spliced: Spliced, batches: list) -> Tensor:
    """[image, token, latent]."""
    parts = {
        int(row): codes
        for x, rows, _ in batches
        for row, codes in zip(rows, spliced.sae.encode(x).to_dense(), strict=True)
    }
    return torch.stack([parts[row] for row in range(N_IMAGES)])


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_images_patches_and_sample_are_those_of_dense_codes(scene, pool: Pool):
    spliced, batches = scene
    dense = dense_codes(spliced, batches)
    callback = ExamplesCallback(
        n_latents=N_LATENTS,
        n_examples=N_EXAMPLES,
        pool=pool,
        n_tokens=dense.shape[1],
        n_sample=N_SAMPLE,
    )
    take_all(spliced, batches, callback)
    callback.finish()
    pooled = {"max": dense.amax(1), "mean": dense.mean(1), "sum": dense.sum(1)}[pool]
    expected = pooled.T.sort(dim=1, descending=True, stable=True).values[:, :N_EXAMPLES]
    torch.testing.assert_close(callback.result.values, expected)
    best = dense.amax(dim=1).T.sort(dim=1, descending=True, stable=True).values
    torch.testing.assert_close(callback.patches.values, best[:, :N_EXAMPLES])
    for latent in range(N_LATENTS):
        for place in range(N_EXAMPLES):
            value = callback.result.values[latent, place]
            if value > 0:
                image = callback.result.ids[latent, place]
                torch.testing.assert_close(pooled[image, latent], value)
                image, token = (column[latent, place] for column in callback.patches[:2])
                assert dense[image, token, latent] == callback.patches.values[latent, place]
        fires = set(pooled[:, latent].nonzero()[:, 0].tolist())
        drawn = [row for row in callback.sample.ids[latent].tolist() if row >= 0]
        assert len(set(drawn)) == len(drawn) == min(N_SAMPLE, len(fires))
        assert set(drawn) <= fires


def test_without_tokens_there_are_no_patches(scene):
    callback = ExamplesCallback(n_latents=N_LATENTS, n_examples=2)
    spliced, batches = scene
    of_one_token = [(x[:, 0], rows, rest) for x, rows, rest in batches]
    take_all(spliced, of_one_token, callback)
    callback.finish()
    assert callback.patches is None
    assert callback.sample is None
    assert callback.result.ids.shape == (N_LATENTS, 2)
