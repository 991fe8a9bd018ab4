import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clipattr.errors import CheckpointError
from clipattr.files import save_weights
from clipattr.probes.files import ProbeRecord, load_head, load_probe, save_probe
from clipattr.probes.heads import AttentionProbe, MlpProbe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.sparse import SparseProbe

MODEL = {"name": "planted-world", "weights_sha256": "abc"}
RECORD = ProbeRecord(["intact", "cracked", "other"], MODEL, "cls", "f00d", {"accuracy": 0.5})


OLD_FIELDS = {
    name: value
    for name, value in asdict(RECORD).items()
    if name not in ("is_multilabel", "preprocess")
}


@pytest.fixture
def probe() -> LinearProbe:
    probe = LinearProbe(5, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        probe.weight.copy_(torch.randn(3, 5, generator=generator))
        probe.bias.copy_(torch.randn(3, generator=generator))
    return probe


def test_logits_equal_sklearn(probe: LinearProbe):
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    reference = LogisticRegression()
    reference.classes_ = torch.arange(3).numpy()
    reference.coef_ = probe.weight.detach().numpy()
    reference.intercept_ = probe.bias.detach().numpy()
    expected = torch.as_tensor(reference.decision_function(features.numpy()))
    torch.testing.assert_close(probe(features).detach(), expected)
    assert probe(features.reshape(7, 1, 5)).shape == (7, 1, 3)


def test_untrained_probe_is_undecided():
    assert (LinearProbe(5, 3)(torch.randn(4, 5)) == 0).all()


def test_round_trip(probe: LinearProbe, tmp_path: Path):
    save_probe(probe, tmp_path, RECORD)
    loaded, record = load_probe(tmp_path, expected_model=MODEL)
    features = torch.randn(4, 5)
    assert torch.equal(loaded(features), probe(features))
    assert record == RECORD
    content = json.loads((tmp_path / "probe.json").read_text())
    assert content["feature"] == "embedding, L2-normalised"


def test_other_model_names_both(probe: LinearProbe, tmp_path: Path):
    save_probe(probe, tmp_path, RECORD)
    with pytest.raises(CheckpointError, match=r"planted-world.*abc.*ViT-B-32.*def"):
        load_probe(tmp_path, expected_model={"name": "ViT-B-32", "weights_sha256": "def"})


def test_class_names_must_fit(probe: LinearProbe, tmp_path: Path):
    record = ProbeRecord(["one", "two"], MODEL, "cls", "f00d")
    with pytest.raises(CheckpointError, match="number of class names is 2, expected 3"):
        save_probe(probe, tmp_path, record)


HEADS = {
    "linear": lambda: LinearProbe(6, 3),
    "mlp": lambda: MlpProbe(6, 3, hidden=4),
    "attention": lambda: AttentionProbe(6, 3, n_heads=2),
    "sparse": lambda: SparseProbe(6, 3),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_makes_the_round_trip(kind: str, tmp_path: Path):
    head = HEADS[kind]()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    save_probe(head, tmp_path, replace(RECORD, feature="residual stream, layer 3"))
    loaded, record = load_head(tmp_path, expected_model=MODEL)
    assert type(loaded) is type(head)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert record.feature == "residual stream, layer 3"
    with pytest.raises(CheckpointError, match="kind is '|feature is 'residual stream, layer 3'"):
        load_probe(tmp_path)


def test_reads_schema_1(probe: LinearProbe, tmp_path: Path):
    old = {"architecture": "linear", "feature": "embedding, L2-normalised", "d_in": 5}
    fields = {name: value for name, value in OLD_FIELDS.items() if name != "feature"}
    save_weights(tmp_path, "probe", probe.state_dict(), {**old, **fields}, 1)
    loaded, record = load_probe(tmp_path, expected_model=MODEL)
    assert torch.equal(loaded.weight, probe.weight)
    assert record == RECORD
    for name, value in (("architecture", "mlp"), ("feature", "raw embedding"), ("d_in", "5")):
        save_weights(tmp_path, "probe", probe.state_dict(), {**old, **fields, name: value}, 1)
        with pytest.raises(CheckpointError, match=f"{name} is '{value}'|whole numbers"):
            load_probe(tmp_path)


def test_reads_schema_2(tmp_path: Path):
    head = MlpProbe(5, 3, hidden=4)
    kind = {"kind": "mlp", "settings": {"d_in": 5, "hidden": 4}}
    save_weights(tmp_path, "probe", head.state_dict(), {**kind, **OLD_FIELDS}, 2)
    loaded, record = load_head(tmp_path, expected_model=MODEL)
    assert isinstance(loaded, MlpProbe)
    assert torch.equal(loaded.hidden.weight, head.hidden.weight)
    assert record == RECORD
    assert not record.is_multilabel


def test_a_probe_of_several_labels_is_not_one_of_classes(probe: LinearProbe, tmp_path: Path):
    save_probe(probe, tmp_path, replace(RECORD, is_multilabel=True, preprocess="Resize(32)"))
    assert load_head(tmp_path)[1].preprocess == "Resize(32)"
    with pytest.raises(CheckpointError, match="is_multilabel is True, expected False"):
        load_probe(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_multilabel": 1}, "is_multilabel must be true or false"),
        ({"feature": "raw embedding"}, "feature is 'raw embedding', expected 'embedding, L2"),
        ({"kind": "resnet"}, "kind is 'resnet', expected linear, mlp"),
        ({"kind": "mlp"}, r"settings are .*'d_in': 5.*, expected \['d_in', 'hidden'\]"),
        (
            {"kind": "attention", "settings": {"d_in": 5, "n_heads": 2}},
            "probe.json: n_heads=2: must divide",
        ),
        ({"schema_version": 0}, "schema_version is 0, expected 1 or 2 or 3"),
        ({"class_names": ["a", "b"]}, r"bias is torch.float32 \[3\], allowed .*\[2\]"),
        ({"class_names": 3}, "class_names is 3, must be a list of texts"),
        ({"settings": {"d_in": 4}}, r"\[3, 4\]"),
        ({"settings": {"d_in": True}}, "whole numbers"),
        ({"settings": 5}, "settings are 5"),
        ({"label": "cls"}, r"unexpected fields \['label'\]"),
    ],
)
def test_wrong_json(probe: LinearProbe, tmp_path: Path, changes: dict[str, object], message: str):
    save_probe(probe, tmp_path, RECORD)
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_probe(tmp_path)
