"""Logits without a cue, attributions and their sums, against a plain float64 loop over images."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

from clipattr.callbacks import LinearHead, ShortcutCallback, take_all
from clipattr.callbacks import head_attribution as head_attribution_module
from clipattr.callbacks.shortcuts_result import ShortcutResult
from clipattr.clip import Cut, Site, image_tower, load_clip
from clipattr.clip.cut import Rest
from clipattr.config.schema import DeviceConfig
from clipattr.errors import ConfigError
from clipattr.sae.topk import TopKSae
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule, rows_loader
from clipattr.training.trainer import build_tester
from tests.tiny import save_tiny_clip

N_IMAGES, N_LATENTS, K = 14, 24, 4
CUES = {"tag": torch.tensor([1, 5, 7, 9]), "nothing": torch.tensor([], dtype=torch.int64)}
SITES = {
    "last": Site(),
    "patches": Site(0, "residual", "spatial"),
    "class token": Site(0, "mlp", "cls"),
}


class Scene(NamedTuple):
    spliced: Spliced
    double: Cut
    """the same cut of the same model in float64"""
    x: Tensor
    rest: Rest
    images: Tensor
    heads: dict[str, LinearHead]


def draw_heads(n_classes: int, width: int = 16) -> dict[str, LinearHead]:
    generator = torch.Generator().manual_seed(7)
    text = normalize(torch.randn(n_classes, width, generator=generator), dim=1)
    probe = 3 * torch.randn(n_classes, width, generator=generator)
    bias = torch.randn(n_classes, generator=generator)
    return {
        "text": LinearHead(text, torch.zeros(n_classes)),
        "probe": LinearHead(probe, bias),
    }


def build_scene(name: str, site: Site, n_classes: int) -> Scene:
    clip = load_clip(name)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
    cut = image_tower(clip.model).cut(site)
    double = image_tower(copy.deepcopy(clip.model).double()).cut(site)
    with torch.no_grad():
        x, rest = cut.prefix(images)
    sae = TopKSae(d_model=cut.d_site, n_latents=N_LATENTS, k=K, generator=generator)
    sae.initialise_from(x.reshape(-1, cut.d_site))
    sae.requires_grad_(False)
    return Scene(Spliced(cut, sae), double, x, rest, images, draw_heads(n_classes))


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def batches(scene: Scene, size: int = 5) -> Iterator[tuple[Tensor, Tensor, Rest]]:
    for rows in torch.arange(len(scene.x)).split(size):
        yield scene.x[rows], rows, scene.rest.rows(rows)


def run(scene: Scene, *, size: int = 5, **options) -> ShortcutResult:
    options = {"cues": CUES, "automatic": True} | options
    callback = ShortcutCallback(scene.spliced, scene.heads, **options)
    take_all(scene.spliced, batches(scene, size), callback)
    callback.finish()
    assert callback.result is not None
    return callback.result


def score_of(logits: list[Tensor], number: int) -> Tensor:
    """One class against the mean of the others; of two the second against the first."""
    if len(logits) == 2:
        return logits[1] - logits[0]
    others = [logit for place, logit in enumerate(logits) if place != number]
    return logits[number] - torch.stack(others).mean()


class Plain:
    """One image, in float64, a latent at a time."""

    def __init__(self, scene: Scene, image: int) -> None:
        self.scene, row = scene, torch.tensor([image])
        self.x = scene.x[row].double()
        residual = scene.rest.rows(row).residual
        self.rest = Rest(None if residual is None else residual.double())
        # Which latents fire is the model's own business: TopK of float32.
        codes = scene.spliced.sae.encode(scene.x[row])
        tokens = codes.reshape(-1)
        self.directions = scene.spliced.sae.directions.double()
        self.active: list[tuple[int, int, float]] = [
            (token, int(latent), float(value))
            for token, (latents, values) in enumerate(
                zip(tokens.indices, tokens.values, strict=True)
            )
            for latent, value in zip(latents, values, strict=True)
            if value != 0
        ]

    def logits(self, x: Tensor, head: str) -> list[Tensor]:
        embedding = self.scene.double.suffix(x, self.rest)[0]
        weights, bias = self.scene.heads[head]
        return list((embedding / embedding.norm()) @ weights.double().T + bias.double())

    def without(self, latents: list[int]) -> Tensor:
        x = self.x.clone()
        flat = x.view(-1, x.shape[-1])
        for token, latent, value in self.active:
            if latent in latents:
                flat[token] -= value * self.directions[latent]
        return x

    def attribution(self, head: str, number: int) -> dict[int, float]:
        """Latent -> a_j v_j . dy/dx, summed over its tokens."""
        x = self.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score_of(self.logits(x, head), number), x)
        flat = gradient.view(-1, x.shape[-1])
        found: dict[int, float] = {}
        for token, latent, value in self.active:
            part = value * float(self.directions[latent] @ flat[token])
            found[latent] = found.get(latent, 0.0) + part
        return found


@pytest.mark.parametrize(("site", "n_classes"), [("last", 2), ("last", 3), ("patches", 3)])
def test_every_number_equals_a_plain_loop(clip_name: str, site: str, n_classes: int):
    scene = build_scene(clip_name, SITES[site], n_classes)
    result = run(scene)
    n_scores = 1 if n_classes == 2 else n_classes
    per_image = torch.zeros(N_IMAGES, 2, n_scores, N_LATENTS, dtype=torch.float64)
    changed = 0.0
    for image in range(N_IMAGES):
        plain = Plain(scene, image)
        with torch.no_grad():
            edited = plain.without(CUES["tag"].tolist())
            for head in ("text", "probe"):
                clean = torch.stack(plain.logits(plain.x, head))
                near(result.logits[head][image], clean)
                near(result.without[head, "nothing"][image], clean)
                near(result.without[head, "tag"][image], torch.stack(plain.logits(edited, head)))
                changed += float((result.without[head, "tag"][image] - clean).abs().sum())
        for number, head in enumerate(("text", "probe")):
            for score in range(n_scores):
                found = plain.attribution(head, score)
                for latent, value in found.items():
                    per_image[image, number, score, latent] = value
                total = sum(abs(value) for value in found.values())
                of_tag = sum(value for latent, value in found.items() if latent in CUES["tag"])
                near(result.total_attribution[head][image, score], total)
                near(result.cue_attribution[head, "tag"][image, score], of_tag)
                assert result.cue_attribution[head, "nothing"][image, score] == 0
    assert changed > 0.1
    check_sums(scene, result, per_image)


def near(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64), atol=2e-5, rtol=1e-4
    )


def check_sums(scene: Scene, result: ShortcutResult, per_image: Tensor) -> None:
    assert result.sums is not None
    near(result.sums.total, per_image.sum(0))
    near(result.sums.square, per_image.square().sum(0))
    near(result.sums.cross, (per_image[:, 0] * per_image[:, 1]).sum(0))
    fired, energy = [0] * N_LATENTS, [0.0] * N_LATENTS
    for image in range(N_IMAGES):
        active = Plain(scene, image).active
        for latent in {latent for _, latent, _ in active}:
            fired[latent] += 1
        for _, latent, value in active:
            energy[latent] += value**2 * float(scene.spliced.sae.directions[latent].norm()) ** 2
    assert result.sums.fired.tolist() == fired
    near(result.sums.energy, torch.tensor(energy))
    assert result.sums.n_images == N_IMAGES


def test_the_other_tokens_of_an_edited_image_are_its_own(clip_name: str):
    """At this site the suffix needs a rest, of the images in which the cue fires."""
    scene = build_scene(clip_name, SITES["class token"], 2)
    result = run(scene, attributed=False, automatic=False)
    n_without_cue = 0
    for image in range(N_IMAGES):
        plain = Plain(scene, image)
        with torch.no_grad():
            edited = torch.stack(plain.logits(plain.without(CUES["tag"].tolist()), "probe"))
        near(result.without["probe", "tag"][image], edited)
        n_without_cue += not any(latent in CUES["tag"] for _, latent, _ in plain.active)
    assert 0 < n_without_cue < N_IMAGES
    assert (result.cue_attribution, result.total_attribution, result.sums) == ({}, {}, None)


def test_an_image_without_the_cue_keeps_its_bits_and_costs_nothing(clip_name: str, monkeypatch):
    scene = build_scene(clip_name, SITES["last"], 2)
    suffix, n_rows = Cut.suffix, []
    monkeypatch.setattr(
        Cut, "suffix", lambda cut, x, rest: n_rows.append(len(x)) or suffix(cut, x, rest)
    )
    result = run(scene)
    lacks = [
        image
        for image in range(N_IMAGES)
        if not any(latent in CUES["tag"] for _, latent, _ in Plain(scene, image).active)
    ]
    assert 0 < len(lacks) < N_IMAGES
    assert sum(n_rows) == N_IMAGES + N_IMAGES - len(lacks)
    assert torch.equal(result.without["text", "tag"][lacks], result.logits["text"][lacks])
    unit = result.embeddings.double()
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(N_IMAGES, dtype=torch.float64))
    weights = scene.heads["text"].weights.double()
    torch.testing.assert_close(unit @ weights.T, result.logits["text"], atol=1e-6, rtol=1e-6)


def test_gradients_equal_the_closed_form(clip_name: str, monkeypatch):
    scene = build_scene(clip_name, SITES["last"], 3)
    closed = run(scene)
    monkeypatch.setattr(Cut, "has_last_layer", False)
    by_gradients = run(scene)
    for head in ("text", "probe"):
        near(by_gradients.total_attribution[head], closed.total_attribution[head])
        near(by_gradients.cue_attribution[head, "tag"], closed.cue_attribution[head, "tag"])
    assert closed.sums is not None
    assert by_gradients.sums is not None
    for one, other in zip(by_gradients.sums[:-1], closed.sums[:-1], strict=True):
        near(one.double(), other.double())


def test_small_blocks_and_batches_change_nothing(clip_name: str, monkeypatch):
    scene = build_scene(clip_name, SITES["last"], 3)
    whole = run(scene, size=N_IMAGES)
    monkeypatch.setattr(head_attribution_module, "_ENTRIES", 1)
    parts = run(scene, size=3)
    near(parts.total_attribution["probe"], whole.total_attribution["probe"])
    assert whole.sums is not None
    assert parts.sums is not None
    near(parts.sums.square, whole.sums.square)
    assert torch.equal(parts.sums.fired, whole.sums.fired)


def test_a_trainer_sees_the_same(clip_name: str, tmp_path: Path):
    scene = build_scene(clip_name, SITES["last"], 2)
    callback = ShortcutCallback(scene.spliced, scene.heads, cues=CUES, automatic=True)
    settings = DeviceConfig(progress=False, accelerator="cpu")
    trainer = build_tester(settings, tmp_path, callbacks=[callback])
    trainer.test(SplicedModule(scene.spliced), rows_loader(scene.x, batch_size=4), verbose=False)
    expected = run(scene)
    assert callback.result is not None
    assert callback.result.sums is not None
    near(callback.result.without["probe", "tag"], expected.without["probe", "tag"])
    near(callback.result.sums.cross, expected.sums.cross)


def test_weights_of_the_wrong_shape_and_unknown_latents_are_refused(clip_name: str):
    scene = build_scene(clip_name, SITES["last"], 2)
    one = scene.heads["text"]
    with pytest.raises(ConfigError, match="they must be the same"):
        ShortcutCallback(scene.spliced, {"text": one, "probe": draw_heads(3)["probe"]}, cues={})
    with pytest.raises(ConfigError, match="at least 2"):
        ShortcutCallback(scene.spliced, draw_heads(1), cues={})
    with pytest.raises(ConfigError, match="in this order"):
        ShortcutCallback(scene.spliced, {"a": one, "b": one}, cues={}, automatic=True)
    for wrong in (-1, N_LATENTS):
        with pytest.raises(ConfigError, match=f"'x': latent {wrong}, and the SAE has 0 to 23"):
            ShortcutCallback(scene.spliced, scene.heads, cues={"x": torch.tensor([wrong])})


def flat(result: ShortcutResult) -> list[Tensor]:
    assert result.sums is not None
    parts = (result.logits, result.without, result.cue_attribution, result.total_attribution)
    tensors = [each for part in parts for each in part.values()]
    return [result.rows, result.embeddings, *tensors, *result.sums[:-1]]


def run_process(rank: int, folder: str, clip_name: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    scene = build_scene(clip_name, SITES["patches"], 3)
    rows = torch.arange(N_IMAGES).split(N_IMAGES - 3)[rank]
    callback = ShortcutCallback(scene.spliced, scene.heads, cues=CUES, automatic=True)
    parts = [(scene.x[part], part, scene.rest.rows(part)) for part in rows.split(4)]
    take_all(scene.spliced, parts, callback)
    callback.finish()
    assert callback.result is not None
    assert callback.result.sums is not None
    assert callback.result.sums.n_images == N_IMAGES
    torch.save(flat(callback.result), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(clip_name: str, tmp_path: Path):
    spawn(run_process, args=(str(tmp_path), clip_name), nprocs=2)
    expected = flat(run(build_scene(clip_name, SITES["patches"], 3)))
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_score_is_what_is_attributed(clip_name: str):
    """Close to the reference the effect of a latent is its attribution: both are of one score."""
    scene = build_scene(clip_name, SITES["last"], 3)
    small = copy.deepcopy(scene.spliced.sae)
    result = run(scene)
    with torch.no_grad():
        small.W_dec.mul_(1e-3)
    tiny = ShortcutCallback(Spliced(scene.spliced.cut, small), scene.heads, cues=CUES)
    take_all(Spliced(scene.spliced.cut, small), batches(scene), tiny)
    tiny.finish()
    assert tiny.result is not None
    effect = contrast_logits(tiny.result.logits["probe"] - tiny.result.without["probe", "tag"])
    attribution = tiny.result.cue_attribution["probe", "tag"]
    torch.testing.assert_close(effect, attribution, atol=1e-5, rtol=2e-2)
    assert result.cue_attribution["probe", "tag"].abs().max() > 100 * attribution.abs().max()
