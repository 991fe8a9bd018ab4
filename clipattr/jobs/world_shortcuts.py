"""How much more than a text prompt the probe leans on each sticker, and who is harmed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.callbacks.shortcuts import LinearHead, ShortcutCallback
from clipattr.callbacks.shortcuts_result import CueEffect, ShortcutResult, measure_effects
from clipattr.clip import embed_prompts
from clipattr.errors import DataError
from clipattr.jobs.world_data import SplitRows, WorldData
from clipattr.jobs.world_scorecard import latents_of
from clipattr.metrics.groups import GroupCounts, count_groups
from clipattr.metrics.intervals import Interval, bootstrap_mean
from clipattr.metrics.ranks import auroc
from clipattr.shortcuts.amplification import pair_effects
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.world.factors import Sticker
from clipattr.world.prompts import TASK_CLASSES, TASK_PROMPTS

HEADS = ("text", "probe")
Columns = dict[str, Float[Tensor, " _"]]
"""Of each image, from `read_columns`: `<head>.score`, `.total`, `.<cue>` and `.without_<cue>`."""
CUE_AUROC = 0.8


class CueEntry(NamedTuple):
    """One cue. Effects are in standard deviations of each head's score over the task's test set."""

    cue: Sticker
    latents: Int[Tensor, " cue"]
    effect_text: Interval
    """of pasting the cue into a scene"""
    effect_probe: Interval
    amplification: Interval
    """nan where the text head's effect cannot be told from 0"""
    removal: dict[str, Interval]
    """head -> score minus score without the cue's latents, on the task's test set"""
    share: dict[str, float]
    """head -> sum of the attributions of the cue's latents / sum of all |attributions|"""


class GroupEntry(NamedTuple):
    """Accuracy of one head on the images of one label with or without the planted cue."""

    head: str
    label: str
    has_cue: bool
    n_images: int
    accuracy: Interval


class HeadQuality(NamedTuple):
    """One head on the task's test set, 'cracked' being a score above 0."""

    counts: GroupCounts
    auroc_with: float
    """on images with the planted cue"""
    auroc_without: float


class PairScores(NamedTuple):
    """Counterfactual scenes: the rows of each variant, scene by scene, and their scores."""

    rows: dict[str, list[int]]
    """variant -> rows of the pair split; position s is the same scene in every variant"""
    scores: dict[tuple[str, str], Float[Tensor, " scene"]]
    """(head, variant) -> score over the standard deviation of the head's score"""


def build_heads(data: WorldData, cues: dict[Sticker, Tensor]) -> ShortcutCallback:
    """Both heads, whose one score is 'cracked minus intact'."""
    text = embed_prompts(data.frozen.clip, list(TASK_PROMPTS))
    heads = {
        "text": LinearHead(text, text.new_zeros(len(text))),
        "probe": LinearHead(data.probe.weight, data.probe.bias),
    }
    named = {cue.name: latents for cue, latents in cues.items()}
    return ShortcutCallback(data.spliced, heads, cues=named)


def read_columns(result: ShortcutResult) -> Columns:
    """What was found of each image, by name."""
    columns: Columns = {}
    for head, logits in result.logits.items():
        columns[f"{head}.score"] = contrast_logits(logits)[:, 0]
        columns[f"{head}.total"] = result.total_attribution[head][:, 0]
    for (head, cue), logits in result.without.items():
        columns[f"{head}.{cue}"] = result.cue_attribution[head, cue][:, 0]
        columns[f"{head}.without_{cue}"] = contrast_logits(logits)[:, 0]
    return columns


def carries(sticker: Sticker) -> Callable[[dict[str, object]], bool]:
    """Whether the factors of an image say that it carries the sticker."""
    return lambda factors: bool(factors[f"has_{sticker.name}"])


def find_cue_latents(
    activations: Float[Tensor, "image latent"], rows: SplitRows
) -> dict[Sticker, Int[Tensor, " cue"]]:
    """The latents that fire on each sticker."""
    return {
        sticker: latents_of(activations, rows.where(carries(sticker)), at_least=CUE_AUROC)
        for sticker in Sticker
    }


