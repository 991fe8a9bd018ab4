"""What folders, tables, tar sets and hub sets are read as, and what of them is refused."""

import csv
import datetime
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from clipattr.build.build import Options, build_shards
from clipattr.build.open_source import Naming, open_source
from clipattr.build.source_folder import read_folder
from clipattr.build.source_hub import read_hub
from clipattr.build.sources import Source, Trouble, number_labels
from clipattr.errors import ConfigError, DataError
from tests.build_sources import photo, read_built, read_tar, write_photos
from tests.tars import picture, sample, write_shard

PLAIN = Options(shuffle=False)


def troubles_of(source: Source) -> dict[str, Trouble]:
    return {failure.name: failure.trouble for failure in source.failures}


def fields_of(source: Source, folder: Path) -> list[dict[str, bytes]]:
    """The samples that are built, in the order of the source; what it cannot use is left out."""
    build_shards(source, folder, PLAIN, max_bad_fraction=1.0)
    return list(read_built(folder).values())


# Folders


def test_folder_of_classes(tmp_path: Path):
    names = [
        "b c/x.jpg",
        "b c/deep/er/y.jpg",
        "a/1.v2.jpg",
        "\u00fc\u732b/\u732b 1.PNG",
        "10/a.jpg",
    ]
    contents = write_photos(tmp_path / "in", names)
    source = read_folder(tmp_path / "in")
    assert source.classes == ("10", "a", "b c", "\u00fc\u732b")
    assert (source.failures, source.ignored) == ([], {})
    samples = fields_of(source, tmp_path / "out")
    rows = [json.loads(fields["json"]) for fields in samples]
    assert [row["path"] for row in rows] == sorted(names)
    for row, fields in zip(rows, samples, strict=True):
        assert fields["jpg"] == contents[row["path"]]
        assert row["label"] == row["path"].split("/")[0]
        assert source.classes[int(fields["cls"])] == row["label"]


