"""SAEs of saev, overcomplete, ViT-Prisma and attributing-clip: one file each, most of it pickle."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae import import_sae
from tests.foreign import (
    B_DEC,
    B_ENC,
    B_MAG,
    D_MODEL,
    N_LATENTS,
    R_MAG,
    THRESHOLD,
    W_DEC,
    W_ENC,
    K,
    X,
    check,
    decode,
    gate,
    normal,
    pre_activations,
    scaled_rows,
    top,
    write_json,
)
from tests.test_data_shards import Bomb

PLAIN = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
# So low that fewer than k pre-activations are positive.
LOW = B_ENC - 4


def refusal(path: Path, settings: dict[str, object] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_sae(path, settings)
    return str(caught.value)


# saev


def saev(path: Path, header: dict[str, object], **tensors: Tensor) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save({**PLAIN, "b_enc": LOW, **tensors}, file)
    return path


def header(schema: int, kind: str) -> dict[str, object]:
    """Schema 1 in its first form, all others."""
    params = {} if kind == "Relu" else {"top_k": K}
    sizes = {"d_model": D_MODEL, "d_sae": N_LATENTS}
    if schema == 1:
        return {"schema": 1, "cls": kind, "cfg": {**sizes, **params}}
    return {"schema": schema, "cfg": {**sizes, "activation": {"cls": kind, "params": params}}}


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["Relu", "TopK", "BatchTopK"])
def test_saev(tmp_path: Path, schema: int, kind: str):
    settings = {"subtract_b_dec": False} if schema == 1 else None
    pre = pre_activations(0.0, LOW)
    rest = {"activation.threshold": torch.tensor(0.4)} if kind == "BatchTopK" else {}
    path = saev(tmp_path / "sae.pt", header(schema, kind), **rest)
    codes = {
        "Relu": pre.relu(),
        "TopK": top(pre, signed=True),
        "BatchTopK": pre * (pre > 0.4),
    }[kind]
    assert (codes < 0).any() == (kind == "TopK")
    check(path, codes, decode(codes), settings)


def test_saev_of_before_the_change_of_its_encoder(tmp_path: Path):
    path = saev(tmp_path / "sae.pt", {"d_vit": D_MODEL, "exp_factor": 2})
    assert '{"subtract_b_dec": True}' in refusal(path)
    for subtract, centre in ((True, B_DEC), (False, 0.0)):
        codes = pre_activations(centre, LOW).relu()
        check(path, codes, decode(codes), {"subtract_b_dec": subtract})
    path = saev(path, {"d_vit": D_MODEL, "exp_factor": 2}, b_dec=0 * B_DEC)
    codes = pre_activations(0.0, LOW).relu()
    check(path, codes, decode(codes, b_dec=0.0))


def test_saev_takes_32_where_its_first_schema_is_silent(tmp_path: Path):
    silent = {"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": {"d_model": D_MODEL}}
    path = saev(tmp_path / "sae.pt", silent, b_dec=0 * B_DEC)
    assert import_sae(path).max_active == min(32, N_LATENTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 6}, "schema is 6, known are 1 to 5"),
        ({"cfg": 3}, "cfg is 3, expected a JSON object"),
        ({"cfg": {}}, "'activation' is missing"),
        ({"cfg": {"activation": {"cls": "JumpReLU", "params": {}}}}, "activation is 'JumpReLU'"),
    ],
)
def test_saev_that_is_not_known(tmp_path: Path, change: dict[str, object], message: str):
    assert message in refusal(saev(tmp_path / "sae.pt", header(5, "TopK") | change))


# overcomplete


def normalised(rows: Tensor, name: str) -> Tensor:
    power = 1 if name.endswith("l1") else 2
    lengths = [sum(abs(float(each)) ** power for each in row) ** (1 / power) for row in rows]
    if name.startswith("max"):
        lengths = [max(lengths)] * len(lengths)
    divisors = torch.tensor(lengths, dtype=torch.float64)
    return rows.double() if name == "identity" else rows.double() / divisors[:, None]


def overcomplete(path: Path, encoder: dict[str, Tensor] | None = None, **rest: Tensor) -> Path:
    linear = {"final_block.0.weight": W_ENC, "final_block.0.bias": B_ENC}
    tensors = {f"encoder.{name}": each for name, each in (encoder or linear).items()}
    dictionary = {"dictionary._weights": W_DEC, "dictionary.multiplier": torch.tensor(0.3)}
    torch.save({**tensors, **dictionary, **rest}, path)
    return path


def given(kind: str, **rest: object) -> dict[str, object]:
    return {"class": kind, "normalization": "l2", **rest}


def scaled(codes: Tensor, name: str = "l2") -> Tensor:
    return decode(codes, normalised(W_DEC, name) * torch.tensor(0.3).exp().double(), 0.0)


@pytest.mark.parametrize("name", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_overcomplete_topk(tmp_path: Path, name: str):
    codes = top(pre_activations(0.0))
    settings = given("TopKSAE", top_k=K) | {"normalization": name}
    check(overcomplete(tmp_path / "a.pt"), codes, scaled(codes, name), settings)


def test_overcomplete_kinds(tmp_path: Path):
    pre = pre_activations(0.0)
    check(overcomplete(tmp_path / "a.pt"), pre.relu(), scaled(pre.relu()), given("SAE"))
    path = overcomplete(tmp_path / "a.pt", thresholds=THRESHOLD)
    codes = pre * (pre >= THRESHOLD.double().exp())
    check(path, codes, scaled(codes), given("JumpSAE"))
    codes = pre * (pre >= 0.6)
    path = overcomplete(tmp_path / "a.pt")
    check(path, codes, scaled(codes), given("BatchTopKSAE", running_threshold=0.6))


def test_overcomplete_encoders(tmp_path: Path):
    path = tmp_path / "a.pt"
    mean, variance = normal(N_LATENTS, seed=9), normal(N_LATENTS, seed=10).square() + 0.1
    norm = {"weight": R_MAG, "bias": B_MAG, "running_mean": mean, "running_var": variance}
    block = {"final_block.0.weight": W_ENC, "final_block.0.bias": B_ENC}
    block |= {f"final_block.1.{name}": each for name, each in norm.items()}
    block |= {"final_block.1.num_batches_tracked": torch.tensor(7)}
    pre = (pre_activations(0.0) - mean) / (variance.double() + 1e-5).sqrt() * R_MAG + B_MAG
    check(overcomplete(path, block), pre.relu(), scaled(pre.relu()), given("SAE"))
    tied = {"tied_to._weights": W_DEC, "tied_to.multiplier": torch.tensor(0.3), "bias": B_ENC}
    pre = X.double() @ (normalised(W_DEC, "l2") * torch.tensor(0.3).exp().double()).T + B_ENC
    check(overcomplete(path, tied), pre.relu(), scaled(pre.relu()), given("SAE"))
    pre = pre_activations(0.0, torch.zeros(N_LATENTS))
    check(overcomplete(path, {"weight": W_ENC}), pre.relu(), scaled(pre.relu()), given("SAE"))


def test_overcomplete_that_is_not_known(tmp_path: Path):
    path = overcomplete(tmp_path / "a.pt")
    assert "{'class': 'TopKSAE', 'normalization': 'l2', 'top_k': 32}" in refusal(path)
    assert "'running_threshold': 0.5" in refusal(path, {"class": "BatchTopKSAE"})
    assert "class is 'QSAE'; known are SAE, " in refusal(path, {"class": "QSAE"})
    assert "given are ['class', 'k', 'norm" in refusal(path, given("TopKSAE", k=3))
    assert "lacks the tensors ['thresholds']" in refusal(path, given("JumpSAE"))
    assert "normalization is 'l3'" in refusal(path, given("SAE") | {"normalization": "l3"})
    layer_norm = {"final_block.0.weight": W_ENC, "final_block.0.bias": B_ENC}
    layer_norm |= {"final_block.1.weight": B_ENC, "final_block.1.bias": B_ENC}
    assert "running_mean" in refusal(overcomplete(path, layer_norm), given("SAE"))
    archetypal = {"dictionary.W": W_DEC, "dictionary.C": W_DEC, "dictionary.Relax": W_DEC}
    assert "'dictionary.Relax'" in refusal(overcomplete(path, **archetypal), given("SAE"))


# ViT-Prisma


def prisma(folder: Path, **settings: object) -> Path:
    known: dict[str, object] = {
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "none",
        "is_transcoder": False,
    }
    write_json(folder / "config.json", known | settings)
    gates = {"b_gate": B_ENC, "r_mag": R_MAG, "b_mag": B_MAG, "b_enc": 0 * B_ENC}
    is_gated = settings.get("architecture") == "gated"
    torch.save({**PLAIN, **(gates if is_gated else {})}, folder / "weights.pt")
    return folder


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["relu", "topk", "gated"])
def test_prisma(tmp_path: Path, kind: str, normalise: str):
    mean, scale, rows = torch.zeros(()), torch.ones(()), X.double()
    if normalise == "layer_norm":
        mean, scale, rows = scaled_rows()
    pre = pre_activations(B_DEC, x=rows)
    codes = {"relu": pre.relu(), "topk": top(pre), "gated": gate(B_DEC, x=rows)}[kind]
    settings: dict[str, object] = {
        "relu": {},
        "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        "gated": {"architecture": "gated"},
    }[kind]
    folder = prisma(tmp_path, normalize_activations=normalise, **settings)
    check(folder, scale * codes, mean + scale * decode(codes))


def test_prisma_with_settings_that_are_given(tmp_path: Path):
    folder = prisma(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    assert "needs its config.json in the same folder" in refusal(folder)
    codes = pre_activations(B_DEC).relu()
    check(folder, codes, decode(codes), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_transcoder": True}, "is_transcoder is True"),
        ({"normalize_activations": "constant_norm_rescale"}, "imported can be none or layer_norm"),
        ({"activation_fn_str": "tanh-relu"}, "('standard', 'tanh-relu'); known are"),
        ({"architecture": "gated", "activation_fn_str": "topk"}, "('gated', 'topk'); known are"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "postact_fn": "x"}},
            "activation_fn_kwargs is ['k', 'postact_fn']",
        ),
    ],
)
def test_prisma_that_is_not_known(tmp_path: Path, settings: dict[str, object], message: str):
    assert message in refusal(prisma(tmp_path, **settings))


# attributing-clip


@pytest.mark.parametrize("form", ["weight_{}", "parametrizations.weight.original{}"])
@pytest.mark.parametrize("is_checkpoint", [True, False])
def test_attributing_clip(tmp_path: Path, form: str, is_checkpoint: bool):
    length, direction = (form.format(each) for each in ("gv" if "_" in form else "01"))
    lengths = B_MAG[:, None]
    tensors = {
        f"encoder.0.{length}": lengths,
        f"encoder.0.{direction}": W_ENC,
        "encoder.0.bias": LOW,
        f"decoder.{length}": torch.ones(1, N_LATENTS),
        f"decoder.{direction}": W_DEC.T,
    }
    checkpoint = {"epoch": 1, "pytorch-lightning_version": "2.4", "state_dict": tensors}
    torch.save(checkpoint if is_checkpoint else tensors, tmp_path / "last.ckpt")
    rows = normalised(W_ENC, "l2") * lengths
    pre = torch.stack([(X.double() * row).sum(1) for row in rows], dim=1) + LOW.double()
    codes = top(pre, signed=True)
    assert (codes < 0).any()
    assert 'import_sae(path, settings={"k": 64})' in refusal(tmp_path)
    check(tmp_path, codes, decode(codes, normalised(W_DEC, "l2"), 0.0), {"k": K})
    torch.save(tensors | {"decoder.bias": B_DEC}, tmp_path / "last.ckpt")
    assert "['decoder.bias'] are not known here" in refusal(tmp_path, {"k": K})


# Any file


def test_files_of_nobody(tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save({"layer.weight": W_ENC}, path)
    assert "of none of the known toolkits; its tensors are ['layer.weight']" in refusal(path)
    torch.save([W_ENC], path)
    assert "holds no named tensors" in refusal(path)
    path.write_bytes(b"nothing of the kind")
    assert "or is damaged" in refusal(path)
    path.write_bytes(b"{nothing of the kind")
    assert "opens with no line of JSON" in refusal(path)
    (tmp_path / "b.ckpt").write_bytes(b"")
    assert "it holds 2 files: name one of them" in refusal(tmp_path)
    assert "it holds no such file" in refusal(tmp_path / "nowhere")


def test_no_pickle_is_executed(tmp_path: Path):
    path, marker = tmp_path / "a.pt", tmp_path / "executed"
    bomb = Bomb(marker)
    for content in (bomb, {"state_dict": bomb}, {"cfg": bomb, "state_dict": PLAIN}):
        torch.save(content, path)
        assert "holds more than tensors" in refusal(path)
        path.write_bytes(pickle.dumps(content))
        assert "holds more than tensors" in refusal(path)
    path.write_bytes(json.dumps(header(5, "TopK")).encode() + b"\n" + pickle.dumps(bomb))
    assert "holds more than tensors" in refusal(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["TopKSAE", "SAE", "JumpSAE"])
def test_overcompletes_own_code_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    # Matplotlib has taken away what it imports and does not need here.
    monkeypatch.setattr("matplotlib.cm.get_cmap", None, raising=False)
    package = pytest.importorskip("overcomplete.sae")
    options = {"top_k": K} if kind == "TopKSAE" else {}
    theirs = getattr(package, kind)(D_MODEL, N_LATENTS, **options)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    with torch.no_grad():
        _, codes, recon = theirs.eval()(X)
        check(tmp_path / "a.pt", codes, recon, given(kind, **options))
