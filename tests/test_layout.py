"""House rules that no linter knows: sizes, no side effects, no dead setting, no lying example."""

import ast
import importlib
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import clipattr
from clipattr.config import schema
from clipattr.config.load import load_config
from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(Path(clipattr.__file__).parent.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MAX_FILE, MAX_FUNCTION = 400, 60


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources_and_configs():
    assert len(SOURCES) > 20
    assert len(CONFIGS) > 3


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_shipped_config_loads(path):
    """With the command that its header opens with."""
    text = path.read_text()
    job = yaml.safe_load(text)["job"]
    script, jobs = ("train", TRAIN_JOBS) if job in TRAIN_JOBS else ("evaluate", EVALUATE_JOBS)
    _, command, rest = text.partition(f"{script}.py {name_of(path)}")
    assert command, "open the file with its command"
    assert type(load_config([str(path), *shlex.split(rest.split("\n")[0])], jobs)) is jobs[job]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or 0) - node.lineno + 1
            assert n_lines <= MAX_FUNCTION, f"{node.name} has {n_lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ascii_and_no_print(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_import_has_no_output(path, capfd):
    parts = path.relative_to(ROOT).with_suffix("").parts
    importlib.import_module(".".join(part for part in parts if part != "__init__"))
    assert capfd.readouterr() == ("", "")


def list_sections() -> list[type]:
    defined = [value for value in vars(schema).values() if isinstance(value, type)]
    return [value for value in defined if is_dataclass(value)]


def test_every_setting_is_read():
    """A field that nothing reads is a bug: its name occurs as an attribute outside the schema."""
    read = {"job"}  # the loader reads it, as a key, to choose the class
    for path in SOURCES:
        if path.parent.name == "config":
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    settings = {f"{owner.__name__}.{f.name}" for owner in list_sections() for f in fields(owner)}
    dead = {setting for setting in settings if setting.split(".")[1] not in read}
    assert not dead


def test_demo_is_the_same_in_makefile_and_image():
    steps = re.findall(r"(train|evaluate)\.py (configs/demo/\S+)", (ROOT / "Makefile").read_text())
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    commands = [line for line in dockerfile.splitlines() if line.startswith("CMD")]
    assert len(steps) == 6
    assert len(commands) == 2
    for command in commands:
        assert re.findall(r"clipattr-(train|evaluate) (configs/demo/[\w.]+)", command) == steps
    assert all((ROOT / path).exists() for _, path in steps)