def pair_scores(on_pairs: Columns, on_task: Columns, pairs: SplitRows) -> PairScores:
    """Match the variants of each scene by its number; a scene that lacks one is left out."""
    row_of: dict[str, dict[int, int]] = {}
    for row, factors in enumerate(pairs.factors):
        row_of.setdefault(str(factors["variant"]), {})[int(str(factors["pair"]))] = row
    scenes = sorted(set.intersection(*(set(found) for found in row_of.values())))
    rows = {variant: [found[scene] for scene in scenes] for variant, found in row_of.items()}
    scores = {
        (head, variant): on_pairs[f"{head}.score"][chosen]
        / on_task[f"{head}.score"].std(correction=0)
        for head in HEADS
        for variant, chosen in rows.items()
    }
    return PairScores(rows, scores)


def measure_cue(
    cue: Sticker,
    latents: Int[Tensor, " cue"],
    *,
    on_task: Columns,
    on_pairs: Columns,
    pairs: PairScores,
    resamples: int,
    seed: int,
) -> CueEntry:
    """Effect of pasting the cue, on both heads and on the same scenes, and their ratio."""
    with_cue, without = pairs.rows[cue.name], pairs.rows["none"]
    pasted = {
        head: pair_effects(on_pairs[f"{head}.score"][with_cue], on_pairs[f"{head}.score"][without])
        for head in HEADS
    }
    removed = {
        head: pair_effects(on_task[f"{head}.score"], on_task[f"{head}.without_{cue.name}"])
        for head in HEADS
    }
    scores = {head: on_task[f"{head}.score"][:, None] for head in HEADS}

    def measure(effects: dict[str, Tensor], name: str, *, same_images: bool) -> CueEffect:
        text, probe = (effects[head][:, None] for head in HEADS)
        return measure_effects(
            text,
            probe,
            scores=scores,
            same_images=same_images,
            names=("cracked",),
            measure=name,
            resamples=resamples,
            seed=seed,
        )[0]

    effect = measure(pasted, f"{cue.name} pasted", same_images=False)
    removal = measure(removed, f"{cue.name} removed", same_images=True)
    return CueEntry(
        cue=cue,
        latents=latents,
        effect_text=effect.text,
        effect_probe=effect.probe,
        amplification=effect.amplification,
        removal={"text": removal.text, "probe": removal.probe},
        share={head: _share(on_task, head, cue) for head in HEADS},
    )


def _share(on_task: Columns, head: str, cue: Sticker) -> float:
    return float(on_task[f"{head}.{cue.name}"].sum() / on_task[f"{head}.total"].sum())


def measure_groups(
    on_task: Columns, rows: SplitRows, cue: Sticker, *, resamples: int, seed: int
) -> tuple[list[GroupEntry], dict[str, HeadQuality]]:
    """Accuracy per label and cue; a head says 'cracked' when its score is above 0."""
    is_cracked = rows.where(lambda factors: bool(factors["is_cracked"]))
    has_cue = rows.where(carries(cue))
    entries: list[GroupEntry] = []
    heads: dict[str, HeadQuality] = {}
    for head in HEADS:
        score = on_task[f"{head}.score"].cpu()
        predictions = score > 0
        heads[head] = HeadQuality(
            counts=count_groups(
                predictions=predictions.long(),
                labels=is_cracked.long(),
                cues=has_cue.long(),
                n_labels=2,
                n_cues=2,
            ),
            auroc_with=float(auroc(score[has_cue][:, None], is_cracked[has_cue])),
            auroc_without=float(auroc(score[~has_cue][:, None], is_cracked[~has_cue])),
        )
        is_correct = (predictions == is_cracked).double()
        for label in (0, 1):
            for cued in (False, True):
                chosen: Bool[Tensor, " image"] = (is_cracked == bool(label)) & (has_cue == cued)
                name = f"{head}, {TASK_CLASSES[label]}, {cue.name}={cued}"
                accuracy = _group_accuracy(is_correct[chosen], name, resamples, seed)
                n_images = int(chosen.sum())
                entries.append(GroupEntry(head, TASK_CLASSES[label], cued, n_images, accuracy))
    return entries, heads


def _group_accuracy(is_correct: Tensor, name: str, resamples: int, seed: int) -> Interval:
    if len(is_correct) < 2:
        raise DataError(
            f"group ({name}) has {len(is_correct)} images; at least 2 are needed: draw a larger "
            "world.task_test"
        )
    generator = torch.Generator().manual_seed(seed)
    return bootstrap_mean(is_correct, resamples=resamples, generator=generator)
