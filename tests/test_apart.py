"""Whether two sets of images are apart: same files by other paths, copies, and mere likeness."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from clipattr.data import ShardIndex, build_index, find_shards
from clipattr.errors import ConfigError
from clipattr.jobs.apart import check_apart
from tests.tars import write_shard


def index_of(folder: Path, samples: dict[str, bytes]) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "0.tar", [{"__key__": key, "png": body} for key, body in samples.items()])
    return open_index(folder)


def open_index(folder: Path) -> ShardIndex:
    return build_index(find_shards(str(folder)), cache=None)


PICTURES = {f"{n:04d}": n.to_bytes(2, "little") + bytes(198) for n in range(300)}


def test_one_file_by_two_paths(tmp_path: Path):
    first = index_of(tmp_path / "a", PICTURES)
    os.symlink(tmp_path / "a", tmp_path / "link")
    for other in (tmp_path / "link", tmp_path / "a" / ".." / "a"):
        with pytest.raises(ConfigError, match="both have"):
            check_apart(first, open_index(other), "here", "rule")


def test_a_copy_and_renamed_copies(tmp_path: Path):
    first = index_of(tmp_path / "a", PICTURES)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(ConfigError, match="the image 0000 is in both; rule"):
        check_apart(first, open_index(tmp_path / "copy"), "here", "rule")
    renamed = {f"x{key}": body for key, body in PICTURES.items()}
    with pytest.raises(ConfigError, match="300 of 300 images are in both under other keys"):
        check_apart(first, index_of(tmp_path / "b", renamed), "here", "rule")


def test_single_renamed_copies_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Sizes and ends are those of the others; keys too: none of this makes a copy."""
    first = index_of(tmp_path / "a", PICTURES)
    others = {key: b"\xff\xff" + body[:2] + bytes(196) for key, body in PICTURES.items()}
    with caplog.at_level(logging.WARNING):
        check_apart(first, index_of(tmp_path / "b", others), "here", "rule")
    assert not caplog.records
    others["new"] = PICTURES["0007"]
    check_apart(first, index_of(tmp_path / "c", others), "here", "rule")
    assert f"1 of {len(others)} images are in both under other keys, the first is new" in (
        caplog.text
    )
