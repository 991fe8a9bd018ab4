import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from clipattr.errors import CheckpointError
from clipattr.sae.files import SaeRecord, load_sae, save_sae
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sae import Sae
from clipattr.sae.topk import TopKSae
from clipattr.sae.transcoder import Transcoder
from tests.saes import ALL, small_rows, small_sae

SITE: dict[str, str | int] = {"layer": 5, "stream": "residual", "tokens": "cls"}
MODEL = {"name": "planted-world", "weights_sha256": "abc"}
SETTINGS = {"d_model": 4, "n_latents": 8, "k": 2}
RECORD = SaeRecord(SITE, MODEL, data_fingerprint="f00d", metrics={"fvu": 0.125})


def record_of(sae: Sae) -> SaeRecord:
    return replace(RECORD, target_site=SITE) if isinstance(sae, Transcoder) else RECORD


@pytest.fixture
def sae() -> TopKSae:
    generator = torch.Generator().manual_seed(0)
    sae = TopKSae(d_model=4, n_latents=8, k=2, generator=generator)
    sae.initialise_from(3 + 2 * torch.randn(20, 4, generator=generator))
    return sae


@pytest.fixture
def saved(tmp_path: Path, sae: TopKSae) -> Path:
    save_sae(sae, tmp_path / "run", RECORD)
    return tmp_path / "run"


def edit_json(folder: Path, **changes: object) -> None:
    path = folder / "sae.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def resave_tensors(folder: Path, tensors: dict[str, torch.Tensor], sae: TopKSae) -> None:
    """Other tensors under a JSON that fits them: what a buggy writer would leave."""
    wrong = TopKSae(d_model=sae.d_model, n_latents=sae.n_latents, k=sae.k)
    wrong.state_dict = lambda *_, **__: tensors  # type: ignore[method-assign]
    save_sae(wrong, folder, RECORD)


def test_round_trip(saved: Path, sae: TopKSae):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    loaded, record = load_sae(saved, expected_site=SITE, expected_model=MODEL)
    assert torch.equal(loaded(x).recon, sae(x).recon)
    assert torch.equal(loaded.encode(x).indices, sae.encode(x).indices)
    assert record == RECORD
    assert sorted(os.listdir(saved)) == ["sae.json", "sae.safetensors"]


def test_files_are_what_the_contract_says(saved: Path):
    content = json.loads((saved / "sae.json").read_text())
    assert content["schema_version"] == 3
    assert content["architecture"] == "topk"
    assert content["settings"] == {"d_model": 4, "n_latents": 8, "k": 2}
    assert content["normalisation"] == "scale"
    assert (content["site"], content["target_site"]) == (SITE, None)
    assert set(safetensors.torch.load_file(saved / "sae.safetensors")) == {
        "W_enc", "W_dec", "b_enc", "b_dec", "input_scale",
    }  # fmt: skip


