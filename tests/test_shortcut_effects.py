"""Scores, effects with intervals and shares, against plain loops and the plain bootstrap."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from clipattr.callbacks.shortcuts_result import (
    ShortcutResult,
    measure_effects,
    measure_shares,
    spreads,
)
from clipattr.errors import ConfigError, DataError
from clipattr.metrics.intervals import bootstrap_ratio, bootstrap_statistic, resampled_means
from clipattr.shortcuts.contrast import (
    class_contrasts,
    contrast_logits,
    remove_direction,
    score_names,
)

DRAWS = {"resamples": 200, "seed": 5}
NAMES = ("cat rather than the others", "dog rather than the others", "cow rather than the others")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_a_score_is_a_class_against_the_mean_of_the_others(n_classes: int):
    weights, bias = draw(n_classes, 4), draw(n_classes, seed=1)
    embeddings = draw(6, 4, seed=2)
    logits = embeddings @ weights.T + bias
    rows = class_contrasts(weights, bias)
    found = contrast_logits(logits)
    torch.testing.assert_close(embeddings @ rows.weights.T + rows.bias, found)
    for image in range(6):
        of_image = logits[image].tolist()
        if n_classes == 2:
            assert found[image].tolist() == pytest.approx([of_image[1] - of_image[0]])
            continue
        for number in range(n_classes):
            others = [y for place, y in enumerate(of_image) if place != number]
            expected = of_image[number] - sum(others) / len(others)
            assert float(found[image, number]) == pytest.approx(expected)
    assert len(score_names([f"c{number}" for number in range(n_classes)])) == found.shape[1]
    # What moves for all classes alike is not seen.
    torch.testing.assert_close(contrast_logits(logits + 100), found, atol=1e-12, rtol=1e-9)


def test_names_of_scores():
    assert score_names(["intact", "cracked"]) == ("cracked rather than intact",)
    assert score_names(["cat", "dog", "cow"]) == NAMES
    with pytest.raises(ConfigError, match="at least 2"):
        score_names(["cat"])


def test_nothing_is_left_along_a_removed_direction():
    unit = torch.nn.functional.normalize(draw(7, 5), dim=1)
    direction = 3 * draw(5, seed=1)
    along = direction / direction.norm()
    removed = remove_direction(unit, direction, 0.0)
    assert (removed @ along).abs().max() < 1e-12
    torch.testing.assert_close(removed.norm(dim=1), torch.ones(7, dtype=torch.float64))
    mean = float((unit @ along).mean())
    for image in range(7):
        edited = unit[image] - (float(unit[image] @ along) - mean) * along
        expected = edited / edited.norm()
        torch.testing.assert_close(remove_direction(unit, direction, mean)[image], expected)
    with pytest.raises(DataError, match="length 0"):
        remove_direction(unit, torch.zeros(5), 0.0)


def spread(scores: Tensor) -> float:
    return float(np.std(scores.numpy()))


def of_spread(square: Tensor, mean: Tensor) -> Tensor:
    return (square - mean.square()).sqrt()


def two_heads(n: int = 60, n_images: int = 60) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    text, probe = 0.1 * draw(n, 3) + 0.2, 5 * draw(n, 3, seed=1) - 9
    text[:, 1] -= 0.2  # cannot be told from 0
    units = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([3.0, 4.0, 5.0])
    scores = {
        head: unit * draw(n_images, 3, seed=seed) + 7
        for seed, (head, unit) in enumerate(zip(("text", "probe"), units, strict=True), start=2)
    }
    return text, probe, scores


def test_effects_of_the_same_images_equal_single_bootstraps():
    text, probe, scores = two_heads()
    found = measure_effects(
        text, probe, scores=scores, same_images=True, names=NAMES, measure="removal", **DRAWS
    )
    assert [each.score for each in found] == list(NAMES)
    for number, effect in enumerate(found):
        columns = {"text": text[:, number], "probe": probe[:, number]}
        base = {head: each[:, number] for head, each in scores.items()}

        def bootstrap(statistic, *heads: str, columns=columns, base=base):
            """Of mean effect, mean score and mean square of each head."""
            parts = [(columns[h], base[h], base[h].square()) for h in heads]
            flat = [each for part in parts for each in part]
            return bootstrap_statistic(flat, statistic, resamples=200, generator=seeded(5))

        assert (effect.measure, effect.n) == ("removal", 60)
        for head, interval in (("text", effect.text), ("probe", effect.probe)):
            point = float(columns[head].mean()) / spread(base[head])
            assert interval.mean == pytest.approx(point)
            expected = bootstrap(lambda e, m, q: e / of_spread(q, m), head)
            assert interval == pytest.approx(expected)
        # Signs of the data's means: -1 of the probe, and of the text head what its mean has.
        sign = float(columns["text"].mean().sign())
        expected = bootstrap(
            lambda e, m, q, f, n, r, sign=sign: -f / of_spread(r, n) - sign * e / of_spread(q, m),
            "text",
            "probe",
        )
        assert effect.excess == pytest.approx(expected)
        if number == 1:
            assert effect.text.low < 0 < effect.text.high
            assert all(math.isnan(value) for value in effect.amplification)
        else:
            ratio = bootstrap(
                lambda e, m, q, f, n, r: f / of_spread(r, n) / (e / of_spread(q, m)),
                "text",
                "probe",
            )
            assert effect.amplification == pytest.approx(ratio)
            assert effect.amplification.mean < -1


def test_units_of_other_images_are_drawn_apart():
    """As many pairs as images, and still not the same draws."""
    text, probe, scores = two_heads()
    options = {"scores": scores, "names": NAMES, "measure": "pairs", **DRAWS}
    same = measure_effects(text, probe, same_images=True, **options)
    apart = measure_effects(text, probe, same_images=False, **options)
    means = text.mean(0), probe.mean(0)
    effects = resampled_means(torch.cat([text, probe], 1), resamples=200, generator=seeded(5))
    moments = torch.cat([each**power for each in scores.values() for power in (1, 2)], 1)
    drawn = resampled_means(moments, resamples=200, generator=seeded(6))
    for number, effect in enumerate(apart):
        mean, square = drawn[:, 6 + number], drawn[:, 9 + number]
        expected = effects[:, 3 + number] / of_spread(square, mean)
        low, high = np.quantile(expected.numpy(), [0.025, 0.975])
        assert (effect.probe.low, effect.probe.high) == pytest.approx((low, high))
        assert effect.probe.mean == pytest.approx(
            float(means[1][number]) / spread(scores["probe"][:, number])
        )
        assert effect.probe.mean == same[number].probe.mean
        assert effect.probe.low != same[number].probe.low
    options["scores"] = {head: each[:59] for head, each in scores.items()}
    with pytest.raises(DataError, match="pairs: 60 effects, but scores of"):
        measure_effects(text, probe, same_images=True, **options)


def test_excess_of_opposite_effects_of_one_size_is_nothing():
    text = 1 + 0.1 * draw(80, 1)
    scores = draw(80, 1, seed=4)
    (found,) = measure_effects(
        text,
        -text,
        scores={"text": scores, "probe": -scores},
        same_images=False,
        names=("a",),
        measure="pairs",
        **DRAWS,
    )
    assert found.excess == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.excess_all == found.excess
    assert found.amplification == pytest.approx((-1, -1, -1))


def test_effects_that_are_not_numbers_or_too_few_are_refused():
    text, probe, scores = two_heads()
    options = {"same_images": False, "names": NAMES, "measure": "pairs", **DRAWS}
    with pytest.raises(DataError, match="pairs: 1 images or pairs"):
        measure_effects(text[:1], probe[:1], scores=scores, **options)
    constant = scores["probe"] * torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(DataError, match="head 'probe', score 1: its standard deviation over 60"):
        measure_effects(text, probe, scores={**scores, "probe": constant}, **options)
    probe[4, 2] = math.nan
    with pytest.raises(DataError, match="1 of them with a number that is not finite"):
        measure_effects(text, probe, scores=scores, **options)


def test_a_draw_of_one_image_alone_does_not_undo_an_interval():
    """One image of four differs: a third of the draws have no spread, and are not divided by 0."""
    scores = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    (found,) = measure_effects(
        0 * scores,
        1 + scores,
        scores={"text": scores, "probe": scores},
        same_images=True,
        names=("a",),
        measure="removal",
        **DRAWS,
    )
    assert found.text == (0, 0, 0)
    assert found.probe.high > 1e5 > found.probe.mean >= found.probe.low > 0
    assert math.isfinite(found.probe.high)


def build_result() -> ShortcutResult:
    heads = ("text", "probe")
    logits = {head: draw(50, 3, seed=seed) for seed, head in enumerate(heads)}
    parts = {(head, "tag"): draw(50, 3, seed=5 + seed) for seed, head in enumerate(heads)}
    totals = {head: 3 + draw(50, 3, seed=9 + seed).abs() for seed, head in enumerate(heads)}
    rows, unit = torch.arange(50), torch.zeros(50, 4)
    return ShortcutResult(rows, unit, logits, {}, parts, totals, None)


def test_spreads_equal_numpy():
    result = build_result()
    for head, found in spreads(result).items():
        logits = result.logits[head].numpy()
        for number in range(3):
            others = np.delete(logits, number, axis=1).mean(axis=1)
            assert float(found[number]) == pytest.approx(np.std(logits[:, number] - others))
    constant = torch.zeros(50, 3, dtype=torch.float64)
    constant[:, 0] = torch.arange(50)  # moves every score
    assert len(spreads(result._replace(logits={"text": constant}))["text"]) == 3
    with pytest.raises(DataError, match="head 'text', score 0: its standard deviation over 50"):
        spreads(result._replace(logits={"text": 0 * constant}))


def test_shares_equal_single_bootstraps():
    result = build_result()
    found = measure_shares(result, "tag", NAMES, **DRAWS)
    for number, share in enumerate(found):
        assert share.score == NAMES[number]
        for head, interval in (("text", share.text), ("probe", share.probe)):
            part = result.cue_attribution[head, "tag"][:, number]
            total = result.total_attribution[head][:, number]
            assert interval.mean == pytest.approx(float(part.sum() / total.sum()))
            expected = bootstrap_ratio(part, total, resamples=200, generator=seeded(5))
            assert interval == pytest.approx(expected)


def test_a_share_of_nothing_is_not_a_number():
    result = build_result()
    nothing = {head: 0 * total for head, total in result.total_attribution.items()}
    for share in measure_shares(result._replace(total_attribution=nothing), "tag", NAMES, **DRAWS):
        assert all(math.isnan(value) for value in (*share.text, *share.probe))
