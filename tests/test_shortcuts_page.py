"""The page of shortcuts: self-contained, complete, escaped, honest about gaps."""

import dataclasses
import io
import math
import re

import pytest
from PIL import Image

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval
from clipattr.report.shortcuts import (
    GroupRow,
    ShortcutsContent,
    charts,
    claims,
    readings,
    write_shortcuts_page,
)
from tests.browser import Watched, open_browser
from tests.shortcuts_content import (
    EMPTY,
    NAN,
    UNDEFINED,
    effect,
    full_content,
    many_scores,
    quality,
    tag,
)
from tests.test_report import HOSTILE, Page, palette, with_every_text

MINUS = "\N{MINUS SIGN}"
HEADS = {"text", "probe"}


def written(content, folder):
    return write_shortcuts_page(content, folder).read_text(encoding="utf-8")


def hostile_content():
    """Every string hostile, but for the names of the heads, which are keys."""
    content = with_every_text(full_content(), HOSTILE)
    assert isinstance(content, ShortcutsContent)
    keep_head_names(content)
    return content


def keep_head_names(content):
    """Two keys that became one text are two again."""
    for cue, clean in zip(content.cues, full_content().cues, strict=True):
        for row, original in zip(cue.groups, clean.groups, strict=True):
            object.__setattr__(row, "accuracy", original.accuracy)
        for row, original in zip(cue.pairs, clean.pairs, strict=True):
            object.__setattr__(row, "scores", original.scores)


