"""The job with many SAEs: files, table and picture; the same bits as one by one."""

import csv
import json
from pathlib import Path

import pytest

from clipattr.config.choices import Architecture
from clipattr.report.pareto import SaePoint, find_front, pareto_png, pareto_table
from clipattr.sae import load_sae
from tests.test_demo import Demo, message_of

GRID = ("sae.k=[4,6]", "sae.lr=[1e-3,1e-2]")
NAMES = ["k=4,lr=0.001", "k=4,lr=0.01", "k=6,lr=0.001", "k=6,lr=0.01"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    made = Demo(tmp_path_factory.mktemp("demo"))
    assert made.run("world") == 0
    return made


def folder_of(demo: Demo, name: str) -> Path:
    return demo.runs / "demo" / name


def test_a_grid_has_a_folder_for_each(demo: Demo, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    assert demo.run("sae", "name=demo/grid", *GRID) == 0
    folder = folder_of(demo, "grid")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        [*NAMES, "checkpoints", "curves"]
    )
    metrics = demo.read("grid", "metrics.json")
    assert list(metrics["sae"]) == NAMES
    assert metrics["failed"] == {}
    with (folder / "pareto.csv").open() as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table) == NAMES
    for name in NAMES:
        sae, record = load_sae(folder / name)
        own = json.loads((folder / name / "metrics.json").read_text())["sae"]
        assert own == metrics["sae"][name] == record.metrics
        assert sae.settings["k"] == int(name[2])
        assert float(table[name]["fvu"]) == own["fvu"]
        assert float(table[name]["l0"]) == own["l0"] <= sae.settings["k"]
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert demo.read("grid", "manifest.json")["rows_per_second"] > 0
    assert "rows/s through each of 4 SAEs" in caplog.text
    assert demo.run("sae", "name=demo/grid", *GRID) == 0
    assert "is finished" in caplog.text


def test_each_has_the_bytes_of_its_own_run(demo: Demo):
    assert demo.run("sae", "name=demo/many", *GRID) == 0
    assert demo.run("sae", "name=demo/single", "sae.k=6", "sae.lr=1e-2") == 0
    assert demo.run("sae", "name=demo/list", "sae.k=[6]", "sae.lr=[1e-2]") == 0
    alone = folder_of(demo, "single") / "sae.safetensors"
    for other in ("many/k=6,lr=0.01", "list"):
        assert (folder_of(demo, other) / "sae.safetensors").read_bytes() == alone.read_bytes()
    assert not (folder_of(demo, "list") / "pareto.csv").exists()


def test_every_architecture_is_a_setting(demo: Demo):
    # A transcoder has another target: tests/test_transcoder_job.py.
    names = [one.name for one in Architecture if one is not Architecture.transcoder]
    options = (f"sae.architecture=[{','.join(names)}]", "sae.ks=[2,6]", "sae.sparsity=0.1")
    assert demo.run("sae", "name=demo/all", *options) == 0
    for name in names:
        sae, _ = load_sae(folder_of(demo, "all") / f"architecture={name}")
        assert sae.architecture == name
        assert demo.read("all", "metrics.json")["sae"][f"architecture={name}"]["fvu"] < 1


def test_what_failed_is_written_down(demo: Demo, capsys: pytest.CaptureFixture[str]):
    options = ("name=demo/failed", "sae.lr=[1e-3,1e30]", "sae.warmup=1")
    assert demo.run("sae", *options) == 0
    folder = folder_of(demo, "failed")
    metrics = demo.read("failed", "metrics.json")
    assert list(metrics["sae"]) == ["lr=0.001"]
    assert "is not finite at step" in metrics["failed"]["lr=1e+30"]
    own = json.loads((folder / "lr=1e+30" / "metrics.json").read_text())
    assert own == {"failed": metrics["failed"]["lr=1e+30"]}
    assert not (folder / "lr=1e+30" / "sae.json").exists()
    assert demo.read("failed", "manifest.json")["finished"] is True
    message = message_of(demo, capsys, "sae", "name=demo/none", "sae.lr=1e30", "sae.warmup=1")
    assert message.startswith("data error: the ")
    assert "is not finite at step" in message
    assert "train-00000" in message


def test_another_grid_leaves_nothing_of_the_one_before(demo: Demo):
    """Except a run whose folder lies inside."""
    assert demo.run("sae", "name=demo/changed", *GRID) == 0
    assert demo.run("sae", "name=demo/changed/k=5", "sae.k=5") == 0
    folder = folder_of(demo, "changed")
    assert demo.run("sae", "name=demo/changed", "sae.k=[3,4]") == 0
    assert {path.parent.name for path in folder.glob("*/sae.json")} == {"k=3", "k=4", "k=5"}
    assert demo.run("sae", "name=demo/changed") == 0
    assert {path.parent.name for path in folder.glob("*/sae.json")} == {"k=5"}
    assert not (folder / "pareto.csv").exists()
    assert demo.run("sae", "name=demo/changed", "sae.k=[3,4]") == 0
    assert not (folder / "sae.json").exists()


def points() -> list[SaePoint]:
    pairs = {"a": (8, 0.2), "b": (16, 0.1), "c": (16, 0.15), "d": (4, 0.2), "e": (20, 0.1)}
    return [SaePoint(name, l0, fvu, 0.0, 1.0) for name, (l0, fvu) in pairs.items()]


def test_the_front_on_paper():
    assert [point.name for point in find_front(points())] == ["d", "b"]
    twins = [SaePoint(name, 1.0, 0.5, 0.0, 1.0) for name in "ba"]
    assert [point.name for point in find_front(twins)] == ["a", "b"]


def test_the_table_and_the_picture():
    lines = pareto_table(points()).splitlines()
    assert lines[0] == "name,l0,fvu,dead_fraction,cosine,on_front"
    assert lines[2] == "b,16,0.1,0.0,1.0,true"
    assert [line.endswith("true") for line in lines[1:]] == [False, True, False, True, False]
    assert pareto_png(points()) == pareto_png(points()) != pareto_png(points()[1:])
