"""The sentences of the world's page; every number in them comes from metrics.json."""

import math
from typing import Any

from clipattr.config.choices import Method
from clipattr.metrics.intervals import Interval
from clipattr.report import Fact
from clipattr.report.claims import direction
from clipattr.report.formatting import NOT_DEFINED, digits_of, is_defined

METHOD_LABELS = {
    Method.attribution_patching: "attribution patching",
    Method.integrated_gradients: "integrated gradients",
    Method.act_times_logit_lens: "activation x logit lens",
    Method.logit_lens: "logit lens",
    Method.energy: "energy",
    Method.random: "random",
    Method.exact: "exact patching",
}
PART_LABELS = {"along_embedding": "along the embedding", "along_state": "along the state"}
STEP_LABELS = {
    "logit_lens": "logit lens",
    "act_times_logit_lens": "x activation",
    "lens_part": "lens part",
    "without_along_embedding": "- along the embedding",
    "attribution_patching": "- along the state\n= attribution patching",
}
_FAITHFUL = {
    -1: "more faithful than",
    0: "not clearly different from",
    1: "less faithful than",
}
"""by the sign of a difference of deletion AUCs"""


def summarise(metrics: dict[str, Any]) -> list[str]:
    """Three sentences, one per question, whichever way the numbers fall."""
    sae, tag, seal = metrics["sae"], metrics["shortcut"]["tag"], metrics["shortcut"]["seal"]
    inside = (
        f"Inside: {100 * (1 - sae['fvu']):.1f} % of the variance of the class token is carried by "
        f"{sae['l0']:.1f} active latents per image."
    )
    return [inside, _faithful(metrics["faithfulness"]), _shortcut(tag, seal)]


def _faithful(table: dict[str, Any]) -> str:
    if "attribution_patching" not in table:
        return "How: attribution patching was not evaluated."
    found, lens = table["attribution_patching"], table["logit_lens"]
    agreement, of_lens = (_two_digits(each["spearman_exact"]["mean"]) for each in (found, lens))
    return (
        f"How: the Spearman correlation with exact patching is {agreement} for the ranking of "
        f"attribution patching and {of_lens} for that of logit lens; {_by_deletion(found)}."
    )


def _by_deletion(found: dict[str, Any]) -> str:
    """What deletion says image by image, and where one order per noun says something else."""
    local = _read(found["minus_logit_lens"]["deletion_auc"])
    whole = _read(found["global"]["minus_logit_lens"])
    if not is_defined(local):
        return f"whether one is more faithful by deletion is {NOT_DEFINED} in this run"
    n_steps = len(found["curves"]["deletion"]) - 1
    said = (
        f"over {n_steps} deleted latents attribution patching is {_FAITHFUL[direction(local)]} "
        f"logit lens ({_written(local)})"
    )
    if not is_defined(whole) or direction(whole) == direction(local):
        return said
    return (
        f"{said}, but one order per noun says otherwise: {_FAITHFUL[direction(whole)]} logit lens "
        f"({_written(whole)})"
    )


def _read(found: dict[str, Any]) -> Interval:
    """Of metrics.json, where null says that there is no number."""
    values = (found[name] for name in Interval._fields)
    return Interval(*(math.nan if value is None else value for value in values))


def _written(interval: Interval) -> str:
    digits = digits_of(interval)
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def _two_digits(value: float | None) -> str:
    return NOT_DEFINED if value is None else f"{value:.2f}"


def _shortcut(tag: dict[str, Any], seal: dict[str, Any]) -> str:
    ratio = tag["amplification"]
    is_amplified = ratio["low"] is not None and ratio["low"] > 1
    verdict = "amplifies the planted tag" if is_amplified else "does not clearly amplify the tag"
    return (
        f"Shortcut: the probe {verdict} (its effect over the text head's: "
        f"{describe_ratio(ratio)}); for the control seal it is "
        f"{describe_ratio(seal['amplification'])}."
    )


def describe_unexpected(metrics: dict[str, Any]) -> list[str]:
    """What of the truth is on the list of an atlas, if one was graded."""
    found = metrics.get("unexpected")
    if found is None:
        return []
    learned, early = len(found["kinds_learned"]), len(found["kinds_found"])
    return [
        f"Told nothing: {early} of the {learned} kinds of failure that the model learned are among "
        f"the first {found['graded']} of {found['listed']} unexpected latents (shuffled "
        f"latents and images put {found['by_chance']:.1f} on the list)."
    ]


def describe_ratio(ratio: dict[str, Any]) -> str:
    """A ratio with its interval; null in metrics.json says that there is none."""
    if ratio["mean"] is None:
        return "not defined, the text head's effect cannot be told from 0"
    found = _read(ratio)
    # Whether it amplifies is asked of 1: 1.00 would not say on which side an end lies.
    mean, low, high = (f"{value:.{digits_of(found, 2, 1.0)}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def list_facts(metrics: dict[str, Any]) -> list[Fact]:
    """Headline numbers."""
    sae, zeroshot = metrics["sae"], metrics["zeroshot"]
    facts = [
        Fact("unexplained variance", f"{sae['fvu']:.3f}", "FVU of the SAE; 0 is perfect"),
        Fact("active latents", f"{sae['l0']:.1f}", "per image, mean (L0)"),
        Fact(
            "dead latents", f"{100 * sae['dead_fraction']:.1f} %", "never fired on the test images"
        ),
        Fact(
            "splice error", f"{metrics['splice']['max_error']:.0e}", "without an edit; 0 in theory"
        ),
    ]
    if metrics["completeness_gap"] is not None:
        gap = f"{100 * metrics['completeness_gap']:.3f} %"
        facts.append(Fact("completeness gap", gap, "of integrated gradients; 0 in theory"))
    facts += [
        Fact(f"zero-shot {name}", f"{row['accuracy']:.3f}", "accuracy, planted correlations broken")
        for name, row in zeroshot.items()
    ]
    probe, text = metrics["probe"], metrics["text"]
    note = "label x tag groups, balanced test split"
    facts.append(Fact("probe, worst group", f"{probe['worst_group_accuracy']:.3f}", note))
    facts.append(Fact("text, worst group", f"{text['worst_group_accuracy']:.3f}", note))
    return facts
