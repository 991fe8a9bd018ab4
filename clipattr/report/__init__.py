"""The static page of a run: plain dataclasses in, one self-contained HTML file out."""

from clipattr.report.content import (
    ClassRow,
    CorrectionResult,
    CueResult,
    ExactResult,
    Explained,
    Fact,
    GroupRow,
    HowRow,
    LatentCard,
    MethodResult,
    PairPicture,
    ReportContent,
    ScatterResult,
    ScorecardRow,
)
from clipattr.report.page import write_report

__all__ = [
    "ClassRow",
    "CorrectionResult",
    "CueResult",
    "ExactResult",
    "Explained",
    "Fact",
    "GroupRow",
    "HowRow",
    "LatentCard",
    "MethodResult",
    "PairPicture",
    "ReportContent",
    "ScatterResult",
    "ScorecardRow",
    "write_report",
]
