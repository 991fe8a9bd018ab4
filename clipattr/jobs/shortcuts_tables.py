"""The page's numbers for programs and for the terminal: metrics.json, four tables, log lines."""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from clipattr.atomic import write_text
from clipattr.metrics.intervals import Interval
from clipattr.report.shortcuts.claims import excess_over_all, is_confirmed
from clipattr.report.shortcuts.content import (
    AmplifiedLatent,
    CueResult,
    EffectRow,
    QualityRow,
    RepairRow,
    ShortcutsContent,
)

logger = logging.getLogger(__name__)

# Latents of a cue that a line of the log has.
_LATENTS = 10
_BAND = ("null_high", "null_share", "n_null")
EFFECTS, AMPLIFIED, GROUPS, REPAIRS = "effects.csv", "amplified.csv", "groups.csv", "repairs.csv"


def collect(content: ShortcutsContent) -> dict[str, object]:
    """Everything that the tables hold, for metrics.json."""
    found: dict[str, object] = {
        "images": content.n_images,
        "cues": {cue.name: _collect_cue(cue) for cue in content.cues},
        "warnings": content.warnings,
    }
    if content.amplified is not None:
        found["amplified"] = {
            "significant": content.n_significant,
            "level": content.level,
            "latents": {
                str(each.latent): {
                    "rank": each.rank,
                    "score": each.score,
                    "text": each.text._asdict(),
                    "probe": each.probe._asdict(),
                    "excess": each.excess._asdict(),
                    "z": each.z,
                    "is_significant": each.is_significant,
                    "is_confirmed": is_confirmed(each),
                    "share_of_images": each.share_of_images,
                    "cues": each.cues,
                    "labels": each.labels,
                }
                for each in content.amplified
            },
        }
    return found


def _collect_cue(cue: CueResult) -> dict[str, object]:
    effects: dict[str, dict[str, object]] = {}
    for row in cue.effects:
        effects.setdefault(row.measure, {})[row.score] = _collect_effect(row)
    groups: dict[str, dict[str, object]] = {}
    for group in cue.groups:
        accuracy = {head: each._asdict() for head, each in group.accuracy.items()}
        state = "with" if group.has_cue else "without"
        groups.setdefault(group.label, {})[state] = {"images": group.n_images, "accuracy": accuracy}
    return {
        "kinds": cue.kinds,
        "source": cue.source,
        "latents": cue.latents,
        "labels": {str(latent): words for latent, words in cue.labels.items()},
        "effects": effects,
        "shares": {
            row.score: {"text": row.text._asdict(), "probe": row.probe._asdict()}
            for row in cue.shares
        },
        "groups": groups,
        "quality": {row.name: _collect_quality(row) for row in cue.quality},
        "repairs": {row.name: _collect_repair(row) for row in cue.repairs},
        "curves": {
            curve.name: {
                str(point.strength): {"accuracy": point.average, "worst_group": point.worst_group}
                for point in curve.points
            }
            for curve in cue.curves
        },
        "warnings": cue.warnings,
    }


def _collect_effect(row: EffectRow) -> dict[str, object]:
    intervals = {
        "text": row.text,
        "probe": row.probe,
        "amplification": row.amplification,
        "excess": row.excess,
        "excess_all": excess_over_all(row),
    }
    found = {name: each._asdict() for name, each in intervals.items()}
    numbers = {name: getattr(row, name) for name in ("n", *_BAND)}
    return {**found, "is_placebo": row.is_placebo, **numbers}


def _collect_quality(row: QualityRow) -> dict[str, object]:
    return {key: value for key, value in asdict(row).items() if key != "name"}


def _collect_repair(row: RepairRow) -> dict[str, object]:
    return {
        **_collect_quality(row.quality),
        "effect": row.effect._asdict(),
        "restored": row.restored,
    }


