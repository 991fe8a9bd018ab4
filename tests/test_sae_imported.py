"""The forms that exist for imports: values with a sign, and rows that are scaled and back."""

import json
from pathlib import Path

import pytest
import torch

from clipattr.clip import Site, image_tower, load_clip
from clipattr.errors import CheckpointError, ConfigError
from clipattr.sae import SaeRecord, load_sae, save_sae
from clipattr.sae.imported import (
    RowScaledGatedSae,
    RowScaledJumpReluSae,
    RowScaledReluSae,
    RowScaledSae,
    RowScaledTopKSae,
    SignedTopKSae,
)
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.sae import Sae
from clipattr.spliced import Spliced
from tests.saes import D_MODEL, SIZES, K, initialise, normal, seeded, small_rows

MODEL = {"name": "m", "weights_sha256": "w"}
SITE: dict[str, str | int] = {"layer": 3, "stream": "residual", "tokens": "cls"}
ROW_SCALED = {
    RowScaledTopKSae: {"k": K},
    RowScaledReluSae: {"sparsity": 0.0},
    RowScaledJumpReluSae: {"sparsity": 0.0},
    RowScaledGatedSae: {"sparsity": 0.0},
}


def shaken(sae: Sae) -> Sae:
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=10 + seed))
    return sae.eval()


@pytest.fixture
def signed() -> SignedTopKSae:
    sae = SignedTopKSae(**SIZES, k=K, generator=seeded()).double()
    initialise(sae)
    shaken(sae)
    with torch.no_grad():
        sae.b_enc.sub_(2.5)
    return sae


@torch.no_grad()
def test_signed_keeps_what_is_negative(signed: SignedTopKSae):
    x = small_rows()
    dense = signed.encode(x).to_dense()
    for row, pre in zip(dense, signed(x).pre, strict=True):
        largest = sorted(range(len(pre)), key=lambda j: -float(pre[j]))[:K]
        for latent in range(len(pre)):
            expected = float(pre[latent] * signed.unit) if latent in largest else 0.0
            assert float(row[latent]) == pytest.approx(expected)
    assert (dense < 0).any()
    assert (dense > 0).any()
    assert signed.encode(x).is_active.all()


def test_gradients_of_signed_are_those_of_autograd(signed: SignedTopKSae):
    x, target = small_rows(), normal(20, D_MODEL, seed=9)
    output = signed(x)
    (output.recon * target).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in signed.named_parameters()}
    signed.zero_grad()
    inputs = (x - signed.b_dec) / signed.input_scale
    pre = inputs @ signed.W_enc.T + signed.b_enc
    chosen = torch.zeros_like(pre).scatter(1, output.codes.indices, 1.0)
    recon = (pre * chosen * signed.input_scale) @ signed.W_dec + signed.b_dec
    (recon * target).sum().backward()
    for name, parameter in signed.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


def test_signed_is_folded_and_kept(signed: SignedTopKSae, tmp_path: Path):
    x = small_rows()
    folded = signed.fold()
    assert isinstance(folded, SignedTopKSae)
    torch.testing.assert_close(folded(x).recon, signed(x).recon)
    save_sae(folded, tmp_path, SaeRecord(SITE, MODEL, "data"))
    again, _ = load_sae(tmp_path)
    assert isinstance(again, SignedTopKSae)
    torch.testing.assert_close(again.double()(x).recon, signed(x).recon, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=ROW_SCALED)
def row_scaled(request: pytest.FixtureRequest) -> RowScaledSae:
    kind = request.param
    sae = kind(**SIZES, **ROW_SCALED[kind], generator=seeded()).double()
    shaken(sae)
    return sae


def test_a_row_scaled_one_follows_the_scale_of_its_input(row_scaled: RowScaledSae):
    """What it makes of scale x + shift is scale x_hat + shift: b_dec is scaled as well."""
    x = small_rows()
    output, moved = row_scaled(x), row_scaled(3 * x + 7)
    assert torch.equal(moved.codes.to_dense() != 0, output.codes.to_dense() != 0)
    expected = 3 * output.codes.to_dense()
    torch.testing.assert_close(moved.codes.to_dense(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.recon, 3 * output.recon + 7, rtol=1e-4, atol=1e-4)
    assert output.recon.std() > 0.1


def test_what_a_row_brings_is_no_code(row_scaled: RowScaledSae):
    x = small_rows()
    output = row_scaled(x)
    own = x.mean(1, keepdim=True) + x.std(1, keepdim=True) * row_scaled.b_dec
    torch.testing.assert_close(output.recon, row_scaled.combine(output.codes) + own)
    assert torch.equal(output.parts[-1], output.recon)
    decoded = row_scaled.decode(output.codes)
    torch.testing.assert_close(decoded, row_scaled.combine(output.codes) + row_scaled.b_dec)
    tokens = row_scaled(x.view(4, 5, D_MODEL))
    torch.testing.assert_close(tokens.recon.view_as(x), output.recon)
    torch.testing.assert_close(row_scaled.fold()(x).recon, output.recon)


def test_a_row_scaled_one_has_one_normalisation(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"RowScaledTopKSae\(normalisation=scale\): must be"):
        RowScaledTopKSae(**SIZES, k=K, normalisation=Normalisation.scale)
    sae = RowScaledTopKSae(**SIZES, k=K)
    save_sae(sae, tmp_path, SaeRecord(SITE, MODEL, "data"))
    content = json.loads((tmp_path / "sae.json").read_text())
    assert content["normalisation"] == "layer_norm"
    (tmp_path / "sae.json").write_text(json.dumps(content | {"normalisation": "none"}))
    with pytest.raises(CheckpointError, match="must be layer_norm"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ROW_SCALED)
def test_what_a_row_brings_is_reconstructed_and_left_alone(kind: type[RowScaledSae]):
    """An edit of the codes must not touch it, and the FVU must not count it as missing."""
    sae = kind(**SIZES, **ROW_SCALED[kind], generator=seeded()).double()
    initialise(sae)
    shaken(sae)
    x = small_rows()
    cut = image_tower(load_clip("planted-world").model).cut(Site(-1))
    readout = Spliced(cut, sae).read(x, torch.arange(len(x)))
    own = x.mean(1, keepdim=True) + (x.std(1, keepdim=True) - 1) * sae.b_dec
    torch.testing.assert_close(readout.recon, sae.decode(readout.codes) + own)
    torch.testing.assert_close(sae.decode(readout.codes) + readout.error, x)
    assert not torch.allclose(readout.recon, x - readout.error)
