"""SAEs of sparsify, SAELens, dictionary_learning: their formulas on their files, and their code."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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

W_SKIP = normal(D_MODEL, D_MODEL, seed=8)


def save(path: Path, **tensors: Tensor) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def sparsify(folder: Path, **settings: object) -> tuple[Tensor, Tensor]:
    """TopK(ReLU(W (x - b_dec) + b)); a transcoder does not subtract, a skip adds W_skip x."""
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    has_skip = settings.get("skip_connection", False)
    save(folder / "sae.safetensors", **tensors, **({"W_skip": W_SKIP} if has_skip else {}))
    known = {"activation": "topk", "k": K, "d_in": D_MODEL, "num_latents": N_LATENTS}
    write_json(folder / "cfg.json", known | settings)
    codes = top(pre_activations(0.0 if settings.get("transcode") else B_DEC))
    skipped = X.double() @ W_SKIP.double().T if has_skip else 0.0
    return codes, decode(codes) + skipped


def saelens(folder: Path, architecture: str, **settings: object) -> tuple[Tensor, Tensor]:
    bias = "b_gate" if architecture == "gated" else "b_enc"
    tensors = {"W_enc": W_ENC.T, bias: B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    if architecture == "jumprelu":
        tensors["threshold"] = THRESHOLD
    if architecture == "gated":
        tensors |= {"r_mag": R_MAG, "b_mag": B_MAG}
    save(folder / "sae_weights.safetensors", **tensors)
    known = {"architecture": architecture, "apply_b_dec_to_input": True, "d_in": D_MODEL, "k": K}
    known |= {"normalize_activations": "none", "reshape_activations": "none"} | settings
    write_json(folder / "cfg.json", known)
    mean, scale, rows = torch.zeros(()), torch.ones(()), X.double()
    if known["normalize_activations"] == "layer_norm":
        mean, scale, rows = scaled_rows()
    centre = B_DEC if known["apply_b_dec_to_input"] else 0.0
    pre = pre_activations(centre, x=rows)
    has_lengths = known.get("rescale_acts_by_decoder_norm")
    lengths = W_DEC.double().norm(dim=1) if has_lengths else torch.ones(())
    match architecture:
        case "topk":
            codes = top(pre * lengths)
        case "standard":
            codes = pre.relu()
        case "gated":
            codes = gate(centre, x=rows)
        case _:
            codes = pre.relu() * (pre > THRESHOLD)
    # A code here is in the units of x, so that x - a_j v_j takes the latent away.
    return scale * codes, mean + scale * decode(codes / lengths)


def dictionary_learning(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    linear = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
    plain = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    k = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    no_bias = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
    tensors = {
        "AutoEncoder": {**linear, "bias": B_DEC},
        "AutoEncoderNew": {**linear, "decoder.bias": B_DEC},
        "AutoEncoderTopK": {**linear, **k, "b_dec": B_DEC},
        "BatchTopKSAE": {**linear, **k, "b_dec": B_DEC},
        "GatedAutoEncoder": {
            **no_bias,
            "decoder_bias": B_DEC,
            "gate_bias": B_ENC,
            "mag_bias": B_MAG,
            "r_mag": R_MAG,
        },
        "JumpReluAutoEncoder": {**plain, "threshold": THRESHOLD},
        "MatryoshkaBatchTopKSAE": {**plain, **k, "group_sizes": torch.tensor([1, 4, 7])},
    }[kind]
    torch.save(tensors, folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": {"dict_class": kind}, "buffer": {}})
    pre = pre_activations(0.0 if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else B_DEC)
    match kind:
        case "AutoEncoderTopK":
            codes = top(pre)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            codes = pre.relu() * (pre > 0.7)
        case "GatedAutoEncoder":
            codes = gate(B_DEC)
        case "JumpReluAutoEncoder":
            codes = pre.relu() * (pre > THRESHOLD)
        case "AutoEncoder":  # their loader moves the lengths of the decoder's rows to the encoder
            return pre.relu() * W_DEC.double().norm(dim=1), decode(pre.relu())
        case _:
            codes = pre.relu()
    return codes, decode(codes)


CASES: dict[str, Callable[[Path], tuple[Tensor, Tensor]]] = {
    "sparsify": sparsify,
    "sparsify skip": partial(sparsify, skip_connection=True),
    "sparsify transcoder": partial(sparsify, transcode=True),
    "sparsify both": partial(sparsify, transcode=True, skip_connection=True),
    "SAELens lengths": partial(saelens, architecture="topk", rescale_acts_by_decoder_norm=True),
    **{
        f"SAELens {kind} {normalised} {centred}": partial(
            saelens,
            architecture=kind,
            normalize_activations=normalised,
            apply_b_dec_to_input=centred,
        )
        for kind in ("topk", "standard", "jumprelu", "gated")
        for normalised in ("none", "layer_norm")
        for centred in (True, False)
    },
    **{
        f"dictionary_learning {kind}": partial(dictionary_learning, kind=kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "GatedAutoEncoder",
            "JumpReluAutoEncoder",
            "MatryoshkaBatchTopKSAE",
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_those_of_the_formula(tmp_path: Path, name: str):
    codes, recon = CASES[name](tmp_path)
    assert 0 < (codes != 0).float().mean() < 1
    check(tmp_path, codes, recon)


def test_importing_leaves_the_global_random_state_alone(tmp_path: Path):
    sparsify(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    import_sae(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_settings_that_are_given_go_before_those_of_the_file(tmp_path: Path):
    sparsify(tmp_path)
    assert import_sae(tmp_path, {"k": 2}).max_active == 2


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_sae(folder)
    return str(caught.value)


def test_what_is_not_known_is_refused(tmp_path: Path):
    assert "holds none of sae.safetensors" in refusal(tmp_path)
    sparsify(tmp_path, activation="groupmax")
    assert "activation is 'groupmax'; imported can be 'topk' alone" in refusal(tmp_path)
    sparsify(tmp_path, k=2.5)
    assert "k is 2.5, expected a whole number" in refusal(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    saelens(tmp_path, "topk", normalize_activations="constant_norm_rescale")
    assert "normalize_activations is 'constant_norm_rescale'" in refusal(tmp_path)
    saelens(tmp_path, "topk", reshape_activations="hook_z")
    assert "reshape_activations is 'hook_z'" in refusal(tmp_path)
    saelens(tmp_path, "temporal")
    assert refusal(tmp_path).endswith("known are topk, standard, jumprelu and gated")
    saelens(tmp_path, "batchtopk")
    assert refusal(tmp_path).endswith("save_inference_model saves it as jumprelu")
    (tmp_path / "cfg.json").write_text('{"architecture": "topk", "normalize_activations": "none"}')
    assert "'k' is missing" in refusal(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    dictionary_learning(tmp_path, "AutoEncoder")
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": "CrossCoder"}})
    assert "dict_class is 'CrossCoder'" in refusal(tmp_path)


def test_no_tensor_is_left_out(tmp_path: Path):
    saelens(tmp_path, "jumprelu")
    settings = json.loads((tmp_path / "cfg.json").read_text())
    write_json(tmp_path / "cfg.json", settings | {"architecture": "standard"})
    assert "['threshold'] are not known here" in refusal(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    sparsify(tmp_path)
    settings = {"activation": "topk", "k": K, "skip_connection": True}
    write_json(tmp_path / "cfg.json", settings)
    assert "lacks the tensors ['W_skip']" in refusal(tmp_path)


def test_wrong_shapes_are_refused(tmp_path: Path):
    sparsify(tmp_path)
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC[1:], "W_dec": W_DEC, "b_dec": B_DEC}
    save(tmp_path / "sae.safetensors", **tensors)
    assert "b_enc has shape (11,), expected (12,)" in refusal(tmp_path)
    save(tmp_path / "sae.safetensors", **(tensors | {"W_dec": B_DEC.clone()}))
    assert "W_dec has shape (5,), expected a matrix" in refusal(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path):
    dictionary_learning(tmp_path, "AutoEncoderTopK")
    marker = tmp_path / "executed"
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Bomb(marker)))
    assert "holds more than tensors" in refusal(tmp_path)
    torch.save({"encoder.weight": Bomb(marker)}, tmp_path / "ae.pt")
    assert "holds more than tensors (it calls for getattr)" in refusal(tmp_path)
    assert "torch.save(sae.state_dict(), file)" in refusal(tmp_path)
    assert not marker.exists()


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """No bias at zero, no row of unit norm."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=20 + seed))
    return module


