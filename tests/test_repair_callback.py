"""Suppressed embeddings against hooks on the whole model, and over two processes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

from clipattr.callbacks.base import take_all
from clipattr.callbacks.suppressed import LatentMeans, SuppressedEmbeddings
from clipattr.clip import Site, image_tower, load_clip
from clipattr.errors import ConfigError
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from tests.tiny import save_tiny_clip

N_IMAGES, WIDTH, N_LATENTS, K = 5, 32, 24, 6
STRENGTHS = (0.0, 0.25, 1.0)
LATENTS, MEANS = torch.tensor([9, 2, 17]), torch.tensor([0.4, 0.0, -1.5])
PLACES = {"cls": slice(0, 1), "spatial": slice(1, None), "all": slice(None)}
SITES = [
    Site(),
    Site(layer=0, stream="residual", tokens="cls"),
    Site(layer=0, stream="residual", tokens="spatial"),
    Site(layer=0, stream="mlp", tokens="all"),
]


class Scene:
    """A tiny CLIP, images, and an SAE whose dimensions have units of their own."""

    def __init__(self, name: str, site: Site, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = load_clip(name).model.to(dtype)
        self.images = torch.randn(N_IMAGES, 3, 32, 32, generator=generator).to(dtype)
        cut = image_tower(self.model).cut(site)
        with torch.no_grad():
            self.state = cut.prefix(self.images)
        sae = TopKSae(
            d_model=WIDTH,
            n_latents=N_LATENTS,
            k=K,
            normalisation=Normalisation.standardise,
            generator=generator,
        ).to(dtype)
        sae.initialise_from(self.state.x.flatten(0, -2))
        self.spliced = Spliced(cut, sae.requires_grad_(False).eval())

    def batches(self, rows: Tensor):
        for chosen in rows.split(2) if len(rows) else ():
            yield self.state.x[chosen], chosen, self.state.rest.rows(chosen)

    def run(self, rows: Tensor, means: Tensor = MEANS) -> SuppressedEmbeddings:
        callback = SuppressedEmbeddings(self.spliced, LATENTS, means, STRENGTHS)
        take_all(self.spliced, self.batches(rows), callback)
        callback.finish()
        return callback


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("suppressed") / "clip")


def hooked(scene: Scene, strength: float) -> Tensor:
    """The whole model, where a hook edits the tokens of the site in a plain loop."""
    site, sae = scene.spliced.cut.site, scene.spliced.sae
    block = scene.model.visual.transformer.resblocks[site.layer]
    module = block.mlp if site.stream == "mlp" else block

    def hook(module: object, args: object, output: Tensor) -> Tensor:
        edited = output.clone()
        for image in range(len(edited)):
            for token in range(edited.shape[1])[PLACES[site.tokens]]:
                activations = sae.encode(output[image, token][None]).to_dense()[0]
                for latent, mean in zip(LATENTS.tolist(), MEANS.tolist(), strict=True):
                    direction = sae.W_dec[latent] * sae.input_spread
                    edited[image, token] -= strength * (activations[latent] - mean) * direction
        return edited

    with module.register_forward_hook(hook), torch.no_grad():
        return normalize(scene.model.encode_image(scene.images), dim=-1)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_equals_a_hook_on_the_whole_model(name: str, site: Site):
    scene = Scene(name, site)
    result = scene.run(torch.arange(N_IMAGES).flip(0)).result
    for number, strength in enumerate(STRENGTHS):
        expected = hooked(scene, strength)
        torch.testing.assert_close(result[number].double(), expected, rtol=0, atol=1e-7)
    assert (result[2] - result[0]).abs().max() > 1e-3


@pytest.mark.parametrize("site", SITES, ids=str)
def test_strength_0_is_the_model_bit_for_bit(name: str, site: Site):
    scene = Scene(name, site, torch.float32)
    found = scene.run(torch.arange(N_IMAGES))
    cut = scene.spliced.cut
    with torch.no_grad():
        parts = [cut.suffix(x, rest) for x, _, rest in scene.batches(torch.arange(N_IMAGES))]
    assert torch.equal(found.result[0], normalize(torch.cat(parts), dim=-1))
    assert found.rows.tolist() == list(range(N_IMAGES))


def test_means_equal_a_plain_loop(name: str):
    scene = Scene(name, SITES[2])
    means = LatentMeans(LATENTS, N_LATENTS)
    take_all(scene.spliced, scene.batches(torch.arange(N_IMAGES)), means)
    means.finish()
    dense = scene.spliced.sae.encode(scene.state.x).to_dense()
    expected = dense.flatten(0, 1).mean(dim=0)[LATENTS]
    torch.testing.assert_close(means.result, expected)
    assert int((expected > 0).sum()) >= 2


def test_one_image_and_one_latent(name: str):
    scene = Scene(name, Site())
    assert scene.run(torch.tensor([3])).result.shape == (len(STRENGTHS), 1, 16)
    means = LatentMeans(LATENTS[:1], N_LATENTS)
    take_all(scene.spliced, scene.batches(torch.tensor([3])), means)
    means.finish()
    assert means.result.shape == (1,)


@pytest.mark.parametrize("latents", [[], [3, 3], [-1], [N_LATENTS]])
def test_impossible_latents_are_refused(name: str, latents: list[int]):
    scene, chosen = Scene(name, Site()), torch.tensor(latents, dtype=torch.int64)
    with pytest.raises(ConfigError, match="between 0 and 23"):
        SuppressedEmbeddings(scene.spliced, chosen, torch.zeros(len(latents)), STRENGTHS)
    with pytest.raises(ConfigError, match="between 0 and 23"):
        LatentMeans(chosen, N_LATENTS)
    with pytest.raises(ConfigError, match="at least one"):
        SuppressedEmbeddings(scene.spliced, LATENTS, MEANS, [])


def compute_on(name: str, rows: Tensor) -> list[Tensor]:
    scene = Scene(name, Site())
    found = scene.run(rows)
    means = LatentMeans(LATENTS, N_LATENTS)
    take_all(scene.spliced, scene.batches(rows), means)
    means.finish()
    assert found.result is not None
    assert found.rows is not None
    assert means.result is not None
    return [found.result, found.rows, means.result]


def run_process(rank: int, name: str, folder: str, parts: list[list[int]]) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = torch.tensor(parts[rank], dtype=torch.int64)
    torch.save(compute_on(name, rows), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[[0, 2, 4], [3, 1]], [[0, 1, 2, 3, 4], []]])
def test_two_processes_equal_one(name: str, tmp_path: Path, parts: list[list[int]]):
    spawn(run_process, args=(name, str(tmp_path), parts), nprocs=2)
    expected = compute_on(name, torch.arange(N_IMAGES))
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted)
