"""How much more than a text prompt the probe leans on each sticker, and who is harmed."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.callbacks import HeadsCallback
from clipattr.clip import embed_prompts
from clipattr.jobs.world_data import SplitRows, WorldData
from clipattr.jobs.world_scorecard import latents_of
from clipattr.metrics.intervals import Interval, bootstrap_mean, bootstrap_statistic
from clipattr.shortcuts.amplification import amplification_ratio, cue_effects, pair_effects
from clipattr.shortcuts.groups import GroupCounts, count_groups
from clipattr.world.factors import Sticker
from clipattr.world.prompts import TASK_PROMPTS

HEADS = ("text", "probe")
Columns = dict[str, Float[Tensor, " _"]]
"""What HeadsCallback measured: `<head>.score`, `<head>.total`, `<head>.<cue>` per image."""
CUE_AUROC = 0.8


class CueEntry(NamedTuple):
    """One cue. Effects are in standard deviations of each head's score over the task's test set."""

    cue: Sticker
    latents: Int[Tensor, " cue"]
    effect_text: Interval
    effect_probe: Interval
    amplification: Interval
    share_text: float
    share_probe: float


class GroupEntry(NamedTuple):
    """Accuracy of one head on the images of one label with or without the planted cue."""

    head: str
    is_cracked: bool
    has_cue: bool
    n_images: int
    accuracy: Interval


class PairScores(NamedTuple):
    """Standardised scores of every counterfactual scene, per head and variant."""

    scenes: list[int]
    rows: dict[str, list[int]]
    """variant -> row in the pair split, scene by scene"""
    scores: dict[tuple[str, str], Float[Tensor, " scene"]]
    """(head, variant) -> score over the head's standard deviation"""


def build_heads(data: WorldData, cues: dict[Sticker, Tensor]) -> HeadsCallback:
    """Both heads as one score, 'cracked minus intact': a row of weights and a bias each."""
    text = embed_prompts(data.frozen.clip, list(TASK_PROMPTS))
    probe = data.probe
    weights = torch.stack([text[1] - text[0], probe.weight[1] - probe.weight[0]])
    bias = torch.stack([text.new_zeros(()), probe.bias[1] - probe.bias[0]])
    return HeadsCallback(
        data.spliced,
        weights,
        bias,
        names=HEADS,
        cue_latents={cue.name: latents for cue, latents in cues.items()},
    )


def find_cue_latents(
    activations: Float[Tensor, "image latent"], rows: SplitRows
) -> dict[Sticker, Int[Tensor, " cue"]]:
    """The latents that fire on each sticker."""
    return {
        sticker: latents_of(
            activations,
            rows.where(lambda factors, name=sticker.name: bool(factors[f"has_{name}"])),
            at_least=CUE_AUROC,
        )
        for sticker in Sticker
    }


def pair_scores(on_pairs: Columns, on_task: Columns, pairs: SplitRows) -> PairScores:
    """Sort the pair split's scores by scene and variant."""
    rows: dict[str, list[int]] = {}
    scenes: list[int] = []
    for row, factors in enumerate(pairs.factors):
        variant = str(factors["variant"])
        rows.setdefault(variant, []).append(row)
        if variant == "none":
            scenes.append(int(str(factors["pair"])))
    scores = {
        (head, variant): on_pairs[f"{head}.score"][chosen]
        / on_task[f"{head}.score"].std(correction=0)
        for head in HEADS
        for variant, chosen in rows.items()
    }
    return PairScores(scenes, rows, scores)


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
    raw = {
        head: pair_effects(on_pairs[f"{head}.score"][with_cue], on_pairs[f"{head}.score"][without])
        for head in HEADS
    }
    effects = cue_effects(
        text_effects=raw["text"],
        probe_effects=raw["probe"],
        text_scores=on_task["text.score"],
        probe_scores=on_task["probe.score"],
    )

    def generator() -> torch.Generator:
        return torch.Generator(effects.text.device).manual_seed(seed)

    return CueEntry(
        cue=cue,
        latents=latents,
        effect_text=bootstrap_mean(effects.text, resamples=resamples, generator=generator()),
        effect_probe=bootstrap_mean(effects.probe, resamples=resamples, generator=generator()),
        amplification=bootstrap_statistic(
            [effects.probe, effects.text],
            amplification_ratio,
            resamples=resamples,
            generator=generator(),
        ),
        share_text=_share(on_task, "text", cue),
        share_probe=_share(on_task, "probe", cue),
    )


def _share(on_task: Columns, head: str, cue: Sticker) -> float:
    cue_sum = on_task[f"{head}.{cue.name}"].sum()
    return float(cue_sum / on_task[f"{head}.total"].sum())


def measure_groups(
    on_task: Columns, rows: SplitRows, cue: Sticker, *, resamples: int, seed: int
) -> tuple[list[GroupEntry], dict[str, GroupCounts]]:
    """Accuracy per label and cue; a head says 'cracked' when its score is above 0."""
    is_cracked = rows.where(lambda factors: bool(factors["is_cracked"]))
    has_cue = rows.where(lambda factors: bool(factors[f"has_{cue.name}"]))
    entries: list[GroupEntry] = []
    counts: dict[str, GroupCounts] = {}
    for head in HEADS:
        predictions = (on_task[f"{head}.score"] > 0).cpu()
        counts[head] = count_groups(
            predictions=predictions.long(),
            labels=is_cracked.long(),
            cues=has_cue.long(),
            n_labels=2,
            n_cues=2,
        )
        is_correct = (predictions == is_cracked).double()
        for label in (False, True):
            for cued in (False, True):
                chosen: Bool[Tensor, " image"] = (is_cracked == label) & (has_cue == cued)
                generator = torch.Generator().manual_seed(seed)
                accuracy = bootstrap_mean(
                    is_correct[chosen], resamples=resamples, generator=generator
                )
                entries.append(GroupEntry(head, label, cued, int(chosen.sum()), accuracy))
    return entries, counts
