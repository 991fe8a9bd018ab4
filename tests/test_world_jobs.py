"""The numbers that the world's jobs compute themselves: ranks, truth latents, pairs and groups."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from clipattr.clip import embed_prompts, load_clip
from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.jobs.world_data import SplitRows
from clipattr.jobs.world_scorecard import (
    LEARNED_AUROC,
    grade,
    latents_of,
    rank_of,
    use_of_latent,
)
from clipattr.jobs.world_shortcuts import measure_cue, measure_groups, pair_scores
from clipattr.jobs.world_text import summarise
from clipattr.jobs.world_zeroshot import zeroshot_accuracy
from clipattr.world.factors import Sticker
from clipattr.world.prompts import ZEROSHOT, planted_failures
from tests.tiny import save_tiny_clip

SEED = 0


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def test_rank_counts_from_one_and_ties_are_not_flattering():
    values = torch.tensor([0.3, -1.0, 0.9, 0.3])
    assert [rank_of(values, latent) for latent in range(4)] == [3, 4, 1, 3]


def graded(**changes):
    generator = rng()
    n_images = 200
    shows_factor = torch.rand(n_images, generator=generator) < 0.3
    shows_class = (torch.rand(n_images, generator=generator) < 0.2) & ~shows_factor
    activations = torch.rand(n_images, 6, generator=generator)
    activations[:, 4] += 0.5 * shows_factor
    options = {
        "activations": activations,
        "scores": torch.rand(n_images, generator=generator) + 0.3 * shows_factor + shows_class,
        "shows_factor": shows_factor,
        "shows_class": shows_class,
        "mean_attribution": torch.tensor([0.1, 0.5, 0.2, -0.1, 0.4, 0.0]),
        "logit_lens": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        "codes": SparseCodes(torch.tensor([[4, 1]]).repeat(n_images, 1), activations[:, [4, 1]], 6),
        "attributions": torch.randn(n_images, 2, generator=generator),
        "resamples": 20,
        "seed": SEED,
    } | changes
    return options, grade(planted_failures()[0], **options)


def test_scorecard_entry_against_sklearn():
    options, entry = graded()
    separations = [
        roc_auc_score(options["shows_factor"], options["activations"][:, latent])
        for latent in range(6)
    ]
    assert entry.latent == max(range(6), key=lambda latent: separations[latent]) == 4
    assert entry.auroc == pytest.approx(separations[4])
    assert (entry.rank_attribution, entry.rank_logit_lens) == (2, 5)
    others = ~options["shows_class"]
    expected = roc_auc_score(options["shows_factor"][others], options["scores"][others])
    assert entry.score_auroc == pytest.approx(expected)
    assert entry.learned == (expected >= LEARNED_AUROC)
    assert entry.learned


def test_use_of_a_latent_against_a_plain_loop():
    options, entry = graded()
    codes, attributions = options["codes"], options["attributions"]
    values = codes.values.clone()
    values[:50] = 0  # padding there, whatever the indices say
    codes = codes._replace(values=values)
    use = use_of_latent(4, codes, attributions, resamples=500, seed=SEED)
    found = [float(attributions[image, 0]) for image in range(50, 200)]
    assert use.mean_attribution.mean == pytest.approx(sum(found) / 200)
    assert use.mean_attribution.low < sum(found) / 200 < use.mean_attribution.high
    assert use.share_of_images == pytest.approx(150 / 200)
    assert use.share_positive == pytest.approx(sum(value > 0 for value in found) / 150)
    silent = use_of_latent(0, codes, attributions, resamples=20, seed=SEED)
    assert silent[:2] == ((0, 0, 0), 0)
    assert silent.share_positive != silent.share_positive
    whole = use_of_latent(entry.latent, options["codes"], attributions, resamples=20, seed=SEED)
    assert entry.use == whole


def test_effect_that_the_model_does_not_show_is_not_learned():
    _, entry = graded(scores=torch.rand(200, generator=rng()))
    assert not entry.learned


def test_cue_latents_are_all_that_separate_or_the_best_one():
    options, _ = graded()
    activations, shows = options["activations"].clone(), options["shows_factor"]
    activations[:, 1] += 2 * shows
    activations[:, 4] += 2 * shows
    assert latents_of(activations, shows, at_least=0.9).tolist() == [1, 4]
    assert latents_of(options["activations"], shows, at_least=0.999).tolist() == [4]


def pair_case():
    """Eight scenes; the tag adds 0.1 to the text score and 3 to the probe's, the seal little."""
    generator = rng()
    factors, text, probe = [], [], []
    for scene in range(8):
        base, noise = (
            torch.randn(2, generator=generator),
            0.01 * torch.randn(6, generator=generator),
        )
        shifts = {"none": (0.0, 0.0), "tag": (0.1, 3.0), "seal": (0.1, 0.2)}
        for number, (variant, (on_text, on_probe)) in enumerate(shifts.items()):
            factors.append({"pair": scene, "variant": variant})
            text.append(base[0] + on_text + noise[number])
            probe.append(base[1] + on_probe + noise[3 + number])
    rows = SplitRows([], factors, torch.zeros(24, 1), "")
    on_pairs = {
        "text.score": torch.stack(text).double(),
        "probe.score": torch.stack(probe).double(),
    }
    task = torch.randn(2, 50, generator=generator).double()
    task *= torch.tensor([[0.5], [4.0]])
    sums = torch.rand(4, 50, generator=generator).double()
    on_task = {
        "text.score": task[0],
        "probe.score": task[1],
        "text.tag": sums[0],
        "text.total": 1 + sums[1],
        "probe.tag": sums[2],
        "probe.total": 1 + sums[3],
        "text.without_tag": task[0] - 0.5,
        "probe.without_tag": task[1] - sums[0],
    }
    return rows, on_pairs, on_task


