"""The faithfulness table at any site: against plain loops that run the whole suffix."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from clipattr.attribution import HeadScore
from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback
from clipattr.callbacks.effects import EffectReader, SuffixEffects
from clipattr.clip import Site, image_tower, load_clip
from clipattr.clip.cut import State
from clipattr.config.choices import Method
from clipattr.config.schema import DeviceConfig
from clipattr.sae.relu import ReluSae
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester
from tests.tiny import CONFIG, save_tiny_clip

N_IMAGES, N_LATENTS, STEPS = 9, 20, 5
SITES = [Site(), Site(0), Site(0, "residual", "all"), Site(0, "neurons", "spatial")]
LAST, TOKENS = SITES[0], SITES[2]
Change = Callable[[FaithfulnessCallback], None]


class Case(NamedTuple):
    """Images at a site; the head is a probe."""

    spliced: Spliced
    state: State
    weights: Tensor
    bias: Tensor
    targets: Tensor

    def score(self, image: int, latents: list[int]) -> float:
        """The score of an image without some latents, at whatever token they are."""
        x = self.state.x[image]
        codes = self.spliced.sae.encode(x)
        dense = codes.to_dense()
        kept = torch.zeros_like(dense)
        kept[..., latents] = dense[..., latents]
        edited = x - kept @ self.spliced.sae.directions
        embedding = self.spliced.cut.suffix(
            edited[None], self.state.rest.rows(torch.tensor([image]))
        )
        target = int(self.targets[image])
        unit = normalize(embedding.double(), dim=1)[0]
        return float(unit @ self.weights[target].double() + self.bias[target].double())

    def active(self, image: int) -> list[int]:
        dense = self.spliced.sae.encode(self.state.x[image]).to_dense().reshape(-1, N_LATENTS)
        return dense.any(dim=0).nonzero().flatten().tolist()

    def effects(self, image: int) -> dict[int, float]:
        clean = self.score(image, [])
        return {latent: clean - self.score(image, [latent]) for latent in self.active(image)}

    def curves(self, image: int, order: list[int]) -> tuple[list[float], list[float]]:
        everything = self.active(image)
        fronts = [order[:step] for step in range(STEPS + 1)]
        deletion = [self.score(image, front) for front in fronts]
        kept = [[j for j in everything if j not in front] for front in fronts]
        return deletion, [self.score(image, each) for each in kept]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


def build(clip, site: Site, kind: str = "topk") -> Case:
    generator = torch.Generator().manual_seed(5)
    cut = image_tower(clip.model).cut(site)
    images = torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
    with torch.no_grad():
        state = cut.prefix(images)
    options = {"d_model": cut.d_site, "n_latents": N_LATENTS, "generator": generator}
    sae = ReluSae(**options, sparsity=0.0) if kind == "relu" else TopKSae(**options, k=3)
    rows = state.x.reshape(-1, cut.d_site)
    sae.initialise_from(rows)
    if kind == "relu":
        # So that images have from none to a few active latents.
        with torch.no_grad():
            sae.b_enc.sub_(sae.pre_activations(sae.normalise(rows)[0]).quantile(0.85))
    head = (
        normalize(torch.randn(4, 16, generator=generator), dim=1),
        1 + torch.rand(4, generator=generator),
    )
    targets = torch.arange(N_IMAGES) % 4
    return Case(Spliced(cut, sae.requires_grad_(False)), state, *head, targets)


def run(case: Case, folder, callback, batch: int = 4) -> None:
    settings = DeviceConfig(progress=False, accelerator="cpu")
    parts = torch.arange(N_IMAGES).split(batch)
    batches = [(case.state.x[one], one, case.state.rest.rows(one)) for one in parts]
    trainer = build_tester(settings, folder, callbacks=[callback])
    trainer.test(SplicedModule(case.spliced), DataLoader(batches, batch_size=None), verbose=False)


def measure(case: Case, folder, batch: int = 4, **changes) -> FaithfulnessCallback:
    options = {
        "methods": list(Method),
        "n_steps": STEPS,
        "ig_steps": 8,
        "overlap_top": 2,
        "resamples": 20,
        "seed": 0,
        "bias": case.bias,
        "sum_classes": True,
    }
    callback = FaithfulnessCallback(case.spliced, case.weights, case.targets, **(options | changes))
    run(case, folder, callback, batch)
    return callback


def area(curve: list[float]) -> float:
    return sum((a + b) / 2 for a, b in zip(curve[:-1], curve[1:], strict=True)) / (len(curve) - 1)


@pytest.mark.parametrize(("site", "kind"), [*((site, "topk") for site in SITES), (LAST, "relu")])
def test_the_table_equals_a_plain_loop(clip, tmp_path, site: Site, kind: str):
    """Also where images have fewer active latents than the curve has steps, or none."""
    case = build(clip, site, kind)
    found = measure(case, tmp_path)
    steps = found.n_steps
    assert steps == (3 if site in SITES[:2] and kind == "topk" else STEPS)
    clean, rest, change, areas, curves = 0.0, 0.0, 0.0, [0.0, 0.0], []
    for image in range(N_IMAGES):
        effects = case.effects(image)
        both = case.curves(image, sorted(effects, key=lambda j: -effects[j]))
        both = [each[: steps + 1] for each in both]
        clean += both[0][0]
        without = case.score(image, case.active(image))
        rest += without
        change += abs(both[0][0] - without)
        areas = [total + area(curve) for total, curve in zip(areas, both, strict=True)]
        curves.append(both)
    exact = found.results[Method.exact]
    assert exact.deletion_auc.mean == pytest.approx(areas[0] / clean, rel=1e-4)
    assert exact.insertion_auc.mean == pytest.approx(areas[1] / clean, rel=1e-4)
    assert exact.deletion_drop.mean == pytest.approx((clean - areas[0]) / change, rel=1e-3)
    assert exact.insertion_gain.mean == pytest.approx((areas[1] - rest) / change, rel=1e-3)
    minus, lens = exact.differences, found.results[Method.logit_lens]
    for name in ("deletion_drop", "insertion_gain"):
        both = getattr(exact, name), getattr(lens, name)
        assert minus[name].mean == pytest.approx(both[0].mean - both[1].mean, rel=1e-6)
        assert both[0].low <= both[0].mean <= both[0].high
    table = torch.tensor(curves)
    for number, name in enumerate(("deletion", "insertion")):
        mean, error = getattr(exact, f"{name}_curve"), getattr(exact, f"{name}_error")
        expected = table[:, number].mean(0), table[:, number].std(0, correction=0) / N_IMAGES**0.5
        torch.testing.assert_close(torch.tensor(mean), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(error), expected[1], rtol=1e-2, atol=1e-5)
    if kind == "relu":
        counts = [len(case.active(image)) for image in range(N_IMAGES)]
        assert min(counts) < 3
        assert len(set(counts)) > 2


@pytest.mark.parametrize("site", [LAST, TOKENS])
def test_class_numbers_and_rankings_equal_a_plain_loop(clip, tmp_path, site: Site):
    case = build(clip, site)
    found = measure(case, tmp_path)
    totals = torch.zeros(4, N_LATENTS, dtype=torch.float64)
    clean, areas = torch.zeros(4), torch.zeros(4)
    for image, target in enumerate(case.targets.tolist()):
        effects = case.effects(image)
        for latent, effect in effects.items():
            totals[target, latent] += effect
        order = sorted(effects, key=lambda j: -effects[j])
        deletion = case.curves(image, order)[0][: found.n_steps + 1]
        clean[target] += deletion[0]
        areas[target] += area(deletion)
    torch.testing.assert_close(found.class_totals[Method.exact], totals, rtol=1e-3, atol=1e-5)
    for target in range(4):
        numbers = found.by_class[Method.exact][target]
        assert numbers["images"] == int((case.targets == target).sum())
        assert numbers["deletion_auc"] == pytest.approx(
            float(areas[target] / clean[target]), rel=1e-4
        )
        assert numbers["spearman_exact"] == pytest.approx(1)
    whole = GlobalDeletionCallback(found.reader, case.targets, found.rankings, resamples=20, seed=0)
    run(case, tmp_path, whole)
    expected = 0.0
    for image, target in enumerate(case.targets.tolist()):
        first = found.rankings[Method.exact][target].tolist()
        curve = [case.score(image, first[:step]) for step in range(found.n_steps + 1)]
        expected += area(curve)
    result = whole.results[Method.exact].deletion_auc
    assert result.mean == pytest.approx(expected / float(clean.sum()), rel=1e-4)
    assert result.low <= result.mean <= result.high
    assert whole.results[Method.logit_lens].minus_logit_lens is None


def test_a_drop_does_not_depend_on_where_the_scores_have_their_zero(clip, tmp_path):
    """A bias moves the scores through 0: areas over a clean score near 0 say nothing then."""
    case = build(clip, LAST)
    one = measure(case, tmp_path)
    scores = one.scores.compute().values[:, 0]
    other = measure(case, tmp_path, bias=case.bias - float(scores.mean()) + 1e-3)
    for method, found in one.results.items():
        shifted = other.results[method]
        assert shifted.deletion_drop == pytest.approx(found.deletion_drop, rel=1e-3, abs=1e-5)
        assert shifted.insertion_gain == pytest.approx(found.insertion_gain, rel=1e-3, abs=1e-5)
        assert abs(shifted.deletion_auc.mean - found.deletion_auc.mean) > 1


def test_the_closed_form_and_the_suffix_give_the_same_effects(clip):
    case = build(clip, LAST)
    reader = EffectReader(case.spliced, case.weights, case.bias)
    rows = torch.arange(N_IMAGES)
    readout = case.spliced.read(case.state.x, rows)
    closed = reader.read(readout, rows, case.targets)
    score = HeadScore(case.spliced.cut.suffix, case.weights, case.targets, case.bias)
    run = SuffixEffects(score, readout.x, readout.codes, case.spliced.sae.directions)
    torch.testing.assert_close(closed.clean, run.clean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(closed.rest, run.rest, rtol=1e-5, atol=1e-5)
    for name, arguments in (
        ("exact_patching", ()),
        ("attribution_patching", ()),
        ("integrated_gradients", (8,)),
    ):
        dense = [
            each.codes._replace(values=getattr(each, name)(*arguments)).to_dense()
            for each in (closed, run)
        ]
        torch.testing.assert_close(*dense, rtol=1e-3, atol=1e-5)


def test_an_unrestricted_lens_deletes_what_did_not_fire(clip, tmp_path):
    case = build(clip, LAST)
    found = measure(case, tmp_path)
    lens = EffectReader(case.spliced, case.weights).lens
    areas, clean = 0.0, 0.0
    for image, target in enumerate(case.targets.tolist()):
        order = lens[target].argsort(descending=True).tolist()
        curve = [case.score(image, order[:step]) for step in range(found.n_steps + 1)]
        areas, clean = areas + area(curve), clean + curve[0]
    result = found.logit_lens_unrestricted
    assert result is not None
    assert result.deletion_auc.mean == pytest.approx(areas / clean, rel=1e-4)
    assert result.deletion_auc != found.results[Method.logit_lens].deletion_auc


def test_completeness_belongs_to_methods_with_units_of_the_score(clip, tmp_path):
    found = measure(build(clip, TOKENS), tmp_path)
    assert found.results[Method.integrated_gradients].completeness.mean < 1e-3
    assert found.results[Method.attribution_patching].completeness.mean > 1e-2
    assert found.completeness_gap == found.results[Method.integrated_gradients].completeness.mean
    for method in (Method.energy, Method.logit_lens, Method.random, Method.act_times_logit_lens):
        assert found.results[method].completeness is None


@pytest.mark.parametrize("site", [LAST, TOKENS])
def test_the_size_of_a_batch_changes_nothing(clip, tmp_path, site: Site, monkeypatch):
    case = build(clip, site)
    one = measure(case, tmp_path)
    monkeypatch.setattr("clipattr.callbacks.effects._ENTRIES", 1)
    other = measure(case, tmp_path, batch=1)
    for method in Method:
        for name in ("deletion_curve", "insertion_curve"):
            pair = [getattr(each.results[method], name) for each in (one, other)]
            assert pair[0] == pytest.approx(pair[1], rel=1e-5)


def test_a_direction_of_neurons_is_read_through_their_output_weights(clip):
    cut = image_tower(clip.model).cut(SITES[3])
    visual = clip.model.visual
    directions = torch.randn(5, cut.d_site, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = directions @ visual.transformer.resblocks[0].mlp.c_proj.weight.T
        expected = visual.ln_post(moved) @ visual.proj
        torch.testing.assert_close(cut.read_directly(directions), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_directions_are_read_in_the_precision_of_the_tower(tmp_path, precision: str, pool: str):
    """The vectors come in float32 and leave in it, whatever the weights are."""
    vision = CONFIG["model_cfg"]["vision_cfg"] | {"pool_type": pool}
    path = save_tiny_clip(tmp_path / "tiny", vision_cfg=vision)
    whole, half = (image_tower(load_clip(path, precision=p).model) for p in ("fp32", precision))
    assert half.cut(LAST).trunk.dtype != torch.float32
    generator = torch.Generator().manual_seed(0)
    streams = ("residual", "heads", "neurons")
    for site in [*(Site(0, stream, "all") for stream in streams), Site(1, "embedding")]:
        directions = torch.randn(5, whole.cut(site).d_site, generator=generator)
        with torch.no_grad():
            expected = whole.cut(site).read_directly(directions)
            found = half.cut(site).read_directly(directions)
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 0.03
