"""The settings of SAEs: what each architecture needs, and lists of values."""

from enum import Enum
from pathlib import Path

import pytest
import yaml

from clipattr.config import choices
from clipattr.config.load import load_config, to_yaml
from clipattr.config.sae import NEEDS, SaeConfig
from clipattr.config.schema import TRAIN_JOBS, TrainSae
from clipattr.errors import ConfigError
from clipattr.jobs.sae_members import build_member, build_sae
from clipattr.sae import initial, normalisation, prefixes, relu

TEXT = "job: train_sae\nname: x\nheld_out: val\ndata:\n  shards: train\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(TEXT)
    return path


def load(path: Path, *overrides: str) -> SaeConfig:
    config = load_config([str(path), *overrides], TRAIN_JOBS)
    assert isinstance(config, TrainSae)
    return config.sae


def test_a_grid_is_the_product_of_its_lists(path: Path):
    sae = load(path, "sae.lr=[1e-3,1]", "sae.k=[8,32]", "sae.warmup=[7]")
    members = sae.members()
    assert {name: (one.k, one.lr, one.warmup) for name, one in members.items()} == {
        "k=8,lr=0.001": (8, 1e-3, 7),
        "k=8,lr=1.0": (8, 1.0, 7),
        "k=32,lr=0.001": (32, 1e-3, 7),
        "k=32,lr=1.0": (32, 1.0, 7),
    }
    assert all(isinstance(one.lr, float) for one in members.values())


def test_one_is_not_named(path: Path):
    assert load(path).members() == {"": SaeConfig()}
    assert load(path, "sae.k=[9]").members() == {"": SaeConfig(k=9)}


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("sae.architecture=[relu, gated]", ["architecture=relu", "architecture=gated"]),
        ("sae.from_data=[true,false]", ["from_data=true", "from_data=false"]),
        ("sae.k_aux=[null,3]", ["k_aux=null", "k_aux=3"]),
        ("sae.normalisation=[none,scale]", ["normalisation=none", "normalisation=scale"]),
        ("sae.n_latents=[64,128]", ["n_latents=64", "n_latents=128"]),
    ],
)
def test_every_kind_of_value_can_be_a_list(path: Path, word: str, names: list[str]):
    members = load(path, word).members()
    assert list(members) == names
    field = word.partition("=")[0].removeprefix("sae.")
    assert not any(isinstance(getattr(one, field), list) for one in members.values())
    for one in members.values():
        build_sae(one, d_model=4, seed=0)


def test_none_is_trained_twice(path: Path):
    """An architecture that has no k is there once, whatever the list of k."""
    sae = load(path, "sae.architecture=[topk,relu]", "sae.k=[4,8]", "sae.sparsity=0.1")
    assert list(sae.members()) == [
        "architecture=topk,k=4",
        "architecture=topk,k=8",
        "architecture=relu",
    ]
    assert sae.members()["architecture=relu"].sparsity == 0.1


