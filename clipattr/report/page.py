"""Renders the page and writes it in one step: a reader never sees half of it."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from clipattr.atomic import write_text
from clipattr.report import (
    attribution_charts,
    charts,
    claims,
    drawing,
    formatting,
    readings,
)
from clipattr.report.content import ReportContent


def write_report(content: ReportContent, folder: Path) -> Path:
    """Write `folder`/index.html and return its path. The page needs no other file."""
    text = render(content)
    path = folder / "index.html"
    write_text(path, text)
    return path


def render(content: ReportContent) -> str:
    """The page as text; the same content gives the same bytes."""
    return (
        _environment()
        .get_template("page.html")
        .render(
            content=content,
            best=readings.best_methods(content.methods),
            worst=readings.worst_groups(content.groups),
            reference_method=readings.REFERENCE_METHOD,
        )
    )


def _environment() -> Environment:
    """The templates of this package: everything escaped, a misspelt name is an error."""
    environment = Environment(
        loader=PackageLoader("clipattr.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formatting.number,
        signed=formatting.signed,
        percent=formatting.percent,
        bounds=formatting.bounds,
        digits_of=formatting.digits_of,
        picture=formatting.picture,
    )
    environment.tests.update(lowers=claims.lowers)
    environment.globals.update(
        NOT_DEFINED=formatting.NOT_DEFINED,
        log_position=formatting.log_position,
        bar_length=formatting.bar_length,
        verdict=readings.verdict,
        tally=readings.tally,
        amplification_reading=readings.amplification_reading,
        largest_bar=readings.largest_bar,
        use_reading=readings.use_reading,
        unexpected_reading=readings.unexpected_reading,
        method_style=drawing.method_style,
        curves_chart=charts.curves_chart,
        method_chart=charts.method_chart,
        difference_chart=charts.difference_chart,
        cue_chart=charts.cue_chart,
        rank_chart=charts.rank_chart,
        control_chart=attribution_charts.control_chart,
        class_chart=attribution_charts.class_chart,
        parts_chart=attribution_charts.parts_chart,
        steps_chart=attribution_charts.steps_chart,
        scatter_chart=attribution_charts.scatter_chart,
        method_claim=claims.method_claim,
        control_claim=claims.control_claim,
        class_claim=claims.class_claim,
        size_claim=claims.size_claim,
        gain_claim=claims.gain_claim,
        exact_claim=claims.exact_claim,
        rank_claim=claims.rank_claim,
    )
    return environment
