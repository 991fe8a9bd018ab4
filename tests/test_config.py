"""A config is right, or one message says what was found, where, and what is allowed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipattr.config.choices import Method, Precision
from clipattr.config.fields import list_fields
from clipattr.config.load import load_config, to_yaml
from clipattr.config.schema import (
    EVALUATE_JOBS,
    JOBS,
    TRAIN_JOBS,
    EvaluateWorld,
    TrainProbe,
    TrainSae,
)
from clipattr.errors import ConfigError
from clipattr.main import run_script

ROOT = Path(__file__).parents[1]
SAE = "job: train_sae\nname: demo/sae\nheld_out: val\ndata:\n  shards: train\nsae:\n  k: 8\n"


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def load_sae(write, *overrides: str) -> TrainSae:
    config = load_config([write(SAE), *overrides], TRAIN_JOBS)
    assert isinstance(config, TrainSae)
    return config


def test_override_wins_over_file_and_file_over_schema(write):
    config = load_sae(write, "trainer.devices=2", "sae.lr=3e-4", "trainer.precision=bf16")
    assert type(config) is TrainSae
    assert config.sae.k == 8
    assert config.sae.n_latents == TrainSae().sae.n_latents
    assert (config.trainer.devices, config.sae.lr) == (2, 3e-4)
    assert config.trainer.precision is Precision.bf16
    assert load_sae(write, "sae.k=4").sae.k == 4


def test_arguments_may_come_in_any_order(write):
    assert load_config(["seed=3", write(SAE)], TRAIN_JOBS).seed == 3


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("name=012", "012"),
        ("name=no", "no"),
        ("name=1e3", "1e3"),
        ("data.shards={000..011}.tar", "{000..011}.tar"),
        ("data.shards=a: b", "a: b"),
        ("name='16'", "16"),
    ],
)
def test_text_on_the_command_line_is_taken_literally(write, word, expected):
    config = load_sae(write, word)
    assert expected == (config.name if word.startswith("name") else config.data.shards)


def test_null_and_lists(write):
    config = load_sae(write, "sae.k_aux=null", "model.pretrained=null")
    assert config.sae.k_aux is None
    assert config.model.pretrained is None
    path = write("job: evaluate_world\nname: e\nsae: s\nprobe: p\n")
    config = load_config([path, "evaluation.methods=[energy,logit_lens]"], EVALUATE_JOBS)
    assert isinstance(config, EvaluateWorld)
    assert config.evaluation.methods == [Method.energy, Method.logit_lens]
    assert config.world == "runs/world"


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("sae.kk=3", ["sae.kk on the command line", "unknown key", "Did you mean sae.k?", "k_aux"]),
        ("trainr.devices=2", ["trainr on", "Did you mean trainer?", "held_out"]),
        ("sae.k=many", ["sae.k='many' on the command line", "must be an integer"]),
        ("sae.k=16.5", ["sae.k=16.5", "must be an integer"]),
        ("sae.k=true", ["sae.k=true", "must be an integer"]),
        ("sae.k.x=3", ["sae.k={'x': 3}", "must be an integer"]),
        ("sae.lr=fast", ["sae.lr='fast'", "must be a number"]),
        ("sae.lr=true", ["sae.lr=true", "must be a number"]),
        ("sae.lr=.nan", ["sae.lr=nan", "must be a number"]),
        ("sae.lr=.inf", ["sae.lr=inf", "must be a number"]),
        ("sae.k_aux=few", ["must be an integer or null"]),
        ("sae.k=null", ["sae.k=null", "must be an integer"]),
        ("trainer.progress=1", ["trainer.progress=1", "must be true or false"]),
        ("trainer.precision=fp16", ["trainer.precision='fp16'", "must be one of fp32, bf16"]),
        ("sae=3", ["sae=3", "must be a section with keys architecture, n_latents, k"]),
        ("name=null", ["name=null", "must be text"]),
        ("sae.k=600", ["sae.k=600 is larger than sae.n_latents=512"]),
        ("sae.k=[1", ["sae.k=[1", "not a YAML value"]),
        ("sae.k=", ["write KEY=VALUE"]),
        ("sae.k=???", ["write KEY=VALUE"]),
        ("=3", ["write KEY=VALUE"]),
        ("job=train_probe", ["the job is chosen by the YAML file"]),
        ("--sae.k=3", ["--sae.k=3: not an option. Write sae.k=3"]),
        ("trainer.devices", ["trainer.devices: neither a .yaml file nor an override"]),
        ("name=${oc.env:HOME}", ["name='${oc.env:HOME}'", "references"]),
        ("name=${seed}", ["name='${seed}'", "references"]),
        ("name=${x", ["name='${x'", "references"]),
        ("sae.k=${seed}", ["sae.k='${seed}'", "references"]),
    ],
)
def test_wrong_override(write, word, parts):
    with pytest.raises(ConfigError) as caught:
        load_sae(write, word)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 4


def test_repeated_override(write):
    """The shell makes two words of shards={0..1}.tar; the second must not win silently."""
    with pytest.raises(ConfigError, match=r"data\.shards on the command line: given 2 times"):
        load_sae(write, "data.shards=0.tar", "data.shards=1.tar")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SAE + "seeed: 1\n", ["seeed in ", "some.yaml", "Did you mean seed?"]),
        (SAE + "  k_aux: many\n", ["sae.k_aux='many' in "]),
        (SAE.replace("k: 8", "k: 8\n  k: 9"), ["some.yaml, line 8", "duplicate key k"]),
        (SAE.replace("demo/sae", "no"), ["name=false in ", "must be text; put it in quotes"]),
        (SAE.replace("demo/sae", "${oc.env:HOME}"), ["name='${oc.env:HOME}'", "references"]),
        (SAE.replace("demo/sae", "${x"), ["some.yaml", "references"]),
        (SAE.replace("held_out: val\n", ""), ["held_out: required", "add held_out=VALUE"]),
        (SAE.replace("demo/sae", "???"), ["name: required"]),
        (SAE.replace("  k: 8\n", ""), ["sae=null in ", "must be a section with keys"]),
        (SAE.replace("train_sae", "train_sea"), ["job=train_sea", "Did you mean train_sae?"]),
        (SAE.replace("train_sae", "evaluate_world"), ["run by evaluate.py"]),
        (SAE.replace("train_sae", "[a]"), ["unknown job", "render_world, train_clip"]),
        ("name: x\n", ["has no job", "train_probe"]),
        ("", ["has no job"]),
        ("- 1\n", ["found a list", "must be a mapping"]),
        ("just words\n", ["has no job"]),
        ("a: [1\n", ["some.yaml, line 2: not valid YAML"]),
        ("a: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
        (
            "job: train_probe\nname: p\ndata: {shards: x}\nprobe: {classes: [1, two]}\n",
            ["probe.classes[0]=1 in ", "must be text; put it in quotes"],
        ),
        (
            "job: train_probe\nname: p\ndata: {shards: x}\nprobe: {classes: one}\n",
            ["probe.classes='one'", "must be a list of text"],
        ),
    ],
)
def test_wrong_file(write, text, parts):
    with pytest.raises(ConfigError) as caught:
        load_config([write(text)], TRAIN_JOBS)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 4


def test_wrong_enum_in_a_list_names_the_item(write):
    text = "job: evaluate_world\nname: e\nsae: s\nprobe: p\nevaluation: {methods: [logit_lense]}\n"
    with pytest.raises(ConfigError, match=r"methods\[0\]='logit_lense'.*Did you mean logit_lens"):
        load_config([write(text)], EVALUATE_JOBS)


def test_missing_file_names_its_neighbours(write):
    path = write(SAE)
    with pytest.raises(ConfigError, match=r"no such file. Did you mean .*some\.yaml"):
        load_config([path.replace("some", "sone")], TRAIN_JOBS)


def test_unreadable_files(tmp_path):
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (folder, binary):
        with pytest.raises(ConfigError, match="cannot be read as text"):
            load_config([str(path)], TRAIN_JOBS)


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "b.yaml"]])
def test_exactly_one_file(arguments):
    with pytest.raises(ConfigError, match=r"exactly one .yaml file is needed, found (none|2)"):
        load_config(arguments, TRAIN_JOBS)


def test_nothing_is_read_from_the_environment(write, monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    for word in ("name=${oc.env:SECRET}", "data.shards=x${oc.env:SECRET}y"):
        with pytest.raises(ConfigError) as caught:
            load_sae(write, word)
        assert "leaked" not in str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    tag=st.none() | st.sampled_from(["no", "012", "1e3", "null", "~", "16", "a: b", "1:30", "'"]),
    rate=st.floats(1e-12, 1e12),
    classes=st.lists(
        st.sampled_from(["yes", "-1", "0x1f", "two words", "#"]), min_size=2, unique=True
    ),
)
def test_round_trip(write, name, tag, rate, classes):
    config = TrainProbe(job="train_probe", name="x" + name.replace("/", "").replace("$", ""))
    config.model.pretrained = tag
    config.data.shards = "{000000..000011}.tar"
    config.probe = replace(config.probe, lr=rate, classes=classes)
    config.trainer.precision = Precision.bf16
    assert load_config([write(to_yaml(config))], TRAIN_JOBS) == config


def test_resolved_file_is_complete(write):
    config = load_config([write(SAE)], TRAIN_JOBS)
    values = yaml.safe_load(to_yaml(config))
    assert values["trainer"]["precision"] == "fp32"
    assert len(values["sae"]) == len(vars(TrainSae().sae))


@pytest.mark.parametrize("name", JOBS)
def test_every_field_has_a_doc(name):
    listed = list(list_fields(JOBS[name]()))
    assert len(listed) > 4
    for field in listed:
        assert field.doc.strip(), f"{name}: {field.name} has no docstring line"
        assert "\n" not in field.doc


@pytest.mark.parametrize(
    ("script", "jobs"), [("train.py", TRAIN_JOBS), ("evaluate.py", EVALUATE_JOBS)]
)
def test_help_lists_jobs_and_fields(capsys, script, jobs):
    assert run_script(script, jobs, ["--help"]) == 0
    text = capsys.readouterr().out
    for name, job in jobs.items():
        assert f"\n  {name} " in text
        for field in list_fields(job()):
            assert (
                f"\n  {field.name}: {field.allowed} = {field.default}\n      {field.doc}\n" in text
            )
    assert text.count("\n  trainer.accelerator: ") == 1
    assert text.index("\nfields of every job:\n  job: ") < text.index("\n  trainer.accelerator: ")


def test_help_of_one_file(write, capsys):
    assert run_script("train.py", TRAIN_JOBS, [write(SAE), "--help"]) == 0
    text = capsys.readouterr().out
    assert "sae.k: an integer, or a list = 16" in text
    assert "world.out" not in text
    assert "render_world" not in text


def test_defaults_in_help_load(write):
    """What --help prints as default is accepted as an override and changes nothing."""
    for field in list_fields(TrainSae()):
        if field.default == "required":
            continue
        config = load_config([write(SAE), f"{field.name}={field.default}"], TRAIN_JOBS)
        expected = load_sae(write, "sae.k=16") if field.name == "sae.k" else load_sae(write)
        assert config == expected, field.name


PROBE_SCRIPT = """
import sys
from clipattr.main import train
try:
    train()
except SystemExit as error:
    print(error.code, [name for name in ("torch", "lightning", "open_clip") if name in sys.modules])
"""


@pytest.mark.parametrize("word", ["sae.kk=3", "sae.k=600", "--help"])
def test_torch_is_not_imported_before_the_config_is_right(write, word):
    done = subprocess.run(
        [sys.executable, "-c", PROBE_SCRIPT, write(SAE), word],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    code = 0 if word == "--help" else 2
    assert done.stdout.splitlines()[-1] == f"{code} []"
    assert done.stderr.startswith("config error: sae.k") == (code == 2)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts(script, write):
    """The two files at the top level are these mains; a typo exits with 2 and one message."""
    done = subprocess.run(
        [sys.executable, script, write(SAE), "sae.kk=3"], capture_output=True, text=True, cwd=ROOT
    )
    expected = "sae.kk on the command line" if script == "train.py" else "run by train.py"
    assert done.returncode == 2
    assert expected in done.stderr
