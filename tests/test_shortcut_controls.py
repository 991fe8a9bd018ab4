"""Heads that know nothing, placebo latents, and what is said of both."""

import dataclasses
import math

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval
from clipattr.report.shortcuts import chance
from clipattr.report.shortcuts.claims import PLACEBO_REMOVAL
from clipattr.report.shortcuts.content import PairPicture
from clipattr.shortcuts import null_heads as module
from clipattr.shortcuts.null_heads import (
    draws_band,
    effects_on_heads,
    headline_effects,
    null_band,
    null_heads,
)
from clipattr.shortcuts.placebos import count_unlike, draw_placebos
from tests.shortcuts_content import effect, tag

N_IMAGES, WIDTH, N_CLASSES = 60, 7, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 0, n_images: int = N_IMAGES) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(n_images, WIDTH, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -2, WIDTH)
    labels = torch.randint(N_CLASSES, (n_images,), generator=generator)
    x[:, 2] += 0.4 * labels
    return x, labels


def left_out_errors(x: Tensor, labels: Tensor) -> list[float]:
    """One fit of scikit-learn for each image and penalty."""
    centred = x - x.mean(dim=0)
    unit = float(centred.square().sum()) / WIDTH
    errors = []
    for penalty in module._PENALTIES:
        total = 0.0
        for left_out in range(len(x)):
            kept = torch.arange(len(x)) != left_out
            targets = one_hot(labels[kept], N_CLASSES)
            fitted = Ridge(alpha=penalty * unit).fit(x[kept], targets)
            said = torch.as_tensor(fitted.predict(x[left_out : left_out + 1]))[0]
            total += float((one_hot(labels[left_out], N_CLASSES) - said).square().sum())
        errors.append(total)
    return errors


def test_heads_are_ridge_regressions_of_shuffled_labels_with_the_penalty_of_the_true_ones():
    x, labels = images()
    errors = left_out_errors(x, labels)
    best = min(range(len(errors)), key=errors.__getitem__)
    assert 0 < best < len(errors) - 1
    unit = float((x - x.mean(dim=0)).square().sum()) / WIDTH
    found = null_heads(x, labels, n_classes=N_CLASSES, n_heads=4, seed=3)
    generator = seeded(3)
    for head in found:
        shuffled = labels[torch.randperm(N_IMAGES, generator=generator)]
        wanted = Ridge(alpha=unit * module._PENALTIES[best]).fit(x, one_hot(shuffled, N_CLASSES))
        torch.testing.assert_close(head, torch.as_tensor(wanted.coef_))


def test_chunks_of_images_change_nothing(monkeypatch):
    x, labels = images()
    whole = null_heads(x, labels, n_classes=N_CLASSES, n_heads=3, seed=0)
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.testing.assert_close(null_heads(x, labels, n_classes=N_CLASSES, n_heads=3, seed=0), whole)


def test_what_cannot_be_learned_from_is_an_error():
    x, labels = images()
    with pytest.raises(DataError, match="60 images have one embedding"):
        null_heads(torch.ones_like(x), labels, n_classes=N_CLASSES, seed=0)
    with pytest.raises(DataError, match="1 images; it takes 2"):
        null_heads(x[:1], labels[:1], n_classes=N_CLASSES, seed=0)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_effects_are_mean_changes_of_each_score_in_its_own_deviations(n_classes: int):
    generator = seeded(1)
    heads = torch.randn(5, n_classes, WIDTH, generator=generator, dtype=torch.float64)
    x, _ = images(2)
    without = x - 0.3 * torch.rand(N_IMAGES, WIDTH, generator=generator)
    found = effects_on_heads(heads, x, (x - without).mean(dim=0))
    for number, head in enumerate(heads):
        with_cue, less = x @ head.T, without @ head.T
        if n_classes == 2:
            with_cue, less = (each[:, 1:] - each[:, :1] for each in (with_cue, less))
        else:
            with_cue, less = (
                each - (each.sum(dim=1, keepdim=True) - each) / (n_classes - 1)
                for each in (with_cue, less)
            )
        wanted = (with_cue - less).mean(dim=0) / with_cue.std(dim=0, correction=0)
        torch.testing.assert_close(found[number], wanted)