def test_loading_leaves_the_random_state_alone(saved: Path):
    before = torch.get_rng_state()
    load_sae(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_other_site_names_both(saved: Path):
    with pytest.raises(CheckpointError, match=r"site is .*'layer': 5.*expected .*'layer': 4"):
        load_sae(saved, expected_site={**SITE, "layer": 4})


def test_other_model_names_both(saved: Path):
    with pytest.raises(CheckpointError, match=r"planted-world.*abc.*ViT-B-32.*def"):
        load_sae(saved, expected_model={"name": "ViT-B-32", "weights_sha256": "def"})


def test_same_weights_under_another_name_are_the_same_model(saved: Path):
    load_sae(saved, expected_model={"name": "local-dir:/x", "weights_sha256": "abc"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 4}, "schema_version is 4, expected 1 or 2 or 3"),
        ({"schema_version": 2}, r"unexpected fields \['target_site'\]"),
        ({"target_site": SITE}, "target_site is .*, for architecture 'topk' it is null"),
        ({"schema_version": 1}, r"missing fields \['d_model', 'k', 'n_latents'\]"),
        ({"architecture": "sparse"}, "architecture is 'sparse', expected one of .*'gated'"),
        ({"architecture": ["topk"]}, r"architecture is \['topk'\]"),
        ({"architecture": "gated"}, "settings are .*'k'.*expected .*'sparsity'"),
        ({"architecture": "batch_topk"}, r"missing tensors \['threshold'\]"),
        ({"normalisation": {}}, "normalisation is {}, expected one of .*'layer_norm'"),
        ({"normalisation": "none"}, r"unexpected tensors \['input_scale'\]"),
        ({"settings": 3}, r"settings are \['3'\]"),
        ({"site": None}, r"missing fields \['site'\]"),
        ({"extra": 1}, r"unexpected fields \['extra'\]"),
        ({"settings": SETTINGS | {"k": 99}}, "k=99"),
        ({"settings": SETTINGS | {"k": 2.5}}, "settings.k is 2.5, expected int"),
        ({"settings": SETTINGS | {"k": True}}, "settings.k is True, expected int"),
        (
            {"settings": SETTINGS | {"d_model": 5}},
            r"settings are those of W_enc \[8, 5\], the file has \[8, 4\]",
        ),
        # Nothing of that size is made before it is compared.
        ({"settings": SETTINGS | {"n_latents": 10**30}}, "settings are those of W_enc"),
        ({"site": 3}, "SaeRecord.site has keys 3"),
        ({"site": ["layer", "stream", "tokens"]}, r"SaeRecord.site has keys \["),
        ({"site": {"layer": "x", "stream": "residual", "tokens": "cls"}}, "site.layer is 'x'"),
        ({"model": "x"}, "SaeRecord.model has keys 'x'"),
        ({"metrics": "x"}, "SaeRecord.metrics is 'x'"),
        ({"model": {"name": "x"}}, r"expected \['name', 'weights_sha256'\]"),
    ],
)
def test_wrong_json(saved: Path, changes: dict[str, object], message: str):
    edit_json(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_sae(saved)


def test_missing_or_broken_files(saved: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere/sae.json: cannot be read"):
        load_sae(tmp_path / "nowhere")
    (saved / "sae.json").write_bytes(b'{"schema_version": 1')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_sae(saved)
    (saved / "sae.json").write_bytes(b"[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_sae(saved)


def test_truncated_weights(saved: Path):
    path = saved / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or belongs to another save"):
        load_sae(saved)


def test_weights_of_another_save_are_refused(saved: Path, sae: TopKSae, tmp_path: Path):
    # A kill between the two replacements leaves new weights beside the old JSON.
    with torch.no_grad():
        sae.b_enc.add_(1)
    save_sae(sae, tmp_path / "other", RECORD)
    os.replace(tmp_path / "other" / "sae.safetensors", saved / "sae.safetensors")
    with pytest.raises(CheckpointError, match="another save"):
        load_sae(saved)


def test_missing_unexpected_and_integer_tensors(saved: Path, sae: TopKSae):
    tensors = dict(sae.state_dict())
    resave_tensors(saved, {**tensors, "threshold": torch.zeros(1)}, sae)
    with pytest.raises(CheckpointError, match=r"unexpected tensors \['threshold'\]"):
        load_sae(saved)
    resave_tensors(saved, {name: tensors[name] for name in tensors if name != "W_enc"}, sae)
    with pytest.raises(CheckpointError, match=r"missing tensors \['W_enc'\]"):
        load_sae(saved)
    resave_tensors(saved, {**tensors, "b_enc": torch.zeros(8, dtype=torch.int64)}, sae)
    with pytest.raises(CheckpointError, match="b_enc is torch.int64"):
        load_sae(saved)


def test_failed_save_keeps_the_old_files(
    saved: Path, sae: TopKSae, monkeypatch: pytest.MonkeyPatch
):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("clipattr.atomic.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sae(sae, saved, RECORD)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_nan_metric_is_refused(tmp_path: Path, sae: TopKSae):
    record = SaeRecord(SITE, MODEL, "f00d", metrics={"fvu": float("nan")})
    with pytest.raises(CheckpointError, match="nan or infinity"):
        save_sae(sae, tmp_path, record)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_every_architecture_comes_back(tmp_path: Path, name: str, normalisation: Normalisation):
    sae, x = small_sae(name, normalisation).float().eval(), small_rows().float()
    save_sae(sae, tmp_path, record_of(sae))
    loaded, _ = load_sae(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.settings == sae.settings
    assert not loaded.training
    if normalisation is Normalisation.standardise:
        sae = sae.fold()  # W_dec of a file is in the units of x
    assert loaded.normalisation is sae.normalisation
    assert torch.equal(loaded(x).recon, sae(x).recon)
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())


def first_schema(folder: Path) -> None:
    """Make the JSON what the first version of this file wrote."""
    path = folder / "sae.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "architecture": "topk",
                "d_model": 4,
                "n_latents": 8,
                "k": 2,
                "normalisation": {"centre": "b_dec", "scale": "input_scale"},
                "site": {"layer": 5, "stream": "residual", "tokens": "cls"},
                "model": {"name": "planted-world", "weights_sha256": "abc"},
                "data_fingerprint": "f00d",
                "metrics": {"fvu": 0.125},
                "tensors_sha256": content["tensors_sha256"],
            }
        )
    )


def test_a_file_of_the_first_schema_loads(saved: Path, sae: TopKSae):
    first_schema(saved)
    loaded, record = load_sae(saved, expected_site=SITE, expected_model=MODEL)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert type(loaded) is TopKSae
    assert torch.equal(loaded(x).recon, sae(x).recon)
    assert record == RECORD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "architecture is 'gated', expected 'topk'"),
        ({"normalisation": {}}, "normalisation is {}, expected {'centre'"),
        ({"k": None}, r"missing fields \['k'\]"),
        ({"k": 2.5}, "settings.k is 2.5"),
    ],
)
def test_wrong_json_of_the_first_schema(saved: Path, changes: dict[str, object], message: str):
    first_schema(saved)
    edit_json(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_sae(saved)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("nested", "ks", [1, "2"], "settings.ks is .*expected a list of numbers"),
        ("nested", "ks", [], "expected a list of numbers"),
        ("nested", "ks", [5, 1], "ascending"),
        ("nested", "weights", "mine", "settings.weights is 'mine', expected one of .*'reverse'"),
        ("matryoshka", "over_batch", 1, "settings.over_batch is 1, expected bool"),
        ("relu", "sparsity", "0.1", "settings.sparsity is '0.1', expected float"),
        ("transcoder", "skip", True, r"missing tensors \['W_skip'\]"),
    ],
)
def test_wrong_settings(tmp_path: Path, name: str, setting: str, value: object, message: str):
    sae = small_sae(name)
    save_sae(sae, tmp_path, record_of(sae))
    settings = json.loads((tmp_path / "sae.json").read_text())["settings"]
    edit_json(tmp_path, settings={**settings, setting: value})
    with pytest.raises(CheckpointError, match=message):
        load_sae(tmp_path)
