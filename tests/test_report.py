"""The page: self-contained, complete, escaped, honest about gaps, the same every time."""

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval
from clipattr.report import (
    ClassRow,
    CorrectionResult,
    Explained,
    GroupRow,
    LatentCard,
    ReportContent,
    write_report,
)
from tests.page_content import COLUMNS, EMPTY, PNG, full_content, interval

# Two dollar signs around what is not TeX: matplotlib would fail if it read labels as formulas.
HOSTILE = "<script>alert('$\\frac{$')</script> & \"quoted\""
NAN_INTERVAL = Interval(math.nan, math.nan, math.inf)
VOID_TAGS = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page into its text, its tags with attributes, and its nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.pieces.append(data)


def written(content: ReportContent, folder: Path) -> str:
    return write_report(content, folder).read_text(encoding="utf-8")


def test_page_needs_no_other_file(tmp_path):
    html = written(full_content(), tmp_path / "report")
    page = Page(html)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attrs.get(name)
            if target is not None:
                is_local = target.startswith("data:image/png;base64,") or target[1:] in ids
                assert is_local, f"<{tag} {name}={target[:60]}>"
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#")
        assert target[1:] in ids
    assert "@import" not in html
    assert set(re.findall(r'https?://[^"\s<]*', html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def expected_numbers(content: ReportContent) -> list[str]:
    """Every number of the content as a reader expects it, formatted here a second time."""

    def text(value: float, digits: int = 3) -> str:
        return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")

    found = []
    intervals = [cue.effect_text for cue in content.cues]
    intervals += [cue.effect_probe for cue in content.cues]
    intervals += [cue.amplification for cue in content.cues]
    intervals += [row.accuracy for row in content.groups]
    for one in content.methods:
        found += [text(value) for value in one.deletion_curve + one.insertion_curve]
        intervals += [getattr(one, column) for column in COLUMNS]
        intervals += one.minus_logit_lens.values()
    for value in intervals:
        found.append(f"{text(value.mean)} [{text(value.low)}, {text(value.high)}]")
    for row in content.scorecard:
        found += [f"latent {row.latent}, AUROC {text(row.auroc)}"]
        found += [f"rank {rank} of {row.n_latents}" for rank in (row.rank_attribution,)]
        found += [f"rank {rank} of {row.n_latents}" for rank in (row.rank_logit_lens,)]
    found += [str(row.count) for row in content.groups]
    return found


def test_every_number_is_on_the_page(tmp_path):
    content = full_content()
    page = Page(written(content, tmp_path))
    for number in expected_numbers(content):
        assert number in page.text, number
    minus = "\N{MINUS SIGN}"
    for text in (
        "The model did not learn this planted effect",
        "score 0.346",
        "latent 31",
        "alignment 0.287",
        f"+0.0432 exact {minus}0.0123",
        f"{minus}0.61 \N{RIGHTWARDS ARROW} 0.28 (+0.89)",
        "0.13 \N{RIGHTWARDS ARROW} 1.94 (+1.81)",
        "2.3 % 9.6 %",
        "4.51 \N{MULTIPLICATION SIGN} amplification [3.92, 5.63]",
        "4.3 %",
        "2.15.0",
        "+0.0123 [0.0101, 0.0145]",
        "27.3 % of the images, raises the score in 91.8 % of these",
        "deletion AUC 0.717 [0.706, 0.739]",
        "along the embedding 91.4 %, along the state 4.3 %",
        "correlates with the whole attribution at 0.777 [0.766, 0.799]",
        "2 pairs drawn at random, the same in both pictures, out of 1,234 in 100 images",
        "multiplied with 0.0456",
    ):
        assert text in page.text, text
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 1 + 1 + 2 + 2
    assert all(attrs["alt"] for attrs in pictures)


def test_a_small_interval_is_not_rounded_onto_zero(tmp_path):
    content = full_content()
    small = Interval(-0.0004, -0.0006, -0.0002)
    exact = dataclasses.replace(content.methods[0], minus_logit_lens=dict.fromkeys(COLUMNS, small))
    cue = dataclasses.replace(content.cues[0], amplification=Interval(1.5, 1.003, 2.0))
    changed = dataclasses.replace(content, methods=[exact, *content.methods[1:]], cues=[cue])
    text = Page(written(changed, tmp_path)).text
    minus = "\N{MINUS SIGN}"
    assert text.count(f"{minus}0.0004 [{minus}0.0006, {minus}0.0002]") == len(COLUMNS)
    assert "amplification [1.003, 2.000]" in text


def with_every_text(value: object, text: str) -> object:
    """The same content with every string replaced, whatever dataclass it sits in."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [with_every_text(one, text) for one in value]
    if isinstance(value, dict):
        # Columns are names of fields, everything else is written on the page.
        return {
            key if key in COLUMNS else text: with_every_text(one, text)
            for key, one in value.items()
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changes = {name: with_every_text(getattr(value, name), text) for name in names}
        return dataclasses.replace(value, **changes)
    return value


def test_the_graded_list_is_on_the_page(tmp_path):
    text = Page(written(full_content(), tmp_path)).text
    for part in ("Rank of 143", "another sense", "not learned", "recall 62 %", "precision 35 %"):
        assert part in text
    assert "88 % and 15 %" in text
    assert "among the first 19 latents" in text


def test_text_is_escaped_everywhere(tmp_path):
    content = with_every_text(full_content(), HOSTILE)
    assert isinstance(content, ReportContent)
    page = Page(written(content, tmp_path))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.open == []
    assert page.text.count(HOSTILE) > 25
    labels = [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "svg"]
    assert len(labels) == 19
    assert all(HOSTILE in label for label in labels)


def test_empty_lists_are_said_in_words(tmp_path):
    page = Page(written(EMPTY, tmp_path))
    for sentence in (
        "No planted failure was scored in this run.",
        "No atlas was given to this run",
        "No key numbers were recorded in this run.",
        "No attribution method was evaluated in this run.",
        "The parts of the attribution were not measured in this run.",
        "No estimate was compared with exact effects pair by pair in this run.",
        "No untrained dictionary was measured in this run.",
        "No class was compared by itself in this run.",
        "No prediction was explained in this run.",
        "No cue was measured in this run.",
        "No group was measured in this run.",
        "No definitions were recorded in this run.",
        "No manifest was recorded for this run.",
    ):
        assert sentence in page.text
    assert "svg" not in {tag for tag, _ in page.tags}
    hollow = dataclasses.replace(
        full_content(),
        explained=[Explained(PNG, "a star", "a star", 0.3, [])],
        cues=[dataclasses.replace(full_content().cues[0], pairs=[])],
    )
    text = Page(written(hollow, tmp_path)).text
    assert "No latent is active in this image." in text
    assert "No counterfactual pairs were kept for this cue." in text


def test_same_content_gives_same_bytes(tmp_path):
    first = write_report(full_content(), tmp_path / "one").read_bytes()
    assert write_report(full_content(), tmp_path / "two").read_bytes() == first


def test_numbers_that_are_not_finite_are_not_defined(tmp_path):
    content = full_content()
    broken = dataclasses.replace(
        content,
        scorecard=[
            dataclasses.replace(content.scorecard[0], auroc=math.nan, share_positive=math.nan)
        ],
        control=[],
        classes=[ClassRow("disc", 1, math.nan, 0.1)],
        corrections=CorrectionResult(
            {"along": interval(0.5)}, {"first": NAN_INTERVAL}, NAN_INTERVAL, NAN_INTERVAL
        ),
        methods=[
            dataclasses.replace(
                content.methods[1],
                deletion_curve=[0.3, math.inf, math.nan],
                deletion_error=[0.1, math.nan, math.inf],
                spearman_exact=NAN_INTERVAL,
                minus_logit_lens=dict.fromkeys(COLUMNS, Interval(-0.2, math.nan, math.nan)),
            )
        ],
        explained=[
            Explained(
                PNG, "c", "p", math.nan, [LatentCard(1, math.nan, -math.inf, "l", math.inf, [])]
            )
        ],
        cues=[
            dataclasses.replace(
                content.cues[0], effect_text=NAN_INTERVAL, amplification=NAN_INTERVAL
            )
        ],
        groups=[GroupRow("probe", "empty group", 0, NAN_INTERVAL)],
    )
    html = written(broken, tmp_path)
    without_pictures = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", without_pictures, re.IGNORECASE)
    text = Page(html).text
    assert "AUROC not defined" in text
    assert "score not defined" in text
    assert "\N{MINUS SIGN}0.200 [interval not defined]" in text
    assert "The ratio is not defined" in text
    assert "worst group" not in text.replace("the worst group", "")


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = write_report(EMPTY, tmp_path)
    before = path.read_bytes()
    jpeg = dataclasses.replace(full_content().explained[0], image=b"\xff\xd8\xff\xe0 a jpeg")
    with pytest.raises(DataError, match="must be PNG files"):
        write_report(dataclasses.replace(full_content(), explained=[jpeg]), tmp_path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["index.html"]

    def killed(*_paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)  # the last step of the write never happens
    with pytest.raises(KeyboardInterrupt):
        write_report(full_content(), tmp_path)
    assert path.read_bytes() == before


def test_curve_on_the_page_is_the_curve_given(tmp_path):
    """Heights in the SVG are an affine map of the scores, places an affine map of the steps."""
    html = written(full_content(), tmp_path)
    chart = re.search(r'id="deletion-curves-figure_1".*?</svg>', html, re.DOTALL)
    assert chart is not None
    path = re.search(r'd="([^"]*)"[^>]*stroke: var\(--attribution-patching\)', chart.group())
    assert path is not None
    numbers = [float(one) for one in re.findall(r"-?\d+\.?\d*", path.group(1))]
    places, heights = numbers[0::2], numbers[1::2]
    curve = full_content().methods[1].deletion_curve
    assert len(places) == len(curve)
    scale = (heights[-1] - heights[0]) / (curve[-1] - curve[0])
    assert scale < 0  # a larger score is drawn higher, and SVG counts downwards
    for step, score in enumerate(curve):
        # Written to a hundredth of a point, and the first step is the unit of the others.
        assert heights[step] - heights[0] == pytest.approx(scale * (score - curve[0]), abs=0.05)
        assert places[step] - places[0] == pytest.approx(step * (places[1] - places[0]), abs=0.1)


def palette(html: str) -> tuple[dict[str, str], dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)[:2]
    read = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    return read[0], read[1]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio of two colours."""

    def luminance(color: str) -> float:
        channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_defined_and_readable_on_light_and_dark(tmp_path):
    html = written(full_content(), tmp_path)
    backgrounds = {"page", "card", "soft"}
    for colors in palette(html):
        used = set(re.findall(r"var\(--([a-z-]+)\)", html)) - {"mark"}
        assert used <= set(colors)
        for name in set(colors) - backgrounds - {"line"}:
            least = 4.5 if name in {"ink", "muted", "accent"} else 3.0
            for background in ("page", "card"):
                ratio = contrast(colors[name], colors[background])
                assert ratio >= least, f"{name} on {background}: {ratio:.2f}"
    assert "#0102" not in html
