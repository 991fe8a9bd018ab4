"""The static page of a run: plain dataclasses in, one self-contained HTML file out."""

from clipattr.report.content import (
    CueResult,
    Explained,
    Fact,
    GroupRow,
    HowRow,
    LatentCard,
    MethodResult,
    PairPicture,
    ReportContent,
    ScorecardRow,
)
from clipattr.report.page import write_report

__all__ = [
    "CueResult",
    "Explained",
    "Fact",
    "GroupRow",
    "HowRow",
    "LatentCard",
    "MethodResult",
    "PairPicture",
    "ReportContent",
    "ScorecardRow",
    "write_report",
]
