"""The explanation of one image: equal to the attribution functions called by hand."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipattr.attribution import (
    HeadScore,
    attribution_patching,
    corrected_patching,
    exact_patching,
    explain,
    gradient_only,
    integrated_gradients,
    logit_lens,
    logit_lens_table,
    two_point,
)
from clipattr.clip import Site, image_tower, load_clip, prompt_head
from clipattr.config.load import load_config
from clipattr.config.schema import EVALUATE_JOBS, Explain
from clipattr.errors import ConfigError
from clipattr.main import run_script
from clipattr.probes import LinearProbe, ProbeRecord, save_probe
from clipattr.report.explanation import Patches, explanation_table, read_explanation
from clipattr.report.explanation_picture import explanation_png
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.sae.transcoder import Transcoder
from clipattr.spliced import Readout, Spliced
from tests.tiny import CONFIG, save_tiny_clip

FILE = Path(__file__).parents[1] / "configs" / "evaluate" / "explain.yaml"
PROMPTS = ["a red fish", "a star"]
CLASSES = ["sand", "boat", "2"]
N_LATENTS, TOP, CORRECTED = 24, 4, 5
VISION = CONFIG["model_cfg"]["vision_cfg"]
SITES = {
    "cls": Site(1, "residual", "cls"),
    "early": Site(0, "residual", "cls"),
    "spatial": Site(0, "residual", "spatial"),
    "all": Site(0, "mlp", "all"),
}
METHODS = {
    "corrected_patching": partial(corrected_patching, n_exact=CORRECTED),
    "attribution_patching": attribution_patching,
    "integrated_gradients": partial(integrated_gradients, n_steps=3),
    "two_point": two_point,
    "gradient_only": gradient_only,
    "exact_patching": exact_patching,
}


def noise(number: int, width: int = 40) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (36, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


class Place:
    """A tiny model with an SAE at each site, a probe and a picture."""

    def __init__(self, folder: Path, sites: dict = SITES, vision: dict = VISION) -> None:
        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny", vision_cfg=vision)
        self.clip = load_clip(self.model)
        self.tower = image_tower(self.clip.model)
        noise(0).save(folder / "photo.png")
        self.images = torch.stack([self.clip.preprocess(noise(n)) for n in range(20)])
        self.record = {"name": self.model, "weights_sha256": self.clip.weights_sha256}
        self.spliced = {name: self.save(name, site) for name, site in sites.items()}
        self.probe = LinearProbe(16, len(CLASSES)).requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        self.probe.weight.copy_(torch.randn(len(CLASSES), 16, generator=generator))
        self.probe.bias.copy_(torch.tensor([0.3, -0.2, 0.9]))
        save_probe(self.probe, folder / "probe", ProbeRecord(CLASSES, self.record, "cls", "data"))

    def save(self, name: str, site: Site, sha: str | None = None) -> Spliced:
        cut = self.tower.cut(site)
        generator = torch.Generator().manual_seed(1)
        sae = TopKSae(d_model=cut.d_site, n_latents=N_LATENTS, k=6, generator=generator)
        sae.initialise_from(cut.read(self.images).detach().flatten(0, -2))
        model = self.record | ({"weights_sha256": sha} if sha else {})
        save_sae(sae, self.folder / name, SaeRecord(cut.site.to_json(), model, "data"))
        return Spliced(cut, sae.requires_grad_(False).eval())

    def run(self, sae: str, *overrides: str, name: str | None = None) -> int:
        words = [
            f"sae={self.folder / sae}",
            f"image={self.folder / 'photo.png'}",
            f"model.name={self.model}",
            f"name={name or sae}",
            f"runs={self.folder / 'runs'}",
            f"top={TOP}",
            f"corrected={CORRECTED}",
            "ig_points=3",
            "trainer.accelerator=cpu",
        ]
        keys = {word.partition("=")[0] for word in overrides}
        words = [word for word in words if word.partition("=")[0] not in keys]
        return run_script("evaluate.py", EVALUATE_JOBS, [str(FILE), *words, *overrides])

    def path(self, name: str, file: str = "explanation.json") -> Path:
        return self.folder / "runs" / name / file

    def scores(self, name: str) -> list[dict]:
        return json.loads(self.path(name).read_text())["scores"]

    @torch.no_grad()
    def read(self, name: str, n_images: int = 1) -> Readout:
        x, rest = self.spliced[name].cut.prefix(self.images[:n_images])
        return self.spliced[name].read(x, torch.arange(n_images), rest)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("explain"))


def by_hand(
    place: Place, name: str, weights: Tensor, bias: Tensor | None = None, **rest
) -> tuple[dict[int, dict], dict]:
    """Every active latent and the whole, one latent and one token after the other."""
    spliced, readout = place.spliced[name], place.read(name)
    method = METHODS[rest.get("method", "corrected_patching")]
    target = torch.zeros(1, dtype=torch.int64)
    score = HeadScore(spliced.cut.suffix, weights[None], target, bias, readout.rest)
    W_dec, codes = spliced.sae.directions, readout.codes
    per_token = method(score, readout.x, codes, W_dec)[0].reshape(-1, 6)
    indices, values = (each[0].reshape(-1, 6) for each in codes[:2])

    def value(x: Tensor) -> float:
        return float(score(x.view_as(readout.x), target).detach())

    found: dict[int, dict] = {}
    for latent in indices[values != 0].unique().tolist():
        is_it = (indices == latent) & (values != 0)
        edited = readout.x.clone().reshape(-1, 32)
        for token in range(len(indices)):
            edited[token] -= values[token][is_it[token]].sum() * W_dec[latent]
        found[latent] = {
            "map": torch.where(is_it, per_token, 0.0).sum(1),
            "attribution": float(per_token[is_it].sum()),
            "activation": float(values[is_it].sum()),
            "exact": value(readout.x) - value(edited),
        }
    leaf = readout.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf, target).sum(), leaf)
    whole = {
        "score": value(readout.x),
        "without_latents": value(spliced.sae.b_dec + readout.error),
        "error": float((gradient * readout.error).sum()),
        "error_exact": value(readout.x) - value(readout.x - readout.error),
    }
    return found, whole


def check(shown: dict, latents: dict[int, dict], whole: dict, first_patch: int | None) -> None:
    close = partial(pytest.approx, rel=1e-4, abs=2e-6)
    assert shown["score"] == close(whole["score"])
    assert shown["without_latents"] == close(whole["without_latents"])
    assert shown["error"]["attribution"] == close(whole["error"])
    assert shown["error"]["exact"] == close(whole["error_exact"])
    assert shown["n_active"] == len(latents)
    sizes = {latent: abs(each["attribution"]) for latent, each in latents.items()}
    total = sum(sizes.values())
    assert shown["sum_of_sizes"] == close(total)
    listed = [each["latent"] for each in shown["latents"]]
    assert listed == sorted(sizes, key=lambda latent: -sizes[latent])[:TOP]
    change = whole["score"] - whole["without_latents"]
    for each in shown["latents"]:
        expected = latents[each["latent"]]
        for name in ("attribution", "activation", "exact"):
            assert each[name] == close(expected[name]), name
        assert each["share"] == close(expected["attribution"] / total)
        assert each["share_of_change"] == pytest.approx(expected["attribution"] / change, rel=1e-2)
        assert ("heatmap" in each) == (first_patch is not None)
        assert ("fired_by" in each) == (first_patch is None)
        if first_patch is not None:
            grid = expected["map"][first_patch:].view(4, 4).numpy()
            np.testing.assert_allclose(np.array(each["heatmap"]), grid, atol=2e-6)
    others = sum(each["attribution"] for latent, each in latents.items() if latent not in listed)
    assert shown["others"] == close(others)


@pytest.mark.parametrize("name", SITES)
def test_job_equals_the_functions_by_hand(place: Place, name: str, caplog):
    caplog.set_level("INFO")
    assert place.run(name, f"prompt={json.dumps(PROMPTS)}") == 0
    rows = prompt_head(place.clip, PROMPTS).weights
    first_patch = {"spatial": 0, "all": 1}.get(name)
    shown = place.scores(name)
    assert [each["name"] for each in shown] == PROMPTS
    for each, row in zip(shown, rows, strict=True):
        check(each, *by_hand(place, name, row), first_patch)
    if name == "spatial":
        for each in shown[0]["latents"]:
            assert np.sum(each["heatmap"]) == pytest.approx(each["attribution"], rel=1e-4)
    if name in ("cls", "early"):  # one token: what is corrected is the exact effect
        assert all(each["attribution"] == each["exact"] for each in shown[0]["latents"])
    with Image.open(place.path(name, "explanation.png")) as picture:
        assert picture.width > 500
    for word in ("a red fish: ", "attribution", "error", str(shown[1]["latents"][0]["latent"])):
        assert word in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_every_method(place: Place, method: str):
    name = f"method-{method}"
    assert place.run("spatial", f"prompt={PROMPTS[0]}", f"method={method}", name=name) == 0
    row = prompt_head(place.clip, PROMPTS).weights[0]
    check(place.scores(name)[0], *by_hand(place, "spatial", row, method=method), 0)


def test_lens_methods(place: Place):
    cut, sae = place.spliced["early"].cut, place.spliced["early"].sae
    rows = prompt_head(place.clip, PROMPTS).weights
    readout = place.read("early")
    table = logit_lens_table(cut.read_directly, sae.directions, rows)
    expected = logit_lens(table, torch.tensor([1]), readout.codes)[0]
    of_latent = dict(zip(readout.codes.indices[0].tolist(), expected.tolist(), strict=True))
    for method in ("logit_lens", "act_times_logit_lens"):
        words = (f"prompt={json.dumps(PROMPTS)}", f"method={method}")
        assert place.run("early", *words, name=method) == 0
        for each in place.scores(method)[1]["latents"]:
            factor = each["activation"] if method != "logit_lens" else 1.0
            assert each["attribution"] == pytest.approx(
                factor * of_latent[each["latent"]], rel=1e-4
            )


@pytest.mark.parametrize("method", ["corrected_patching", "integrated_gradients", "logit_lens"])
def test_half_precision(place: Place, method: str):
    """Weights in bf16: the same to the digits that they have."""
    sha = load_clip(place.model, precision="bf16").weights_sha256
    place.save("half", SITES["early"], sha=sha)
    words = (f"prompt={PROMPTS[0]}", f"method={method}")
    assert place.run("early", *words, name=f"{method}-32") == 0
    assert place.run("half", *words, "model.precision=bf16", name=f"{method}-16") == 0
    whole, half = (place.scores(f"{method}-{bits}")[0] for bits in (32, 16))
    assert half["score"] == pytest.approx(whole["score"], abs=0.02)
    first, other = whole["latents"][0], half["latents"][0]
    assert first["latent"] == other["latent"]
    assert other["attribution"] == pytest.approx(first["attribution"], rel=0.2)


def test_rather_than_is_the_difference_of_two_scores(place: Place):
    words = (f"prompt={PROMPTS[0]}", f"rather_than={PROMPTS[1]}")
    assert place.run("all", *words, name="contrast") == 0
    rows = prompt_head(place.clip, PROMPTS).weights
    shown = place.scores("contrast")
    assert [each["name"] for each in shown] == ["a red fish rather than a star"]
    check(shown[0], *by_hand(place, "all", rows[0] - rows[1]), 1)


@pytest.mark.parametrize(
    ("label", "other", "one", "two"),
    [("boat", None, 1, None), ("1", None, 1, None), ("sand", "2", 0, 2), ("2", "0", 2, 0)],
)
def test_probe(place: Place, label: str, other: str | None, one: int, two: int | None):
    words = [f"probe={place.folder / 'probe'}", f"label={label}"]
    words += [] if other is None else [f"rather_than={other}"]
    name = f"probe-{label}-{other}"
    assert place.run("early", *words, name=name) == 0
    row, bias = place.probe.weight[one], place.probe.bias[[one]]
    if two is not None:
        row, bias = row - place.probe.weight[two], bias - place.probe.bias[[two]]
    shown = place.scores(name)[0]
    assert shown["name"] == CLASSES[one] + ("" if other is None else f" rather than {other}")
    check(shown, *by_hand(place, "early", row, bias), None)


def test_several_images_and_fewer_latents_than_asked_for(place: Place):
    """In Python a batch has a score per row; what an image lacks is not listed."""
    spliced, readout = place.spliced["cls"], place.read("cls", 3)
    values = readout.codes.values.clone()
    values[1, 2:] = 0
    values[2] = 0
    codes = readout.codes._replace(values=values)
    rows = prompt_head(place.clip, PROMPTS).weights
    score = HeadScore(spliced.cut.suffix, rows, torch.tensor([0, 1, 0]), rest=readout.rest)
    found = explain(score, readout.x, codes, spliced.sae.directions, readout.error, n_top=N_LATENTS)
    assert found.is_active.sum(dim=1).tolist() == [6, 2, 0]
    assert torch.equal(found.attribution.gather(1, found.top), found.exact)  # all are corrected
    exact = exact_patching(score, readout.x, codes, spliced.sae.directions)
    dense = codes._replace(values=exact).to_dense()
    for row in range(3):
        for rank in range(int(found.is_active[row].sum())):
            latent = int(found.latents[row, rank])
            assert float(found.exact[row, rank]) == pytest.approx(float(dense[row, latent]))
    shown = read_explanation(found, ["one", "two", "three"], None)
    assert [len(each.latents) for each in shown] == [6, 2, 0]
    assert shown[2].error.share is None
    assert shown[2].error.share_of_change is None
    assert "more" not in explanation_table(shown[1])
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert explanation_png(image, shown).startswith(b"\x89PNG")


def test_heatmaps_are_drawn_where_the_patches_are(place: Place):
    """A wide image: rows of the grid follow each other, and the prefix is no patch."""
    vision = VISION | {"image_size": [32, 48]}
    tower = image_tower(load_clip(save_tiny_clip(place.folder / "wide", vision_cfg=vision)).model)
    assert tower.patch_grid() == (4, 6)
    assert place.tower.patch_grid() == (4, 4)
    found = explain(
        *by_score(place), n_top=2, attribute=lambda score, x, codes, W_dec: codes.values
    )
    maps = read_explanation(found, ["name"], Patches(1, (2, 8)))[0].latents
    for rank, each in enumerate(maps):
        expected = found.maps()[0, rank, 1:].reshape(2, 8)
        assert each.heatmap == expected.tolist()


def test_maps_count_active_latents_alone(place: Place):
    """Whatever a method says of padding, also where a padded slot names an active latent."""
    score, x, codes, W_dec, error = by_score(place)
    values = torch.where(torch.arange(6) < 4, codes.values, 0.0)
    codes = codes._replace(values=values)
    found = explain(
        score, x, codes, W_dec, error, attribute=lambda *_: torch.ones_like(codes.values)
    )
    assert int(found.maps().sum()) == int(found.attribution.gather(1, found.top).sum())
    counts = codes.indices[0][codes.is_active[0]].bincount()
    assert found.maps()[0].sum(dim=-1).int().tolist() == counts[found.latents[0]].tolist()


def by_score(place: Place) -> tuple:
    spliced, readout = place.spliced["all"], place.read("all")
    rows = prompt_head(place.clip, PROMPTS).weights
    score = HeadScore(spliced.cut.suffix, rows, torch.tensor([0]), rest=readout.rest)
    return score, readout.x, readout.codes, spliced.sae.directions, readout.error


ERRORS = {
    "no question": ([], "neither is there"),
    "both": (["prompt=a", "probe=PROBE", "label=boat"], "both are there"),
    "no class": (["probe=PROBE"], "add label=CLASS"),
    "no probe": (["prompt=a", "label=boat"], "add probe=FOLDER"),
    "empty": (["prompt=' '"], "is empty text"),
    "twice": (["prompt=[a, a]"], "'a' stands there twice"),
    "itself": (["prompt=a", "rather_than=a"], "'a' stands there twice"),
    "same class": (["probe=PROBE", "label=boat", "rather_than=1"], "the same class"),
    "unknown class": (["probe=PROBE", "label=bot"], "Did you mean boat?"),
    "number": (["probe=PROBE", "label=3"], "Allowed are 0 to 2 and the names: sand, boat, 2"),
    "no image": (["prompt=a", "image=ABSENT"], "absent.png does not exist"),
    "folder": (["prompt=a", "image=PROBE"], "cannot be read"),
    "text": (["prompt=a", "image=TEXT"], "it is none of JPEG, PNG, WEBP"),
    "other model": (["prompt=a", "sae=FOREIGN"], "belongs to model"),
    "transcoder": (["prompt=a", "sae=TRANSCODER"], "is a transcoder"),
    "top": (["prompt=a", "top=0"], "top=0: must be greater than 0"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(place: Place, what: str, capsys):
    folder = place.folder
    (folder / "text.png").write_text("not a picture")
    if not (folder / "foreign").exists():
        place.save("foreign", SITES["cls"], sha="0" * 64)
        transcoder = Transcoder(d_model=32, d_out=32, n_latents=8, k=2)
        site = SITES["early"].to_json()
        record = SaeRecord(site, place.record, "data", target_site=site | {"stream": "mlp"})
        save_sae(transcoder, folder / "transcoder", record)
    words, message = ERRORS[what]
    paths = {"PROBE": "probe", "ABSENT": "absent.png", "TEXT": "text.png"}
    paths |= {"FOREIGN": "foreign", "TRANSCODER": "transcoder"}
    for short, path in paths.items():
        words = [word.replace(short, str(folder / path)) for word in words]
    assert place.run("cls", *words, name="error") == 2
    assert message in capsys.readouterr().err
    assert not place.path("error").exists()


def test_the_image_is_the_users(capsys):
    with pytest.raises(ConfigError, match="image: required and not set"):
        load_config([str(FILE)], EVALUATE_JOBS)
    config = load_config([str(FILE), "image=photo.jpg", "prompt=a cat"], EVALUATE_JOBS)
    assert isinstance(config, Explain)
    assert config.prompts == ["a cat"]


def test_second_run_is_skipped_until_the_image_changes(place: Place, caplog):
    caplog.set_level("INFO")
    image = place.folder / "other.png"
    noise(1).save(image)
    words = (f"prompt={PROMPTS[0]}", f"image={image}")
    assert place.run("cls", *words, name="again") == 0
    first = place.scores("again")
    assert place.run("cls", *words, name="again") == 0
    assert "is finished" in caplog.text.split("a red fish: ")[-2]  # and the table once more
    noise(2).save(image, "JPEG")
    assert place.run("cls", *words, name="again") == 0
    assert place.scores("again") != first
