"""What of train_probe does not go together is one message, before anything is loaded."""

from pathlib import Path

import pytest

from clipattr.config.choices import Criterion
from clipattr.config.load import load_config
from clipattr.config.schema import TRAIN_JOBS, TrainProbe
from clipattr.errors import ConfigError

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo" / "probe.yaml")
LBFGS, CUE = "probe.solver=lbfgs", "probe.groups=json:cue"
CODES = ["probe.features=[codes]", "probe.head=sparse", "sae=runs"]
SITE = ["probe.features=[site]", "site.layer=0"]
LABELS = ["probe.label=[json:a, json:b]", "probe.classes=[]"]


def load(*words: str) -> TrainProbe:
    config = load_config([CONFIG, *words], TRAIN_JOBS)
    assert isinstance(config, TrainProbe)
    return config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([LBFGS, "probe.C=[1, 10]"], "validation=null: several fits"),
        (["probe.lr=[0.1, 0.01]"], "validation=null: several fits"),
        (["probe.wise_ft=[0, 1]"], "validation=null: several fits"),
        ([LBFGS, CUE, "probe.method=jtt"], "validation=null: several fits"),
        (["validation=runs/world/task_train"], "are the images of the fit"),
        (["probe.C=[3]"], "does nothing without probe.solver=lbfgs"),
        (["probe.C=[0]", LBFGS], "must be greater than 0"),
        (["probe.lr=-1"], "must be greater than 0"),
        (["probe.lr=[]"], "at least one value"),
        (["probe.weight_decay=[-1, 0]"], "must be 0 or greater"),
        (["probe.features=[codes]", "sae=runs"], "a sparse head reads codes"),
        (["probe.head=sparse"], "a sparse head reads codes"),
        ([*CODES, "probe.standardise=true"], "not sparse"),
        (CODES[:2], "sae: goes with"),
        (["sae=runs"], "sae: goes with"),
        (["site.layer=0"], "site: goes with the feature site"),
        (["probe.features=[site]"], "site: goes with the feature site"),
        ([*SITE, "probe.head=attention"], "site.tokens=cls: an attention head"),
        (["probe.head=attention"], "reads the tokens"),
        ([*SITE, LBFGS, "probe.head=mlp"], "probe.head=mlp is trained by sgd"),
        (["probe.head=mlp", "probe.lr=[1, 2]", "validation=x"], "a grid is of linear heads"),
        (["probe.pool=mean"], "does nothing without codes"),
        (["probe.method=dfr"], "needs probe.solver=lbfgs"),
        ([LBFGS, "probe.method=dfr"], "say what the groups are"),
        (["probe.criterion=worst_group"], "say what the groups are"),
        (["probe.groups=cue"], "write json:<field>"),
        ([CUE, "probe.groups_latents=[1]", "sae=runs"], "the cue is one of them"),
        ([LBFGS, CUE, "probe.method=dfr", "probe.class_weight=balanced"], "balances groups"),
        ([*LABELS, CUE], "one label with a cue"),
        ([*LABELS, LBFGS, "probe.class_weight=balanced"], "needs probe.solver=sgd"),
        ([*LABELS, *CODES, LBFGS], "a sparse head has one label"),
        (["probe.label=[json:a, json:b]", "probe.classes=[a]"], "each needs a name"),
        (["probe.label=[cls, json:b]"], "several labels are fields"),
        (["probe.classes=[a]"], "at least two classes"),
        ([LBFGS, "probe.init=text"], "the same minimum from any start"),
        (["probe.init=text", "probe.features=[embedding_raw]"], "a text head is linear"),
        (["probe.init=text", "probe.standardise=true"], "not standardised"),
        (["probe.init=text", "probe.prompts=[a]"], "one for each of the classes"),
        (["probe.wise_ft=[2]"], "between 0 and 1"),
        ([LBFGS, "trainer.devices=2"], "runs in one process"),
        (["probe.batch_size=511", "trainer.devices=2"], "does not divide"),
    ],
)
def test_what_does_not_go_together(words: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        load(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        [LBFGS, "probe.C=[1, 10]", "validation=x"],
        [LBFGS, CUE, "probe.method=balanced"],
        [*CODES, LBFGS],
        ["probe.features=[embedding, codes]", "probe.head=sparse", "sae=runs"],
        [*LABELS, "probe.class_weight=balanced"],
        ["probe.lr=[0.1, 1]", "validation=x", "probe.init=text", "probe.wise_ft=[0.5, 1]"],
        [*SITE, "site.tokens=spatial", "probe.head=attention", "probe.standardise=true"],
    ],
)
def test_what_goes_together(words: list[str]):
    load(*words)


def test_the_shards_it_is_chosen_on_must_exist():
    assert load("validation=nowhere").paths()["validation"] == "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        load("validation=nowhere", "data.shards=.").check_paths()


def test_the_grid_is_the_product():
    probe = load("probe.lr=[1, 2]", "probe.weight_decay=[0, 3]", "validation=x").probe
    assert probe.grid == [(1, 3), (2, 3), (1, 0), (2, 0)]


def test_methods_for_groups_are_chosen_by_the_worst_one():
    words = [LBFGS, CUE, "probe.method=dfr"]
    assert load(*words).probe.chosen_by is Criterion.worst_group
    assert load(*words, "probe.criterion=accuracy").probe.chosen_by is Criterion.accuracy
    assert load().probe.chosen_by is Criterion.accuracy
