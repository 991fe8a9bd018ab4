"""What a better estimate than the first order costs, on the bundled CLIP and rendered images.

    python benchmarks/attribution_accuracy.py [--images 32]

The class token behind the first block, a middle one and the last; prompts as classes, that with
the highest score. No dictionary is trained: its latents point at rows of the data (512 latents,
k = 16), so that they are directions that the model uses.

passes     runs of the suffix per image; a backward pass through frozen weights counts as one
error      sum |R - exact| / sum |exact|
spearman   with exact patching, over the active latents of an image, mean
gap        |sum_j R_j - (y(x) - y(rest))|, summed over images, over the same sum of the change
"""

import argparse

import torch
from torch import Tensor

from clipattr.attribution import (
    HeadScore,
    at_reference,
    attribution_patching,
    clean_scores,
    corrected_patching,
    exact_patching,
    integrated_gradients,
    two_point,
)
from clipattr.clip import Clip, Site, image_tower, load_clip, text_head
from clipattr.codes import SparseCodes
from clipattr.metrics.ranks import spearman
from clipattr.sae import TopKSae
from clipattr.world.render import draw_scene
from clipattr.world.sampling import RATES_OF_SPLIT, Split, generator_of, sample_scene
from clipattr.world.vocabulary import NOUNS

N_ROWS, N_LATENTS, K, CHUNK = 512, 512, 16, 64
Arguments = tuple[HeadScore, Tensor, SparseCodes, Tensor]


def main() -> None:
    """One table per site."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clip = load_clip("planted-world")
    pixels = torch.stack([render(clip, number) for number in range(N_ROWS)])
    weights = text_head(clip, NOUNS).weights
    n_layers = image_tower(clip.model).n_layers
    for layer in (0, n_layers // 2 - 1, n_layers - 1):
        print(f"\nclass token behind block {layer + 1} of {n_layers}, {options.images} images")
        show(build(clip, layer, pixels, weights, options.images))


def render(clip: Clip, number: int) -> Tensor:
    """An image of the test split, as the model reads it."""
    scene = sample_scene(generator_of(0, Split.test, number), RATES_OF_SPLIT[Split.test])
    return clip.preprocess(draw_scene(scene))


@torch.no_grad()
def build(clip: Clip, layer: int, pixels: Tensor, weights: Tensor, n_images: int) -> Arguments:
    """A dictionary on the rows of all images; the first ones are attributed."""
    cut = image_tower(clip.model).cut(Site(layer=layer))
    sae = TopKSae(d_model=cut.d_site, n_latents=N_LATENTS, k=K).requires_grad_(False)
    sae.initialise_from(cut.read(pixels), from_data=True)
    x, rest = cut.prefix(pixels[:n_images])
    targets = (cut.suffix(x, rest) @ weights.T).argmax(dim=1)
    return HeadScore(cut.suffix, weights, targets, rest=rest), x, sae.encode(x), sae.W_dec


def show(arguments: Arguments) -> None:
    """Every estimate next to exact patching."""
    score, x, codes, W_dec = arguments
    exact = exact_patching(*arguments, chunk_rows=CHUNK)
    change = clean_scores(score, x) - clean_scores(score, at_reference(x, codes, W_dec))
    estimates = {
        "attribution patching": (2, attribution_patching(*arguments)),
        "two points": (4, two_point(*arguments)),
    }
    for n_points in (2, 4, 8):
        found = integrated_gradients(*arguments, n_points)
        estimates[f"integrated gradients, {n_points} points"] = (2 * n_points, found)
    for n_exact in (2, 4, 8):
        found = corrected_patching(*arguments, n_exact, CHUNK)
        estimates[f"top {n_exact} exact"] = (2 + n_exact, found)
    estimates["exact patching"] = (K + 1, exact)
    print(f"{'':36}{'passes':>8}{'error':>9}{'spearman':>10}{'gap':>8}")
    for name, (passes, found) in estimates.items():
        error = (found - exact).abs().sum() / exact.abs().sum()
        rank = spearman(found, exact, codes.is_active).nanmean()
        gap = (found.sum(dim=1) - change).abs().sum() / change.abs().sum()
        print(f"{name:36}{passes:8}{error:9.3f}{rank:10.3f}{gap:8.3f}")


if __name__ == "__main__":
    main()
