"""What the atlas reads of every image, against plain loops, under true and under false names."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import HeadScore, attribution_patching
from clipattr.callbacks import (
    ClassReliance,
    ExamplesCallback,
    LatentsCallback,
    RelianceCallback,
    ShuffledNames,
    ShuffledReliance,
    take_all,
)
from clipattr.clip import Site, image_tower, load_clip
from clipattr.clip.cut import Rest
from clipattr.sae.topk import TopKSae
from clipattr.semantics.permutation import shuffle_latents
from clipattr.spliced import Spliced
from tests.tiny import save_tiny_clip

N_IMAGES, N_LATENTS, N_CLASSES, SEED = 12, 20, 3, 4
SITES = {"last": Site(1), "all": Site(0, "residual", "all")}


class Setting:
    """A tiny model with an SAE at each site, and batches of noise at it."""

    def __init__(self, folder: Path, name: str) -> None:
        clip = load_clip(save_tiny_clip(folder / "tiny"))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
        self.cut = image_tower(clip.model).cut(SITES[name])
        with torch.no_grad():
            self.state = self.cut.prefix(images)
        sae = TopKSae(d_model=32, n_latents=N_LATENTS, k=4, generator=generator)
        sae.initialise_from(self.state.x.flatten(0, -2))
        self.spliced = Spliced(self.cut, sae.requires_grad_(False))
        self.weights = normalize(torch.randn(N_CLASSES, 16, generator=generator), dim=1)
        rows = torch.arange(N_IMAGES)
        self.batches = [
            (self.state.x[part], rows[part], self.state.rest.rows(part))
            for part in (rows[7:], rows[:7])  # in another order than their numbers
        ]

    def attributions(self, image: int, number: int) -> Tensor:
        """[latent], dense, of one image for one class."""
        sae, row = self.spliced.sae, torch.tensor([image])
        rest = self.state.rest.rows(row)
        score = HeadScore(self.cut.suffix, self.weights, torch.tensor([number]), None, rest)
        x = self.state.x[row]
        codes = sae.encode(x)
        found = attribution_patching(score, x, codes, sae.directions)
        dense = torch.zeros(N_LATENTS, dtype=torch.float64)
        indices, values = codes.indices.flatten(), found.where(codes.is_active, 0).flatten()
        return dense.index_add_(0, indices, values.double())

    def renamed(self, image: int) -> Tensor:
        """The false name of each latent in an image."""
        every = torch.arange(N_LATENTS)[None]
        codes = self.spliced.sae.encode(self.state.x[:1])._replace(
            indices=every, values=torch.ones(1, N_LATENTS)
        )
        return shuffle_latents(codes, torch.tensor([image]), SEED).indices[0]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    return {name: Setting(tmp_path_factory.mktemp(name), name) for name in SITES}


def run(setting: Setting, *callbacks) -> None:
    take_all(setting.spliced, setting.batches, *callbacks)
    for callback in callbacks:
        callback.finish()


@pytest.mark.parametrize("shuffle", [None, SEED])
@pytest.mark.parametrize("name", SITES)
def test_class_reliance_is_a_mean_over_the_images_of_the_class(
    settings: dict[str, Setting], name: str, shuffle: int | None
) -> None:
    setting = settings[name]
    classes = torch.arange(N_IMAGES) % 2  # no image of the last class
    found = ClassReliance(setting.spliced, setting.weights, classes=classes, shuffle=shuffle)
    run(setting, found)
    expected = torch.zeros(N_CLASSES, N_LATENTS, dtype=torch.float64)
    positive = torch.zeros_like(expected)
    for image, number in enumerate(classes.tolist()):
        values = setting.attributions(image, number)
        if shuffle is not None:
            values = torch.zeros_like(values).index_copy(0, setting.renamed(image), values)
        expected[number] += values / 6
        positive[number] += values > 0
    torch.testing.assert_close(found.mean_attribution, expected, atol=1e-7, rtol=1e-5)
    assert found.counts is not None
    assert found.counts.images.tolist() == [6, 6, 0]
    assert (found.counts.positive == positive).all()


@pytest.mark.parametrize("name", SITES)
def test_without_labels_each_image_is_explained_for_what_is_predicted(
    settings: dict[str, Setting], name: str
) -> None:
    setting = settings[name]
    with torch.no_grad():
        embedding = setting.cut.suffix(setting.state.x, setting.state.rest)
    cosines = normalize(embedding, dim=1) @ setting.weights.T
    bias = -cosines.mean(dim=0)  # or all images would be of one class
    predicted = (cosines + bias).argmax(dim=1)
    assert len(predicted.unique()) > 1
    one = ClassReliance(setting.spliced, setting.weights, bias)
    other = ClassReliance(setting.spliced, setting.weights, bias, classes=predicted)
    run(setting, one, other)
    assert (one.mean_attribution == other.mean_attribution).all()


def test_shuffled_reliance_moves_attributions_within_each_image(
    settings: dict[str, Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = settings["last"]
    monkeypatch.setattr("clipattr.callbacks.shuffled._ENTRIES", 40)  # a few rows at a time
    shuffled = ShuffledReliance(setting.spliced, setting.weights, seed=SEED)
    true = RelianceCallback(setting.spliced, setting.weights)
    run(setting, shuffled, true)
    expected = torch.zeros(N_CLASSES, N_LATENTS, dtype=torch.float64)
    for image in range(N_IMAGES):
        for number in range(N_CLASSES):
            values = setting.attributions(image, number) / N_IMAGES
            expected[number, setting.renamed(image)] += values
    torch.testing.assert_close(shuffled.mean_attribution, expected, atol=1e-7, rtol=1e-5)
    assert true.mean_attribution is not None
    assert shuffled.mean_attribution is not None
    totals = true.mean_attribution.sum(dim=1), shuffled.mean_attribution.sum(dim=1)
    torch.testing.assert_close(*totals, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_shuffled_names_are_those_of_each_image(settings: dict[str, Setting], name: str) -> None:
    setting = settings[name]
    plain = {"n_latents": N_LATENTS, "n_examples": N_IMAGES}
    shuffled, true = ExamplesCallback(**plain), ExamplesCallback(**plain)
    run(setting, ShuffledNames(shuffled, seed=SEED), true)
    assert true.result is not None
    assert shuffled.result is not None
    expected = set()
    for latent, rows in enumerate(true.result.ids.tolist()):
        for row in rows:
            if row >= 0:
                expected.add((int(setting.renamed(row)[latent]), row))
    found = {
        (latent, row)
        for latent, rows in enumerate(shuffled.result.ids.tolist())
        for row in rows
        if row >= 0
    }
    assert found == expected
    assert found != {(j, row) for j, rows in enumerate(true.result.ids.tolist()) for row in rows}


@pytest.mark.parametrize("name", SITES)
def test_statistics_are_of_one_activation_per_image(
    settings: dict[str, Setting], name: str
) -> None:
    setting, classes = settings[name], torch.arange(N_IMAGES) % N_CLASSES
    embeddings = torch.randn(N_IMAGES, 5, generator=torch.Generator().manual_seed(2))
    found = LatentsCallback(
        n_latents=N_LATENTS, embeddings=embeddings, classes=classes, n_classes=N_CLASSES
    )
    run(setting, found)
    dense = setting.spliced.sae.encode(setting.state.x).to_dense()
    dense = (dense if dense.ndim == 2 else dense.amax(dim=1)).double()
    assert found.activity is not None
    assert found.activity.n_rows == N_IMAGES
    assert (found.activity.firing_counts == (dense > 0).sum(dim=0)).all()
    assert found.spread is not None
    for number in range(N_CLASSES):
        counts = (dense[classes == number] > 0).sum(dim=0)
        assert (found.spread.counts[:, number] == counts).all()
    assert found.monosemanticity is not None
    unit = normalize(embeddings.double(), dim=1)
    for latent in range(N_LATENTS):
        a = dense[:, latent] - dense[:, latent].min()
        weights = a[:, None] * a * (1 - torch.eye(N_IMAGES))
        expected = float((weights * (unit @ unit.T)).sum() / weights.sum())
        assert float(found.monosemanticity[latent]) == pytest.approx(expected, nan_ok=True)


def test_rest_of_a_last_layer_is_empty(settings: dict[str, Setting]) -> None:
    assert settings["last"].batches[0][2] == Rest()
    assert settings["all"].batches[0][0].ndim == 3
