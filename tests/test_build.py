"""Building shards: what is in them, whatever the sizes, processes and kills."""

import io
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipattr import atomic
from clipattr.build import build_shard
from clipattr.build.build import Options, build_shards
from clipattr.build.open_source import open_source
from clipattr.build.pictures import Pictures
from clipattr.build.placement import Limits, parse_split, place_samples
from clipattr.build.source_folder import read_folder
from clipattr.build.sources import Source
from clipattr.clip.templates import load_class_names
from clipattr.data import parallel
from clipattr.data.check import check_shards
from clipattr.data.shards import find_shards, read_label
from clipattr.errors import ConfigError, DataError
from tests.build_sources import bytes_of, paths_of, photo, read_built, read_tar, write_photos
from tests.plain_index import index_shards

NAMES = [f"{label}/{number}.jpg" for label in ("cat", "dog", "owl") for number in range(8)]
SMALL = Options(limits=Limits(samples=5))
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 images of three classes."""
    write_photos(tmp_path / "photos", NAMES)
    return tmp_path / "photos"


def build(photos: Path, folder: Path, options: Options = SMALL, **arguments):
    return build_shards(read_folder(photos), folder, options, **arguments)


# What is in the shards


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(1, 30),
    n_bytes=st.integers(1, 60_000),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
    split=st.sampled_from([None, {"train": 0.5, "val": 0.5}]),
)
def test_every_image_is_in_one_sample(samples, n_bytes, shuffle, seed, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    contents = write_photos(folder / "in", NAMES)
    options = Options(Limits(samples, n_bytes), split=split, shuffle=shuffle, seed=seed)
    report = build(folder / "in", folder / "out", options)
    found = read_built(folder / "out")
    assert sorted(paths_of(found)) == sorted(NAMES)
    for key, fields in found.items():
        assert re.fullmatch(r"((train|val)-)?\d{6}-\d{6}", key)
        path = json.loads(fields["json"])["path"]
        label = path.partition("/")[0]
        assert fields == {
            "jpg": contents[path],
            "cls": str(["cat", "dog", "owl"].index(label)).encode(),
            "json": json.dumps({"path": path, "label": label}).encode(),
        }
    for path in (folder / "out").rglob("*.tar"):
        n_here = len(read_tar(path))
        assert 1 <= n_here <= samples
        # A tar ends in up to 10240 zeros.
        assert n_here == 1 or path.stat().st_size <= n_bytes + 10240
    assert sum(part.samples for part in report.splits) == 24
    if not split and not shuffle:
        assert paths_of(found) == NAMES


def test_order_is_mixed_and_a_function_of_the_seed(photos: Path, tmp_path: Path):
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        build(photos, tmp_path / str(number), SMALL._replace(seed=seed))
        orders.append(paths_of(read_built(tmp_path / str(number))))
    assert orders[0] == orders[1] != orders[2]
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1")
    labels = [path.partition("/")[0] for path in orders[0]]
    changes = sum(one != other for one, other in zip(labels, labels[1:], strict=False))
    assert changes > 10  # sorted, there would be 2; 15 are expected


def test_every_order_is_equally_likely():
    """Where sample 0 of 6 lands over many seeds, against the uniform distribution."""
    source = Source("list", [f"{n}" for n in range(6)], np.ones(6, np.int64), list, "")
    places = [place_samples(source, Limits(), seed=seed)[0].rows.tolist() for seed in range(3000)]
    counts = np.array([np.bincount([rows.index(n) for rows in places]) for n in range(6)])
    assert ((counts - 500) ** 2 / 500).sum() < 60  # chi squared with 25 degrees: p = 1e-4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_other_readers_read_the_shards(photos: Path, tmp_path: Path):
    build(photos, tmp_path / "out")
    spec = f"{tmp_path}/out/{{000000..000004}}.tar"
    with_wds = list(wds.WebDataset(spec, shardshuffle=False).decode("pil"))
    assert len(with_wds) == 24
    for sample in with_wds:
        assert sample["jpg"].size == (12, 9)
        assert ["cat", "dog", "owl"][sample["cls"]] == sample["json"]["label"]
    paths = find_shards(str(tmp_path / "out"))
    names = load_class_names([str(tmp_path / "out/classes.txt")]).names
    ours = index_shards(paths)
    assert [one.key for one in ours] == [one["__key__"] for one in with_wds]
    assert [read_label(one, "cls", names) for one in ours] == [one["cls"] for one in with_wds]
    report = check_shards(paths, ["jpg", "cls", "json"], checksums=True)
    assert (report.problems, report.n_samples) == ([], 24)


def test_index_json_notices_a_flipped_bit(photos: Path, tmp_path: Path):
    build(photos, tmp_path / "out")
    path = tmp_path / "out/000001.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"JFIF") + 40] ^= 1
    path.write_bytes(content)
    (problem,) = check_shards(find_shards(str(tmp_path / "out")), checksums=True).problems
    assert problem.shard == str(path)


def test_report(photos: Path, tmp_path: Path):
    (photos / "Thumbs.db").write_bytes(b"?")
    report = build(photos, tmp_path / "out", SMALL._replace(split={"a": 0.5, "b": 0.5}))
    content = json.loads((tmp_path / "out/report.json").read_text())
    parts = content["splits"]
    assert parts["a"]["samples"] + parts["b"]["samples"] == 24
    for name, part in parts.items():
        samples = read_built(tmp_path / "out" / name)
        labels = [json.loads(fields["json"])["label"] for fields in samples.values()]
        assert part["classes"] == {label: labels.count(label) for label in ("cat", "dog", "owl")}
        assert part["fields"] == dict.fromkeys(("jpg", "cls", "json"), len(samples))
        sizes = [path.stat().st_size for path in (tmp_path / "out" / name).glob("*.tar")]
        assert (part["shards"], part["bytes"]) == (len(sizes), sum(sizes))
    assert content["ignored"] == {".db": 1}
    assert str(tmp_path) not in json.dumps(content)
    assert re.search(r"^  cat +\d+ +\d+$", str(report), re.M)
    assert "ignored: 1 x .db" in str(report)


def test_a_long_list_of_classes_is_shortened(tmp_path: Path):
    write_photos(tmp_path / "in", [f"c{number:02d}/a.jpg" for number in range(50)])
    shown = str(build(tmp_path / "in", tmp_path / "out"))
    assert "c00 " in shown
    assert "c49 " in shown
    assert "(30 more)" in shown
    assert "c25 " not in shown


# Processes, kills, resuming


def test_processes_write_the_same_bytes(photos: Path, tmp_path: Path, monkeypatch):
    build(photos, tmp_path / "one")
    monkeypatch.setattr(parallel, "PATIENCE", 0.0)
    started = []
    real = parallel.get_context
    monkeypatch.setattr(parallel, "get_context", lambda kind: started.append(kind) or real(kind))
    build(photos, tmp_path / "two", workers=2)
    assert started
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def build_and_die(photos: Path, folder: Path, n_writes: int) -> bool:
    """Build in another process that is killed before write number `n_writes`; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = 0
    real = os.fsync

    def fsync(number: int) -> None:
        nonlocal count
        count += 1
        if count > n_writes:
            os.kill(os.getpid(), signal.SIGKILL)
        real(number)

    atomic.os.fsync = fsync
    try:
        build(photos, folder)
    finally:
        os._exit(0)