def write_tables(content: ShortcutsContent, folder: Path) -> None:
    """effects.csv, groups.csv, repairs.csv, and amplified.csv where latents were ranked."""
    bounds = ("mean", "low", "high")
    measures = ("text", "probe", "amplification", "excess", "excess_all")
    _write(
        folder / EFFECTS,
        [
            "cue",
            "measure",
            "is_placebo",
            "score",
            "n",
            *(f"{m}_{b}" for m in measures for b in bounds),
            *_BAND,
        ],
        (
            [cue.name, row.measure, row.is_placebo, row.score, row.n]
            + _flat(row.text, row.probe, row.amplification, row.excess, excess_over_all(row))
            + [getattr(row, name) for name in _BAND]
            for cue in content.cues
            for row in cue.effects
        ),
    )
    _write(
        folder / GROUPS,
        ["cue", "label", "has_cue", "images", "head", *(f"accuracy_{b}" for b in bounds)],
        (
            [cue.name, row.label, row.has_cue, row.n_images, head, *_flat(accuracy)]
            for cue in content.cues
            for row in cue.groups
            for head, accuracy in row.accuracy.items()
        ),
    )
    qualities = [key for key in QualityRow.__dataclass_fields__ if key != "name"]
    _write(
        folder / REPAIRS,
        ["cue", "name", *qualities, *(f"effect_{b}" for b in bounds), "restored"],
        (row for cue in content.cues for row in _repair_rows(cue, qualities)),
    )
    if content.amplified is not None:
        _write(
            folder / AMPLIFIED,
            [
                "rank",
                "latent",
                "score",
                *(f"{m}_{b}" for m in ("text", "probe", "excess") for b in bounds),
            ]
            + ["z", "is_significant", "is_confirmed", "share_of_images", "cues", "labels"],
            (
                [each.rank, each.latent, each.score, *_flat(each.text, each.probe, each.excess)]
                + [each.z, each.is_significant, is_confirmed(each), each.share_of_images]
                + [" ".join(each.cues), "; ".join(each.labels)]
                for each in content.amplified
            ),
        )


def _repair_rows(cue: CueResult, qualities: Sequence[str]) -> Iterable[list[object]]:
    """The heads before, and every repair."""
    for row in cue.quality:
        yield [cue.name, row.name, *(getattr(row, key) for key in qualities), "", "", "", ""]
    for repair in cue.repairs:
        numbers = [getattr(repair.quality, key) for key in qualities]
        yield [cue.name, repair.name, *numbers, *repair.effect, repair.restored]


def _flat(*intervals: Interval) -> list[object]:
    return [value for each in intervals for value in each]


def _write(path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def log_tables(content: ShortcutsContent) -> None:
    """What a person wants to see first."""
    for warning in content.warnings:
        logger.warning("%s", warning)
    for cue in content.cues:
        logger.info("%s: latents %s", cue.name, _name_latents(cue) or "none")
        for row in cue.effects:
            logger.info(
                "  %-24s %-32s text %+.3f  probe %+.3f  excess %+.3f [%+.3f, %+.3f]  times %.2f",
                row.measure,
                row.score,
                row.text.mean,
                row.probe.mean,
                *row.excess,
                row.amplification.mean,
            )
        for row in [*cue.quality, *(each.quality for each in cue.repairs)]:
            logger.info(
                "  %-24s accuracy %.3f  worst group %.3f  AUROC with %.3f without %.3f  ECE %.3f",
                row.name,
                row.accuracy,
                row.worst_group,
                row.auroc_with,
                row.auroc_without,
                row.ece,
            )
        for warning in cue.warnings:
            logger.warning("%s: %s", cue.name, warning)
    for each in (content.amplified or [])[:5]:
        logger.info(
            "latent %d%s (%s): %s text %+.3f  probe %+.3f  excess %+.3f [%+.3f, %+.3f]%s",
            each.latent,
            _bracket(each.labels),
            ", ".join(each.cues) or "of no named cue",
            each.score,
            each.text.mean,
            each.probe.mean,
            *each.excess,
            _reservation(each),
        )


def _reservation(row: AmplifiedLatent) -> str:
    if not row.is_significant:
        return "  not significant"
    return "" if is_confirmed(row) else "  removal does not confirm"


def _name_latents(cue: CueResult) -> str:
    """The first ten, with their words where there are some."""
    return ", ".join(
        f"{latent}{_bracket(cue.labels.get(latent, []))}" for latent in cue.latents[:_LATENTS]
    )


def _bracket(labels: Sequence[str]) -> str:
    return f" [{', '.join(labels)}]" if labels else ""
