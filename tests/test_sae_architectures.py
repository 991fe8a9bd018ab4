"""Every architecture against its equations in plain Python, one number at a time."""

import math

import pytest
import torch
from torch import Tensor

from clipattr.errors import ConfigError
from clipattr.sae import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    NestedTopKSae,
    ReluSae,
    Transcoder,
)
from clipattr.sae.losses import reconstruction_loss, sae_loss
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relative import spread_of
from clipattr.sae.sae import Sae
from tests.saes import ALL, N_LATENTS, N_ROWS, K, small_rows, small_sae, target_of

Code = dict[int, float]


def plain_inputs(sae: Sae, row: list[float]) -> tuple[list[float], float]:
    """u and s of one row."""
    mean = sum(row) / len(row)
    std = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
    centres = [0.0] * len(row)
    divisors, unit = [1.0] * len(row), 1.0
    match sae.normalisation:
        case Normalisation.centre:
            centres = sae.input_mean.tolist()
        case Normalisation.norm:
            unit = sae.input_scale.item()
            divisors = [unit] * len(row)
        case Normalisation.layer_norm:
            centres, divisors, unit = [mean] * len(row), [std] * len(row), std
        case Normalisation.standardise:
            centres, unit = sae.input_mean.tolist(), sae.input_scale.item()
            divisors = [unit * spread for spread in sae.input_spread.tolist()]
        case Normalisation.scale:
            is_transcoder = isinstance(sae, Transcoder)
            centres = (sae.input_mean if is_transcoder else sae.b_dec).tolist()
            unit = sae.input_scale.item()
            divisors = [unit] * len(row)
    if isinstance(sae, Transcoder):
        unit = sae.output_scale.item()
    inputs = [
        (value - centre) / divisor
        for value, centre, divisor in zip(row, centres, divisors, strict=True)
    ]
    return inputs, unit


def plain_pre(sae: Sae, inputs: list[float]) -> list[float]:
    weights, bias = sae.W_enc.tolist(), sae.b_enc.tolist()
    return [
        sum(w * u for w, u in zip(weights[j], inputs, strict=True)) + bias[j]
        for j in range(N_LATENTS)
    ]


def largest(pairs: list[tuple[float, int, int]], count: int) -> set[tuple[int, int]]:
    return {(row, latent) for _, row, latent in sorted(pairs, reverse=True)[:count]}


def plain_chosen(sae: Sae, pre: list[list[float]]) -> set[tuple[int, int]]:
    """(row, latent) of all that may be active."""
    pairs = [(pre[row][j], row, j) for row in range(len(pre)) for j in range(N_LATENTS)]
    is_over_batch = isinstance(sae, BatchTopKSae) and getattr(sae, "over_batch", True)
    if is_over_batch and sae.training:
        return largest(pairs, K * len(pre))
    if is_over_batch:
        return {(row, j) for z, row, j in pairs if z > sae.threshold}
    if isinstance(sae, JumpReluSae):
        theta = sae.log_theta.exp().tolist()
        return {(row, j) for z, row, j in pairs if z > theta[j]}
    if isinstance(sae, ReluSae | GatedSae):
        return {(row, j) for z, row, j in pairs if z > 0}
    count = max(sae.ks) if isinstance(sae, NestedTopKSae) else K
    rows = [[pair for pair in pairs if pair[1] == row] for row in range(len(pre))]
    return set().union(*(largest(row, count) for row in rows))


def plain_value(sae: Sae, z: float, latent: int) -> float:
    if isinstance(sae, GatedSae):
        product = z - sae.b_enc[latent].item()
        z = math.exp(sae.r_mag[latent].item()) * product + sae.b_mag[latent].item()
    return max(z, 0.0)


def plain_forward(sae: Sae, x: Tensor) -> tuple[list[Code], list[list[float]]]:
    """Codes and reconstruction of all rows."""
    seen = [plain_inputs(sae, row) for row in x.tolist()]
    pre = [plain_pre(sae, inputs) for inputs, _ in seen]
    chosen = plain_chosen(sae, pre)
    spread = [1.0] * sae.W_dec.shape[1]
    if sae.normalisation is Normalisation.standardise and not isinstance(sae, Transcoder):
        spread = sae.input_spread.tolist()
    directions, bias = sae.W_dec.tolist(), sae.b_dec.tolist()
    codes, recons = [], []
    for row, (inputs, unit) in enumerate(seen):
        code = {
            j: unit * plain_value(sae, pre[row][j], j)
            for j in range(N_LATENTS)
            if (row, j) in chosen
        }
        codes.append({j: value for j, value in code.items() if value > 0})
        recon = [
            bias[i] + spread[i] * sum(a * directions[j][i] for j, a in code.items())
            for i in range(len(bias))
        ]
        if isinstance(sae, Transcoder) and sae.W_skip is not None:
            skip = sae.W_skip.tolist()
            for i in range(len(bias)):
                recon[i] += unit * sum(w * u for w, u in zip(skip[i], inputs, strict=True))
        recons.append(recon)
    return codes, recons