@FORKS
def test_a_killed_build_goes_on(photos: Path, tmp_path: Path):
    """Killed before each of its writes: plan, five shards with records, and what ends it."""
    build(photos, tmp_path / "whole")
    whole = bytes_of(tmp_path / "whole")
    for n_writes in range(20):
        folder = tmp_path / f"killed-{n_writes}"
        was_killed = build_and_die(photos, folder, n_writes)
        if not was_killed:
            break
        assert not (folder / "report.json").exists()
        shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
        build(photos, folder)
        assert bytes_of(folder) == whole  # and no temporary file
        kept = [path for path, time in shards.items() if path.stat().st_mtime_ns == time]
        assert len(kept) >= len(shards) - 1  # the one whose record was not written yet
    assert n_writes == 15


@FORKS
def test_one_kill_after_the_other(photos: Path, tmp_path: Path):
    build(photos, tmp_path / "whole")
    kills = [build_and_die(photos, tmp_path / "out", 5) for _ in range(4)]
    assert kills == [True, True, True, False]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_finished_build_is_left_alone(photos: Path, tmp_path: Path):
    first = build(photos, tmp_path / "out")
    (tmp_path / "out/classes.txt").write_text("house cat\ndog\nowl\n")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert build(photos, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_damaged_shard_is_written_again(photos: Path, tmp_path: Path, damage: str):
    build(photos, tmp_path / "out")
    whole = bytes_of(tmp_path / "out")
    path = tmp_path / "out/000002.tar"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    build(photos, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": Limits(6)}, "limits.samples=5, asked for is 6"),
        ({"limits": Limits(5, 10**6)}, "limits.bytes=1000000000, asked for is 1000000"),
        ({"seed": 1}, "seed=0, asked for is 1"),
        ({"shuffle": False}, "shuffle=True, asked for is False"),
        ({"split": {"a": 0.5, "b": 0.5}}, "split=None, asked for is "),
        ({"pictures": Pictures(resize=8)}, "pictures.resize=0, asked for is 8"),
        ({"pictures": Pictures(encode="png")}, "pictures.encode='', asked for is 'png'"),
        ({"pictures": Pictures(verify=True)}, "pictures.verify=False, asked for is True"),
    ],
)
def test_other_options_are_refused(photos: Path, tmp_path: Path, options, message: str):
    build(photos, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path}/out: was made with ") + ".*" + message
    ):
        build(photos, tmp_path / "out", SMALL._replace(**options))
    assert bytes_of(tmp_path / "out") == before


