"""The demo's commands on a small world, through the real mains: contract, restart, refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS
from clipattr.main import run_script
from tests.tars import sample, write_shard
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo"
INTERVAL = {"mean", "low", "high"}
METHODS = {
    "attribution_patching",
    "integrated_gradients",
    "act_times_logit_lens",
    "logit_lens",
    "energy",
    "random",
    "exact",
}


class Demo:
    """The demo in a folder of its own, small enough for a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.model = save_tiny_clip(folder / "tiny")

    def options(self, name: str) -> list[str]:
        world, runs = self.runs / "world", f"runs={self.runs}"
        read = [f"model.name={self.model}", "data.workers=0", f"data.cache={self.runs / 'cache'}"]
        read += ["trainer.accelerator=cpu", "trainer.progress=false"]
        small = {
            "world": [
                *(f"world.{split}=60" for split in ("train", "val", "test")),
                *(f"world.{split}=120" for split in ("task_train", "task_test")),
                *("world.task_pairs=12", "world.shard_size=30", "world.workers=1"),
                f"world.out={world}",
            ],
            "sae": [
                *(f"data.shards={world}/train", f"held_out={world}/val", *read),
                *("sae.n_latents=48", "sae.k=6", "sae.batch_size=32"),
                *("trainer.steps=30", "trainer.checkpoint_every=10"),
            ],
            "probe": [
                *(f"data.shards={world}/task_train", *read),
                *("trainer.steps=10", "probe.batch_size=32"),
            ],
            "atlas": [
                *(f"data.shards={world}/val", f"sae={self.runs}/demo/sae", *read),
                f"scorer.name={self.model}",
                f"atlas.vocabulary=[{DEMO / 'vocabulary.txt'}]",
            ],
            "evaluate": [
                *(f"world={world}", f"atlas={self.runs}/demo/atlas", *read),
                *(f"sae={self.runs}/demo/sae", f"probe={self.runs}/demo/probe"),
                *("evaluation.images=20", "evaluation.resamples=50", "evaluation.ig_steps=32"),
                "evaluation.overlap_top=3",
            ],
            "zeroshot": [f"data.shards={world}/val", *read],
        }
        return [str(DEMO / f"{name}.yaml"), runs, *small[name]]

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """The small demo's options, an override in place of the option it changes."""
        changed = {override.split("=")[0] for override in overrides}
        kept = [option for option in self.options(name) if option.split("=")[0] not in changed]
        return [*kept, *overrides]

    def run(self, name: str, *overrides: str) -> int:
        is_train = name in ("world", "sae", "probe")
        script, jobs = ("train.py", TRAIN_JOBS) if is_train else ("evaluate.py", EVALUATE_JOBS)
        return run_script(script, jobs, self.arguments(name, *overrides))

    def read(self, run: str, name: str) -> dict:
        return json.loads((self.runs / "demo" / run / name).read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    made = Demo(tmp_path_factory.mktemp("demo"))
    for name in ("world", "sae", "probe", "atlas", "evaluate"):
        assert made.run(name) == 0
    return made


def test_metrics_keep_the_contract(demo):
    metrics = demo.read("evaluation", "metrics.json")
    assert metrics["faithfulness"].keys() == METHODS
    for method, row in metrics["faithfulness"].items():
        for number in ("deletion_auc", "insertion_auc", "spearman_exact", "overlap_exact"):
            assert row[number].keys() == INTERVAL
        if method != "logit_lens":
            assert row["minus_logit_lens"]["deletion_auc"].keys() == INTERVAL
        assert row["global"]["deletion_auc"].keys() == INTERVAL
    assert metrics["control"]["faithfulness"].keys() == METHODS
    assert metrics["corrections"]["size"].keys() == {"along_embedding", "along_state"}
    assert metrics["against_exact"]["act_times_logit_lens"]["pearson"].keys() == INTERVAL
    assert sum(row["exact"]["images"] for row in metrics["by_class"].values()) == 20
    assert metrics["sae"].keys() >= {"fvu", "l0", "dead_fraction"}
    assert metrics["probe"].keys() >= {"accuracy", "worst_group_accuracy"}
    assert metrics["shortcut"].keys() == {"tag", "seal"}
    for row in metrics["shortcut"].values():
        for number in ("effect_text", "effect_probe", "amplification"):
            assert row[number].keys() == INTERVAL
    assert len(metrics["scorecard"]) == 11
    for row in metrics["scorecard"].values():
        assert row.keys() >= {"rank_attribution", "rank_logit_lens", "auroc"}
        assert 1 <= row["rank_attribution"] <= 48
        assert 1 <= row["rank_logit_lens"] <= 48
        assert row["mean_attribution"].keys() == INTERVAL
        assert 0 < row["share_of_images"] <= 1


def test_the_list_of_the_atlas_is_graded(demo):
    found = demo.read("evaluation", "metrics.json")["unexpected"]
    atlas = demo.read("atlas", "metrics.json")["atlas"]["unexpected"]
    assert (found["listed"], found["by_chance"]) == (atlas["latents"], atlas["by_chance"])
    # Of the eleven planted failures the two of the stickers are about no noun.
    assert len(found["failures"]) == 9
    assert set(found["kinds_found"]) <= set(found["kinds_learned"])
    assert 0 <= found["precision"] <= 1
    assert 0 <= found["recall"] <= 1
    page = (demo.runs / "demo" / "evaluation" / "report" / "index.html").read_text()
    assert f"Rank of {found['listed']}" in page


def test_an_atlas_of_another_sae_is_refused(demo, capsys):
    assert demo.run("sae", "seed=1", "name=demo/other") == 0
    options = (f"sae={demo.runs}/demo/other", "name=demo/refused")
    assert demo.run("evaluate", *options) == 2
    assert "sha256 of its SAE's weights" in capsys.readouterr().err
    assert not (demo.runs / "demo" / "refused" / "metrics.json").exists()


def test_without_an_atlas_the_page_says_so(demo):
    assert demo.run("evaluate", "atlas=null", "name=demo/no-atlas") == 0
    assert "unexpected" not in demo.read("no-atlas", "metrics.json")
    page = (demo.runs / "demo" / "no-atlas" / "report" / "index.html").read_text()
    assert "No atlas was given to this run" in page


def test_numbers_that_must_hold_for_any_model(demo):
    metrics = demo.read("evaluation", "metrics.json")
    assert metrics["splice"]["max_error"] < 1e-5
    assert metrics["completeness_gap"] < 0.01
    assert metrics["faithfulness"]["exact"]["spearman_exact"]["mean"] == pytest.approx(1)
    assert metrics["faithfulness"]["attribution_patching"]["spearman_exact"]["mean"] > 0.9
    # The SAE's final metrics come from other rows (val) than the evaluation's (test).
    assert demo.read("sae", "metrics.json")["sae"]["n_rows"] == 60
    # The same agreement, once by the callback and once beside the parts of the attribution.
    agreement = metrics["corrections"]["agreement"]
    for method in ("attribution_patching", "logit_lens", "act_times_logit_lens"):
        twice = metrics["faithfulness"][method]["spearman_exact"]["mean"]
        assert agreement[method]["mean"] == pytest.approx(twice, abs=1e-3)
    # A whole model explains an image; the untrained dictionary is another one.
    trained = metrics["faithfulness"]["exact"]["deletion_auc"]
    assert metrics["control"]["faithfulness"]["exact"]["deletion_auc"] != trained


def test_run_folders_record_what_was_run(demo):
    for run in ("world", "sae", "probe", "evaluation"):
        manifest = demo.read(run, "manifest.json")
        assert manifest["finished"] is True
        assert manifest["seed"] == 0
        assert manifest["data"]
        assert manifest["versions"]["torch"]
        assert (demo.runs / "demo" / run / "config.yaml").read_text().startswith("job: ")
    record = demo.read("sae", "sae.json")
    assert record["site"] == {"layer": 1, "stream": "residual", "tokens": "cls"}
    assert record["data_fingerprint"] == demo.read("sae", "manifest.json")["data"]


def test_page_shows_the_numbers(demo):
    page = (demo.runs / "demo" / "evaluation" / "report" / "index.html").read_text()
    metrics = demo.read("evaluation", "metrics.json")
    assert f"{metrics['sae']['fvu']:.3f}" in page
    for failure in metrics["scorecard"]:
        assert failure in page
    for size in metrics["corrections"]["size"].values():
        assert f"{100 * size['mean']:.1f}\N{NO-BREAK SPACE}%" in page
    assert f"{metrics['against_exact']['n_pairs']:,} pairs" in page
    assert "untrained" in page


def test_without_a_control_the_page_says_so(demo):
    options = ("evaluation.control=false", "evaluation.methods=[logit_lens]", "name=demo/plain")
    assert demo.run("evaluate", *options) == 0
    assert "control" not in demo.read("plain", "metrics.json")
    page = (demo.runs / "demo" / "plain" / "report" / "index.html").read_text()
    assert "No untrained dictionary was measured in this run." in page
    assert "Attribution patching and logit lens were not compared in this run." in page


def test_ranks_that_are_not_defined_are_said_to_be(demo, caplog):
    """With two active latents in an image a rank correlation is undefined in every one."""
    caplog.set_level("INFO")
    assert demo.run("sae", "name=demo/two", "sae.k=2") == 0
    options = (f"sae={demo.runs}/demo/two", "name=demo/undefined", "evaluation.overlap_top=1")
    assert demo.run("evaluate", *options, "atlas=null") == 0
    table = demo.read("undefined", "metrics.json")["faithfulness"]
    assert table["logit_lens"]["spearman_exact"]["mean"] is None
    assert "is not defined for the ranking of attribution patching" in caplog.text
    page = (demo.runs / "demo" / "undefined" / "report" / "index.html").read_text()
    assert "Order: attribution patching minus logit lens is not defined in this run." in page


def test_second_run_is_skipped(demo, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr("clipattr.jobs.train_sae.load_frozen", None)
    assert demo.run("sae") == 0
    assert "is finished" in caplog.text
    assert demo.run("evaluate") == 0
    assert "polysemous_word_lightning" in caplog.text


def test_clip_runs_once_per_image(demo, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the prefix ran although its activations are cached")

    monkeypatch.setattr("clipattr.clip.images.OpenClipImages.embed", forbidden)
    assert demo.run("sae", "name=demo/sae-again", "sae.k=5") == 0


def test_same_seed_gives_the_same_sae(demo):
    # Another folder name, so nothing is skipped and nothing resumed.
    assert demo.run("sae", "name=demo/sae-twin") == 0
    weights = [demo.runs / "demo" / run / "sae.safetensors" for run in ("sae", "sae-twin")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(("stream", "width"), [("neurons", 128), ("heads", 32), ("embedding", 16)])
def test_an_sae_of_another_site(demo, capsys, stream, width):
    layer = -1 if stream == "embedding" else 0
    site = (f"site.layer={layer}", f"site.stream={stream}")
    assert demo.run("sae", f"name=demo/{stream}", *site) == 0
    record = demo.read(stream, "sae.json")
    assert record["site"] == {"layer": layer % 2, "stream": stream, "tokens": "cls"}
    weights = load_file(demo.runs / "demo" / stream / "sae.safetensors")
    assert weights["W_dec"].shape == (48, width)
    message = message_of(demo, capsys, "evaluate", f"sae={demo.runs}/demo/{stream}", "name=demo/x")
    assert stream in message


def test_a_probe_of_a_tower_without_sites(demo, tmp_path):
    """A ResNet embeds images, which is all that a probe needs."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    model = save_tiny_clip(tmp_path / "resnet", vision_cfg=vision)
    assert demo.run("probe", f"model.name={model}", "name=demo/resnet") == 0
    assert demo.read("resnet", "probe.json")["metrics"]["train_accuracy"] > 0.4


def test_zeroshot_is_a_share_of_images(demo):
    assert demo.run("zeroshot") == 0
    for row in demo.read("zeroshot", "metrics.json")["zeroshot"].values():
        assert (60 * row["accuracy"]) == pytest.approx(round(60 * row["accuracy"]))


def message_of(demo: Demo, capsys, name: str, *overrides: str) -> str:
    assert demo.run(name, *overrides) == 2
    return capsys.readouterr().err


def test_sae_of_another_model_is_refused(demo, capsys):
    other = save_tiny_clip(demo.folder / "other", seed=1)
    message = message_of(demo, capsys, "evaluate", f"model.name={other}", "name=demo/other")
    assert "checkpoint error" in message
    assert "sae.json" in message
    assert "belongs to model" in message


def test_sae_of_another_site_is_refused(demo, capsys):
    folder = demo.folder / "moved"
    shutil.copytree(demo.runs / "demo" / "sae", folder)
    record = json.loads((folder / "sae.json").read_text())
    record["site"]["layer"] = 0
    (folder / "sae.json").write_text(json.dumps(record))
    message = message_of(demo, capsys, "evaluate", f"sae={folder}", "name=demo/moved")
    assert "checkpoint error" in message
    assert "site" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=local-dir:missing"], "does not exist"),
        (["model.name=ViT-B-99"], "nearest: "),
        (["data.shards=nowhere.tar"], "nowhere.tar does not exist"),
        (["held_out=nowhere"], "held_out='nowhere'"),
        (["data.shards=nowhere{0..1}.tar"], "nowhere0.tar does not exist"),
        (["trainer.devices=3"], "does not divide by trainer.devices=3"),
        (["site.layer=9"], "site.layer=9: the tower has 2 layers"),
        (["sae.k=49"], "larger than sae.n_latents"),
        (["sae.batch_size=1000"], "but there are 60 rows"),
    ],
)
def test_wrong_settings_say_what_is_wrong(demo, capsys, overrides, expected):
    message = message_of(demo, capsys, "sae", "name=demo/wrong", *overrides)
    assert expected in message
    assert "Traceback" not in message


def test_missing_sae_is_named(demo, capsys):
    message = message_of(demo, capsys, "evaluate", "sae=runs/nothing", "name=demo/nothing")
    assert "sae='runs/nothing'" in message
    (demo.folder / "empty").mkdir()
    message = message_of(demo, capsys, "evaluate", f"sae={demo.folder}/empty", "name=demo/empty")
    assert "sae.json" in message


def test_probe_of_another_task_is_refused(demo, capsys):
    assert demo.run("probe", "name=demo/words", "probe.classes=[one, two]") == 0
    probe = f"probe={demo.runs}/demo/words"
    message = message_of(demo, capsys, "evaluate", probe, "name=demo/words-evaluation")
    assert "tells ['one', 'two'] apart" in message


def test_shards_of_another_world_are_refused(demo, capsys):
    folder = demo.folder / "foreign"
    shutil.copytree(demo.runs / "world", folder)
    write_shard(folder / "test" / "000000.tar", [sample("a", json=b'{"width": 3}')])
    message = message_of(demo, capsys, "evaluate", f"world={folder}", "name=demo/foreign")
    assert "a.json lacks" in message
    assert "render_world" in message


def test_typo_destroys_nothing(demo, capsys):
    assert demo.run("sae", "name=demo/kept") == 0
    folder = demo.runs / "demo" / "kept"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    message_of(demo, capsys, "sae", "name=demo/kept", "model.name=ViT-B-99")
    message_of(demo, capsys, "sae", "name=demo/kept", "site.layer=9")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_changed_weights_and_lost_outputs_are_noticed(demo):
    model = save_tiny_clip(demo.folder / "changing")
    options = (f"model.name={model}", "name=demo/changing")
    assert demo.run("sae", *options) == 0
    path = demo.runs / "demo" / "changing" / "sae.json"
    first = json.loads(path.read_text())
    shutil.rmtree(demo.folder / "changing")
    save_tiny_clip(demo.folder / "changing", seed=5)
    assert demo.run("sae", *options) == 0
    second = json.loads(path.read_text())
    assert first["model"]["weights_sha256"] != second["model"]["weights_sha256"]
    path.unlink()
    assert demo.run("sae", *options) == 0
    assert json.loads(path.read_text()) == second


@pytest.mark.parametrize("name", ["sae", "probe"])
def test_killed_after_the_last_step_is_finished_by_a_restart(demo, name):
    run = demo.runs / "demo" / name
    stem = run / name
    weights = stem.with_suffix(".safetensors").read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    assert demo.run(name) == 0
    assert stem.with_suffix(".safetensors").read_bytes() == weights
    assert demo.read(name, "manifest.json")["finished"] is True


def start(demo: Demo, name: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *demo.arguments(name, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_run_goes_on_and_ends_with_the_same_bits(demo):
    name = "name=demo/killed"
    steps = ["trainer.steps=600", "trainer.checkpoint_every=20"]
    checkpoints = demo.runs / "demo" / "killed" / "checkpoints"
    process = start(demo, "sae", name, *steps)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (demo.runs / "demo" / "killed" / "sae.json").exists()
    assert demo.run("sae", name, *steps) == 0
    assert demo.run("sae", "name=demo/whole", *steps) == 0
    killed, whole = (demo.runs / "demo" / run / "sae.safetensors" for run in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
