"""Content of the page of shortcuts for tests: every part there, every number another one."""

import io
import math

from PIL import Image

from clipattr.metrics.intervals import Interval
from clipattr.report.shortcuts import (
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

SCORE = "cracked rather than intact"
NAN = math.nan
UNDEFINED = Interval(NAN, NAN, NAN)


def picture(seed: int) -> bytes:
    """A small PNG, of another colour for each seed."""
    buffer = io.BytesIO()
    color = (37 * seed % 256, 91 * seed % 256, 53 * seed % 256)
    Image.new("RGB", (48, 48), color).save(buffer, format="PNG")
    return buffer.getvalue()


def interval(mean: float, width: float = 0.05) -> Interval:
    return Interval(mean, mean - width, mean + 1.2 * width)


def effect(
    measure: str,
    text: float,
    probe: float,
    *,
    score: str = SCORE,
    placebo: bool = False,
    n: int = 150,
) -> EffectRow:
    """Effects with intervals of 0.05; the ratio is defined where that of the text leaves 0 out."""
    ratio = UNDEFINED if abs(text) < 0.06 else interval(probe / text, 0.1 * abs(probe / text))
    excess = interval(abs(probe) - abs(text))
    return EffectRow(measure, score, interval(text), interval(probe), ratio, excess, placebo, n)


def quality(name: str, start: float) -> QualityRow:
    """Eleven numbers, none of them twice."""
    return QualityRow(
        name,
        accuracy=start,
        balanced_accuracy=start - 0.011,
        worst_group=start - 0.25,
        gap=0.253 - start / 100,
        auroc=start + 0.021,
        auroc_with=start - 0.113,
        auroc_without=start + 0.033,
        ece=0.101 - start / 10,
        ece_with=0.242 - start / 10,
        ece_without=0.123 - start / 10,
    )


def groups() -> list[GroupRow]:
    rows = []
    for number, (label, has_cue) in enumerate(
        [("intact", False), ("intact", True), ("cracked", False), ("cracked", True)]
    ):
        probe = [0.957, 0.412, 0.803, 0.991][number]
        text = [0.852, 0.803, 0.774, 0.831][number]
        accuracy = {"text": interval(text, 0.02), "probe": interval(probe, 0.03)}
        shown = [picture(7 * number + each) for each in range(6)]
        rows.append(GroupRow(label, has_cue, 1270 + number, accuracy, shown))
    return rows


def repairs() -> list[RepairRow]:
    return [
        RepairRow(
            "suppress",
            "the cue's latents at their mean",
            quality("suppress", 0.871),
            interval(0.21),
            0.53,
        ),
        RepairRow(
            "dfr",
            "last layer, on balanced groups",
            quality("dfr", 0.943),
            interval(0.07),
            NAN,
        ),
    ]


def curves() -> list[Curve]:
    names = {"suppress": 0.02, "dfr": -0.004, "project": 0.01}
    return [
        Curve(
            name,
            [
                CurvePoint(s, 0.91 + slope * s, 0.41 + (0.4 + 3 * slope) * s)
                for s in (0.0, 0.5, 1.0)
            ],
        )
        for name, slope in names.items()
    ]


def tag() -> CueResult:
    """A cue with all there is."""
    return CueResult(
        "tag",
        ["overlay", "metadata"],
        [275, 1301],
        [
            effect("pairs", 0.114, 1.641),
            effect("placebo of the pairs", 0.013, 0.021, placebo=True),
            effect("removal", 0.083, 0.972, n=5123),
        ],
        [ShareRow(SCORE, interval(0.0234, 0.001), interval(0.1956, 0.01))],
        groups(),
        [quality("text", 0.812), quality("probe", 0.907)],
        [
            PairPicture(
                f"scene {number}",
                *(picture(number), picture(number + 30), picture(number + 60)),
                {"text": (0.11, 0.23, 0.15), "probe": (-0.61, 1.04 + number, -0.58)},
                SCORE,
            )
            for number in range(3)
        ],
        repairs(),
        curves(),
        ["3 scenes lack a state and are left out."],
    )


def ink() -> CueResult:
    """A cue of which only a direction is known."""
    return CueResult(
        "ink", ["prompt"], [], [effect("prompt", 0.021, 0.312)], [], [], [], [], [], []
    )


def latent(rank: int, number: int, *, significant: bool, cues: list[str]) -> AmplifiedLatent:
    return AmplifiedLatent(
        rank,
        number,
        SCORE,
        interval(0.05 / rank),
        interval(0.9 / rank),
        interval(0.85 / rank),
        31.4 / rank,
        significant,
        0.073 * rank,
        cues,
        [picture(rank + 11 * each) for each in range(6)],
    )


def full_content() -> ShortcutsContent:
    return ShortcutsContent(
        "Shortcuts of a crack detector",
        ["intact", "cracked"],
        ["an intact shape", "a cracked shape"],
        5124,
        [tag(), ink()],
        [
            latent(1, 275, significant=True, cues=["tag"]),
            latent(2, 88, significant=False, cues=[]),
        ],
        17,
        0.05,
        [Fact("model", "planted ViT, 3f2a"), Fact("seed", "17")],
        ["The evaluated images were seen in training."],
    )


def many_scores(n_classes: int) -> CueResult:
    """A cue with as many scores as classes, each with its placebo; class 7 is the extreme one."""
    rows = []
    for number in range(n_classes):
        score = f"class {number} rather than the others"
        probe = 2.5 if number == 7 else 0.3 + number / 1000
        rows.append(effect("pairs", 0.2, probe, score=score))
        rows.append(effect("placebo of the pairs", 0.01, 0.02, score=score, placebo=True))
    return CueResult("water", ["overlay"], [3], rows, [], [], [], [], [], [])


EMPTY = ShortcutsContent("Nothing", [], [], 0, [], None, 0, 0.05, [])
