"""Renders the page of shortcuts and writes it in one step: a reader never sees half of it."""

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from clipattr.atomic import write_text
from clipattr.metrics.intervals import Interval
from clipattr.report import formatting
from clipattr.report.shortcuts import chance, charts, claims, readings
from clipattr.report.shortcuts.content import ShortcutsContent


def write_shortcuts_page(content: ShortcutsContent, folder: Path) -> Path:
    """Write `folder`/index.html and return its path. The page needs no other file."""
    text = render(content)
    path = folder / "index.html"
    write_text(path, text)
    return path


def render(content: ShortcutsContent) -> str:
    """The page as text; the same content gives the same bytes."""
    return _environment().get_template("cues_page.html").render(content=content)


def percent_bounds(interval: Interval) -> str:
    """The ends of an interval of a share, in per cent."""
    return formatting.bounds(Interval(*(100 * value for value in interval)), 1)


def _environment() -> Environment:
    """The templates of this page and the macros and style of the report; everything escaped."""
    own = PackageLoader("clipattr.report.shortcuts", "templates")
    environment = Environment(
        loader=ChoiceLoader([own, PackageLoader("clipattr.report", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formatting.number,
        signed=formatting.signed,
        percent=formatting.percent,
        percent_bounds=percent_bounds,
        bounds=formatting.bounds,
        digits_of=formatting.digits_of,
        picture=formatting.picture,
        head_name=readings.head_name,
        head_role=readings.head_role,
    )
    environment.globals.update(
        NOT_DEFINED=formatting.NOT_DEFINED,
        is_defined=formatting.is_defined,
        has_choice=claims.has_choice,
        headline_effect=claims.headline_effect,
        ratio_digits=claims.ratio_digits,
        chance_claims=chance.chance_claims,
        chance_note=chance.chance_note,
        pair_change=chance.pair_change,
        amplification_claim=claims.amplification_claim,
        placebo_claims=claims.placebo_claims,
        choice_note=claims.choice_note,
        amplified_claim=claims.amplified_claim,
        is_confirmed=claims.is_confirmed,
        harm_claims=readings.harm_claims,
        source_note=readings.source_note,
        quality_note=readings.quality_note,
        repair_claim=readings.repair_claim,
        calibration_claim=readings.calibration_claim,
        group_heads=readings.group_heads,
        group_labels=readings.group_labels,
        worst_group=readings.worst_group,
        points=readings.points,
        charted_effects=charts.charted_effects,
        drawn_curves=charts.drawn_curves,
        effects_chart=charts.effects_chart,
        latents_chart=charts.latents_chart,
        trade_chart=charts.trade_chart,
    )
    return environment
