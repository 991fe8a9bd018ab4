"""Run folders: complete, atomic, and never a mixture of two experiments."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipattr.atomic import write_text
from clipattr.config.inputs import TrainingImagesConfig
from clipattr.config.load import load_config, to_yaml
from clipattr.config.schema import TRAIN_JOBS, RenderWorld, TrainClip, WorldConfig
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.main import run_script
from clipattr.runs import is_finished_with, open_run

COMMAND = ["train.py", "configs/demo/world.yaml"]
INPUTS = {"shards": ["000000.tar"], "sha256": "ab"}


@pytest.fixture(autouse=True)
def _single_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path) -> RenderWorld:
    return RenderWorld(job="render_world", name="demo/world", runs=str(tmp_path / "runs"), seed=7)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_files_of_a_new_run(config, tmp_path):
    run = open_run(config, COMMAND, INPUTS)
    assert run.path == tmp_path / "runs" / "demo" / "world"
    assert load_config([str(run.path / "config.yaml")], TRAIN_JOBS) == config
    manifest = read(run.path / "manifest.json")
    assert manifest["command"] == COMMAND
    assert manifest["seed"] == 7
    assert manifest["inputs"] == INPUTS
    assert manifest["data"] is None
    assert (manifest["finished"], manifest["resumed"]) == (False, False)
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["omegaconf"].startswith("2.")
    assert set(manifest["git"]) == {"commit", "dirty"}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_manifest_names_the_commit_of_this_code(config, tmp_path, monkeypatch):
    """Null when the code is installed inside somebody else's checkout."""
    (tmp_path / "runs.py").write_text("a = 1")
    monkeypatch.setattr("clipattr.runs.__file__", str(tmp_path / "runs.py"))
    git(tmp_path, "init")
    (tmp_path / ".gitignore").write_text("runs/")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-m", "other")

    def record() -> dict:
        return read(open_run(config, COMMAND).path / "manifest.json")["git"]

    assert record() == {"commit": None, "dirty": None}
    git(tmp_path, "add", "runs.py")
    git(tmp_path, "commit", "-m", "first")
    assert record() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "runs.py").write_text("a = 2")
    assert record()["dirty"] is True


def test_finish_records_time_and_later_facts(config):
    run = open_run(config, COMMAND)
    run.started -= 12.5
    run.update_manifest(data={"images": 10})
    run.finish()
    manifest = read(run.path / "manifest.json")
    assert 12.5 <= manifest["wall_seconds"] < 20
    assert manifest["data"] == {"images": 10}
    assert manifest["finished"] is True


def test_metrics_merge_and_null(config):
    run = open_run(config, COMMAND)
    run.write_metrics({"sae": {"fvu": 0.1, "l0": 16}, "probe": {"accuracy": 0.5}})
    run.write_metrics({"sae": {"fvu": float("nan")}, "probe": {"accuracy": 0.75, "auroc": -1e999}})
    assert read(run.path / "metrics.json") == {
        "sae": {"fvu": None, "l0": 16},
        "probe": {"accuracy": 0.75, "auroc": None},
    }


def test_finished_only_with_the_same_config_and_inputs(config):
    assert not is_finished_with(config, INPUTS)
    run = open_run(config, COMMAND, INPUTS)
    assert not is_finished_with(config, INPUTS)
    run.finish()
    assert is_finished_with(config, INPUTS)
    assert is_finished_with(config, {"sha256": "ab", "shards": ("000000.tar",)})
    assert not is_finished_with(config, {**INPUTS, "sha256": "cd"})
    assert not is_finished_with(config)
    assert not is_finished_with(replace(config, seed=8), INPUTS)
    assert not is_finished_with(replace(config, world=WorldConfig(train=1)), INPUTS)


def make_old_run(config):
    run = open_run(config, COMMAND, INPUTS)
    run.checkpoints.mkdir()
    (run.checkpoints / "last.ckpt").write_text("old")
    run.write_metrics({"old": 1.0})
    return run


def test_same_job_goes_on(config):
    make_old_run(config)
    run = open_run(config, COMMAND, INPUTS)
    assert (run.checkpoints / "last.ckpt").exists()
    assert read(run.path / "metrics.json") == {"old": 1.0}
    assert read(run.path / "manifest.json")["resumed"] is True


@pytest.mark.parametrize("change", ["config", "inputs"])
def test_changed_job_starts_over(config, change, caplog):
    make_old_run(config).finish()
    caplog.set_level("INFO")
    changed = replace(config, seed=8) if change == "config" else config
    run = open_run(changed, COMMAND, INPUTS if change == "config" else {"sha256": "cd"})
    assert not run.checkpoints.exists()
    assert not (run.path / "metrics.json").exists()
    manifest = read(run.path / "manifest.json")
    assert (manifest["finished"], manifest["resumed"]) == (False, False)
    assert (run.path / "config.yaml").read_text() == to_yaml(changed)
    assert "the run starts over" in caplog.text