def test_another_pillow_is_refused_where_it_writes(photos: Path, tmp_path: Path, monkeypatch):
    """Its versions encode differently."""
    small = SMALL._replace(pictures=Pictures(resize=5))
    for name, options in (("as-is", SMALL), ("small", small)):
        build(photos, tmp_path / name, options)
    monkeypatch.setattr("PIL.__version__", "1.2.3")
    build(photos, tmp_path / "as-is")
    with pytest.raises(DataError, match=r"was made with pillow=.*, asked for is '1\.2\.3'"):
        build(photos, tmp_path / "small", small)


def test_another_source_is_refused(photos: Path, tmp_path: Path):
    build(photos, tmp_path / "out")
    (photos / "cat/0.jpg").write_bytes(photo(100))
    with pytest.raises(DataError, match="was made with source.sha256="):
        build(photos, tmp_path / "out")
    (photos / "cat/new.jpg").write_bytes(photo(100))
    with pytest.raises(DataError, match="was made with source.samples=24, asked for is 25"):
        build(photos, tmp_path / "out")


def test_foreign_folders_are_refused(photos: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.tar").write_bytes(b"precious")
    parts = SMALL._replace(split={"out": 0.5, "b": 0.5})
    for folder, options in ((tmp_path / "out", SMALL), (tmp_path, parts)):
        with pytest.raises(DataError, match=r"out/a\.tar is there, and of no build"):
            build(photos, folder, options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]
    for inside in (photos, photos / "cat", photos / "new/shards"):
        with pytest.raises(ConfigError, match=f"{inside} lies in the source {photos}"):
            build(photos, inside)
    assert not (photos / "new").exists()


# What cannot be used


def test_broken_images_are_listed_and_the_shards_kept(photos: Path, tmp_path: Path):
    (photos / "cat/3.jpg").write_bytes(b"no image")
    (photos / "owl/5.jpg").write_bytes(b"")
    (photos / "dog/1.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        build(photos, out)
    message = str(caught.value)
    assert "3 of 24 cannot be used (3 x bad image); max_bad_fraction allows 0" in message
    for name in ("cat/3.jpg", "owl/5.jpg", "dog/1.jpg"):
        assert f"\n  {name}: bad image (it is none of JPEG, PNG, WEBP)" in message
    entries = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in entries) == ["cat/3.jpg", "dog/1.jpg", "owl/5.jpg"]
    assert not (out / "report.json").exists()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    with pytest.raises(DataError, match="max_bad_fraction allows 2"):
        build(photos, out, max_bad_fraction=0.12)
    report = build(photos, out, max_bad_fraction=0.125)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    assert "left out: 3 x bad image" in str(report)
    assert json.loads((out / "report.json").read_text())["failures"] == {"bad image": 3}
    good = set(NAMES) - {"cat/3.jpg", "owl/5.jpg", "dog/1.jpg"}
    assert sorted(paths_of(read_built(out))) == sorted(good)
    assert check_shards(find_shards(str(out)), ["jpg"], checksums=True).problems == []


def test_a_truncated_image_is_found_by_decoding(photos: Path, tmp_path: Path):
    path = photos / "cat/3.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    build(photos, tmp_path / "headers")
    with pytest.raises(DataError, match=r"cat/3\.jpg: bad image \(.*truncated"):
        build(photos, tmp_path / "all", SMALL._replace(pictures=Pictures(verify=True)))
    with pytest.raises(DataError, match=r"cat/3\.jpg: bad image \(.*truncated"):
        build(photos, tmp_path / "small", SMALL._replace(pictures=Pictures(resize=5)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_training_refuses_are_refused(photos: Path, tmp_path: Path):
    Image.new("1", (30000, 3000)).save(photos / "cat/huge.png")
    Image.new("1", (2000, 2)).save(photos / "cat/thin.png")
    with pytest.raises(DataError, match=r"2 of 26 cannot be used \(2 x bad image\)") as caught:
        build(photos, tmp_path / "out")
    for shown in ("cat/thin.png: bad image (2000 x 2", "cat/huge.png: bad image (30000 x 3000"):
        assert f"{shown} pixels; allowed are 89478485 in all" in str(caught.value)


def test_a_file_that_disappears_is_listed(photos: Path, tmp_path: Path):
    source = read_folder(photos)
    (photos / "cat/3.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/3\.jpg: cannot be read \(No such file"):
        build_shards(source, tmp_path / "out", SMALL)


def test_a_shard_of_broken_images_has_no_file(photos: Path, tmp_path: Path):
    options = SMALL._replace(limits=Limits(8), shuffle=False)
    for number in range(8):
        (photos / f"dog/{number}.jpg").write_bytes(b"no image")
    report = build(photos, tmp_path / "out", options, max_bad_fraction=0.4)
    tars = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert tars == ["000000.tar", "000002.tar"]
    assert (report.splits[0].samples, len(report.failures)) == (16, 8)
    assert check_shards(find_shards(str(tmp_path / "out")), checksums=True).problems == []
    assert build(photos, tmp_path / "out", options, max_bad_fraction=0.4) == report


def test_a_build_of_broken_images_gives_up(tmp_path: Path, monkeypatch):
    """After the hundred that are worth a list, and not after a million."""
    names = [f"a/{number}.jpg" for number in range(150)]
    write_photos(tmp_path / "in", names)
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"no image")
    written = []
    real = build_shard.write_text
    monkeypatch.setattr(
        build_shard, "write_text", lambda path, text: written.append(path) or real(path, text)
    )
    with pytest.raises(DataError, match=r"105 of 150 cannot be used.*The build has stopped"):
        build(tmp_path / "in", tmp_path / "out")
    assert len(written) == 21
    lines = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    assert len(lines) == 105


def test_unwritable_folder(photos: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out cannot be written"):
        build(photos, tmp_path / "file/out")


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (SMALL._replace(limits=Limits(0)), {}, "0 samples per shard: allowed are 1 to"),
        (SMALL._replace(limits=Limits(10**7)), {}, "10000000 samples per shard"),
        (SMALL._replace(limits=Limits(5, 0)), {}, "0 bytes per shard"),
        (SMALL._replace(pictures=Pictures(resize=-1)), {}, "resize=-1"),
        (SMALL._replace(pictures=Pictures(encode="gif")), {}, "'gif': allowed are jpg, png, webp"),
        (SMALL, {"max_bad_fraction": 1.5}, "max_bad_fraction=1.5: allowed are 0 to 1"),
    ],
)
def test_options_that_cannot_be(photos, tmp_path, options, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(photos, tmp_path / "out", options, **arguments)


# Images


@pytest.mark.parametrize(
    ("name", "image_format", "field"),
    [
        ("a.jpg", "JPEG", "jpg"),
        ("a.JPEG", "JPEG", "jpg"),
        ("a.png", "PNG", "png"),
        ("a.webp", "WEBP", "webp"),
        ("a.jpg", "PNG", "png"),  # the bytes decide
    ],
)
def test_bytes_and_format_stay(tmp_path: Path, name: str, image_format: str, field: str):
    content = photo(1, image_format)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    build(tmp_path / "in", tmp_path / "out")
    (fields,) = read_built(tmp_path / "out").values()
    assert fields == {field: content, "json": json.dumps({"path": name}).encode()}


def test_photos_of_phones_are_jpeg(tmp_path: Path):
    """PIL calls a JPEG with a second image MPO."""
    images = [Image.open(io.BytesIO(photo(number))) for number in range(2)]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.jpg"
    images[0].save(path, "MPO", save_all=True, append_images=images[1:])
    with Image.open(path) as image:
        assert image.format == "MPO"
    build(tmp_path / "in", tmp_path / "out")
    (fields,) = read_built(tmp_path / "out").values()
    assert fields["jpg"] == path.read_bytes()


def test_other_formats_are_refused(tmp_path: Path):
    write_photos(tmp_path / "in", ["a.jpg"])
    (tmp_path / "in/b.gif").write_bytes(photo(1, "GIF"))
    (tmp_path / "in/c.tif").write_bytes(photo(1, "TIFF"))
    with pytest.raises(DataError, match=r"2 of 3 cannot be used \(2 x bad image\)"):
        build(tmp_path / "in", tmp_path / "out")


def open_field(folder: Path, field: str) -> Image.Image:
    (fields,) = read_built(folder).values()
    assert set(fields) == {field, "json"}
    return Image.open(io.BytesIO(fields[field]))


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((40, 30), 15, (20, 15)),
        ((30, 41), 15, (15, 20)),
        ((40, 30), 30, (40, 30)),
        ((40, 30), 50, (40, 30)),
        ((400, 3), 2, (267, 2)),
    ],
)
def test_resize_makes_the_shorter_side_this_long(tmp_path, size, resize, expected):
    (tmp_path / "in").mkdir()
    content = photo(1, "PNG", size)
    (tmp_path / "in/a.png").write_bytes(content)
    options = SMALL._replace(pictures=Pictures(resize=resize))
    build(tmp_path / "in", tmp_path / "out", options)
    image = open_field(tmp_path / "out", "png")
    assert image.size == expected
    if expected == size:
        (fields,) = read_built(tmp_path / "out").values()
        assert fields["png"] == content
    else:
        whole = Image.open(io.BytesIO(content))
        oracle = whole.resize(expected, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(image), np.asarray(oracle))