def test_a_band_counts_sizes():
    band = null_band(torch.tensor([-0.5, 0.1, 0.3, -0.2, 0.4]), -0.3)
    assert band.share == pytest.approx((1 + 3) / (1 + 5))
    assert band.n == 5
    assert draws_band(torch.tensor([-0.5, 0.1, 0.3, -0.2, 0.4]), -0.3).share == 3 / 5
    assert band.high == pytest.approx(0.48)
    for undefined in (torch.zeros(0), torch.tensor([1.0, math.nan])):
        assert math.isnan(null_band(undefined, 0.1).high)
        assert math.isnan(null_band(undefined, 0.1).share)


def test_a_probe_of_shuffled_labels_is_one_of_them_and_a_taught_one_is_not():
    """100 probes that know nothing of a cue: 5 % are beyond the band; one that was taught is."""
    generator = seeded(5)
    x = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    has_cue = torch.rand(400, generator=generator) < 0.5
    x[has_cue, 0] += 2
    x, moved = normalize(x, dim=1), torch.eye(16, dtype=torch.float64)[0]
    is_same = torch.rand(400, generator=generator) < 0.9
    labels = torch.where(is_same, has_cue, ~has_cue).long()
    nulls = effects_on_heads(
        null_heads(x, labels, n_classes=2, n_heads=100, seed=0), x, moved
    ).flatten()
    others = effects_on_heads(
        null_heads(x, labels, n_classes=2, n_heads=300, seed=1), x, moved
    ).flatten()
    beyond = [null_band(nulls, float(one)).share < 0.05 for one in others]
    assert 0.01 < sum(beyond) / len(beyond) < 0.12
    taught = Ridge(alpha=1.0).fit(x, one_hot(labels, 2))
    judged = effects_on_heads(torch.as_tensor(taught.coef_)[None], x, moved)
    assert null_band(nulls, float(judged)).share == pytest.approx(1 / 101)


def test_a_probe_that_knows_nothing_is_no_surprise_however_many_scores_it_has():
    """Its headline is the largest of 14; so is that of each head it is put beside."""
    n_classes, n_runs, beyond = 14, 60, [0, 0]
    for seed in range(n_runs):
        generator = seeded(seed)
        x = torch.randn(300, 16, generator=generator) * torch.logspace(0, -1, 16) + 0.3
        x, labels = normalize(x, dim=1), torch.randint(n_classes, (300,), generator=generator)
        moved = 0.1 * torch.randn(16, generator=generator)
        found = null_heads(x, labels, n_classes=n_classes, n_heads=61, seed=seed)
        effects = effects_on_heads(found, x, moved)
        prompts = torch.randn(1, n_classes, 16, generator=generator)
        text = effects_on_heads(prompts, x, moved)[0]
        judged, nulls = effects[0], effects[1:]
        chosen = int((judged.abs() - text.abs()).argmax())
        for place, each in enumerate((headline_effects(nulls, text), nulls[:, chosen])):
            beyond[place] += null_band(each, float(judged[chosen])).share < 0.05
    assert beyond[0] / n_runs < 0.12
    assert beyond[1] / n_runs > 0.2


def test_each_head_is_met_on_its_own_headline():
    nulls = torch.tensor([[0.5, -0.9, 0.1], [-0.2, 0.4, 0.3]])
    found = headline_effects(nulls, torch.tensor([0.1, -0.6, 0.0]))
    assert found.tolist() == pytest.approx([0.5, 0.3])
    one = torch.tensor([[0.5], [-0.7]])
    assert headline_effects(one, torch.tensor([3.0])).tolist() == pytest.approx([0.5, -0.7])


def energies() -> tuple[Tensor, Tensor]:
    energy = torch.logspace(0, 4, 40, dtype=torch.float64)
    energy[3], energy[30] = 0.0, 0.0
    return energy, torch.zeros(40, dtype=torch.bool)