def test_kill_while_starting_over_never_looks_finished(config, monkeypatch):
    make_old_run(config).finish()

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clipattr.runs.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            open_run(replace(config, seed=8), COMMAND, INPUTS)
    # The old metrics are gone, so the old job must not be skipped any more.
    assert not is_finished_with(config, INPUTS)
    assert not open_run(config, COMMAND, INPUTS).checkpoints.exists()


KILLED = """
import os, sys
from pathlib import Path
from clipattr import atomic
os.fsync = lambda _: os.kill(os.getpid(), 9)
atomic.write_text(Path(sys.argv[1]), "{" * 100_000)
"""


def test_kill_in_the_middle_of_a_write_keeps_the_old_file(config):
    run = make_old_run(config)
    path = run.path / "metrics.json"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[1])
    assert done.returncode == -9
    assert read(path) == {"old": 1.0}
    assert list(run.path.glob(".*.tmp-*"))
    open_run(config, COMMAND, INPUTS)
    assert not list(run.path.glob(".*.tmp-*"))


def test_atomic_write_replaces(tmp_path):
    path = tmp_path / "some.txt"
    for text in ("first", "second \u00e9"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["some.txt"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_other_processes_write_nothing(config, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    run = open_run(config, COMMAND)
    run.write_metrics({"a": 1.0})
    run.finish()
    assert not run.path.exists()
    monkeypatch.setenv(name, "0")
    assert open_run(config, COMMAND).path.exists()


def test_broken_manifest_is_named(config):
    run = open_run(config, COMMAND)
    (run.path / "manifest.json").write_text('{"finished": tr')
    with pytest.raises(DataError, match=r"manifest\.json: not JSON .* delete it"):
        is_finished_with(config)


def test_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="runs=.* cannot be made"):
        open_run(config, COMMAND)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a"), 2, "config error: a\n"),
        (DataError("b"), 2, "data error: b\n"),
        (CheckpointError("c"), 2, "checkpoint error: c\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted: the same command starts it again\n"),
    ],
)
def test_main_reports_what_a_user_can_get_wrong(config, monkeypatch, capsys, error, code, text):
    calls = []

    def fail(config, command):
        calls.append((config, command))
        raise error

    path = Path(config.runs).parent / "world.yaml"
    path.write_text(to_yaml(config))
    monkeypatch.setattr("clipattr.jobs.run", fail, raising=False)
    assert run_script("train.py", TRAIN_JOBS, [str(path), "seed=3"]) == code
    assert capsys.readouterr().err == text
    assert calls == [(replace(config, seed=3), ["train.py", str(path), "seed=3"])]


def test_ctrl_c_inside_lightning(config, monkeypatch):
    """Lightning answers Ctrl+C with sys.exit(1); a plain exit keeps its code."""

    def exit_from_interrupt(config, command):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    def exit_plainly(config, command):
        sys.exit(3)

    path = Path(config.runs).parent / "world.yaml"
    path.write_text(to_yaml(config))
    monkeypatch.setattr("clipattr.jobs.run", exit_from_interrupt, raising=False)
    assert run_script("train.py", TRAIN_JOBS, [str(path)]) == 130
    monkeypatch.setattr("clipattr.jobs.run", exit_plainly)
    with pytest.raises(SystemExit) as caught:
        run_script("train.py", TRAIN_JOBS, [str(path)])
    assert caught.value.code == 3


def test_signed_urls_are_not_kept_and_a_new_signature_is_no_new_run(tmp_path):
    def run_of(signature: str) -> TrainClip:
        shards = f"https://user:{signature}@host/{{00..11}}.tar?X-Signature={signature}"
        data = TrainingImagesConfig(shards=shards)
        return TrainClip(job="train_clip", name="clip", runs=str(tmp_path), data=data)

    config = run_of("s3cret")
    run = open_run(config, ["train.py", "clip.yaml", f"data.shards={config.data.shards}"], INPUTS)
    run.finish()
    texts = [path.read_text() for path in run.path.iterdir()]
    assert len(texts) == 2
    assert not any("s3cret" in text for text in texts)
    assert all("https://host/{00..11}.tar" in text for text in texts)
    assert is_finished_with(run_of("another"), INPUTS)
    assert not is_finished_with(replace(run_of("another"), seed=1), INPUTS)


@pytest.mark.parametrize(
    ("setting", "value", "is_kept"), [("progress", False, True), ("steps", 7, False)]
)
def test_bars_do_not_make_a_run_another(tmp_path, setting: str, value: object, is_kept: bool):
    config = TrainClip(job="train_clip", name="a", runs=str(tmp_path))
    config.data.shards = "x.tar"
    open_run(config, COMMAND).finish()
    setattr(config.trainer, setting, value)
    assert is_finished_with(config) is is_kept
