"""What was found as plain values and pictures: what the page shows and the tables hold."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from clipattr.callbacks.shortcuts_result import CueEffect
from clipattr.config.schema import Shortcuts
from clipattr.data import BadSample, ShardIndex
from clipattr.data.images import decode_image, read_image
from clipattr.data.thumbnails import fit
from clipattr.jobs.shortcuts_amplified import AmplifiedList, Confirmed
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import (
    DIRECTION,
    PAIRS,
    PLACEBO_PAIRS,
    REMOVAL,
    Measured,
    Passes,
    headline_score,
    score,
)
from clipattr.jobs.shortcuts_groups import Group, HeadQuality
from clipattr.jobs.shortcuts_inputs import HEADS, Audited, ImageSet
from clipattr.jobs.shortcuts_pairs import GROUPS_SHOWN, PLACEBO, WITH, WITHOUT, CuePairs
from clipattr.jobs.shortcuts_provenance import warn_of_known_images
from clipattr.jobs.shortcuts_repairs import RepairedCue
from clipattr.metrics.quality import Quality
from clipattr.report.shortcuts.claims import PLACEBO_REMOVAL
from clipattr.report.shortcuts.content import (
    AmplifiedLatent,
    CueResult,
    Curve,
    CurvePoint,
    EffectRow,
    Fact,
    GroupRow,
    PairPicture,
    QualityRow,
    RepairRow,
    ShareRow,
    ShortcutsContent,
)
from clipattr.shortcuts.null_heads import NullBand

_ORDER = (PAIRS, REMOVAL, DIRECTION, PLACEBO_PAIRS, PLACEBO_REMOVAL)


class CueFindings(NamedTuple):
    """All that was measured of one cue."""

    cue: KnownCue
    measured: Measured
    groups: list[Group]
    quality: dict[str, HeadQuality]
    pairs: CuePairs | None
    repairs: list[RepairedCue]


def build_content(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    cues: Sequence[CueFindings],
    amplified: AmplifiedList | None,
) -> ShortcutsContent:
    """The whole page."""
    show = partial(_show, images.samples, config.shortcuts.thumbnail)
    found = None
    if amplified is not None:
        found = [
            _amplified(number, each, audited, show)
            for number, each in enumerate(amplified.confirmed, start=1)
        ]
    return ShortcutsContent(
        title=config.name,
        classes=list(audited.classes),
        prompts=list(audited.prompts),
        n_images=len(passes.labels),
        cues=[_cue(config, audited, passes, each, show) for each in cues],
        amplified=found,
        n_significant=0 if amplified is None else amplified.ranking.n_significant,
        level=config.shortcuts.level,
        facts=_facts(config, audited, images, passes, amplified),
        warnings=[*_warnings(images.bad), *warn_of_known_images(config, audited, images)],
    )


def _cue(
    config: Shortcuts, audited: Audited, passes: Passes, found: CueFindings, show: "partial[bytes]"
) -> CueResult:
    cue, effects = found.cue, found.measured.effects
    effects = sorted(effects, key=lambda each: _ORDER.index(each.measure))
    return CueResult(
        name=cue.name,
        kinds=cue.settings.kinds,
        latents=cue.latents.tolist(),
        effects=[_effect(each, found.measured, n_scores=len(audited.scores)) for each in effects],
        shares=[ShareRow(*each) for each in found.measured.shares],
        groups=[
            GroupRow(
                each.label,
                each.has_cue,
                each.n_images,
                each.accuracy,
                _examples(config, found, each, show),
            )
            for each in found.groups
        ],
        quality=[_quality(head, *found.quality[head]) for head in HEADS],
        pairs=[]
        if found.pairs is None
        else _pictures(config, audited, passes, found.pairs, effects),
        repairs=[_repair(each) for each in found.repairs],
        curves=[_curve(each) for each in found.repairs],
        warnings=cue.warnings,
        source=cue.source or "",
    )


def _examples(
    config: Shortcuts, found: CueFindings, group: Group, show: "partial[bytes]"
) -> list[bytes]:
    """Images of the set, or pictures of the pairs."""
    if len(found.groups) > GROUPS_SHOWN:
        return []
    if found.cue.source != "pairs":
        return [show(row) for row in group.examples]
    assert found.pairs is not None, "groups are made of them"
    pictures = found.pairs.pictures[WITH if group.has_cue else WITHOUT]
    return [_png(pictures[number], config.shortcuts.thumbnail) for number in group.examples]


def _effect(found: CueEffect, measured: Measured, *, n_scores: int) -> EffectRow:
    band = measured.bands.get((found.measure, found.score), NullBand(math.nan, math.nan, 0))
    return EffectRow(
        measure=found.measure,
        score=found.score,
        text=found.text,
        probe=found.probe,
        amplification=found.amplification,
        excess=found.excess,
        excess_all=None if n_scores == 1 else found.excess_all,
        is_placebo=found.measure in (PLACEBO_PAIRS, PLACEBO_REMOVAL),
        n=found.n,
        null_high=band.high,
        null_share=band.share,
        n_null=band.n,
    )


def _quality(name: str, found: Quality, accuracy_of_all: float) -> QualityRow:
    numbers = {key: value for key, value in found._asdict().items() if key != "counts"}
    return QualityRow(name=name, accuracy_of_all=accuracy_of_all, **numbers)


def _repair(found: RepairedCue) -> RepairRow:
    repaired = found.repaired
    quality = _quality(repaired.name, found.quality[-1], found.accuracy_of_all)
    return RepairRow(repaired.name, repaired.description, quality, found.effect, found.restored)


def _curve(found: RepairedCue) -> Curve:
    steps = zip(found.repaired.strengths, found.quality, strict=True)
    return Curve(
        found.repaired.name,
        [CurvePoint(strength, each.accuracy, each.worst_group) for strength, each in steps],
    )


def _pictures(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    pairs: CuePairs,
    effects: Sequence[CueEffect],
) -> list[PairPicture]:
    """The first pairs, with the score of the headline."""
    chosen = headline_score(effects, audited.scores)
    size = config.shortcuts.thumbnail
    scores = {
        head: {
            variant: score(audited, head, unit)[:, chosen] / float(passes.spreads[head][chosen])
            for variant, unit in pairs.embeddings.items()
        }
        for head in HEADS
    }
    found: list[PairPicture] = []
    for number in range(min(config.shortcuts.shown, len(pairs.keys))):
        pixels = {variant: each[number] for variant, each in pairs.pictures.items()}
        values = {
            head: (
                float(of_head[WITHOUT][number]),
                float(of_head[WITH][number]),
                float(of_head[PLACEBO][number]) if PLACEBO in of_head else math.nan,
            )
            for head, of_head in scores.items()
        }
        found.append(
            PairPicture(
                key=pairs.keys[number],
                without=_png(pixels[WITHOUT], size),
                with_cue=_png(pixels[WITH], size),
                placebo=_png(pixels[PLACEBO], size) if PLACEBO in pixels else None,
                scores=values,
                score=audited.scores[chosen] if len(audited.scores) > 1 else "",
                is_cut_out=pairs.is_cut_out,
            )
        )
    return found


def _amplified(
    rank: int, found: Confirmed, audited: Audited, show: "partial[bytes]"
) -> AmplifiedLatent:
    effect = found.effect
    return AmplifiedLatent(
        rank=rank,
        latent=found.estimate.latent,
        score=audited.scores[found.estimate.score],
        text=effect.text,
        probe=effect.probe,
        excess=effect.excess,
        z=found.estimate.z,
        is_significant=found.estimate.is_significant,
        share_of_images=found.share_of_images,
        cues=found.cues,
        examples=[show(row) for row in found.examples],
    )


def _show(samples: ShardIndex, size: int, row: int) -> bytes:
    """A small picture of an image that has been read before."""
    content = read_image(samples[row])
    assert not isinstance(content, BadSample), "it was read in the pass"
    return _encode(decode_image(content), size)


def _png(pixels: UInt8[Tensor, "3 height width"], size: int) -> bytes:
    return _encode(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), size)


def _encode(picture: Image.Image, size: int) -> bytes:
    small = picture.resize(fit(picture.size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _facts(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    amplified: AmplifiedList | None,
) -> list[Fact]:
    facts: Mapping[str, object] = {
        "model": f"{audited.clip.name}, weights {audited.clip.weights_sha256[:12]}",
        "probe": config.probe,
        "SAE": "none" if config.sae is None else config.sae,
        "site": "image embedding" if audited.spliced is None else audited.spliced.cut.site,
        "evaluated images": f"{len(passes.labels):,} of {config.data.shards}",
        "label": audited.label,
        "pairs": config.pairs.shards or "made of evaluated images, where there are any",
        "repairs learned from": config.repair.shards or "nothing: no repair was asked for",
        "reference of repairs": config.repair.reference or "the prompts",
        "intervals": f"95 %, {config.shortcuts.resamples} bootstrap resamples of images or pairs",
        "seed": config.seed,
        "data": images.samples.fingerprint[:12],
    }
    if amplified is not None:
        ranking = amplified.ranking
        said = f"{ranking.n_tested:,} of a latent and a score; {ranking.n_rare:,} latents"
        facts = {**facts, "pairs tested": f"{said} fire in too few images"}
    return [Fact(name, str(value)) for name, value in facts.items()]


def _warnings(bad: Sequence[BadSample]) -> list[str]:
    return [f"{len(bad)} images could not be used; bad_samples.jsonl lists them"] if bad else []
