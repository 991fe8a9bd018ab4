"""Who is harmed by a cue, and what a repair gives and costs: groups, quality, differences."""

import math
from collections.abc import Sequence

from clipattr.report.formatting import number, percent, signed
from clipattr.report.shortcuts.claims import quoted
from clipattr.report.shortcuts.content import CueResult, GroupRow, QualityRow, RepairRow

HEADS = {"text": "text head", "probe": "probe"}
"""name of a head -> what the page calls it"""
ROLES = {"text": "text-head", "probe": "probe"}
"""name of a head -> the CSS variable of its colour"""


def head_name(name: str) -> str:
    """What the page calls a head."""
    return HEADS.get(name, name)


def head_role(name: str) -> str:
    """The colour of a head."""
    return ROLES.get(name, "muted")


def worst_group(groups: Sequence[GroupRow], head: str) -> GroupRow | None:
    """The group with the lowest accuracy of a head; none where no accuracy is defined."""
    found = [row for row in groups if head in row.accuracy and _is_number(row, head)]
    return min(found, key=lambda row: row.accuracy[head].mean, default=None)


def _is_number(row: GroupRow, head: str) -> bool:
    return math.isfinite(row.accuracy[head].mean)


def group_heads(groups: Sequence[GroupRow]) -> list[str]:
    """Every head whose accuracy is known in some group, in order."""
    return list(dict.fromkeys(head for row in groups for head in row.accuracy))


def group_labels(groups: Sequence[GroupRow]) -> list[tuple[str, list[GroupRow]]]:
    """The groups of each label, those without the cue first."""
    labels = dict.fromkeys(row.label for row in groups)
    return [
        (label, sorted((row for row in groups if row.label == label), key=lambda row: row.has_cue))
        for label in labels
    ]


def source_note(cue: CueResult) -> str:
    """What says which images have the cue, and what follows for reading the groups."""
    return {
        "metadata": "Groups from metadata: a column of the data says which images have the cue.",
        "pairs": (
            "Groups from pairs: nothing says which of the evaluated images have the cue, so the "
            "pairs are the groups, each picture once without the cue and once with it. Both states "
            "of a label show the same pictures; the interval of each is its own."
        ),
        "latents": (
            "Groups inferred from latents: an image has the cue where the cue's latents say so."
        ),
    }.get(cue.source, "")


def quality_note(cue: CueResult) -> str:
    """Which images the numbers are of."""
    if cue.source == "pairs":
        return (
            "Over the pictures of the pairs, half with the cue; accuracy over all evaluated "
            "images as they are stands in a column of its own."
        )
    return "Over all evaluated images, and apart on those without and with the cue."


def harm_claims(cue: CueResult) -> list[str]:
    """Where each head is worst, against its average over all images."""
    return [_harm_claim(cue, head) for head in group_heads(cue.groups)]


def _harm_claim(cue: CueResult, head: str) -> str:
    row, name = worst_group(cue.groups, head), head_name(head)
    if row is None:
        return f"Accuracy of the {name} by group is not defined in this run."
    state = "with" if row.has_cue else "without"
    said = (
        f"The {name} is worst on {quoted(row.label)} {state} the cue: "
        f"{percent(row.accuracy[head].mean)}"
    )
    average = next((each.accuracy for each in cue.quality if each.name == head), math.nan)
    over = " over the pairs" if cue.source == "pairs" else ""
    mean = f", with {percent(average)} on average{over}."
    return said + (mean if math.isfinite(average) else ".")


def points(after: float, before: float) -> str:
    """A difference of two shares in percentage points."""
    return signed(100 * (after - before), 1)


def repair_claim(cue: CueResult) -> str:
    """What the best repair gives, and what it costs in average accuracy."""
    before = cue.quality[-1] if cue.quality else None
    repairs = [row for row in cue.repairs if _is_measured(row.quality)]
    if before is None or not _is_measured(before) or not repairs:
        return "What the repairs give and cost is not defined in this run."
    best = max(repairs, key=lambda row: row.quality.worst_group)
    if best.quality.worst_group <= before.worst_group:
        return f"No repair raises the accuracy on the worst group ({percent(before.worst_group)})."
    return (
        f"{quoted(best.name)} raises the worst group most: from {percent(before.worst_group)} to "
        f"{percent(best.quality.worst_group)}, average accuracy "
        f"{_averages(cue, best.quality, before)}.{_came_back(best)}"
    )


def _averages(cue: CueResult, after: QualityRow, before: QualityRow) -> str:
    said = f"{points(after.accuracy, before.accuracy)} points"
    if cue.source != "pairs":
        return said
    of_all = points(after.accuracy_of_all, before.accuracy_of_all)
    return f"{said} over the pairs and {of_all} points over all evaluated images as they are"


def _came_back(repair: RepairRow) -> str:
    if not math.isfinite(repair.restored):
        return ""
    return f" {percent(repair.restored, 0)} of what was lost against the reference came back."


def _shown(cue: CueResult) -> str:
    return "pictures of the pairs" if cue.source == "pairs" else "images"


def _is_measured(row: QualityRow) -> bool:
    return math.isfinite(row.accuracy) and math.isfinite(row.worst_group)


def calibration_claim(cue: CueResult) -> str:
    """AUROC and ECE of what repairs start from, without the cue and with it: means alone."""
    row = cue.quality[-1] if cue.quality else None
    if row is None or not math.isfinite(row.auroc_with + row.auroc_without):
        return "AUROC with and without the cue is not defined in this run."
    said = (
        f"AUROC of the {head_name(row.name)}: {number(row.auroc)} over all {_shown(cue)}, "
        f"{number(row.auroc_without)} without the cue, {number(row.auroc_with)} with it"
    )
    if not math.isfinite(row.ece_with + row.ece_without):
        return f"{said}."
    return f"{said}; calibration error {percent(row.ece_without)} and {percent(row.ece_with)}."