def test_folder_of_images_has_no_classes(tmp_path: Path):
    write_photos(tmp_path, ["b.jpg", "a.jpg"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("")
    source = read_folder(tmp_path)
    assert (source.names, source.classes) == (["a.jpg", "b.jpg"], None)
    with pytest.raises(ConfigError, match="has no class folders, to which 2 names belong"):
        read_folder(tmp_path, ["a", "b"])


def test_what_is_no_image_is_counted(tmp_path: Path):
    write_photos(tmp_path, ["a/1.jpg", "b/2.jpg", "a/.hidden.jpg", ".git/x.jpg"])
    for name in ("a/x.txt", "a/y.TXT", "b/README"):
        (tmp_path / name).write_text("")
    source = read_folder(tmp_path)
    assert source.names == ["a/1.jpg", "b/2.jpg"]
    expected = {".txt": 2, "hidden files and folders": 2, "files without a suffix": 1}
    assert source.ignored == expected


def test_image_beside_the_class_folders(tmp_path: Path):
    write_photos(tmp_path, ["a/1.jpg", "b/2.jpg", "stray.jpg"])
    source = read_folder(tmp_path)
    assert troubles_of(source) == {"stray.jpg": Trouble.no_class}
    assert len(source.names) == 2


def test_class_folder_without_an_image(tmp_path: Path):
    """As a class it has no image; left out, the numbers of the others would change."""
    write_photos(tmp_path, ["a/1.jpg", "c/2.jpg"])
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/b holds no image"):
        read_folder(tmp_path)
    source = read_folder(tmp_path, ["a", "b", "c"])
    assert [json.loads(one["json"])["label"] for one in fields_of(source, tmp_path / "../out")]
    assert source.classes == ("a", "b", "c")


def test_given_classes_number_the_folders(tmp_path: Path):
    write_photos(tmp_path / "in", ["10/a.jpg", "9/b.jpg", "x/c.jpg"])
    source = read_folder(tmp_path / "in", ["9", "8", "10"])
    assert troubles_of(source) == {"x/c.jpg": Trouble.unknown_label}
    labels = [fields["cls"] for fields in fields_of(source, tmp_path / "out")]
    assert labels == [b"2", b"0"]  # by name: "10" is not class number 10


def test_links(tmp_path: Path):
    write_photos(tmp_path / "elsewhere", ["1.jpg"])
    write_photos(tmp_path / "in", ["a/2.jpg"])
    (tmp_path / "in/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/a/3.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    (tmp_path / "in/a/gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/c").symlink_to(tmp_path / "nowhere")
    source = read_folder(tmp_path / "in")
    assert source.names == ["a/2.jpg", "a/3.jpg", "b/1.jpg"]
    assert troubles_of(source) == {"a/gone.jpg": Trouble.missing, "c": Trouble.missing}
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match=r"in/a/loop/ is a link to a folder that it lies in"):
        read_folder(tmp_path / "in")


def test_pipe_is_not_opened(tmp_path: Path):
    """Reading it would wait for ever."""
    write_photos(tmp_path, ["a/1.jpg", "b/1.jpg"])
    os.mkfifo(tmp_path / "a/2.jpg")
    assert troubles_of(read_folder(tmp_path)) == {"a/2.jpg": Trouble.missing}


def test_folder_without_images(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path} holds no image file"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "\u2028", "b\x07"])
def test_class_names_that_are_no_line(tmp_path: Path, name: str):
    write_photos(tmp_path, [f"{name}/1.jpg", "c/1.jpg"])
    with pytest.raises(DataError, match="cannot stand in a list of one name a line"):
        read_folder(tmp_path)


def test_class_names_that_differ_by_spaces(tmp_path: Path):
    write_photos(tmp_path, ["cat/1.jpg", "cat /1.jpg"])
    with pytest.raises(DataError, match="two classes have one name: 'cat' and 'cat '"):
        read_folder(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path):
    write_photos(tmp_path / "in", ["a/1.jpg", "b/1.jpg"])
    (tmp_path / "in/a/1.jpg").rename(os.fsdecode(os.fsencode(tmp_path) + b"/in/a/\xff.jpg"))
    samples = fields_of(read_folder(tmp_path / "in"), tmp_path / "out")
    assert json.loads(samples[0]["json"])["path"] == "a/\udcff.jpg"


# Labels


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "names"),
    [
        (["2", "0", "1"], None, [2, 0, 1], None),
        (["2.0", "0", " 1 "], None, [2, 0, 1], None),
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        (["10", "9"], ["x"] * 0 or [f"c{n}" for n in range(11)], [10, 9], None),
        (["b", "1", "a"], ["b", "a"], [0, 1, 1], None),
    ],
)
def test_labels_are_numbers_or_names(labels, classes, numbers, names):
    found = number_labels(labels, classes)
    assert (found.numbers, found.bad) == (numbers, {})
    assert found.classes == (tuple(classes) if classes else names)


def test_labels_that_are_wrong():
    found = number_labels(["a", "", "2", "c", "-1", "1.5", "1"], ["a", "b"])
    assert found.numbers == [0, -1, -1, -1, -1, -1, 1]
    kinds = {row: bad.trouble.name for row, bad in found.bad.items()}
    unknown = dict.fromkeys((2, 3, 4, 5), "unknown_label")
    assert kinds == {1: "no_label"} | unknown
    assert found.bad[3].what == "'c'; allowed are 'a', 'b', and numbers"


def test_numbers_and_names_are_not_mixed():
    with pytest.raises(DataError, match="labels are numbers, such as '3', and names, such as 'b'"):
        number_labels(["", "b", "3", "4"], None)


# Tables


