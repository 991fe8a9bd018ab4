"""Files of probes that say what cannot be, and features in words that no reader makes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from clipattr.config.choices import Stream, Tokens
from clipattr.errors import CheckpointError
from clipattr.probes import features
from clipattr.probes.features import SitePart, parse_features
from clipattr.probes.files import ProbeRecord, load_head, save_probe
from clipattr.probes.heads import MlpProbe
from clipattr.probes.linear import LinearProbe

MODEL = {"name": "m", "weights_sha256": "s"}


def forge(folder: Path, **fields: Any) -> Path:
    save_probe(LinearProbe(4, 2), folder, ProbeRecord(["a", "b"], MODEL, "cls", "data"))
    path = folder / "probe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": {"d_in": 10**12}}, "its tensors hold 10 numbers"),
        ({"settings": {"d_in": 10**30}}, "its tensors hold 10 numbers"),
        ({"settings": {"d_in": 5}}, "allowed is a floating-point tensor"),
        ({"class_names": [1, 2]}, "must be a list of texts"),
        ({"class_names": []}, "must be a list of texts"),
        ({"class_names": [["a"], {}]}, "must be a list of texts"),
        ({"feature": None}, "feature is None, must be a text"),
        ({"feature": 3}, "feature is 3, must be a text"),
        ({"metrics": []}, "metrics is \\[\\], must be a JSON object"),
        ({"model": "m"}, "model is 'm', must be a JSON object"),
    ],
)
def test_fields_that_cannot_be(tmp_path: Path, fields: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        load_head(forge(tmp_path, **fields))


def test_sizes_need_no_memory_to_be_refused(tmp_path: Path):
    """Each is smaller than the file, their product would be 40 GB."""
    n = 100_000
    save_probe(MlpProbe(n, 2, hidden=1), tmp_path, ProbeRecord(["a", "b"], MODEL, "cls", "data"))
    path = tmp_path / "probe.json"
    content = json.loads(path.read_text()) | {"settings": {"d_in": n, "hidden": n}}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="allowed is a floating-point tensor"):
        load_head(tmp_path)


def test_weights_that_are_not_finite(tmp_path: Path):
    folder = forge(tmp_path)
    weights = save({"weight": torch.full((2, 4), torch.nan), "bias": torch.zeros(2)})
    (folder / "probe.safetensors").write_bytes(weights)
    path = folder / "probe.json"
    sha256 = hashlib.sha256(weights).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors_sha256": sha256}))
    with pytest.raises(CheckpointError, match="weight holds numbers that are not finite"):
        load_head(folder)


def test_all_sites_of_a_config_can_be_written():
    for stream in Stream:
        for tokens in Tokens:
            text = str(SitePart(0, stream.name, tokens.name))
            assert str(parse_features(text)) == text


SITE = "site(layer=1, stream={}, tokens={}, drawn={}, pool={})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SITE.format("wat", "cls", "all", "none"), "stream is 'wat', allowed are"),
        (SITE.format("residual", "wat", "all", "mean"), "tokens is 'wat', allowed are"),
        (SITE.format("residual", "cls", "all", "mean"), "pool is 'mean' of tokens=cls"),
        (SITE.format("residual", "spatial", "all", "max"), "pool is 'max' of tokens=spatial"),
        (SITE.format("residual", "spatial", "0", "mean"), "drawn is '0', expected a whole"),
        (
            "embedding, raw + " + SITE.format("residual", "spatial", "all", "none"),
            "tokens stand beside nothing",
        ),
        (
            "codes(layer=1, stream=residual, tokens=spatial, n_latents=4, sae=x, pool=none)",
            "pool is 'none' of tokens=spatial, allowed are max, mean, sum",
        ),
        (
            f"codes(layer=1, stream=residual, tokens=cls, n_latents={10**30}, sae=x, pool=none)",
            "n_latents is '1000",
        ),
    ],
)
def test_features_that_no_reader_makes(text: str, message: str):
    with pytest.raises(CheckpointError, match=message):
        parse_features(text)


def test_the_docstring_shows_features_that_can_be_read():
    assert features.__doc__ is not None
    lines = [line.strip() for line in features.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    for line in lines:
        assert str(parse_features(line)) == line