def test_a_list_survives_its_file_and_is_replaced_whole(path: Path):
    path.write_text(TEXT + "sae:\n  k: [4, 8, 16]\n  architecture: [topk, batch_topk]\n")
    config = load_config([str(path), "sae.lr=[1e-4,1]"], TRAIN_JOBS)
    written = yaml.safe_load(to_yaml(config))["sae"]
    assert (written["k"], written["architecture"]) == ([4, 8, 16], ["topk", "batch_topk"])
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(config))
    assert load_config([str(again)], TRAIN_JOBS) == config
    assert load(path, "sae.k=[1,2]", "sae.architecture=topk").members().keys() == {"k=1", "k=2"}
    assert load(path, "sae.k=2", "sae.architecture=topk").members().keys() == {""}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["architecture=tpok"], ["sae.architecture='tpok'", "batch_topk", "Did you mean topk?"]),
        (["architecture=transcoder"], ["target=null", "needs the site that it reconstructs"]),
        (["architecture=[topk,transcoder,relu]"], ["transcoder and topk, relu in one grid"]),
        (["skip=true"], ["sae.skip=true is a setting of transcoder"]),
        (["architecture=relu", "k=8"], ["sae.k=8 is a setting of topk", "architecture=relu"]),
        (["sparsity=0.1"], ["sae.sparsity=0.1", "of relu, jump_relu, gated", "architecture=topk"]),
        (["architecture=gated", "bandwidth=0.1"], ["sae.bandwidth=0.1", "jump_relu", "=gated"]),
        (["ks=[4,8]"], ["sae.ks=[4, 8]", "nested_topk", "architecture=topk"]),
        (["l0=[step,tanh]"], ["sae.l0=[step, tanh]", "jump_relu"]),
        (["k=[8,8]"], ["sae.k=[8, 8]: name at least one value, each once"]),
        (["k=[]"], ["sae.k=[]: name at least one value"]),
        (["k=[8,many]"], ["sae.k[1]='many'", "must be an integer"]),
        (["lr=[1e-3,-1]"], ["sae.lr=-1.0: must be greater than 0"]),
        (["k=[8,600]"], ["sae.k=600 is larger than sae.n_latents=512"]),
        (["k=[8,16]", "n_latents=[8,64]"], ["sae.k=16 is larger than sae.n_latents=8"]),
        (["batch_size=[8,16]"], ["sae.batch_size=[8, 16]", "must be an integer."]),
        (["k_start=8"], ["sae.k_start=8 is smaller than sae.k=16, to which it falls"]),
        (["k_start=600"], ["sae.k_start=600 is larger than sae.n_latents=512"]),
        (["k_start=32", "k_steps=1000"], ["sae.k_steps=1000: k must have fallen", "steps=1000"]),
        (["k_steps=10"], ["sae.k_steps=10 does nothing without sae.k_start"]),
        (["architecture=relu", "k_start=32"], ["sae.k_start=32 is a setting of topk"]),
        (["ema=0.9", "architecture=batch_topk"], ["sae.ema=0.9 with sae.architecture=batch_topk"]),
        (["k_start=32", "k_steps=900"], ["within four fifths of trainer.steps=1000"]),
        (["ema=1"], ["sae.ema=1.0: must lie between 0 and 1"]),
        (["architecture=jump_relu", "bandwidth=0"], ["sae.bandwidth=0.0: must be greater"]),
        (["architecture=relu", "sparsity=-1"], ["sae.sparsity=-1.0: must be 0 or greater"]),
        (["architecture=nested_topk", "ks=[8,4]"], ["sae.ks=[8, 4]", "ascending"]),
        (["architecture=nested_topk", "ks=[8,999]"], ["sae.ks=999 is larger than sae.n_latents"]),
        (["architecture=matryoshka", "fractions=[0.5,0.4]"], ["sae.fractions=[0.5, 0.4]", "to 1"]),
        (["architecture=matryoshka", "fractions=[1,0]"], ["groups of [512, 0] latents"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(path: Path, words: list[str], parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load(path, *(f"sae.{word}" for word in words))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_words_of_the_config_are_those_of_the_modules():
    pairs: list[tuple[type[Enum], type[Enum]]] = [
        (choices.Normalisation, normalisation.Normalisation),
        (choices.Bias, initial.Bias),
        (choices.L0, relu.L0),
        (choices.LevelWeights, prefixes.LevelWeights),
    ]
    for ours, theirs in pairs:
        assert list(ours.__members__) == list(theirs.__members__)


ANNEALED = {"k_start": 5, "k_steps": 7}
SETTINGS: dict[str, dict[str, object]] = {
    "topk": {"k": 3, **ANNEALED},
    "batch_topk": {"k": 3, **ANNEALED},
    "relu": {"sparsity": 0.5},
    "jump_relu": {"sparsity": 0.5, "bandwidth": 0.25, "l0": choices.L0.tanh},
    "gated": {"sparsity": 0.5},
    "matryoshka": {"k": 3, "fractions": [0.25, 0.75], "over_batch": False, **ANNEALED},
    "nested_topk": {"ks": [2, 5], "level_weights": choices.LevelWeights.reverse},
    "transcoder": {"k": 3, "skip": True, **ANNEALED},
}


@pytest.mark.parametrize("name", [one.name for one in choices.Architecture])
def test_every_setting_arrives(name: str):
    architecture = choices.Architecture[name]
    assert SETTINGS[name].keys() == NEEDS[architecture]
    config = SaeConfig(
        architecture=architecture,
        n_latents=16,
        normalisation=choices.Normalisation.norm,
        bias=choices.Bias.geometric_median,
        from_data=True,
        lr=0.5,
        warmup=5,
        k_aux=7,
        aux_coefficient=0.125,
        dead_after=99,
        ema=None if name == "batch_topk" else 0.75,
        **SETTINGS[name],  # type: ignore[arg-type]
    )
    config.check()
    d_out = 6 if name == "transcoder" else None
    member = build_member(config, d_model=4, seed=3, d_out=d_out)
    sae = member.sae
    assert sae.architecture == name
    assert (sae.d_model, sae.W_dec.shape) == (4, (16, d_out or 4))
    assert sae.normalisation is normalisation.Normalisation.norm
    for setting, value in SETTINGS[name].items():
        if setting in ANNEALED:
            assert getattr(member, setting) == value
            continue
        found = sae.settings["weights" if setting == "level_weights" else setting]
        if isinstance(value, Enum):
            assert found.name == value.name
        else:
            assert found == (tuple(value) if isinstance(value, list) else value)
    assert (member.lr, member.warmup, member.k_aux) == (0.5, 5, 7)
    assert (member.aux_coefficient, member.dead_after) == (0.125, 99)
    if name != "batch_topk":
        assert member.averaged is not None
        assert member.averaged.decay == 0.75
    assert (member.bias, member.from_data) == (initial.Bias.geometric_median, True)
    assert build_member(SaeConfig(), d_model=10, seed=0).k_aux == 5


@pytest.mark.parametrize(("name", "weight"), [("relu", 0.2), ("gated", 0.2), ("jump_relu", 0.003)])
def test_the_weight_of_the_penalty_is_that_of_its_kind(path: Path, name: str, weight: float):
    """As the help says; none of them is trained with a weight that suits another."""
    config = load(path, f"sae.architecture={name}")
    assert build_sae(config, d_model=4, seed=0).settings["sparsity"] == weight
