"""The files of the atlas: what they hold, that they are safe, whole, and the same each time."""

import base64
import dataclasses
import math
import re
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from clipattr.errors import DataError
from clipattr.jobs.atlas_choice import latents_of_class, moved_classes
from clipattr.report.atlas import Example, PairPoint, UnexpectedEntry, write_site
from clipattr.report.atlas.scripts import rounded, script
from tests import atlas_sites as small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas")
    assert small.write(path) == path / "index.html"
    return path


def test_every_latent_is_in_its_file(folder):
    blocks = [small.read_data(folder, f"latents-{number}") for number in range(3)]
    assert [len(block) for block in blocks] == [100, 100, 50]
    for latent, found in enumerate(each for block in blocks for each in block):
        entry = small.latent_entry(latent)
        assert found["dead"] == (latent % 50 == 49)
        assert [one[0] for one in found["labels"]] == [label.word for label in entry.labels]
        assert [one[:2] for one in found["top"]] == [list(one[:2]) for one in entry.top]
        assert found["numbers"][1] == (latent + 1) % small.N_LATENTS
        clarity = entry.numbers["clarity"]
        assert found["numbers"][2] == (clarity and pytest.approx(clarity, rel=5e-5))
        assert [one[0] for one in found["reliance"]] == [each[0] for each in entry.reliance]
    assert not (folder / "data" / "latents-3.js").exists()


def test_the_table_holds_what_the_files_hold(folder):
    table = small.read_data(folder, "table")
    assert table["words"][:2] == ["word0", "word1"]
    assert table["words"][49] == ""
    assert table["dead"] == [49, 99, 149, 199, 249]
    assert table["numbers"][0] == [small.frequency(latent) for latent in range(small.N_LATENTS)]
    assert [table["x"][18], table["y"][18]] == [2, 1]


def test_pairs_carry_words_and_pictures_of_their_latents(folder):
    classes = small.read_data(folder, "classes-1")  # 20 to 24
    assert len(classes) == 5
    first = classes[2]["pairs"][0]  # latent 22 * 10 + 7
    assert first[0] == 227
    assert first[-4:] == [small.HOSTILE_LATENT, "word227", [681, 682, 683, 684], small.HOSTILE]
    assert classes[2]["pairs"][1][3] is None  # share_positive that is not known
    ranked = small.read_data(folder, "overview")["unexpected"]
    assert [row[:2] for row in ranked] == [
        [each.class_number, each.pair.latent] for each in small.unexpected()
    ]
    rows = small.read_data(folder, "overview")["classes"]
    assert rows[0] == [30, 3, 0.25]
    assert rows[5][:2] == [30, 3 + 1234]  # also those that the page leaves out
    assert (classes[2]["more"], small.read_data(folder, "classes-0")[5]["more"]) == (0, 1234)


@pytest.mark.parametrize("n_raised", [1, 3, 40])
def test_classes_that_a_latent_moves_by_a_plain_loop(n_raised):
    mean = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    mean[:, 1], mean[:, 2], mean[2:, 3] = mean[:, 1].abs(), -mean[:, 2].abs(), 0
    for latent, found in enumerate(moved_classes(mean, n_raised=n_raised)):
        column = mean[:, latent].tolist()
        raised = sorted((n for n in range(9) if column[n] > 0), key=lambda n: -column[n])
        lowered = sorted((n for n in range(9) if column[n] < 0), key=lambda n: column[n])
        assert found == raised[:n_raised] + lowered[: math.ceil(n_raised / 2)]


@pytest.mark.parametrize("unexpected", [[], [5, 0], [5, 0, 3, 7]])
def test_latents_on_the_page_of_a_class_by_a_plain_loop(unexpected):
    row = torch.tensor([0.5, -0.9, 0.3, 0.8, 0.7, 0.1, 0.0, 0.2])
    found = latents_of_class(row, unexpected, n_each=3)
    others = [n for n in (3, 4, 0, 2, 7, 5) if n not in unexpected]
    assert found.unexpected == unexpected[:3]
    assert found.others == others[:3]
    assert found.n_more == max(0, len(unexpected) - 3)


def test_heatmaps_are_packed_row_by_row(folder):
    image, value, columns, packed = small.read_data(folder, "latents-0")[7]["top"][0]
    assert (image, value, columns) == (0, 9.5, 3)
    assert list(base64.b64decode(packed)) == [each for row in small.HEAT for each in row]


def test_data_cannot_leave_their_string(folder):
    for path in (folder / "data").iterdir():
        text = path.read_bytes()
        assert b"<" not in text
        assert max(text) < 128
    assert script("x", "<\u2028</script>") == 'atlas.put("x","\\u003c\\u2028\\u003c/script>");\n'
    # Words are values, never keys, where `__proto__` would change the object.
    keys = set(re.findall(rb'"([^"]*)":', (folder / "data" / "latents-0.js").read_bytes()))
    known = [b"labels", b"margin", b"numbers", b"top", b"spread", b"reliance", b"dead"]
    assert keys == set(known)