def test_placebos_are_distinct_sets_of_others_of_about_the_same_energy():
    energy, is_excluded = energies()
    is_excluded[18:20] = True
    cue = torch.tensor([5, 20, 21])
    draws = draw_placebos(energy, cue, is_excluded, n_draws=6, seed=0)
    again = draw_placebos(energy, cue, is_excluded, n_draws=6, seed=0)
    other = draw_placebos(energy, cue, is_excluded, n_draws=6, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(draws, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(draws, other, strict=False))
    assert len({frozenset(one.tolist()) for one in draws}) == 6
    for one in draws:
        assert len(one) == len(set(one.tolist())) >= 3
        assert not set(one.tolist()) & {3, 30, 5, 20, 21, 18, 19}
        # Eight candidates in steps of a quarter, five of them on one side of a gap.
        distance = (energy[one[:3]] / energy[cue]).log().abs()
        assert distance.max() < math.log(10)
        assert energy[one].sum() >= 0.5 * energy[cue].sum()


def test_beside_the_largest_latents_more_of_the_smaller_ones_are_drawn():
    energy = torch.full((50,), 2.0)
    energy[7] = 10.0
    draws = draw_placebos(
        energy, torch.tensor([7]), torch.zeros(50, dtype=torch.bool), n_draws=30, seed=0
    )
    assert [len(one) for one in draws] == [3] * 30
    assert count_unlike(energy, torch.tensor([7]), draws) == 0
    assert count_unlike(energy, torch.tensor([7]), [torch.tensor([1, 2]), draws[0]]) == 1
    assert count_unlike(energy, torch.tensor([1]), [torch.tensor([7])]) == 1
    assert count_unlike(torch.zeros(3), torch.tensor([1]), [torch.tensor([2])]) == 1


def test_a_small_dictionary_has_fewer_placebos_and_then_none():
    energy, is_excluded = energies()
    is_excluded[4:] = True
    cue = torch.tensor([8])
    draws = draw_placebos(energy, cue, is_excluded, n_draws=30, seed=0)
    # Two of 0, 1 and 2 carry less than half of it: there is but one such set.
    assert [sorted(one.tolist()) for one in draws] == [[0, 1, 2]]
    is_excluded[2] = True
    two = draw_placebos(energy, torch.tensor([7, 8]), is_excluded, n_draws=30, seed=0)
    assert [sorted(one.tolist()) for one in two] == [[0, 1]]
    with pytest.raises(DataError, match="2 of 40 fire and are"):
        draw_placebos(energy, torch.tensor([7, 8, 9]), is_excluded, n_draws=30, seed=0)


@pytest.mark.parametrize(
    ("probe", "as_large", "words"),
    [
        (Interval(0.5, 0.4, 0.6), 31, "labels taught it: of 100 probes trained on shuffled"),
        (Interval(0.5, 0.4, 0.6), 3, "Chance does not explain how strongly the probe reacts"),
        (Interval(0.5, 0.4, 0.6), 0, "and none reacts as strongly as the probe"),
        (Interval(0.1, -0.2, 0.4), 90, "For comparison: 95"),
    ],
)
def test_a_cue_is_put_beside_probes_that_know_nothing(probe: Interval, as_large: int, words: str):
    row = dataclasses.replace(effect("pairs", 0.1, 0.5), probe=probe)
    row = dataclasses.replace(row, null_high=0.4321, null_share=(1 + as_large) / 101, n_null=100)
    draws = effect(PLACEBO_REMOVAL, 0.1, 0.1, placebo=True)
    draws = dataclasses.replace(draws, null_high=0.2, null_share=3 / 30, n=30, n_null=30)
    (said,) = chance.chance_claims(dataclasses.replace(tag(), effects=[row]))
    assert words in said
    _, of_draws = chance.chance_claims(dataclasses.replace(tag(), effects=[row, draws]))
    assert of_draws.startswith("Of 30 draws of other latents, 3 move")
    assert chance.chance_note(row).startswith("95\N{NO-BREAK SPACE}% below 0.432; ")
    assert "as large as the cue" in chance.chance_note(draws)
    unknown = dataclasses.replace(row, null_high=math.nan, null_share=math.nan)
    assert chance.chance_claims(dataclasses.replace(tag(), effects=[unknown])) == []
    assert chance.chance_note(unknown) == "not defined"


@pytest.mark.parametrize(("is_cut_out", "of_placebo"), [(False, 0.2), (True, 0.3)])
def test_what_a_placebo_changes_is_what_the_table_counts(is_cut_out: bool, of_placebo: float):
    """Beside a region that is cut out, the image has what the placebo lacks."""
    scores = {"probe": (0.1, 0.6, 0.3)}
    pair = PairPicture("a", b"", b"", b"", scores, is_cut_out=is_cut_out)
    assert chance.pair_change(pair, "probe", "with") == pytest.approx(0.5)
    assert chance.pair_change(pair, "probe", "placebo") == pytest.approx(of_placebo)
