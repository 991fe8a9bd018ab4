"""The page of shortcuts: which cues a probe leans on, how much more than a prompt, and repairs."""

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
from clipattr.report.shortcuts.page import write_shortcuts_page

__all__ = [
    "AmplifiedLatent",
    "CueResult",
    "Curve",
    "CurvePoint",
    "EffectRow",
    "Fact",
    "GroupRow",
    "PairPicture",
    "QualityRow",
    "RepairRow",
    "ShareRow",
    "ShortcutsContent",
    "write_shortcuts_page",
]