@pytest.mark.parametrize("encode", ["jpg", "png", "webp"])
def test_encode_writes_all_in_one_format(tmp_path: Path, encode: str):
    (tmp_path / "in").mkdir()
    original = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    original.save(tmp_path / "in/a.png")
    build(tmp_path / "in", tmp_path / "out", SMALL._replace(pictures=Pictures(encode=encode)))
    image = open_field(tmp_path / "out", encode)
    assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[encode]
    found, oracle = (np.asarray(one, dtype=float) for one in (image, original))
    assert abs(found - oracle).max() <= (0 if encode == "png" else 6)


@pytest.mark.parametrize("encode", ["jpg", "png", "webp"])
def test_encoded_images_keep_their_orientation(tmp_path: Path, encode: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "in/a.jpg", exif=exif)
    pictures = Pictures(resize=15, encode=encode)
    build(tmp_path / "in", tmp_path / "out", SMALL._replace(pictures=pictures))
    image = open_field(tmp_path / "out", encode)
    assert (image.size, dict(image.getexif())) == ((20, 15), {0x0112: 6})


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("I;16", 77 * 256, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, value, expected: tuple[int, ...]):
    (tmp_path / "in").mkdir()
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new(mode, (20, 20), value).save(tmp_path / "in" / name)
    pictures = Pictures(resize=10, encode="png")
    build(tmp_path / "in", tmp_path / "out", SMALL._replace(pictures=pictures))
    image = open_field(tmp_path / "out", "png")
    assert (image.mode, image.size) == ("RGB", (10, 10))
    assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 2


