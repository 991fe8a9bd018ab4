"""Class names of settings beside those that lie with the shards."""

import logging
from pathlib import Path

import pytest

from clipattr.data.index import build_index
from clipattr.data.shards import find_shards
from clipattr.errors import ConfigError
from clipattr.jobs.class_names import check_class_names, check_prompts
from tests import official_layouts as layouts
from tests.official_layouts import convert


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("names"))
        layouts.waterbirds(Path("download"))
        assert convert("waterbirds") == 0
        yield build_index(find_shards("out/train"), cache=None)


def test_the_same_names_pass_silently(samples, caplog):
    check_class_names(samples, "cls", ["landbird", "waterbird"], "probe.classes")
    check_class_names(samples, "json:label", ["waterbird", "landbird"], "probe.classes")
    assert not caplog.records


def test_another_order_is_refused(samples):
    with pytest.raises(ConfigError, match=r"probe\.classes=.*another order, \['landbird'"):
        check_class_names(samples, "cls", ["waterbird", "landbird"], "probe.classes")


def test_other_names_are_warned_of(samples, caplog):
    with caplog.at_level(logging.WARNING):
        check_class_names(samples, "cls", ["intact", "cracked"], "probe.classes")
    assert "number 0 is taken to be 'intact'" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "n_warnings"),
    [
        (["a photo of a dog", "a photo of a cat"], 2),
        (["a photo of a Cat", "a photo of a dog"], 0),
        (["a pet", "a dog, not a cat"], 0),
        (["a pet", "another pet"], 0),
    ],
)
def test_prompts_of_other_classes(prompts: list[str], n_warnings: int, caplog):
    with caplog.at_level(logging.WARNING):
        check_prompts(prompts, ["cat", "dog"], "prompts")
    assert len(caplog.records) == n_warnings