def measure_tag(on_pairs, on_task, pairs):
    return measure_cue(
        Sticker.tag,
        torch.tensor([0]),
        on_task=on_task,
        on_pairs=on_pairs,
        pairs=pairs,
        resamples=200,
        seed=SEED,
    )


def test_cue_effects_against_a_plain_loop():
    rows, on_pairs, on_task = pair_case()
    pairs = pair_scores(on_pairs, on_task, rows)
    entry = measure_tag(on_pairs, on_task, pairs)
    expected = {}
    for head in ("text", "probe"):
        scores = on_pairs[f"{head}.score"]
        effects = [float(scores[3 * scene + 1] - scores[3 * scene]) for scene in range(8)]
        of_task = on_task[f"{head}.score"]
        deviation = float(((of_task - of_task.mean()) ** 2).mean().sqrt())
        expected[head] = sum(effects) / 8 / deviation
    assert entry.effect_text.mean == pytest.approx(expected["text"])
    assert entry.effect_probe.mean == pytest.approx(expected["probe"])
    ratio = abs(expected["probe"]) / abs(expected["text"])
    assert entry.amplification.mean == pytest.approx(ratio)
    assert entry.amplification.low < ratio < entry.amplification.high
    share = on_task["text.tag"].sum() / on_task["text.total"].sum()
    assert entry.share["text"] == pytest.approx(float(share))
    removed = float(on_task["probe.score"].sub(on_task["probe.without_tag"]).mean())
    deviation = float(on_task["probe.score"].std(correction=0))
    assert entry.removal["probe"].mean == pytest.approx(removed / deviation)


def test_pairs_are_matched_by_scene_not_by_position():
    rows, on_pairs, on_task = pair_case()
    whole = pair_scores(on_pairs, on_task, rows)
    kept = [row for row in torch.randperm(24, generator=rng()).tolist() if row not in (3, 13)]
    shuffled = SplitRows([], [rows.factors[row] for row in kept], torch.zeros(22, 1), "")
    some = pair_scores({k: v[kept] for k, v in on_pairs.items()}, on_task, shuffled)
    # Row 3 is scene 1 without a sticker, row 13 is scene 4 with the tag: both scenes are left out.
    scenes = [0, 2, 3, 5, 6, 7]
    for key, scores in whole.scores.items():
        torch.testing.assert_close(some.scores[key], scores[scenes])


def test_amplification_of_an_effect_that_is_not_there_is_not_a_number():
    rows, on_pairs, on_task = pair_case()
    on_pairs["text.score"] = torch.randn(24, generator=rng()).double()
    pairs = pair_scores(on_pairs, on_task, rows)
    entry = measure_tag(on_pairs, on_task, pairs)
    assert entry.effect_text.low < 0 < entry.effect_text.high
    assert entry.amplification.mean != entry.amplification.mean


def test_groups_against_a_plain_loop():
    generator = rng()
    factors = [
        {"is_cracked": bool(flags[0] > 0.5), "has_tag": bool(flags[1] > 0.5)}
        for flags in torch.rand(80, 2, generator=generator)
    ]
    rows = SplitRows([], factors, torch.zeros(80, 1), "")
    scores = {head: torch.randn(80, generator=generator) for head in ("text.score", "probe.score")}
    entries, heads = measure_groups(scores, rows, Sticker.tag, resamples=50, seed=SEED)
    worst = {"text": 1.0, "probe": 1.0}
    for entry in entries:
        right, total = 0, 0
        for factor, score in zip(factors, scores[f"{entry.head}.score"], strict=True):
            if (factor["is_cracked"], factor["has_tag"]) == (
                entry.label == "cracked",
                entry.has_cue,
            ):
                total += 1
                right += bool(score > 0) == factor["is_cracked"]
        assert entry.n_images == total
        assert entry.accuracy.mean == pytest.approx(right / total)
        worst[entry.head] = min(worst[entry.head], right / total)
    for head, value in worst.items():
        assert heads[head].counts.worst_group_accuracy == pytest.approx(value)
        chosen = [row for row, factor in enumerate(factors) if factor["has_tag"]]
        truth = [factors[row]["is_cracked"] for row in chosen]
        expected = roc_auc_score(truth, scores[f"{head}.score"][chosen])
        assert heads[head].auroc_with == pytest.approx(expected)


