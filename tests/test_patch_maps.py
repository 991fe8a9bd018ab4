"""Where a latent is in an image, against forward passes, dense codes and a planted sticker."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from clipattr.clip import Site, image_tower, load_clip
from clipattr.codes import SparseCodes
from clipattr.jobs.patch_maps import map_codes, map_reads, why_no_maps
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relu import JumpReluSae, ReluSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.world.factors import Sticker
from clipattr.world.render import IMAGE_SIZE, draw_scene
from clipattr.world.sampling import BALANCED, Split, generator_of, sample_scene
from tests.test_towers_options import OPEN_CLIP, OPTIONS, subject_of

IMAGES = torch.tensor([1, 0, 1, 0])
LATENTS = torch.tensor([3, 7, 0, 3])
KINDS = {
    "topk": lambda **rest: TopKSae(k=5, **rest),
    "relu": lambda **rest: ReluSae(sparsity=0.1, **rest),
    "jump_relu": lambda **rest: JumpReluSae(sparsity=0.1, bandwidth=0.5, **rest),
}


def sae_at(width: int, rows: Tensor, kind: str, normalisation: Normalisation) -> Sae:
    generator = torch.Generator().manual_seed(2)
    sae = KINDS[kind](d_model=width, n_latents=24, normalisation=normalisation, generator=generator)
    sae.initialise_from(rows)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(24, generator=generator))
    return sae.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalisation", Normalisation)
def test_the_parts_add_up_to_what_the_encoder_says(kind: str, normalisation: Normalisation):
    subject = subject_of(OPEN_CLIP)
    cut = subject.tower.cut(Site(1, "residual", "cls"))
    with torch.no_grad():
        x = cut.read(subject.inputs)
    sae = sae_at(cut.d_site, x + torch.randn_like(x[:1]), kind, normalisation)
    found = map_reads(Spliced(cut, sae), subject.inputs, IMAGES, LATENTS, n_points=40)
    output = sae(x)
    expected = (output.pre * output.unit)[IMAGES, LATENTS]
    total = found.patches.sum(dim=1) + found.other_tokens + found.nothing
    assert found.patches.shape == (4, 8)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert (found.patches.std(dim=1) > 1e-4).all()


def test_sites_without_a_map():
    tower = subject_of(OPEN_CLIP | OPTIONS["average"]).tower
    assert "pools all patches" in str(why_no_maps(tower.cut(Site(-1, "embedding", "cls"))))
    assert why_no_maps(tower.cut(Site(1, "residual", "cls"))) is None
    assert why_no_maps(tower.cut(Site(1, "residual", "spatial"))) is None
    tower.trunk.blocks[0] = replace(tower.trunk.blocks[0], attention=torch.nn.Identity())
    assert "not read head by head" in str(why_no_maps(tower.cut(Site(1, "residual", "cls"))))


@pytest.mark.parametrize("n_prefix", [0, 2])
def test_activations_at_patches_are_those_of_dense_codes(n_prefix: int):
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(10)])
    values = torch.rand(10, 4, generator=generator)
    values[values < 0.3] = 0
    codes = SparseCodes(indices, values, 9).reshape(2, 5)
    found = map_codes(codes, IMAGES, LATENTS, n_prefix)
    dense = codes.to_dense()
    for pair, (image, latent) in enumerate(zip(IMAGES, LATENTS, strict=True)):
        assert torch.equal(found[pair], dense[image, n_prefix:, latent])


def test_a_planted_sticker_is_found():
    """The latent is the direction in which the class token moves when the tag is pasted."""
    clip = load_clip("planted-world")
    tower = image_tower(clip.model)
    cut = tower.cut(Site(-1, "residual", "cls"))
    scenes = [sample_scene(generator_of(0, Split.test, number), BALANCED) for number in range(24)]
    bare = [replace(scene, stickers=()) for scene in scenes]
    tagged = [replace(scene, stickers=(Sticker.tag.name,)) for scene in scenes]
    pictures = [[draw_scene(scene) for scene in some] for some in (bare, tagged)]
    without, with_tag = (torch.stack([clip.preprocess(each) for each in some]) for some in pictures)
    with torch.no_grad():
        moved = (cut.read(with_tag) - cut.read(without)).mean(dim=0)
    sae = TopKSae(d_model=len(moved), n_latents=2, k=1, normalisation=Normalisation.none)
    sae.requires_grad_(False)
    sae.W_enc[1] = moved / moved.norm()
    latents, images = torch.ones(24, dtype=torch.int64), torch.arange(24)
    grid = tower.patch_grid()
    maps = map_reads(Spliced(cut, sae), with_tag, images, latents).patches.unflatten(1, grid)
    shares, areas = [], []
    for before, after, found in zip(*pictures, maps.abs(), strict=True):
        differs = (np.asarray(before) != np.asarray(after)).any(axis=2)
        side = IMAGE_SIZE // grid[0]
        touched = torch.from_numpy(differs.reshape(grid[0], side, grid[1], side).any(axis=(1, 3)))
        shares.append(float(found[touched].sum() / found.sum()))
        areas.append(float(touched.double().mean()))
    assert np.mean(areas) < 0.1
    assert np.mean(shares) > 0.5