def write_table(path: Path, rows: list[list[str]], encoding: str = "utf-8", **dialect) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_table_reads_as_it_was_written(data: st.DataObject, tmp_path_factory):
    """Oracle: what csv wrote, in any dialect, with any text."""
    folder = tmp_path_factory.mktemp("table")
    bad = {"Cs"}
    cells = st.text(st.characters(exclude_categories=bad, exclude_characters="\0\r"), max_size=8)
    names = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
    files = [f"\u00fc {number}.jpg" for number in names]
    write_photos(folder, files)
    rows = [[file, data.draw(cells), data.draw(cells)] for file in files]
    dialect = data.draw(
        st.fixed_dictionaries(
            {
                "delimiter": st.sampled_from(",;\t|"),
                "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
                "lineterminator": st.sampled_from(["\n", "\r\n"]),
            }
        )
    )
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig"]))
    path = write_table(
        folder / "t.csv", [["path", "caption", "x"], *rows], encoding=encoding, **dialect
    )
    source = open_source(str(path))
    assert (source.names, source.failures) == (files, [])
    for item, row in zip(source.items(range(len(files))), rows, strict=True):
        content = item.read()
        assert json.loads(content.fields["json"]) == dict(
            zip(["path", "caption", "x"], row, strict=True)
        )
        assert content.fields.get("txt", b"").decode() == row[1]
        assert content.image == (folder / row[0]).read_bytes()


