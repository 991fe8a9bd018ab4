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
    UnexpectedResult,
    UnexpectedRow,
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
    "UnexpectedResult",
    "UnexpectedRow",
    "write_report",
]