def test_zeroshot_against_a_plain_loop(tmp_path):
    clip = load_clip(save_tiny_clip(tmp_path / "tiny"))
    generator = rng()
    embeddings = normalize(torch.randn(60, 16, generator=generator), dim=1)
    factors = [
        {
            task.field: task.values[int(torch.randint(len(task.values), (), generator=generator))]
            for task in ZEROSHOT.values()
        }
        for _ in range(60)
    ]
    accuracy = zeroshot_accuracy(clip, embeddings, factors)
    for name, task in ZEROSHOT.items():
        right = 0
        for embedding, row in zip(embeddings, factors, strict=True):
            cosines = [float(embedding @ embed_prompts(clip, [p])[0]) for p in task.prompts]
            right += task.values[cosines.index(max(cosines))] == row[task.field]
        assert accuracy[name] == pytest.approx(right / 60)
    factors[3]["colour"] = "mauve"
    with pytest.raises(DataError, match="mauve"):
        zeroshot_accuracy(clip, embeddings, factors)


def interval(mean: float | None, low: float | None, high: float | None):
    return {"mean": mean, "low": low, "high": high}


BETTER, WORSE = interval(-0.1, -0.2, -0.05), interval(0.1, 0.05, 0.2)
UNCLEAR, UNDEFINED = interval(0.1, -0.05, 0.2), interval(None, None, None)


def said_of(difference, whole, ratio, agreement: float | None = 0.9) -> str:
    """The summary, with these differences from logit lens image by image and by noun."""
    row = {"spearman_exact": {"mean": agreement}}
    subject = {
        "minus_logit_lens": {"deletion_auc": difference},
        "global": {"minus_logit_lens": whole},
        "curves": {"deletion": [0.3] * 8},
    }
    metrics = {
        "sae": {"fvu": 0.1, "l0": 4.0},
        "faithfulness": {"attribution_patching": row | subject, "logit_lens": row},
        "shortcut": {"tag": {"amplification": ratio}, "seal": {"amplification": ratio}},
    }
    return " ".join(summarise(metrics))


@pytest.mark.parametrize(
    ("difference", "ratio", "expected"),
    [
        (BETTER, interval(3, 2, 4), ["more faithful", "probe amplifies"]),
        (WORSE, interval(1, 0.9, 4), ["less faithful", "does not clearly"]),
        (UNCLEAR, interval(0.5, 0.4, 0.6), ["not clearly different", "does not clearly"]),
        (UNCLEAR, UNDEFINED, ["not clearly different", "cannot be told from 0"]),
    ],
)
def test_sentences_follow_the_numbers(difference, ratio, expected):
    text = said_of(difference, difference, ratio)
    assert all(words in text for words in expected)
    assert "90.0 % of the variance" in text
    assert "is 0.90 for the ranking of attribution patching" in text
    assert "over 7 deleted latents attribution patching is" in text
    assert "otherwise" not in text


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (WORSE, "says otherwise: less faithful than logit lens (+0.100 [+0.050, +0.200])"),
        (UNCLEAR, "says otherwise: not clearly different from logit lens"),
        (BETTER, None),
        (UNDEFINED, None),
    ],
)
def test_one_order_per_noun_is_named_where_it_says_otherwise(whole, words):
    text = said_of(BETTER, whole, UNDEFINED)
    assert "more faithful than logit lens (-0.100 [-0.200, -0.050])" in text
    assert ("otherwise" in text) == (words is not None)
    assert words is None or words in text


def test_what_is_not_defined_is_said_in_the_summary():
    text = said_of(UNDEFINED, UNDEFINED, UNDEFINED, agreement=None)
    assert "is not defined for the ranking of attribution patching and not defined for" in text
    assert "whether one is more faithful by deletion is not defined in this run." in text
    assert "clearly different" not in text


def test_summary_shows_on_which_side_an_interval_lies():
    text = said_of(interval(-0.0004, -0.0006, -0.0002), BETTER, interval(2.0, 1.004, 3.0))
    assert "more faithful than logit lens (-0.0004 [-0.0006, -0.0002])" in text
    assert "2.000 [1.004, 3.000]" in text