def compare(sae: Sae) -> None:
    x = small_rows()
    output = sae(x)
    codes, recons = plain_forward(sae, x)
    assert 0 < sum(len(code) for code in codes) < N_ROWS * N_LATENTS
    expected = torch.zeros(N_ROWS, N_LATENTS, dtype=torch.float64)
    for row, code in enumerate(codes):
        for latent, value in code.items():
            expected[row, latent] = value
    found = output.codes.to_dense()
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        output.recon, torch.tensor(recons, dtype=torch.float64), rtol=1e-12, atol=1e-11
    )
    encoded = sae.encode(x)
    assert torch.equal(encoded.to_dense(), found)
    assert torch.equal(output.parts[-1], output.recon)
    if not (isinstance(sae, Transcoder) and sae.skip):
        torch.testing.assert_close(sae.decode(encoded), output.recon, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_forward_equals_the_plain_loop(name: str, training: bool):
    compare(small_sae(name).train(training))


@pytest.mark.parametrize("name", ["topk", "batch_topk", "gated", "transcoder_skip"])
@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_every_normalisation_equals_the_plain_loop(name: str, normalisation: Normalisation):
    compare(small_sae(name, normalisation))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalisation", [Normalisation.scale, Normalisation.layer_norm])
def test_tokens_are_rows(name: str, normalisation: Normalisation):
    sae, x = small_sae(name, normalisation), small_rows()
    flat, tokens = sae(x), sae(x.reshape(4, 5, -1))
    assert tokens.codes.indices.shape[:2] == (4, 5)
    assert tokens.parts.shape[1:3] == (4, 5)
    for field in ("recon", "inputs", "pre"):
        assert torch.equal(getattr(tokens, field).flatten(0, 1), getattr(flat, field))
    assert torch.equal(tokens.codes.to_dense().flatten(0, 1), flat.codes.to_dense())
    assert torch.equal(sae.decode(tokens.codes).flatten(0, 1), sae.decode(flat.codes))


@pytest.mark.parametrize("name", ALL)
def test_forward_changes_no_state(name: str):
    sae = small_sae(name).train()
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    sae(small_rows())
    sae.encode(small_rows())
    assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())


def error_of(sae: Sae, target: Tensor, x: Tensor) -> Tensor:
    output = sae(x)
    return reconstruction_loss(sae, target, output, spread_of(target, sae.error_unit(output)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_the_mean_predictor_has_reconstruction_loss_one(name: str, normalisation: Normalisation):
    sae = small_sae(name, normalisation)
    target = target_of(sae)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(target.mean(0))
        if isinstance(sae, Transcoder) and sae.W_skip is not None:
            sae.W_skip.zero_()
    loss = error_of(sae, target, small_rows()).item()
    assert loss == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_step_under_autocast_has_float32_gradients(name: str):
    sae = small_sae(name).float()
    is_dead = torch.arange(N_LATENTS) < 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = target_of(sae).float()
        output = sae(small_rows().float())
        loss = sae_loss(sae, target, output, is_dead=is_dead, k_aux=2, aux_coefficient=0.5)
    loss.total.backward()
    assert output.pre.dtype is torch.bfloat16
    for parameter in sae.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu"])
def test_rows_without_an_active_latent_are_the_bias(name: str):
    sae = small_sae(name).eval()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    output = sae(small_rows())
    assert not output.codes.is_active.any()
    assert torch.equal(output.recon, sae.b_dec.expand(N_ROWS, -1))


def test_matryoshka_prefixes_are_smaller_dictionaries():
    sae = small_sae("matryoshka")
    assert isinstance(sae, MatryoshkaSae)
    output = sae(small_rows())
    dense = output.codes.to_dense()
    for part, end in zip(output.parts, [1, 3, 7, 16], strict=True):
        alone = dense[:, :end] @ sae.W_dec[:end] + sae.b_dec
        torch.testing.assert_close(part, alone, rtol=1e-12, atol=1e-12)


def test_nested_levels_are_topk_saes():
    sae = small_sae("nested_reverse")
    assert isinstance(sae, NestedTopKSae)
    x = small_rows()
    output = sae(x)
    for part, k in zip(output.parts, (1, 2, 5), strict=True):
        level = sae.at(k)
        assert level.encode(x).indices.shape[1] == k
        torch.testing.assert_close(level(x).recon, part, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert torch.equal(sae.at(2).W_dec, sae.W_dec)
    errors = [error_of(level, x, x) for level in map(sae.at, (1, 2, 5))]
    expected = (3 * errors[0] + 2 * errors[1] + errors[2]) / 6
    torch.testing.assert_close(error_of(sae, x, x), expected)
    with pytest.raises(ConfigError, match=r"at\(3\)"):
        sae.at(3)


def test_codes_decode_where_they_are_not_sparse():
    sae = small_sae("relu")
    codes = sae.encode(small_rows())
    assert codes.indices.shape[1] > N_LATENTS / 8
    few = codes._replace(indices=codes.indices[:, :2], values=codes.values[:, :2])
    for each in (codes, few):
        torch.testing.assert_close(sae.decode(each), each.to_dense() @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ReluSae, {"sparsity": -1.0}, "sparsity=-1.0"),
        (JumpReluSae, {"sparsity": 1.0, "bandwidth": 0.0}, "bandwidth=0.0"),
        (MatryoshkaSae, {"k": 2, "fractions": (0.5, 0.4)}, "add up to one"),
        (MatryoshkaSae, {"k": 2, "fractions": (0.01, 0.99)}, "no group empty"),
        (NestedTopKSae, {"ks": ()}, "ascending"),
        (NestedTopKSae, {"ks": (4, 2)}, "ascending"),
        (NestedTopKSae, {"ks": (2, 40)}, "k=40"),
        (Transcoder, {"k": 2, "d_out": 0}, "d_out=0"),
    ],
)
def test_impossible_settings(kind: type[Sae], settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        kind(d_model=4, n_latents=8, **settings)


def test_a_decoded_batch_needs_no_gradient_product_for_the_input():
    sae = small_sae("topk", Normalisation.centre)
    output = sae(small_rows())
    assert not output.inputs.requires_grad
    assert not output.pre.requires_grad