def test_line_breaks_of_windows_stay_in_cells(tmp_path: Path):
    write_photos(tmp_path, ["a.jpg"])
    (tmp_path / "t.csv").write_bytes(b'path,caption\r\na.jpg,"one\r\ntwo"\r\n')
    (item,) = open_source(str(tmp_path / "t.csv")).items([0])
    assert item.read().fields["txt"] == b"one\r\ntwo"


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder with four images."""
    write_photos(tmp_path / "birds", ["img/0.jpg", "img/1.jpg", "img/2.jpg", "img/3.jpg"])
    return tmp_path / "birds"


def test_columns_become_fields(birds: Path, tmp_path: Path):
    rows = [
        ["file", "y", "text", "place", "path"],
        ["img/0.jpg", "wren", "a wren", "land", "old/0"],
        ["./img/1.jpg", "gull", "", "sea", "old/1"],
        [f"{birds}/img/2.jpg", "gull", "two", "", "old/2"],
    ]
    table = write_table(birds / "birds.csv", rows)
    source = open_source(str(table), Naming(path="file", label="y", caption="text"))
    assert source.names == ["img/0.jpg", "img/1.jpg", "img/2.jpg"]
    assert source.classes == ("gull", "wren")
    samples = fields_of(source, tmp_path / "out")
    assert [fields["cls"] for fields in samples] == [b"1", b"0", b"0"]
    assert [fields.get("txt") for fields in samples] == [b"a wren", None, b"two"]
    assert [json.loads(one["json"]) for one in samples] == [
        dict(zip(rows[0], row, strict=True)) for row in rows[1:]
    ]


def test_labels_as_numbers(birds: Path, tmp_path: Path):
    rows = [["path", "label"], ["img/0.jpg", "3"], ["img/1.jpg", "0"]]
    source = open_source(str(write_table(birds / "birds.tsv", rows, delimiter="\t")))
    assert source.classes is None
    assert [one["cls"] for one in fields_of(source, tmp_path / "out")] == [b"3", b"0"]
    assert not (tmp_path / "out/classes.txt").exists()


def test_rows_that_cannot_be_used(birds: Path):
    (birds / "img/empty").mkdir()
    rows = [
        ["path", "label", "who"],
        ["img/0.jpg", "0", "a"],
        ["img/gone.jpg", "0", "a"],
        ["../secret.jpg", "0", "a"],
        ["/etc/passwd", "0", "a"],
        ["img/../img/0.jpg", "0", "a"],
        ["img/1.jpg", "", "a"],
        ["img/1.jpg", "0"],
        ["", "0", "a"],
        ["https://example.org/a.jpg", "0", "a"],
        ["img/empty", "0", "a"],
        ["img/2.jpg", "0", ""],
        [],
        ["img/3.jpg", "9", "b"],
    ]
    source = open_source(
        str(write_table(birds / "birds.csv", rows)), Naming(group="who"), classes=["w", "g"]
    )
    assert source.names == ["img/0.jpg"]
    found = [(failure.name.split(", ")[1], failure.trouble) for failure in source.failures]
    assert sorted(found) == sorted(
        [
            ("row 3", Trouble.missing),
            ("row 4", Trouble.outside),
            ("row 5", Trouble.outside),
            ("row 6", Trouble.repeated),
            ("row 7", Trouble.no_label),
            ("row 8", Trouble.malformed),
            ("row 9", Trouble.malformed),
            ("row 10", Trouble.malformed),
            ("row 11", Trouble.missing),
            ("row 12", Trouble.malformed),
            ("row 14", Trouble.unknown_label),
        ]
    )
    assert source.ignored == {"blank lines": 1}
    text = {failure.name.split(", ")[1]: str(failure) for failure in source.failures}
    assert text["row 3"] == "birds.csv, row 3, img/gone.jpg: missing file (does not exist)"
    assert "birds.csv, row 2 has it already" in text["row 6"]
    assert "fetch the images first" in text["row 10"]


def test_paths_start_at_the_root(birds: Path, tmp_path: Path):
    table = write_table(tmp_path / "t.csv", [["path"], ["0.jpg"], [f"{birds}/img/1.jpg"]])
    source = open_source(str(table), Naming(root=birds / "img"))
    assert (source.names, source.failures) == (["0.jpg", "1.jpg"], [])
    beside = Path(f"{birds}/img2")
    write_photos(beside, ["0.jpg"])
    table = write_table(tmp_path / "t.csv", [["path"], ["../img2/0.jpg"], [f"{beside}/0.jpg"]])
    source = open_source(str(table), Naming(root=birds / "img"))
    assert set(troubles_of(source).values()) == {Trouble.outside}


def test_the_build_stops_before_it_writes(birds: Path, tmp_path: Path):
    table = write_table(birds / "t.csv", [["path"], ["img/0.jpg"], ["img/gone.jpg"]])
    with pytest.raises(DataError, match=r"1 of 2 cannot be used \(1 x missing file\)"):
        build_shards(open_source(str(table)), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failures.jsonl"]
    write_photos(birds, ["img/gone.jpg"])
    report = build_shards(open_source(str(table)), tmp_path / "out")
    assert (report.splits[0].samples, report.failures) == (2, [])


def test_groups_are_of_the_plan(birds: Path, tmp_path: Path):
    rows = [["path", "a", "b"], ["img/0.jpg", "1", "2"], ["img/1.jpg", "3", "4"]]
    table = str(write_table(birds / "t.csv", rows))
    build_shards(open_source(table, Naming(group="a")), tmp_path / "out")
    with pytest.raises(DataError, match=r"was made with source\.groups="):
        build_shards(open_source(table, Naming(group="b")), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            b"file,label\na.jpg,1\n",
            ConfigError,
            "has no column 'path'; its first line is 'file,label'",
        ),
        (b"", ConfigError, "has no column 'path'"),
        (b"path,x,x\n", DataError, "has the column 'x' twice"),
        (b"path,x\na.jpg,\xff\n", DataError, "is not UTF-8 (invalid start byte)"),
        (b'path,x\na.jpg,"1\n', DataError, "line 2: unexpected end of data"),
        (b'path,x\na.jpg,"1"2\n', DataError, "line 2: "),
        ("path,x\n".encode("utf-16"), DataError, "is not UTF-8"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, content: bytes, error, message: str):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(error, match=re.escape(message)):
        open_source(str(path))


def test_columns_that_are_not_there(birds: Path):
    table = write_table(birds / "t.csv", [["path", "y"], ["img/0.jpg", "1"]])
    for naming in (Naming(label="x"), Naming(caption="x"), Naming(group="x")):
        with pytest.raises(ConfigError, match="t.csv has no column 'x'; it has path, y"):
            open_source(str(table), naming)
    with pytest.raises(ConfigError, match="has no column of labels, to which classes belong"):
        open_source(str(table), classes=["a", "b"])
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read"):
        open_source(str(birds / "nowhere.csv"))


def test_parquet(birds: Path, tmp_path: Path):
    columns = {
        "path": ["img/0.jpg", "img/1.jpg", "img/2.jpg"],
        "label": [1.0, 0.0, None],
        "caption": ["one", None, "three"],
        "score": [0.5, float("nan"), None],
        "taken": [datetime.date(2020, 1, 2)] * 3,
        "tags": [["a"], [], None],
        "thumb": [b"\xff", b"", None],
        "more": [{"n": 1, "raw": b"x"}] * 3,
    }
    parquet.write_table(arrow.table(columns), birds / "t.parquet")
    source = open_source(str(birds / "t.parquet"))
    assert source.ignored == {"column thumb (bytes)": 3, "column more (bytes)": 3}
    assert troubles_of(source) == {"t.parquet, row 3, img/2.jpg": Trouble.no_label}
    samples = fields_of(source, tmp_path / "out")
    assert [fields["cls"] for fields in samples] == [b"1", b"0"]
    assert [fields.get("txt") for fields in samples] == [b"one", None]
    assert json.loads(samples[1]["json"]) == {
        "path": "img/1.jpg",
        "label": 0.0,
        "caption": None,
        "score": None,
        "taken": "2020-01-02",
        "tags": [],
    }
    with pytest.raises(DataError, match="the column 'tags' holds"):
        open_source(str(birds / "t.parquet"), Naming(label="tags"))
    (birds / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is no Parquet file"):
        open_source(str(birds / "t.parquet"))


# Tar sets


def test_tars_keep_their_fields(tmp_path: Path):
    samples = [
        sample(f"x/{number}", **{"seg.png": picture("PNG"), "cls": b"1"}) for number in range(3)
    ]
    samples[1]["json"] = b'{"path": "old.jpg",  "n": 1}'
    samples[2]["json"] = b'{"n": 2}'
    write_shard(tmp_path / "a.tar", samples)
    found = fields_of(open_source(str(tmp_path / "a.tar")), tmp_path / "out")
    assert [json.loads(fields.pop("json")) for fields in found] == [
        {"path": "x/0"},
        {"path": "old.jpg", "n": 1},
        {"path": "x/2", "n": 2},
    ]
    for fields, original in zip(found, samples, strict=True):
        assert fields == {name: original[name] for name in ("jpg", "txt", "cls", "seg.png")}


def test_json_that_says_its_path_keeps_its_bytes(tmp_path: Path):
    content = b'{"path": "old.jpg",  "n": 1}'
    write_shard(tmp_path / "a.tar", [sample("a", json=content)])
    (fields,) = fields_of(open_source(str(tmp_path / "a.tar")), tmp_path / "out")
    assert fields["json"] == content


def test_folder_of_tars(tmp_path: Path):
    """As img2dataset writes them."""
    for shard in range(2):
        keys = [f"{shard:05d}{number:04d}" for number in range(3)]
        samples = [sample(key, json=json.dumps({"key": key}).encode()) for key in keys]
        write_shard(tmp_path / f"{shard:05d}.tar", samples)
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert source.names == [f"{shard:05d}{number:04d}" for shard in range(2) for number in range(3)]
    found = fields_of(open_source(f"{tmp_path}/{{00000..00001}}.tar"), tmp_path / "out")
    assert [json.loads(fields["json"])["key"] for fields in found] == source.names


def test_samples_of_tars_that_cannot_be_used(tmp_path: Path):
    broken = [
        sample("0"),
        {"__key__": "1", "txt": b"no image"},
        sample("2", json=b"[1]"),
        sample("3", cls=b"7"),
        sample("4", **{"a b": b""}),
        sample("5", png=picture("PNG"), jpg=picture("PNG")),
        sample("6", cls=b"dog"),
    ]
    write_shard(tmp_path / "a.tar", broken)
    source = open_source(str(tmp_path / "a.tar"), classes=["cat", "dog"])
    report = build_shards(source, tmp_path / "out", PLAIN, max_bad_fraction=0.9)
    assert {failure.name: failure.trouble for failure in report.failures} == {
        "1": Trouble.no_image,
        "2": Trouble.bad_field,
        "3": Trouble.unknown_label,
        "4": Trouble.bad_field,
        "5": Trouble.bad_field,
    }
    assert [fields["cls"] for fields in read_built(tmp_path / "out").values()] == [b"1", b"1"]
    assert report.count_classes(report.splits[0]) == {"cat": 0, "dog": 2}


def test_field_that_webdataset_would_drop_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("a.jpg", picture()), ("a._mask", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"a: bad field \(the name '_mask' cannot be written\)"):
        build_shards(open_source(str(tmp_path / "a.tar")), tmp_path / "out")


def test_damaged_tars_are_refused(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", [sample("a"), sample("b")])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.tar"):
        open_source(str(path))
    with pytest.raises(DataError, match="SOURCE='.*nowhere': .*nowhere does not exist"):
        open_source(str(tmp_path / "nowhere"))


def test_members_are_never_executed(tmp_path: Path):
    marker = tmp_path / "executed"
    code = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    fields = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt"), code)
    write_shard(tmp_path / "a.tar", [sample("a", **fields)])
    (found,) = fields_of(open_source(str(tmp_path / "a.tar")), tmp_path / "out")
    assert found["pkl"] == code
    assert not marker.exists()


# Naming


@pytest.mark.parametrize(
    ("kind", "naming", "message"),
    [
        ("folder", Naming(path="x"), "path='x': of a folder of images, nothing can be named"),
        ("table", Naming(hub_split="x"), "hub_split='x': of a manifest, path, label, "),
        ("tars", Naming(group="x"), "group='x': of a tar set, nothing can be named"),
        ("hub", Naming(root=Path("x")), "root='x': of a hub set, path, label, "),
    ],
)
def test_naming_that_does_not_belong(tmp_path: Path, kind: str, naming: Naming, message: str):
    write_photos(tmp_path / "folder", ["a.jpg"])
    write_table(tmp_path / "t.csv", [["path"]])
    write_shard(tmp_path / "a.tar", [sample("a")])
    spec = {
        "folder": str(tmp_path / "folder"),
        "table": str(tmp_path / "t.csv"),
        "tars": str(tmp_path / "a.tar"),
        "hub": "hf:nobody/nothing",
    }[kind]
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_source(spec, naming)


# The hub


def test_hub_needs_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"needs datasets .*pip install 'clipattr\[hf-datasets\]'"
    ):
        open_source("hf:nobody/nothing")


@pytest.fixture
def hub(tmp_path: Path):
    """Five rows, two of them without an image; `save_to_disk` puts the file into the table."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write_photos(tmp_path / "files", ["1.jpg"])
    images = [
        {"bytes": photo(10), "path": "zero.jpg"},
        {"bytes": None, "path": str(tmp_path / "files/1.jpg")},
        None,
        {"bytes": b"no image", "path": None},
        {"bytes": photo(14, "PNG"), "path": None},
    ]
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["10", "9"]),
        "caption": datasets.Value("string"),
        "score": datasets.Value("float32"),
        "mask": datasets.Image(),
    }
    columns = {
        "image": images,
        "label": [1, 0, 1, 0, 1],
        "caption": ["a", None, "c", "d", "e"],
        "score": [0.5, float("nan"), 1, 2, 3],
        "mask": [{"bytes": photo(1), "path": None}] * 5,
    }
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(tmp_path / "hub")
    return tmp_path / "hub"


