"""`check_shards` and its console script: what is found, what is written, how it ends."""

import json
import os
from pathlib import Path

import pytest

from clipattr import tools
from clipattr.data import index as index_module
from clipattr.data.check import check_shards, read_checksums
from clipattr.data.faults import Fault, Problems
from clipattr.data.index import build_index
from clipattr.errors import DataError
from clipattr.tools import run_index
from tests.tars import picture, sample, write_shard


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "shards"
    folder.mkdir()
    return [
        write_shard(folder / f"{name}.tar", [sample(f"{name}{i}") for i in range(3)])
        for name in "abc"
    ]


def faults(problems) -> list[tuple[Fault, str, str]]:
    return [(found.fault, Path(found.shard).name, found.key) for found in problems]


# The report


def test_report_counts(paths: list[Path]):
    extra = sample("x", json=b"{}")
    del extra["cls"]
    paths.append(write_shard(paths[0].with_name("d.tar"), [extra]))
    report = check_shards(paths)
    assert report.problems == []
    assert (report.n_shards, report.n_samples) == (4, 10)
    assert report.n_bytes == sum(path.stat().st_size for path in paths)
    assert report.fields == {"cls": 9, "jpg": 10, "json": 1, "txt": 10}
    assert check_shards([]) == (0, 0, 0, {}, [])


def test_all_damages_are_found_at_once(paths: list[Path]):
    """build_index stops at the first."""
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    write_shard(paths[1], [sample("c1"), sample("ok")])
    report = check_shards(paths)
    assert faults(report.problems) == [
        (Fault.damaged, "a.tar", ""),
        (Fault.key_twice, "c.tar", "c1"),
    ]
    assert report.n_samples == 1 + 2 + 3  # what stands before the cut


def test_key_of_every_shard_is_named_with_the_shard_before(tmp_path: Path):
    paths = [
        write_shard(tmp_path / f"{n:02d}.tar", [sample(f"{99 - n}"), sample("x")])
        for n in range(40)
    ]
    problems = check_shards(paths).problems
    assert [(problem.shard, problem.what) for problem in problems] == [
        (str(path), f"the key stands in {before} already")
        for before, path in zip(paths, paths[1:], strict=False)
    ]


def test_alike_problems_are_one_with_their_number():
    problems = Problems("a.tar")
    for number in range(5):
        problems.add(Fault.field_twice, f"field {number}", key=f"{number}", byte=number * 512)
    problems.add(Fault.empty, "holds no sample")
    first, other = problems
    assert (first.key, first.byte, first.n_alike) == ("0", 0, 5)
    assert str(first) == (
        "a.tar, sample '0', byte 0: field 0 (and 4 more like it); rename one of the two members"
    )
    assert str(other) == "a.tar: holds no sample; leave the shard out"
    assert problems.first_fatal() is first


def test_lacking_fields(paths: list[Path]):
    rows = [sample(f"x{number}") for number in range(4)]
    del rows[1]["cls"], rows[2]["cls"], rows[2]["txt"], rows[3]["jpg"]
    write_shard(paths[0], rows)
    report = check_shards(paths, ("jpg", "cls"))
    (problem,) = report.problems
    assert (problem.fault, problem.shard, problem.key) == (Fault.lacks_field, str(paths[0]), "x1")
    assert (problem.what, problem.n_alike) == ("lacks cls; has jpg, txt", 3)
    content = paths[0].read_bytes()
    assert problem.byte is not None
    assert content[problem.byte :].startswith(b"x1.")
    assert check_shards(paths, ("txt",)).problems[0].key == "x2"
    everywhere = check_shards(paths, ("seg.png",)).problems
    assert [problem.n_alike for problem in everywhere] == [4, 3, 3]