# Splits


def splits_of(names: list[str], split: dict[str, float], **arguments) -> dict[str, str]:
    """Name -> split."""
    source = Source("list", names, np.ones(len(names), np.int64), list, "", **arguments)
    places = place_samples(source, Limits(), split=split)
    return {names[row]: place.split for place in places for row in place.rows}


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(min_size=1, max_size=5), min_size=40, max_size=60, unique=True),
    n_first=st.integers(30, 40),
)
def test_added_samples_leave_the_others_where_they_are(names: list[str], n_first: int):
    split = {"train": 0.5, "val": 0.5}
    before, after = splits_of(names[:n_first], split), splits_of(names, split)
    assert len(after) == len(names)
    assert before == {name: after[name] for name in names[:n_first]}


def test_parts_have_their_shares():
    found = list(
        splits_of([f"{n}" for n in range(20_000)], {"a": 0.7, "b": 0.2, "c": 0.1}).values()
    )
    shares = [found.count(name) / 20_000 for name in "abc"]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.015)


def test_seed_and_order_leave_the_split_alone(photos: Path, tmp_path: Path):
    for number, options in enumerate(({}, {"seed": 7}, {"shuffle": False})):
        options = SMALL._replace(split=parse_split("a=0.5, b=0.5"), **options)
        build(photos, tmp_path / str(number), options)
    parts = [sorted(paths_of(read_built(tmp_path / f"{number}/a"))) for number in range(3)]
    assert parts[0] == parts[1] == parts[2]