def test_hub(hub: Path, tmp_path: Path):
    source = open_source(f"hf:{hub}", Naming(path="image"))
    assert (source.kind, source.classes) == ("hub", ("10", "9"))
    assert source.ignored == {"column mask (bytes)": 5}
    file = tmp_path / "files/1.jpg"
    sizes = [len(photo(10)), file.stat().st_size, 0, 8, len(photo(14, "PNG"))]
    assert source.sizes.tolist() == sizes
    report = build_shards(source, tmp_path / "out", PLAIN, max_bad_fraction=0.4)
    assert {failure.name: failure.trouble for failure in report.failures} == {
        "row 2": Trouble.no_image,
        "row 3": Trouble.bad_image,
    }
    assert list(read_tar(tmp_path / "out/000000.tar").values()) == [
        {
            "jpg": photo(10),
            "cls": b"1",
            "txt": b"a",
            "json": b'{"path": "zero.jpg", "label": "9", "caption": "a", "score": 0.5}',
        },
        {
            "jpg": file.read_bytes(),
            "cls": b"0",
            "json": json.dumps(
                {"path": "1.jpg", "label": "10", "caption": None, "score": None}
            ).encode(),
        },
        {
            "png": photo(14, "PNG"),
            "cls": b"1",
            "txt": b"e",
            "json": b'{"path": "row 4", "label": "9", "caption": "e", "score": 3.0}',
        },
    ]