class Page(HTMLParser):
    """The addresses a page names, and whether anything stands inline."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.inline: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets += [given[name] or "" for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


def test_pages_name_files_of_the_folder_alone(folder):
    pages = {path.name: path.read_text() for path in folder.glob("*.html")}
    assert set(pages) == {"index.html", "latent.html", "class.html"}
    for text in pages.values():
        page = Page(text)
        assert page.inline == []
        files = {target.partition("#")[0] for target in page.targets} - {""}
        assert all((folder / name).is_file() for name in files)
        assert "default-src 'none'" in text
        assert small.HOSTILE not in text
    assert "&lt;/script&gt;&lt;img" in pages["index.html"]


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacent", "eval(", "http"])
def test_scripts_make_no_markup_from_text_and_ask_no_server(folder, word):
    scripts = sorted((folder / "assets").glob("*.js"))
    assert len(scripts) == 7
    assert all(word not in path.read_text() for path in scripts)
    assert all("document.write" not in path.read_text() for path in scripts)


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    small.write(tmp_path)
    first, second = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}
                     for root in (folder, tmp_path))  # fmt: skip
    assert first == second


def test_latents_are_written_while_they_come(tmp_path):
    def latents():
        for latent in range(small.N_LATENTS):
            assert (tmp_path / "data" / "latents-0.js").exists() == (latent >= 100)
            yield small.latent_entry(latent)

    classes = [small.class_entry(number) for number in range(small.N_CLASSES)]
    write_site(tmp_path, small.overview(), latents(), classes)


def test_a_smaller_site_leaves_nothing_of_the_larger_one(tmp_path):
    thumbnail = tmp_path / "thumbs" / "0" / "1.jpg"
    thumbnail.parent.mkdir(parents=True)
    thumbnail.write_bytes(b"a picture")
    small.write(tmp_path)
    fewer = dataclasses.replace(small.overview(), class_names=[], unexpected=[], points=[])
    write_site(tmp_path, fewer, [broken()], [])
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"latents-0.js", "table.js", "overview.js", "site.js"}
    assert thumbnail.read_bytes() == b"a picture"


def test_a_site_that_failed_has_no_index(tmp_path):
    small.write(tmp_path)
    with pytest.raises(DataError, match="given latent 5 where 0 is next"):
        write_site(tmp_path, small.overview(), [small.latent_entry(5)], [])
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 123456789.0, 0.000123456789, -7.65432198, 1e-30, 2.0**70, 29999.0]
)
def test_numbers_keep_five_digits(value):
    short = rounded(value)
    assert short is not None
    assert abs(Decimal(short) - Decimal(value)) <= abs(Decimal(value)) * Decimal("5e-5")
    assert len(re.sub(r"[-.]|e.*|0*$|^0\.0*", "", repr(short)).lstrip("0")) <= 5
    assert math.copysign(1, short) == 1 or value < 0


def test_what_is_not_finite_is_missing():
    assert [rounded(value) for value in (math.nan, math.inf, -math.inf, None)] == [None] * 4


def broken(**changes: object):
    return dataclasses.replace(small.latent_entry(0), **{"reliance": []} | changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (broken(numbers={"frequency": 1.0}), r"numbers \['frequency'\]"),
        (broken(top=[Example(4, 1.0, [[1, 2], [3]])]), "latent 0 on image 4"),
        (broken(top=[Example(4, 1.0, [[256]])]), "integers from 0 to 255"),
        (broken(top=[Example(4, 1.0, [])]), "latent 0 on image 4"),
        (broken(reliance=[small.latent_entry(0).reliance[0]._replace(class_number=1)]), "class 1"),
    ],
)
def test_entries_that_cannot_be_shown(tmp_path: Path, entry, message):
    content = dataclasses.replace(small.overview(), class_names=["only"], unexpected=[], points=[])
    with pytest.raises(DataError, match=message):
        write_site(tmp_path, content, [entry], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unexpected": [UnexpectedEntry(0, small.pair(9, 3))]}, "names latent 100"),
        ({"unexpected": [UnexpectedEntry(25, small.pair(0, 1))]}, "names class 25"),
        ({"points": [PairPoint(0, -1, 0.1, 0.1, True)]}, "names latent -1"),
        ({"class_names": ["a", "b"], "unexpected": [], "points": []}, "2 names"),
    ],
)
def test_pairs_without_a_page_are_refused(tmp_path, changes, message):
    content = dataclasses.replace(small.overview(), **{"unexpected": [], "points": []} | changes)
    classes = [small.class_entry(0)]
    latents = [dataclasses.replace(small.latent_entry(n), reliance=[]) for n in range(100)]
    with pytest.raises(DataError, match=message):
        write_site(tmp_path, content, latents, classes)
