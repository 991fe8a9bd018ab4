"""SAEs of other toolkits: their formulas on their files, and their code where it is installed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.sae import SaeRecord, import_sae, load_sae, save_sae
from tests.test_data_shards import Bomb

D_MODEL, N_LATENTS, K = 5, 12, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(9, D_MODEL, seed=0) * 2 + 1
W_ENC, W_DEC = normal(N_LATENTS, D_MODEL, seed=1), normal(N_LATENTS, D_MODEL, seed=2)
B_ENC, B_DEC = normal(N_LATENTS, seed=3), normal(D_MODEL, seed=4)


def top(pre: Tensor) -> Tensor:
    """All but the K largest become zero, by a loop."""
    dense = torch.zeros_like(pre)
    for row in range(len(pre)):
        for latent in sorted(range(N_LATENTS), key=lambda j: -float(pre[row, j]))[:K]:
            dense[row, latent] = max(float(pre[row, latent]), 0.0)
    return dense


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def sparsify(folder: Path, **settings: object) -> tuple[Tensor, Tensor]:
    """relu(W (x - b_dec) + b), its K largest."""
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    save_file(tensors, folder / "sae.safetensors")
    known = {"activation": "topk", "k": K, "d_in": D_MODEL, "num_latents": N_LATENTS}
    write_json(folder / "cfg.json", known | settings)
    codes = top((X - B_DEC) @ W_ENC.T + B_ENC)
    return codes, codes @ W_DEC + B_DEC


def saelens(folder: Path, architecture: str, **settings: object) -> tuple[Tensor, Tensor]:
    threshold = normal(N_LATENTS, seed=5)
    tensors = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    if architecture == "jumprelu":
        tensors["threshold"] = threshold
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    known = {"architecture": architecture, "apply_b_dec_to_input": True, "d_in": D_MODEL, "k": K}
    known |= {"normalize_activations": "none", "reshape_activations": "none"} | settings
    write_json(folder / "cfg.json", known)
    pre = (X - B_DEC * bool(known["apply_b_dec_to_input"])) @ W_ENC.T + B_ENC
    lengths = W_DEC.norm(dim=1) if known.get("rescale_acts_by_decoder_norm") else torch.ones(())
    match architecture:
        case "topk":
            codes = top(pre * lengths)
        case "standard":
            codes = pre.relu()
        case _:
            codes = pre.relu() * (pre > threshold)
    return codes, (codes / lengths) @ W_DEC + B_DEC


def dictionary_learning(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
    bias = "bias" if kind == "AutoEncoder" else "b_dec"
    tensors[bias] = B_DEC
    if kind != "AutoEncoder":
        tensors |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    torch.save(tensors, folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": {"dict_class": kind}, "buffer": {}})
    pre = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    match kind:
        case "AutoEncoderTopK":
            codes = top(pre)
        case "BatchTopKSAE":
            codes = pre * (pre > 0.7)
        case _:  # their loader moves the lengths of the decoder's rows into the encoder
            return pre * W_DEC.norm(dim=1), pre @ W_DEC + B_DEC
    return codes, codes @ W_DEC + B_DEC


CASES = {
    "sparsify": lambda folder: sparsify(folder),
    "SAELens topk": lambda folder: saelens(folder, "topk"),
    "SAELens topk, lengths": lambda folder: saelens(
        folder, "topk", rescale_acts_by_decoder_norm=True
    ),
    "SAELens, not centred": lambda folder: saelens(folder, "topk", apply_b_dec_to_input=False),
    "SAELens standard": lambda folder: saelens(folder, "standard"),
    "SAELens jumprelu": lambda folder: saelens(folder, "jumprelu"),
    "dictionary_learning topk": lambda folder: dictionary_learning(folder, "AutoEncoderTopK"),
    "dictionary_learning batch": lambda folder: dictionary_learning(folder, "BatchTopKSAE"),
    "dictionary_learning relu": lambda folder: dictionary_learning(folder, "AutoEncoder"),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_those_of_the_formula(tmp_path: Path, name: str):
    codes, recon = CASES[name](tmp_path)
    sae = import_sae(tmp_path)
    torch.testing.assert_close(sae.encode(X).to_dense(), codes, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae(X).recon, recon, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_was_imported_can_be_kept(tmp_path: Path, name: str):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    CASES[name](theirs)
    sae = import_sae(theirs)
    site = {"layer": 3, "stream": "residual", "tokens": "cls"}
    save_sae(sae, ours, SaeRecord(site, {"name": "m", "weights_sha256": "w"}, "data"))
    again, _ = load_sae(ours)
    assert type(again) is type(sae)
    assert torch.equal(again(X).recon, sae(X).recon)


def test_importing_leaves_the_global_random_state_alone(tmp_path: Path):
    sparsify(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    import_sae(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; imported can be 'topk' alone"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"transcode": True}, "transcode is True"),
    ],
)
def test_what_is_not_known_of_sparsify_is_refused(tmp_path: Path, settings, message):
    sparsify(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        import_sae(tmp_path)


def test_what_is_not_known_of_the_others_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds none of sae\.safetensors"):
        import_sae(tmp_path)
    saelens(tmp_path, "topk", normalize_activations="layer_norm")
    with pytest.raises(CheckpointError, match="normalize_activations is 'layer_norm'"):
        import_sae(tmp_path)
    saelens(tmp_path, "gated")
    with pytest.raises(CheckpointError, match="architecture is 'gated'; known are"):
        import_sae(tmp_path)
    (tmp_path / "cfg.json").write_text('{"architecture": "topk"}')
    with pytest.raises(CheckpointError, match="lacks 'k'"):
        import_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    dictionary_learning(tmp_path, "GatedAutoEncoder")
    with pytest.raises(CheckpointError, match="dict_class is 'GatedAutoEncoder'"):
        import_sae(tmp_path)


def test_wrong_shapes_are_refused(tmp_path: Path):
    sparsify(tmp_path)
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC[1:], "W_dec": W_DEC, "b_dec": B_DEC}
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(CheckpointError, match=r"b_enc has shape \(11,\), expected \(12,\)"):
        import_sae(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path):
    dictionary_learning(tmp_path, "AutoEncoderTopK")
    marker = tmp_path / "executed"
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        import_sae(tmp_path)
    torch.save({"encoder.weight": Bomb(marker)}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        import_sae(tmp_path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_sparsifys_own_code_agrees(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    package = pytest.importorskip("sparsify")
    torch.manual_seed(0)
    config = package.SparseCoderConfig(num_latents=64, k=4)
    theirs = package.SparseCoder(16, config)
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_to_disk(tmp_path)
    x = torch.randn(20, 16)
    ours = import_sae(tmp_path)
    torch.testing.assert_close(ours(x).recon, theirs(x).sae_out, atol=1e-5, rtol=1e-5)