def test_hub_in_processes(hub: Path, tmp_path: Path, monkeypatch):
    """The rows are sent to them without the images."""
    import pickle

    source = open_source(f"hf:{hub}", Naming(path="image"))
    assert len(pickle.dumps(source.items([0, 1]))) < 5000
    (item,) = pickle.loads(pickle.dumps(source.items([4])))
    assert item.read().image == photo(14, "PNG")


def test_hub_columns(hub: Path):
    with pytest.raises(ConfigError, match="which column holds the images.*of images: image, mask"):
        open_source(f"hf:{hub}")
    with pytest.raises(ConfigError, match="'score' holds no images"):
        open_source(f"hf:{hub}", Naming(path="score"))
    with pytest.raises(ConfigError, match="the dataset has no column 'x'; it has image, label"):
        open_source(f"hf:{hub}", Naming(path="image", label="x"))
    source = open_source(f"hf:{hub}", Naming(path="image", group="caption"))
    assert source.groups == ["a", "c", "d", "e"]
    assert troubles_of(source) == {"row 1": Trouble.malformed}
    with pytest.raises(ConfigError, match="the dataset has no column 'mask'"):
        open_source(f"hf:{hub}", Naming(path="image", group="mask"))
    source = open_source(f"hf:{hub}", Naming(path="mask", label="caption"))
    assert set(troubles_of(source).values()) == {Trouble.no_label}
    assert source.classes == ("a", "c", "d", "e")
    swapped = open_source(f"hf:{hub}", Naming(path="image"), classes=["9", "10"])
    assert np.array_equal(swapped.items([0, 1]).labels, [0, 1])