@pytest.mark.filterwarnings("ignore")
def test_sparsifys_own_code_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    package = pytest.importorskip("sparsify")
    config = package.SparseCoderConfig(num_latents=N_LATENTS, k=K)
    theirs = shaken(package.SparseCoder(D_MODEL, config))
    theirs.save_to_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(X)
        dense = torch.zeros(len(X), N_LATENTS).scatter(1, codes.top_indices, codes.top_acts)
        check(tmp_path, dense, theirs(X).sae_out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Gated", "JumpReLU", "TopK", "Standard"])
def test_saelens_own_code_agrees(tmp_path: Path, name: str):
    package = pytest.importorskip("sae_lens")
    options = {"k": K} if name == "TopK" else {}
    config = getattr(package, f"{name}SAEConfig")(d_in=D_MODEL, d_sae=N_LATENTS, **options)
    theirs = shaken(getattr(package, f"{name}SAE")(config))
    theirs.save_model(tmp_path)
    with torch.no_grad():
        check(tmp_path, theirs.encode(X), theirs(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderNew"])
def test_dictionary_learnings_own_code_agrees(tmp_path: Path, name: str):
    package = pytest.importorskip("dictionary_learning.dictionary")
    theirs = shaken(getattr(package, name)(D_MODEL, N_LATENTS))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    write_json(tmp_path / "config.json", {"trainer": {"dict_class": name}})
    with torch.no_grad():
        check(tmp_path, theirs.encode(X), theirs(X))