def test_groups_stay_together():
    names = [f"{number}" for number in range(300)]
    groups = [f"patient {number % 30}" for number in range(300)]
    found = splits_of(names, {"a": 0.5, "b": 0.5}, groups=groups)
    for patient in range(30):
        assert len({found[f"{number}"] for number in range(patient, 300, 30)}) == 1
    assert set(found.values()) == {"a", "b"}


def test_a_part_without_a_sample_is_an_error():
    with pytest.raises(DataError, match="split 'val' gets none of the 3 samples"):
        splits_of(["a", "b", "c"], {"train": 0.999, "val": 0.001})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.9", "the parts sum to 0.9"),
        ("train=0.9,val=0.2", "the parts sum to 1.1"),
        ("train=0.9,val", "'val' is no part"),
        ("train=0.9,val=x", "'val=x' is no part"),
        ("train=0.5,train=0.5", "'train=0.5' is no part"),
        ("train=1.5,val=-0.5", "'train=1.5' is no part"),
        ("a/b=0.5,c=0.5", "'a/b=0.5' is no part"),
        ("..=0.5,c=0.5", "'..=0.5' is no part"),
        ("a=nan,c=0.5", "'a=nan' is no part"),
    ],
)
def test_splits_that_cannot_be(text: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_split(text)


def test_a_built_set_can_be_built_anew(photos: Path, tmp_path: Path):
    """Tars as a source: the same samples, labels and paths, in other shards."""
    build(photos, tmp_path / "first")
    source = open_source(str(tmp_path / "first"))
    build_shards(source, tmp_path / "second", Options(limits=Limits(samples=7), seed=5))
    first, second = read_built(tmp_path / "first"), read_built(tmp_path / "second")
    by_path = [
        {json.loads(f["json"])["path"]: f for f in found.values()} for found in (first, second)
    ]
    assert by_path[0] == by_path[1]
    assert len(list((tmp_path / "second").glob("*.tar"))) == 4