def test_hub_set_of_files(tmp_path: Path):
    """As the `imagefolder` loader makes it: paths, and no bytes."""
    datasets = pytest.importorskip("datasets")
    contents = write_photos(tmp_path, ["0.jpg", "1.jpg"])
    paths = [str(tmp_path / name) for name in contents]
    made = datasets.Dataset.from_dict({"image": [*paths, f"{tmp_path}/gone.jpg"]})
    source = read_hub(made.cast_column("image", datasets.Image()))
    assert source.sizes.tolist() == [len(content) for content in contents.values()] + [0]
    report = build_shards(source, tmp_path / "out", PLAIN, max_bad_fraction=0.4)
    assert troubles_of(source) == {}
    assert [(one.name, one.trouble) for one in report.failures] == [("row 2", Trouble.unreadable)]
    for fields, name in zip(read_built(tmp_path / "out").values(), contents, strict=True):
        path = json.dumps({"path": str(tmp_path / name)}).encode()
        assert fields == {"jpg": contents[name], "json": path}


def test_hub_set_with_two_kinds_of_label():
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "fine": label, "coarse": label})
    columns = {"image": [{"bytes": photo(1), "path": None}], "fine": [0], "coarse": [1]}
    made = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(ConfigError, match="which column holds the labels.* fine, coarse"):
        read_hub(made)
    assert list(read_hub(made, label="coarse").items([0]))[0].label == 1
    assert list(read_hub(made.rename_column("fine", "label")).items([0]))[0].label == 0
