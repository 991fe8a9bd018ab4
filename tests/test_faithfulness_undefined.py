"""What a faithfulness table says where a number is not defined, and what it refuses."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipattr.callbacks import GlobalDeletionCallback, HeldOut, measure_faithfulness, take_all
from clipattr.clip import Site, load_clip
from clipattr.config.choices import Method
from clipattr.config.load import load_config
from clipattr.config.schema import EVALUATE_JOBS
from clipattr.config.training_faithfulness import TrainingFaithfulnessConfig
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.class_head import load_classes
from clipattr.metrics.intervals import Interval
from tests.test_faithfulness import LAST, N_IMAGES, N_LATENTS, Case, build, measure, run
from tests.tiny import save_tiny_clip

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


def held_out_of(case: Case) -> HeldOut:
    batches = [(case.state.x, torch.arange(N_IMAGES), case.state.rest)]
    return HeldOut(case.spliced.cut, batches, case.weights, case.targets, case.bias)


def global_deletion(case: Case, folder: Path, table) -> GlobalDeletionCallback:
    whole = GlobalDeletionCallback(table.reader, case.targets, table.rankings, resamples=9, seed=0)
    run(case, folder, whole)
    return whole


def is_undefined(interval: Interval) -> bool:
    return all(math.isnan(value) for value in interval)


def test_an_auc_over_negative_scores_is_not_defined(clip, tmp_path: Path):
    """Divided by them it would rank the methods the wrong way round."""
    case = build(clip, LAST)
    above = measure(case, tmp_path)
    case = case._replace(bias=case.bias - 5)
    below = measure(case, tmp_path)
    whole = global_deletion(case, tmp_path, below)
    for method, found in below.results.items():
        assert is_undefined(found.deletion_auc)
        assert is_undefined(found.insertion_auc)
        assert is_undefined(whole.results[method].deletion_auc)
        assert is_undefined(whole.results[method].insertion_auc)
        if method is not Method.logit_lens:
            assert is_undefined(found.minus_logit_lens)
            assert is_undefined(found.differences["insertion_auc"])
            assert is_undefined(whole.results[method].minus_logit_lens)
        expected = above.results[method]
        assert found.deletion_drop == pytest.approx(expected.deletion_drop, rel=1e-3, abs=1e-5)
        assert found.spearman_exact == pytest.approx(expected.spearman_exact, nan_ok=True)
        for numbers in [*below.by_class[method].values(), below.means()[method]]:
            assert math.isnan(numbers["deletion_auc"])
            assert math.isnan(numbers["insertion_auc"])
    assert is_undefined(below.logit_lens_unrestricted.deletion_auc)
    trained = measure_faithfulness(case.spliced.sae, held_out_of(case))
    assert math.isnan(trained["logit_lens/deletion_auc"])
    assert not math.isnan(trained["logit_lens/spearman_exact"])


def test_a_class_below_zero_is_not_defined_by_itself(clip, tmp_path: Path):
    case = build(clip, LAST)
    case = case._replace(bias=case.bias + torch.tensor([-3.0, 2, 2, 2]))
    found = measure(case, tmp_path)
    assert found.results[Method.exact].deletion_auc.mean > 0
    rows = found.by_class[Method.exact]
    assert [math.isnan(rows[number]["deletion_auc"]) for number in range(4)] == [True] + 3 * [False]


@pytest.mark.parametrize("what", ["inactive", "patches"])
def test_latents_that_do_nothing_have_no_drop(clip, tmp_path: Path, what: str):
    """None fires; or they fire at patches that no class token reads any more."""
    case = build(clip, LAST, "relu")
    if what == "patches":
        case = build(clip, Site(-1, "residual", "spatial"))
    else:
        case.spliced.sae.b_enc.fill_(-1e9)
    found = measure(case, tmp_path)
    for row in found.results.values():
        assert row.deletion_auc == pytest.approx((1, 1, 1))
        assert is_undefined(row.deletion_drop)
        assert is_undefined(row.insertion_gain)
        assert row.completeness is None or is_undefined(row.completeness)
    assert found.results[Method.integrated_gradients].completeness is not None
    assert math.isnan(found.completeness_gap)


def test_the_random_order_of_a_class_does_not_follow_how_often_latents_fire(clip, tmp_path: Path):
    case = build(clip, LAST)
    found = measure(case, tmp_path)
    again = measure(case, tmp_path, batch=1)
    assert torch.equal(found.rankings[Method.random], again.rankings[Method.random])
    for target in range(4):
        images = (case.targets == target).nonzero().flatten().tolist()
        fired = {latent for image in images for latent in case.active(image)}
        assert set(found.rankings[Method.random][target].tolist()) <= fired
    # A thousand classes in which latent j fires j times: each is the first as often as another.
    n_fired, n_classes = 10, 1000
    totals = torch.arange(N_LATENTS).double().roll(n_fired) * torch.tensor([0.5])
    totals = torch.where(torch.arange(N_LATENTS) < n_fired, totals, 0.0)
    found.class_totals[Method.random] = totals.expand(n_classes, N_LATENTS)
    order = found._rank(Method.random).argsort(dim=1, descending=True)
    assert (order[:, :n_fired] < n_fired).all()
    first = order[:, 0].bincount(minlength=n_fired)
    expected = n_classes / n_fired
    assert float((first - expected).square().sum() / expected) < 28  # chi2 of 9: p = 0.001


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_steps": 0}, "n_steps=0: at least 1"),
        ({"methods": [Method.exact]}, r"methods \(exact\): logit_lens must be among them"),
        ({"methods": []}, r"methods \(none\): logit_lens"),
    ],
)
def test_options_that_cannot_work(clip, tmp_path: Path, changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        measure(build(clip, LAST), tmp_path, **changes)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of no images
def test_inputs_that_cannot_work(clip, tmp_path: Path):
    case = build(clip, LAST)
    good, sae = held_out_of(case), case.spliced.sae
    with pytest.raises(ConfigError, match="n_steps=0"):
        measure_faithfulness(sae, good, n_steps=0)
    with pytest.raises(DataError, match="0 images were measured, at least 1"):
        measure_faithfulness(sae, good._replace(batches=[]))
    for wrong in (4, -1):
        with pytest.raises(ConfigError, match=f"targets: {wrong} is no class of the head, whose 4"):
            measure_faithfulness(sae, good._replace(targets=good.targets.clone().fill_(wrong)))
    with pytest.raises(DataError, match="1 images were measured, at least 2"):
        measure(case._replace(targets=case.targets[:1]), tmp_path)
    table = measure(case, tmp_path)
    options = {"resamples": 9, "seed": 0}
    with pytest.raises(ConfigError, match="logit_lens must be among"):
        GlobalDeletionCallback(table.reader, case.targets, {}, **options)
    with pytest.raises(ConfigError, match="targets: 4 is no class"):
        GlobalDeletionCallback(table.reader, case.targets + 1, table.rankings, **options)
    whole = GlobalDeletionCallback(table.reader, case.targets[:1], table.rankings, **options)
    take_all(case.spliced, good.batches, whole)
    with pytest.raises(DataError, match="1 images were measured"):
        whole.finish()


def test_rows_beyond_the_targets_are_left_out(clip):
    case = build(clip, LAST)
    good, sae = held_out_of(case), case.spliced.sae
    few = measure_faithfulness(sae, good._replace(targets=good.targets[:5]))
    rows = torch.arange(5)
    five = good._replace(batches=[(case.state.x[:5], rows, case.state.rest)])
    expected = measure_faithfulness(sae, five)
    del few["fvu"], expected["fvu"]  # of every row that is given
    assert few == pytest.approx(expected)


@pytest.mark.parametrize("name", ["evaluate/attribution.yaml", "demo/evaluate.yaml"])
def test_one_image_has_no_interval(name: str):
    given = ["sae=a", "data.shards=b", "zeroshot.classes=[a,b]"] if "attribution" in name else []
    arguments = [str(CONFIGS / name), *given, "evaluation.images=1"]
    with pytest.raises(ConfigError, match="evaluation.images=1: at least 2"):
        load_config(arguments, EVALUATE_JOBS)
    config = load_config([*arguments[:-1], "evaluation.images=2"], EVALUATE_JOBS)
    assert config.evaluation.images == 2


def test_the_setting_of_classes_is_named():
    settings = TrainingFaithfulnessConfig(classes=["star"])
    with pytest.raises(ConfigError, match=r"^faithfulness\.classes=\['star'\]: one entry is"):
        load_classes(settings)
    settings = replace(settings, classes=["star", "moon"], templates="photo")
    with pytest.raises(ConfigError, match=r"^faithfulness\.templates='photo': neither"):
        load_classes(settings)
