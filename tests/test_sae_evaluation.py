"""The evaluation of an SAE against plain float64 loops over a model that raw hooks edit."""

import math
from collections.abc import Callable
from typing import NamedTuple

import open_clip
import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from clipattr.callbacks import SaeEvaluation, mean_by_type
from clipattr.clip import Clip, Site, TextHead, image_tower, load_clip
from clipattr.clip.token_types import token_types
from clipattr.config.schema import DeviceConfig
from clipattr.errors import ConfigError
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae
from clipattr.sae.transcoder import Transcoder
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester
from tests.tiny import save_tiny_clip
from tests.tower_hooks import patched
from tests.towers import freeze

N_IMAGES, N_CLASSES, WIDTH, N_LATENTS = 11, 6, 32, 24
# Slices of the tokens of an image: the class token, then 16 patches.
PLACES = {"cls": slice(0, 1), "spatial": slice(1, 17), "all": slice(0, 17)}
SITES = {
    "last class token": Site(),
    "class token, MLP": Site(0, "mlp", "cls"),
    "patches": Site(0, "residual", "spatial"),
    "all": Site(0, "residual_middle", "all"),
    "heads of all": Site(1, "heads", "all"),
}
SIGMOID = {True: -2.0, False: None}


class Scene(NamedTuple):
    clip: Clip
    images: Tensor
    weights: Tensor
    labels: Tensor


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    clip = load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
    weights = normalize(torch.randn(N_CLASSES, 16, generator=generator), dim=1)
    labels = torch.randint(0, N_CLASSES, (N_IMAGES,), generator=generator)
    return Scene(clip, images, weights, labels)


def head(scene: Scene, *, sigmoid: bool = False) -> TextHead:
    names = tuple("abcdef")
    return TextHead(names, scene.weights, 15.0, SIGMOID[sigmoid])


def build(scene: Scene, site: Site, make: Callable[[Tensor], Sae]) -> Spliced:
    cut = image_tower(scene.clip.model).cut(site)
    with torch.no_grad():
        sae = make(cut.read(scene.images))
    return Spliced(cut, sae.requires_grad_(False).eval())


def topk(x: Tensor) -> Sae:
    sae = TopKSae(d_model=WIDTH, n_latents=N_LATENTS, k=4, generator=torch.Generator())
    sae.initialise_from(x.flatten(0, -2))
    return sae


def bare(n_latents: int) -> TopKSae:
    """Every parameter zero."""
    sae = TopKSae(d_model=WIDTH, n_latents=n_latents, k=n_latents, normalisation=Normalisation.none)
    for parameter in sae.parameters():
        parameter.zero_()
    return sae


def identity(x: Tensor) -> Sae:
    """The positive and the negative part of every coordinate."""
    sae = bare(2 * WIDTH)
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    sae.W_enc.copy_(both)
    sae.W_dec.copy_(both)
    return sae


def predict_mean(x: Tensor) -> Sae:
    sae = bare(3)
    sae.b_dec.copy_(x.flatten(0, -2).double().mean(0))
    return sae


def run(
    scene: Scene, spliced: Spliced, folder, *, batch_size: int = 4, sigmoid: bool = False, **changes
) -> SaeEvaluation:
    cut = spliced.cut
    with torch.no_grad():
        mean = mean_by_type(spliced, cut.read(scene.images).double().mean(0))
        states = [cut.prefix(images) for images in scene.images.split(batch_size)]
    rows = torch.arange(N_IMAGES).split(batch_size)
    batches = [(*state[:1], row, *state[1:]) for state, row in zip(states, rows, strict=True)]
    options = {"head": head(scene, sigmoid=sigmoid), "labels": scene.labels} | changes
    evaluation = SaeEvaluation(spliced, mean, **options)
    settings = DeviceConfig(progress=False, accelerator="cpu")
    trainer = build_tester(settings, folder, callbacks=[evaluation])
    trainer.test(SplicedModule(spliced), DataLoader(batches, batch_size=None), verbose=False)
    return evaluation


# The same by hand


def all_tokens(scene: Scene, site: Site) -> Tensor:
    """What a hook sees of the stream, [image, token, width]."""
    seen: list[Tensor] = []
    block = scene.clip.model.visual.transformer.resblocks[site.layer]
    with torch.no_grad(), patched(block, site.stream, lambda x: seen.append(x) or x):
        scene.clip.model.encode_image(scene.images)
    return seen[0]