def test_what_check_found_is_not_read_again(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unless training would refuse it."""
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    check_shards(paths, cache=tmp_path / "cache")
    read: list[str] = []
    original = index_module.scan_shard
    monkeypatch.setattr(
        index_module, "scan_shard", lambda path: read.append(path.name) or original(path)
    )
    assert len(build_index(paths[:2], cache=tmp_path / "cache")) == 6
    assert read == []
    with pytest.raises(DataError):
        build_index(paths, cache=tmp_path / "cache")
    assert read == ["c.tar"]


# Checksums


def sidecar(paths: list[Path]) -> Path:
    return paths[0].parent / "index.json"


def test_checksums_are_written_and_compared(paths: list[Path]):
    assert check_shards(paths[:2], checksums=True).problems == []
    known = json.loads(sidecar(paths).read_text())["shards"]
    assert list(known) == ["a.tar", "b.tar"]
    # sha256sum, of another program
    with os.popen(f"sha256sum {paths[1]}") as stream:
        assert known["b.tar"] == {
            "size": paths[1].stat().st_size,
            "sha256": stream.read().split()[0],
        }
    assert check_shards(paths, checksums=True).problems == []
    assert list(read_checksums(sidecar(paths).parent)) == ["a.tar", "b.tar", "c.tar"]


def test_changed_bytes_sizes_and_lost_shards(paths: list[Path]):
    check_shards(paths, checksums=True)
    before, size = sidecar(paths).read_bytes(), paths[1].stat().st_size
    content = bytearray(paths[0].read_bytes())
    content[600] ^= 16  # within a member: all headers are whole
    paths[0].write_bytes(content)
    write_shard(paths[1], [sample(f"b{i}", jpg=picture() * 40) for i in range(3)])
    paths[2].unlink()
    assert check_shards(paths[:2]).problems == []
    problems = check_shards(paths[:2], checksums=True).problems
    assert faults(problems) == [
        (Fault.changed, "a.tar", ""),
        (Fault.changed, "b.tar", ""),
        (Fault.missing, "c.tar", ""),
    ]
    assert "its bytes are not those" in problems[0].what
    now = paths[1].stat().st_size
    assert problems[1].what == f"has {now} bytes; when index.json was written it had {size}"
    assert sidecar(paths).read_bytes() == before  # what was found wrong does not become right


def test_damaged_shard_gets_no_checksum(paths: list[Path]):
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    check_shards(paths, checksums=True)
    assert list(read_checksums(sidecar(paths).parent)) == ["b.tar", "c.tar"]


def test_shards_of_several_folders(paths: list[Path], tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    paths.append(write_shard(other / "a.tar", [sample("other")]))
    check_shards(paths, checksums=True)
    assert list(read_checksums(other)) == ["a.tar"]
    assert read_checksums(other)["a.tar"] != read_checksums(paths[0].parent)["a.tar"]
    assert check_shards(paths, checksums=True).problems == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"wids_version": 1, "shardlist": []}', '{"schema_version": 1}']
    + ['{"schema_version": 1, "shards": {"a.tar": 3}}'],
)
def test_another_index_json_is_not_overwritten(paths: list[Path], content: str):
    """webdataset's own wids puts one there."""
    sidecar(paths).write_text(content)
    assert check_shards(paths).problems == []
    with pytest.raises(DataError, match=f"{sidecar(paths)} is no list of checksums"):
        check_shards(paths, checksums=True)
    assert sidecar(paths).read_text() == content


def test_checksums_of_another_version(paths: list[Path]):
    sidecar(paths).write_text('{"schema_version": 2, "shards": {}}')
    with pytest.raises(DataError, match="schema_version is 2, allowed is 1"):
        check_shards(paths, checksums=True)


def test_folder_that_cannot_be_written(paths: list[Path], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("clipattr.data.check.write_text", fail)
    with pytest.raises(DataError, match=f"{sidecar(paths)} cannot be written: .*denied"):
        check_shards(paths, checksums=True)


# The console script


def test_script_says_that_nothing_is_wrong(paths: list[Path], capsys: pytest.CaptureFixture[str]):
    assert run_index([str(paths[0].parent), "--fields", "jpg, CLS", "--workers", "0"]) == 0
    assert capsys.readouterr().out == (
        f"3 shards, 9 samples, {3 * paths[0].stat().st_size} bytes; samples with each field:\n"
        "  cls: all\n  jpg: all\n  txt: all\nnothing is wrong\n"
    )


def test_script_says_what_is_wrong(paths: list[Path], capsys: pytest.CaptureFixture[str]):
    rows = [sample(key) for key in ("b0", "x.y", "z")]
    del rows[2]["cls"]
    write_shard(paths[0], rows)
    shards = [str(path) for path in paths[:2]]
    assert run_index([*shards, "--fields", "cls"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    *lines, last = out.splitlines()
    assert lines[0].startswith(f"{paths[0]}, sample 'x', byte 3584: has no image, but the fields ")
    assert lines[1].startswith(f"{paths[0]}, sample 'x', byte 3584: lacks cls; has ")
    assert lines[2].startswith(f"{paths[1]}, sample 'b0', byte 0: the key stands in {paths[0]} ")
    assert lines[3].startswith("2 shards, 6 samples, ")
    assert "  cls: 4" in lines
    assert "  txt: 5" in lines
    assert last == "wrong: dotted 1, lacks field 2, key twice 1"


def test_script_keeps_the_index(paths: list[Path], tmp_path: Path):
    assert run_index([f"{paths[0].parent}/{{a..c}}.tar", "--cache", str(tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 3


@pytest.mark.parametrize("arguments", [[], ["x.tar", "--what"], ["x.tar", "--workers", "many"]])
def test_script_explains_its_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run_index(arguments)
    assert ended.value.code == 2
    assert "usage: clipattr-index" in capsys.readouterr().err


def test_script_names_shards_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_index([str(tmp_path / "no.tar")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{tmp_path}/no.tar does not exist" in err
    assert run_index([f"pipe:touch {tmp_path}/executed"]) == 2
    assert not (tmp_path / "executed").exists()


def test_script_that_is_interrupted(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipattr.data.check.scan_shard", fail)
    assert run_index([str(paths[0])]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_entry_point_ends_with_the_exit_code(paths: list[Path], monkeypatch: pytest.MonkeyPatch):
    for arguments, code in (([str(paths[0])], 0), ([str(paths[0]), "--fields", "json"], 1)):
        monkeypatch.setattr("sys.argv", ["clipattr-index", *arguments])
        with pytest.raises(SystemExit) as ended:
            tools.index()
        assert ended.value.code == code
