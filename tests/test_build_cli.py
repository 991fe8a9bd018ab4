"""The command `clipattr-shards`, as a person types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipattr import shards_cli
from clipattr.shards_cli import make_parser, parse_bytes, run_shards
from tests.build_sources import bytes_of, paths_of, read_built, write_photos

ROOT = Path(__file__).parents[1]
NAMES = [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(6)]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    """Twelve images of two classes, in the folder where the command is typed."""
    write_photos(tmp_path / "photos", NAMES)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_folder_to_shards(photos: Path, capsys):
    assert run_shards(["photos", "out", "--samples-per-shard", "5"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "out: 12 samples in 3 shards" in shown.out
    assert "cls 12, jpg 12, json 12" in shown.out
    assert [line.split() for line in shown.out.splitlines() if line.startswith("  ")] == [
        ["class", "samples"],
        ["cat", "6"],
        ["dog", "6"],
    ]
    found = read_built(Path("out"))
    assert sorted(paths_of(found)) == sorted(NAMES)
    assert Path("out/classes.txt").read_text() == "cat\ndog\n"
    assert run_shards(["photos", "out", "--samples-per-shard", "5"]) == 0
    assert capsys.readouterr().out == shown.out


def test_options_reach_the_build(photos: Path, capsys):
    Path("names.txt").write_text("dog\ncat\nowl\n")
    options = ["--bytes-per-shard", "1KB", "--no-shuffle", "--resize", "5", "--encode", "png"]
    options += ["--verify", "--seed", "3", "--classes", "names.txt", "--workers", "0"]
    assert run_shards(["photos", "out", *options]) == 0
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["limits"] == {"samples": 10_000, "bytes": 1000}
    assert plan["pictures"] == {"resize": 5, "encode": "png", "verify": True}
    assert (plan["shuffle"], plan["seed"]) == (False, 3)
    assert plan["classes"] == ["dog", "cat", "owl"]
    samples = read_built(Path("out"))
    assert paths_of(samples) == NAMES
    assert [fields["cls"] for fields in samples.values()] == [b"1"] * 6 + [b"0"] * 6
    assert len(list(Path("out").glob("*.tar"))) == 12


def test_table_to_parts(photos: Path, capsys):
    rows = "".join(f"{name};{number % 4};{number % 3}\n" for number, name in enumerate(NAMES))
    Path("table.csv").write_text("file;y;who\n" + rows)
    options = ["--path-column", "file", "--label-column", "y", "--split-by", "who"]
    options += ["--root", "photos", "--split", "train=0.6,test=0.4"]
    assert run_shards(["table.csv", "out", *options]) == 0
    parts = {part: read_built(Path("out") / part) for part in ("train", "test")}
    who = {
        part: {json.loads(fields["json"])["who"] for fields in found.values()}
        for part, found in parts.items()
    }
    assert who["train"] | who["test"] == {"0", "1", "2"}
    assert not who["train"] & who["test"]
    assert sum(len(found) for found in parts.values()) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "SOURCE='nowhere': nowhere does not exist"),
        (["photos", "photos/out"], "photos/out lies in the source photos"),
        (["photos", "out", "--split", "a=1"], "split='a=1'"),
        (["photos", "out", "--split-by", "x"], "--split-by says what stays together in a --split"),
        (["photos", "out", "--bytes-per-shard", "1TB"], "--bytes-per-shard 1TB: write for example"),
        (["photos", "out", "--encode", "gif"], "encode='gif': allowed are jpg, png, webp"),
        (["photos", "out", "--label-column", "x"], "label='x': of a folder of images, nothing"),
        (["photos", "out", "--classes", "no.txt"], "classes=['no.txt']"),
        (["photos", "out", "--max-bad-fraction", "2"], "max_bad_fraction=2.0"),
        (["ftp://host/{0..9}.tar", "out"], "a shard with ftp:, which is not opened; allowed are"),
    ],
)
def test_mistakes_give_one_message(photos: Path, capsys, arguments: list[str], message: str):
    assert run_shards(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not Path("out").exists()


def test_broken_images_are_shown(photos: Path, capsys):
    (photos / "cat/1.jpg").write_bytes(b"no image")
    assert run_shards(["photos", "out"]) == 2
    shown = capsys.readouterr().err
    assert "1 of 12 cannot be used (1 x bad image)" in shown
    assert "\n  cat/1.jpg: bad image (it is none of JPEG, PNG, WEBP)" in shown
    assert run_shards(["photos", "out", "--max-bad-fraction", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "11 samples" in shown
    assert "left out: 1 x bad image" in shown
    assert "out/failures.jsonl" in shown


def test_interrupt(photos: Path, capsys, monkeypatch):
    def interrupt(options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards_cli, "build", interrupt)
    assert run_shards(["photos", "out"]) == 130
    assert capsys.readouterr().err == "\ninterrupted: the same command goes on\n"


def test_help_shows_every_option_and_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_shards(["--help"])
    shown = capsys.readouterr().out
    for action in make_parser()._actions:
        assert all(option in shown for option in action.option_strings)
        assert action.help
    assert shown.count("\n  clipattr-shards ") >= 5
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.parametrize("line", shards_cli.EXAMPLES.replace("\\\n", "").splitlines())
def test_examples_parse(line: str):
    _, is_example, command = line.partition("  clipattr-shards ")
    if is_example:
        make_parser().parse_args([word.strip("'") for word in command.split()])


def test_a_typo_dies_before_torch_is_imported():
    code = (
        "import sys; from clipattr.shards_cli import run_shards\n"
        "try: run_shards(['photos', 'out', '--oops'])\n"
        "except SystemExit as error: assert error.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unrecognized arguments: --oops" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GB", 10**9), ("0.5 gb", 5 * 10**8), ("64KB", 64000), ("500MB", 5 * 10**8), ("123", 123)],
)
def test_sizes(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.slow
def test_kill_of_a_build_in_processes(tmp_path: Path):
    """SIGKILL at random times, until it is done: the bytes are those of one undisturbed process."""
    names = [f"{label}/{number}.jpg" for label in "abc" for number in range(2000)]
    write_photos(tmp_path / "photos", names)
    code = (
        "import sys; from clipattr.data import parallel; parallel.PATIENCE = 0.0\n"
        "from clipattr.shards_cli import run_shards\n"
        "if __name__ == '__main__': sys.exit(run_shards(sys.argv[1:]))\n"
    )
    (tmp_path / "main.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(folder: str, workers: int) -> subprocess.Popen[bytes]:
        options = ["--samples-per-shard", "100", "--resize", "5", "--workers", str(workers)]
        command = [sys.executable, str(tmp_path / "main.py"), "photos", folder, *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    assert start("whole", 0).wait(timeout=300) == 0
    n_kills = 0
    while n_kills < 20:
        running = start("killed", 2)
        n_before = len(list((tmp_path / "killed").glob("*.tar")))
        deadline = time.monotonic() + 120
        while running.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("*.tar"))) > n_before + 8:
                running.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        if running.wait(timeout=120) == 0:
            break
        n_kills += 1
    assert n_kills >= 3
    time.sleep(2)  # the children of the last kill see that their parent is gone
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