def edited_embedding(scene: Scene, site: Site, image: int, place: slice, values: Tensor) -> Tensor:
    """The model on one image while a hook writes `values` over some tokens."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, place] = values
        return x

    block = scene.clip.model.visual.transformer.resblocks[site.layer]
    with torch.no_grad(), patched(block, site.stream, edit):
        return scene.clip.model.encode_image(scene.images[image][None])[0].double()


def places_of(site: Site) -> dict[str, slice]:
    return PLACES if site.tokens == "all" else {site.tokens: PLACES[site.tokens]}


def distributions(scene: Scene, embedding: Tensor, sigmoid: bool) -> list[list[float]]:
    cosines = [float(embedding @ row.double() / embedding.norm()) for row in scene.weights]
    if sigmoid:
        yes = [1 / (1 + math.exp(2.0 - 15 * cosine)) for cosine in cosines]
        return [[p, 1 - p] for p in yes]
    total = sum(math.exp(15 * cosine) for cosine in cosines)
    return [[math.exp(15 * cosine) / total for cosine in cosines]]


def measures(scene: Scene, embedding: Tensor, clean: Tensor, label: int, sigmoid: bool) -> dict:
    q, p = (distributions(scene, each, sigmoid) for each in (embedding, clean))
    scores = [row[0] for row in q] if sigmoid else q[0]
    clean_scores = [row[0] for row in p] if sigmoid else p[0]
    rank = sum(score > scores[label] for score in scores)
    flat = [(a, b) for one, two in zip(p, q, strict=True) for a, b in zip(one, two, strict=True)]
    entropy = -math.log(scores[label])
    if sigmoid:
        entropy -= sum(math.log(row[1]) for c, row in enumerate(q) if c != label)
    return {
        "similarity": float(embedding @ clean / embedding.norm() / clean.norm()),
        "kl": sum(a * math.log(a / b) for a, b in flat),
        "agreement": scores.index(max(scores)) == clean_scores.index(max(clean_scores)),
        "cross_entropy": entropy,
        "top1": rank == 0,
        "top5": rank < 5,
    }


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_splice_against_a_model_that_hooks_edit(scene: Scene, tmp_path, name: str, sigmoid: bool):
    site = SITES[name]
    spliced = build(scene, site, topk)
    evaluation = run(scene, spliced, tmp_path, sigmoid=sigmoid)
    tokens = all_tokens(scene, site)
    recon = spliced.sae(tokens).recon
    assert list(evaluation.types) == list(places_of(site))
    for kind, place in places_of(site).items():
        parts = [p for p in (PLACES["cls"], PLACES["spatial"]) if kind == "all"] or [place]
        mean = torch.zeros_like(tokens[0])
        for part in parts:
            mean[part] = tokens[:, part].double().mean(dim=(0, 1)).float()
        sums = [dict.fromkeys(("similarity", "kl"), 0.0) for _ in range(3)]
        for image in range(N_IMAGES):
            values = [tokens[image, place], recon[image, place], mean[place]]
            found = [edited_embedding(scene, site, image, place, each) for each in values]
            label = int(scene.labels[image])
            for total, embedding in zip(sums, found, strict=True):
                for key, value in measures(scene, embedding, found[0], label, sigmoid).items():
                    total[key] = total.get(key, 0.0) + value / N_IMAGES
        for key in sums[0]:
            expected = [total[key] for total in sums]
            measure = getattr(evaluation.types[kind].splice, key)
            assert measure[:3] == pytest.approx(expected, abs=2e-5), (kind, key)
    assert evaluation.identity_error < 1e-5


@pytest.mark.parametrize("name", ["class token, MLP", "patches", "all"])
def test_reconstruction_of_each_type_against_a_plain_loop(scene: Scene, tmp_path, name: str):
    site = SITES[name]
    spliced = build(scene, site, topk)
    evaluation = run(scene, spliced, tmp_path)
    tokens = all_tokens(scene, site)
    for kind, place in places_of(site).items():
        rows = tokens[:, place].flatten(0, 1)
        output = spliced.sae(rows)
        mean = rows.double().mean(0)
        error = spread = cosine = 0.0
        counts = [0] * N_LATENTS
        for x, recon, latents, values in zip(
            rows.double(), output.recon.double(), *output.codes[:2], strict=True
        ):
            error += float((x - recon) @ (x - recon))
            spread += float((x - mean) @ (x - mean))
            cosine += float(x @ recon / x.norm() / recon.norm())
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True):
                counts[latent] += value > 0
        found = evaluation.types[kind].reconstruction
        assert int(found.n_rows) == len(rows)
        assert float(found.fvu) == pytest.approx(error / spread, rel=1e-5)
        assert float(found.cosine) == pytest.approx(cosine / len(rows), rel=1e-5)
        assert found.firing_counts.tolist() == counts
        assert float(found.l0) == pytest.approx(sum(counts) / len(rows))
        assert evaluation.types[kind].frequency.dead == counts.count(0)
    assert evaluation.latents is not None
    assert evaluation.latents.firing_counts.tolist() == counts  # the last type is that of all rows


@pytest.mark.parametrize("name", ["last class token", "patches", "all"])
def test_controls(scene: Scene, tmp_path, name: str):
    """The identity loses nothing, the mean everything there is to lose."""
    perfect = run(scene, build(scene, SITES[name], identity), tmp_path)
    for found in perfect.types.values():
        assert float(found.reconstruction.fvu) == 0
        assert found.splice.kl is not None
        assert found.splice.cross_entropy is not None
        assert found.splice.kl.spliced == 0
        assert found.splice.kl.recovered == 1
        assert found.splice.cross_entropy.recovered == 1
        assert found.splice.similarity.spliced == pytest.approx(1)
    useless = run(scene, build(scene, SITES[name], predict_mean), tmp_path)
    for kind, found in useless.types.items():
        if name == "all":  # the mean of all rows is not that of each type
            assert float(found.reconstruction.fvu) == pytest.approx(1) or kind != "all"
            continue
        assert float(found.reconstruction.fvu) == pytest.approx(1)
        assert float(found.reconstruction.l0) == 0
        assert found.splice.kl is not None
        assert found.splice.kl.recovered == pytest.approx(0, abs=1e-5)
        assert found.splice.similarity.recovered == pytest.approx(0, abs=1e-5)


def test_batch_size_changes_nothing(scene: Scene, tmp_path):
    spliced = build(scene, SITES["all"], topk)
    one, other = (run(scene, spliced, tmp_path, batch_size=size) for size in (3, N_IMAGES))
    for kind in one.types:
        for a, b in zip(one.types[kind].splice[1:], other.types[kind].splice[1:], strict=True):
            assert a[:3] == pytest.approx(b[:3], abs=1e-6)
        fvu = [float(each.types[kind].reconstruction.fvu) for each in (one, other)]
        assert fvu[0] == pytest.approx(fvu[1], rel=1e-6)
        assert one.types[kind].frequency == other.types[kind].frequency


def test_without_labels_and_without_classes(scene: Scene, tmp_path):
    spliced = build(scene, SITES["patches"], topk)
    whole = run(scene, spliced, tmp_path).types["spatial"].splice
    unlabelled = run(scene, spliced, tmp_path, labels=None).types["spatial"].splice
    assert unlabelled == whole._replace(cross_entropy=None, top1=None, top5=None)
    alone = run(scene, spliced, tmp_path, head=None).types["spatial"].splice
    assert alone == unlabelled._replace(kl=None, agreement=None)


def test_identity_is_measured_not_assumed(scene: Scene, tmp_path, monkeypatch):
    spliced = build(scene, SITES["patches"], topk)
    embed = spliced.embed
    monkeypatch.setattr(spliced, "embed", lambda codes, error, rest: embed(codes, 0 * error, rest))
    assert run(scene, spliced, tmp_path).identity_error > 1e-3


def test_transcoder_is_refused(scene: Scene):
    transcoder = Transcoder(d_model=WIDTH, d_out=WIDTH, n_latents=4, k=2)
    with pytest.raises(ConfigError, match="transcoder"):
        Spliced(image_tower(scene.clip.model).cut(Site()), transcoder)


def test_types_of_towers_with_registers_and_without_class_token(monkeypatch):
    """A class token and four registers; one register alone; patches alone."""
    expected = {
        "vit_small_patch14_reg4_dinov2": {"cls": 1, "registers": 4, "spatial": 8, "all": 13},
        "vit_medium_patch16_reg1_gap_256": {"registers": 1, "spatial": 8, "all": 9},
        "vit_base_patch16_siglip_224": {"all": 8},
    }
    create = timm.create_model
    for name, sizes in expected.items():
        patch = 14 if "14" in name else 16
        size = (2 * patch, 4 * patch)
        shape = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": size}
        monkeypatch.setattr(timm, "create_model", lambda *a, s=shape, **k: create(*a, **k, **s))
        vision = {"timm_model_name": name, "timm_proj": None, "image_size": size}
        vision["timm_pool"] = {"cls": "token", "registers": "avg", "all": "map"}[next(iter(sizes))]
        model = freeze(open_clip.CustomTextCLIP(24, vision, {"layers": 1, "width": 16, "heads": 2}))
        cut = image_tower(model).cut(Site(0, "residual", "all"))
        tokens = range(image_tower(model).count_tokens("all"))
        assert {kind: len(tokens[place]) for kind, place in token_types(cut).items()} == sizes
        means = torch.randn(len(tokens), 24)
        sae = TopKSae(d_model=24, n_latents=4, k=1)
        found = mean_by_type(Spliced(cut, sae), means)
        for kind in [one for one in sizes if one != "all" or len(sizes) == 1]:
            place = token_types(cut)[kind]
            expected_mean = means[place].double().mean(0).expand(sizes[kind], 24)
            torch.testing.assert_close(found[place], expected_mean)
        spatial = image_tower(model).cut(Site(0, "residual", "spatial"))
        assert token_types(spatial) == {"spatial": slice(None)}
