"""A suppression on disk: what was saved comes back, and whatever does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clipattr.errors import CheckpointError
from clipattr.files import save_weights
from clipattr.sae import TopKSae
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.shortcuts.repair import Suppression
from clipattr.shortcuts.suppression_files import (
    SuppressionRecord,
    check_sae,
    load_suppression,
    save_suppression,
)

MODEL = {"name": "tiny", "weights_sha256": "a" * 64}
SITE = {"layer": 3, "stream": "residual", "tokens": "cls"}
RECORD = SuppressionRecord("sticker", "runs/demo/sae", "b" * 64, 16, SITE, MODEL)
FOUND = Suppression(torch.tensor([7, 2]), torch.tensor([0.5, -1.25]))


def test_comes_back(tmp_path: Path):
    save_suppression(tmp_path, FOUND, RECORD)
    found, record = load_suppression(tmp_path, MODEL)
    assert record == RECORD
    assert torch.equal(found.latents, FOUND.latents)
    assert torch.equal(found.means, FOUND.means)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "suppression.json",
        "suppression.safetensors",
    ]


def test_another_model_is_refused(tmp_path: Path):
    save_suppression(tmp_path, FOUND, RECORD)
    with pytest.raises(CheckpointError, match="belongs to model"):
        load_suppression(tmp_path, MODEL | {"weights_sha256": "c" * 64})


TENSORS = {"latents": FOUND.latents, "means": FOUND.means}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.tensor([7, 7])}, "each once"),
        ({"latents": torch.tensor([7, 16])}, "between 0 and 15"),
        ({"latents": torch.tensor([-1, 2])}, "between 0 and 15"),
        ({"latents": torch.tensor([7.0, 2.0])}, "a list of int64"),
        ({"latents": torch.tensor([[7, 2]])}, "a list of int64"),
        ({"latents": torch.zeros(0, dtype=torch.int64), "means": torch.zeros(0)}, "list of int64"),
        ({"means": torch.zeros(3)}, r"expected torch.float32 \[2\]"),
        ({"means": torch.zeros(2, dtype=torch.float64)}, "expected torch.float32"),
        ({"means": torch.tensor([0.0, torch.nan])}, "nan or infinity"),
        ({"more": torch.zeros(1)}, "expected latents and means"),
    ],
)
def test_broken_tensors_are_refused(tmp_path: Path, change: dict, message: str):
    save_weights(tmp_path, "suppression", TENSORS | change, dataclasses.asdict(RECORD))
    with pytest.raises(CheckpointError, match=message) as error:
        load_suppression(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_latents": 0}, "n_latents is 0"),
        ({"n_latents": True}, "n_latents is True"),
        ({"cue": None}, "cue is None"),
        ({"sae": 3}, "sae is 3"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"unknown": 1}, "unexpected fields"),
    ],
)
def test_broken_record_is_refused(tmp_path: Path, change: dict, message: str):
    save_suppression(tmp_path, FOUND, RECORD)
    path = tmp_path / "suppression.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_suppression(tmp_path)


def test_halves_of_two_saves_are_refused(tmp_path: Path):
    save_suppression(tmp_path, FOUND, RECORD)
    before = (tmp_path / "suppression.json").read_text()
    save_suppression(tmp_path, FOUND._replace(means=torch.zeros(2)), RECORD)
    (tmp_path / "suppression.json").write_text(before)
    with pytest.raises(CheckpointError, match="another save"):
        load_suppression(tmp_path)
    (tmp_path / "suppression.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_suppression(tmp_path)


def test_latents_of_another_sae_are_refused(tmp_path: Path):
    for name, seed in (("one", 0), ("other", 1)):
        sae = TopKSae(d_model=4, n_latents=16, k=2, generator=torch.Generator().manual_seed(seed))
        save_sae(sae, tmp_path / name, SaeRecord(SITE, MODEL, "data"))
    sha256 = json.loads((tmp_path / "one" / "sae.json").read_text())["tensors_sha256"]
    record = dataclasses.replace(RECORD, sae=str(tmp_path / "one"), sae_sha256=sha256)
    check_sae(tmp_path, record, tmp_path / "one")
    with pytest.raises(CheckpointError, match="its latents are those of the SAE"):
        check_sae(tmp_path, record, tmp_path / "other")
