"""Weights with nothing trivial in them, as other toolkits would save, and what they compute."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clipattr.sae import SaeRecord, Transcoder, import_sae, load_sae, save_sae

D_MODEL, N_LATENTS, K = 5, 12, 3
EPSILON = 1e-5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# What is saved is in float32, and what is expected of it in float64.
X = normal(9, D_MODEL, seed=0) * 2 + 1
W_ENC, W_DEC = normal(N_LATENTS, D_MODEL, seed=1), normal(N_LATENTS, D_MODEL, seed=2)
B_ENC, B_DEC = normal(N_LATENTS, seed=3), normal(D_MODEL, seed=4)
THRESHOLD, R_MAG = normal(N_LATENTS, seed=5), normal(N_LATENTS, seed=6) / 2
B_MAG = normal(N_LATENTS, seed=7)


def pre_activations(centre: Tensor | float, bias: Tensor = B_ENC, x: Tensor = X) -> Tensor:
    """W_enc (x - centre) + b, by a loop over latents."""
    rows = x.double() - centre
    columns = [(rows * W_ENC[j].double()).sum(1) + bias[j].double() for j in range(N_LATENTS)]
    return torch.stack(columns, dim=1)


def top(pre: Tensor, k: int = K, *, signed: bool = False) -> Tensor:
    """All but the k largest become zero, by a loop."""
    dense = torch.zeros_like(pre)
    for row in range(len(pre)):
        for latent in sorted(range(N_LATENTS), key=lambda j: -float(pre[row, j]))[:k]:
            dense[row, latent] = pre[row, latent] if signed else max(float(pre[row, latent]), 0.0)
    return dense


def gate(centre: Tensor | float, x: Tensor = X) -> Tensor:
    """1[W_enc (x - centre) + b > 0] ReLU(exp(r) W_enc (x - centre) + b_mag)."""
    product = pre_activations(centre, torch.zeros(N_LATENTS), x)
    magnitude = R_MAG.double().exp() * product + B_MAG.double()
    return (product + B_ENC.double() > 0) * magnitude.relu()


def decode(codes: Tensor, W_dec: Tensor = W_DEC, b_dec: Tensor | float = B_DEC) -> Tensor:
    return codes.double() @ W_dec.double() + b_dec


def scaled_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of each row of X, by a loop, and what is left without them."""
    means, scales, rows = [], [], []
    for row in X.double():
        mean = float(row.sum()) / D_MODEL
        scale = (sum((float(each) - mean) ** 2 for each in row) / (D_MODEL - 1)) ** 0.5
        means.append(mean)
        scales.append(scale)
        rows.append((row - mean) / (scale + EPSILON))
    column = torch.tensor([means, scales], dtype=torch.float64)[..., None]
    return column[0], column[1], torch.stack(rows)


def check(
    path: Path, codes: Tensor, recon: Tensor, settings: dict[str, object] | None = None
) -> None:
    """Codes and reconstructions are the expected ones, also of what was kept and loaded again."""
    sae = import_sae(path, settings)
    tolerances = {"atol": 3e-5, "rtol": 1e-5}
    torch.testing.assert_close(sae.encode(X).to_dense(), codes.float(), **tolerances)
    torch.testing.assert_close(sae(X).recon, recon.float(), **tolerances)
    assert not sae.training
    site: dict[str, str | int] = {"layer": 3, "stream": "residual", "tokens": "cls"}
    folder = (path if path.is_dir() else path.parent) / "kept"
    record = SaeRecord(site, {"name": "m", "weights_sha256": "w"}, "data")
    if isinstance(sae, Transcoder):
        record = replace(record, target_site=site)
    save_sae(sae, folder, record)
    again, _ = load_sae(folder)
    assert type(again) is type(sae)
    assert torch.equal(again(X).recon, sae(X).recon)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