def with_every_number(value, number):
    """The same content with every fraction replaced, whatever it sits in."""
    if isinstance(value, float):
        return number
    if isinstance(value, Interval):
        return Interval(number, number, number)
    if isinstance(value, list):
        return [with_every_number(one, number) for one in value]
    if isinstance(value, tuple):
        return tuple(with_every_number(one, number) for one in value)
    if isinstance(value, dict):
        return {key: with_every_number(one, number) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changes = {name: with_every_number(getattr(value, name), number) for name in names}
        return dataclasses.replace(value, **changes)
    return value


def test_page_needs_no_other_file(tmp_path):
    html = written(full_content(), tmp_path / "report")
    page = Page(html)
    assert page.open == []
    assert "script" not in {name for name, _ in page.tags}
    assert "default-src 'none'; img-src data:" in html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for name, attrs in page.tags:
        for attribute in ("src", "href", "xlink:href", "srcset", "data"):
            target = attrs.get(attribute)
            if target is not None:
                is_local = target.startswith("data:image/png;base64,") or target[1:] in ids
                assert is_local, f"<{name} {attribute}={target[:60]}>"
    for target in re.findall(r"url\(#([^)]*)\)", html):
        assert target in ids
    addresses = set(re.findall(r'https?://[^"\s<]*', html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert written(full_content(), tmp_path / "again") == html


def test_pictures_and_charts_are_named(tmp_path):
    page = Page(written(full_content(), tmp_path))
    pictures = [attrs for name, attrs in page.tags if name == "img"]
    assert len(pictures) == 4 * 6 + 3 * 3 + 2 * 6
    names = [attrs["alt"] for attrs in pictures]
    assert len(set(names)) == len(names)
    assert "scene 1, with the cue tag" in names
    assert "scene 1, placebo of tag" in names
    assert "intact with the cue tag, 3 of 6" in names
    drawings = [attrs for name, attrs in page.tags if name == "svg"]
    assert len(drawings) == 2 + 1 + 1
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in drawings)
    regions = [attrs for _, attrs in page.tags if attrs.get("class", "").startswith("scroll")]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def text_of(value, digits=3):
    return f"{value:.{digits}f}".replace("-", MINUS)


def numbers_of_effects():
    expected = []
    found = [row for cue in full_content().cues for row in cue.effects]
    for row in [*found, *(full_content().amplified or [])]:
        for each in (row.text, row.probe, row.excess):
            bounds = f"[{text_of(each.low)}, {text_of(each.high)}]"
            expected.append(f"{text_of(each.mean)} {bounds}")
    return expected


def numbers_of_groups_and_repairs():
    expected = []
    for row in tag().groups:
        for each in row.accuracy.values():
            bounds = f"[{text_of(100 * each.low, 1)}, {text_of(100 * each.high, 1)}]"
            expected.append(f"{text_of(100 * each.mean, 1)} % {bounds}")
        expected.append(f"{row.n_images:,} images")
    for row in [*tag().quality, *(repair.quality for repair in tag().repairs)]:
        for name in ("auroc", "auroc_with", "auroc_without"):
            expected.append(text_of(getattr(row, name)))
        for name in ("accuracy", "balanced_accuracy", "worst_group", "ece"):
            expected.append(f"{text_of(100 * getattr(row, name), 1)} %")
        expected.append(text_of(100 * row.gap, 1))
    for curve in tag().curves:
        for point in curve.points:
            shown = [f"{text_of(100 * each, 1)} %" for each in (point.average, point.worst_group)]
            expected.append(" ".join([curve.name, text_of(point.strength, 2), *shown]))
    return expected


def test_every_number_is_on_the_page(tmp_path):
    text = Page(written(full_content(), tmp_path)).text
    expected = numbers_of_effects() + numbers_of_groups_and_repairs()
    expected += ["0.210 [0.160, 0.270]", "53 %", "14.4", "[13.0, 16.1]"]
    expected += ["z 31.4", "fires in 14.6 % of the images", "latents 275, 1301", "2.3 % [2.2, 2.5]"]
    expected += [f"1.04 (+1.65) {MINUS}0.58 (+0.03)", "0.11 0.23 (+0.12) 0.15 (+0.04)", "5,124"]
    expected += ["planted ViT, 3f2a", "cracked \N{LEFT DOUBLE QUOTATION MARK}a cracked shape"]
    for number in expected:
        assert number in text, number


def test_differences_of_a_repair_stand_below_its_numbers(tmp_path):
    before, after = quality("probe", 0.907), quality("dfr", 0.943)
    html = written(full_content(), tmp_path)
    row = html[html.index("last layer, on") :]
    cells = [Page(cell).text for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)][:10]
    assert cells[0] == "94.3 % +3.6"
    assert cells[2] == f"69.3 % {100 * (after.worst_group - before.worst_group):+.1f}"
    assert cells[4] == "not defined"
    assert cells[8] == f"0.7 % {MINUS}0.4"
    assert cells[9] == "0.070 [0.020, 0.130]"


def test_text_is_escaped_everywhere(tmp_path):
    content = hostile_content()
    assert content.amplified is not None
    # With one score alone the chart of latents has no text of the data.
    content.amplified[1] = dataclasses.replace(content.amplified[1], score=f"{HOSTILE} too")
    page = Page(written(content, tmp_path))
    assert "script" not in {name for name, _ in page.tags}
    assert page.open == []
    assert page.text.count(HOSTILE) > 40
    labels = [attrs["aria-label"] for name, attrs in page.tags if name == "svg"]
    assert len(labels) == 4
    assert all("<script>" in str(label) for label in labels)


@pytest.mark.parametrize("number", [NAN, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_defined(tmp_path, number):
    content = with_every_number(full_content(), number)
    html = written(content, tmp_path)
    without_pictures = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", without_pictures, re.IGNORECASE)
    text = Page(html).text
    assert "leans on \N{LEFT DOUBLE QUOTATION MARK}tag" in text
    for sentence in (
        "more than the prompt does is not defined in this run.",
        "Accuracy of the probe by group is not defined in this run.",
        "AUROC with and without the cue is not defined in this run.",
        "What the repairs give and cost is not defined in this run.",
        "The trade-off of the repairs is not defined in this run.",
    ):
        assert sentence in text
    assert "\N{MULTIPLICATION SIGN}" not in text  # no ratio in large letters
    assert 'class="worst"' not in html


def test_what_is_missing_is_said_in_words(tmp_path):
    page = Page(written(EMPTY, tmp_path))
    for sentence in (
        "No cue was named in this run.",
        "Latents were not ranked in this run",
        "No classes were recorded in this run.",
        "No facts were recorded for this run.",
    ):
        assert sentence in page.text
    assert "svg" not in {name for name, _ in page.tags}
    hollow = dataclasses.replace(tag(), effects=[], shares=[], groups=[], quality=[], latents=[])
    hollow = dataclasses.replace(hollow, pairs=[], repairs=[], curves=[], warnings=[])
    content = dataclasses.replace(full_content(), cues=[hollow], amplified=[], n_significant=0)
    text = Page(written(content, tmp_path)).text
    for sentence in (
        "No effect of \N{LEFT DOUBLE QUOTATION MARK}tag",
        "No effect of this cue was measured in this run.",
        "No share of the attribution",
        "No groups: whether an image has this cue is not known.",
        "No counterfactual pairs were kept for this cue.",
        "No repair was made in this run.",
        "no latent stands for it",
        "no latent is used more by the probe",
    ):
        assert sentence in text
    assert "No placebo was measured" not in text
    content = dataclasses.replace(content, cues=[dataclasses.replace(tag(), quality=[])])
    assert "What the repairs give and cost is not defined" in Page(written(content, tmp_path)).text


def test_a_ratio_without_an_interval_is_not_in_large_letters(tmp_path):
    half = dataclasses.replace(effect("pairs", 0.1, 0.4), amplification=Interval(4.0, NAN, NAN))
    cue = dataclasses.replace(tag(), effects=[half])
    html = written(dataclasses.replace(full_content(), cues=[cue]), tmp_path)
    assert "4.00" in html
    assert 'class="amplification"' not in html
    whole = written(full_content(), tmp_path)
    assert 'class="amplification"' in whole
    assert "each on the score of its largest excess" not in whole


def test_warnings_come_first(tmp_path):
    page = Page(written(full_content(), tmp_path))
    first = page.text.index("The evaluated images were seen in training.")
    assert first < page.text.index("The probe leans on")
    assert "prompt does. 1 warning" in page.text
    second = page.text.index("3 scenes lack a state and are left out.")
    assert page.text.index("Cue 1 of 2") < second < page.text.index("amplification [13.0")
    assert len([1 for _, attrs in page.tags if attrs.get("role") == "note"]) == 2


def test_jpegs_are_refused_and_the_old_page_stays(tmp_path):
    path = write_shortcuts_page(full_content(), tmp_path)
    before = path.read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="JPEG")
    row = GroupRow("intact", True, 3, {}, [buffer.getvalue()])
    broken = dataclasses.replace(full_content(), cues=[dataclasses.replace(tag(), groups=[row])])
    with pytest.raises(DataError, match="must be PNG files"):
        write_shortcuts_page(broken, tmp_path)
    assert path.read_bytes() == before


def test_colours_are_defined_on_light_and_dark(tmp_path):
    html = written(full_content(), tmp_path)
    used = set(re.findall(r"var\(--([a-z-]+)\)", html)) - {"mark"}
    for colors in palette(html):
        assert used <= set(colors)
    assert "#0102" not in html


def test_many_scores_are_charted_by_excess(tmp_path):
    cue = many_scores(40)
    shown = charts.charted_effects(cue)
    assert len(shown) == 12
    assert {row.score.split()[1] for row in shown} == {"7", "39", "38", "37", "36", "35"}
    row = claims.headline_effect(cue)
    assert row is not None
    assert row.score == "class 7 rather than the others"
    assert "largest excess of 40" in claims.choice_note(cue)
    text = Page(written(dataclasses.replace(full_content(), cues=[cue]), tmp_path)).text
    assert "68 more rows in the table" in text
    assert "which know nothing, each on the score of its largest excess;" in text
    assert text.count("class 23 rather than the others") == 2
    assert charts.charted_effects(tag()) == tag().effects


def test_trade_curve_is_the_curve_given():
    """Places in the SVG are an affine map of the numbers; the ring is at strength 0."""
    chart = charts.trade_chart(tag().curves, 1)
    lines = re.findall(r'd="([^"]*)"[^>]*stroke: var\(--attribution-patching\)', chart)
    numbers = [float(one) for one in re.findall(r"-?\d+\.?\d*", lines[0])]
    places = list(zip(numbers[0::2], numbers[1::2], strict=True))
    points = tag().curves[0].points
    assert len(places) == len(points) == 3
    for axis, name in enumerate(("average", "worst_group")):
        values = [getattr(point, name) for point in points]
        scale = (places[2][axis] - places[0][axis]) / (values[2] - values[0])
        assert scale > 0 if axis == 0 else scale < 0
        expected = places[0][axis] + scale * (values[1] - values[0])
        assert places[1][axis] == pytest.approx(expected, abs=0.05)
    ring = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*stroke: var\(--ink\)', chart)
    assert ring is not None
    assert float(ring.group(1)) == pytest.approx(places[0][0], abs=0.05)
    assert float(ring.group(2)) == pytest.approx(places[0][1], abs=0.05)
    late = dataclasses.replace(tag().curves[0], points=points[1:])
    assert not re.search(r"<use [^>]*stroke: var\(--ink\)", charts.trade_chart([late], 1))


def test_worst_groups_are_those_with_the_lowest_accuracy():
    rows = tag().groups
    assert readings.worst_group(rows, "probe") is rows[1]
    assert readings.worst_group(rows, "text") is rows[2]
    assert readings.worst_group(rows, "other") is None
    labels = readings.group_labels(rows[::-1])
    assert [name for name, _ in labels] == ["cracked", "intact"]
    assert [[row.has_cue for row in found] for _, found in labels] == [[False, True]] * 2
    undefined = dataclasses.replace(rows[1], accuracy={"probe": UNDEFINED})
    assert readings.worst_group([undefined], "probe") is None


def test_only_the_worst_group_of_each_head_is_marked(tmp_path):
    html = written(full_content(), tmp_path)
    assert html.count('class="worst"') == len(HEADS)
    block = html[html.index('class="worst"') :]
    assert "41.2" in block[: block.index("</dd>")]


@pytest.mark.browser
def test_page_fits_a_phone_and_complains_of_nothing(tmp_path):
    """Names as long as a table is wide, without a space to break at."""
    content = with_every_text(full_content(), "a" * 90)
    assert isinstance(content, ShortcutsContent)
    keep_head_names(content)
    written(content, tmp_path)
    with open_browser() as browser:
        watched = Watched(browser, tmp_path)
        watched.page.goto(f"{tmp_path.as_uri()}/index.html")
        for width in (360, 700, 1300):
            watched.page.set_viewport_size({"width": width, "height": 800})
            sizes = "[document.documentElement.scrollWidth, window.innerWidth]"
            scrolled, shown = watched.page.evaluate(sizes)
            assert scrolled <= shown == width
        broken = "[...document.images].filter(one => !one.naturalWidth).length"
        assert watched.page.evaluate(broken) == 0
        watched.check()
