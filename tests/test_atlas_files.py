"""The atlas on disk: what is written comes back, and what cannot be one is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipattr.errors import CheckpointError
from clipattr.semantics.atlas_files import (
    Atlas,
    AtlasOrigin,
    AtlasTensors,
    load_atlas,
    save_atlas,
)

MODEL = {"name": "tiny", "weights_sha256": "aa"}
ORIGIN = AtlasOrigin(
    model=MODEL,
    sae="bb",
    site={"layer": 1, "stream": "residual", "tokens": "cls"},
    scorer={"name": "tiny", "pretrained": None, "precision": "fp32", "weights_sha256": "aa"},
    words=["sea", "boat"],
    templates=["a {}"],
    shards="images",
    images="cc",
    n_examples=2,
)


def example() -> Atlas:
    means = torch.tensor([[0.6, 0.8], [torch.nan, torch.nan]])
    labels = torch.tensor([[1, 0], [-1, -1]])
    scores = torch.tensor([[0.5, 0.1], [torch.nan, torch.nan]])
    examples = torch.tensor([[4, 2, 9], [-1, -1, -1]])
    activations = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    return Atlas(AtlasTensors(means, labels, scores, examples, activations), ORIGIN)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save_atlas(example(), tmp_path)
    found = load_atlas(tmp_path, MODEL)
    assert found.origin == ORIGIN
    for one, other in zip(found.tensors, example().tensors, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert found.words_of(0) == [("boat", 0.5), ("sea", pytest.approx(0.1))]
    assert found.words_of(1) == []


def test_an_atlas_of_another_model_is_refused(tmp_path: Path) -> None:
    save_atlas(example(), tmp_path)
    with pytest.raises(CheckpointError, match="weights_sha256"):
        load_atlas(tmp_path, {**MODEL, "weights_sha256": "dd"})


def test_an_atlas_of_another_sae_is_refused(tmp_path: Path) -> None:
    save_atlas(example(), tmp_path)
    assert load_atlas(tmp_path, MODEL, "bb").origin.sae == "bb"
    with pytest.raises(CheckpointError, match="SAE"):
        load_atlas(tmp_path, MODEL, "dd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([[2, 0], [-1, -1]])}, "word 2"),
        ({"labels": torch.tensor([[-2, 0], [-1, -1]])}, "label"),
        ({"means": torch.zeros(3, 2)}, "rows"),
        ({"means": torch.zeros(2, 2, dtype=torch.float64)}, "float32"),
        ({"activations": torch.zeros(2, 2)}, "shape of examples"),
        ({"label_scores": torch.zeros(2)}, "axes of label_scores"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    atlas = example()
    with pytest.raises(CheckpointError, match=message):
        save_atlas(atlas._replace(tensors=atlas.tensors._replace(**changes)), tmp_path)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    save_atlas(example(), tmp_path)
    path = tmp_path / "atlas.safetensors"
    save_file({name: each + 0 for name, each in load_file(path).items() if name != "means"}, path)
    with pytest.raises(CheckpointError):
        load_atlas(tmp_path)


def test_a_record_with_fewer_words_than_labels_is_refused(tmp_path: Path) -> None:
    save_atlas(example(), tmp_path)
    path = tmp_path / "atlas.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"words": ["sea"]}))
    with pytest.raises(CheckpointError, match="word 1"):
        load_atlas(tmp_path)
    with pytest.raises(CheckpointError):
        save_atlas(example()._replace(origin=replace(ORIGIN, words=[])), tmp_path / "other")
