"""Heads against numpy and plain loops, sparse paths against scikit-learn, WiSE-FT."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError, DataError
from clipattr.probes.heads import AttentionProbe, MlpProbe, absorb
from clipattr.probes.linear import LinearProbe
from clipattr.probes.sparse import SparseProbe, solve_sparse_path
from clipattr.probes.text import interpolate, interpolation_scores, text_probe


def drawn(head, seed: int = 0):
    draw = Generator().manual_seed(seed)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    return head


def test_mlp_is_two_layers():
    head, x = drawn(MlpProbe(5, 3, hidden=7)), torch.randn(4, 5)
    V, a, W, b = (one.detach().double() for one in head.parameters())
    hidden = x.double() @ V.T + a
    active = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(head(x).double().detach(), active @ W.T + b, atol=1e-5, rtol=1e-5)


def test_mlp_learns_what_a_line_cannot():
    x = torch.rand(400, 2, generator=Generator().manual_seed(0)) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    head = MlpProbe(2, 2, hidden=16, generator=Generator().manual_seed(1))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(head(x), y).backward()
        optimizer.step()
    assert LogisticRegression().fit(x, y).score(x, y) < 0.65
    assert float((head(x).argmax(1) == y).double().mean()) > 0.95


def test_attention_is_the_plain_loop():
    head, x = drawn(AttentionProbe(6, 3, n_heads=2)), torch.randn(4, 5, 6)
    with torch.no_grad():
        for image in range(4):
            keys = x[image] @ head.keys.weight.T + head.keys.bias
            values = x[image] @ head.values.weight.T + head.values.bias
            pooled = torch.zeros(6)
            for number in range(2):
                part = slice(3 * number, 3 * number + 3)
                scores = [float(key[part] @ head.query[number, 0]) / math.sqrt(3) for key in keys]
                total = sum(math.exp(score) for score in scores)
                for score, value in zip(scores, values, strict=True):
                    pooled[part] += math.exp(score) / total * value[part]
            expected = head.output.weight @ pooled + head.output.bias
            torch.testing.assert_close(head(x)[image], expected, atol=1e-5, rtol=1e-4)


def test_attention_starts_undecided_and_finds_the_token():
    draw = Generator().manual_seed(0)
    head = AttentionProbe(8, 2, n_heads=2, generator=draw)
    y = torch.randint(2, (300,), generator=draw)
    x = 0.5 * torch.randn(300, 6, 8, generator=draw)
    assert (head(x) == 0).all()
    # One token says the class, another place in each image; the rest point anywhere.
    place = torch.randint(6, (300,), generator=draw)
    x[torch.arange(300), place, :2] = torch.stack([torch.full((300,), 3.0), 6.0 * y - 3], dim=1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(head(x), y).backward()
        optimizer.step()
    assert float((head(x).argmax(1) == y).double().mean()) > 0.97


@pytest.mark.parametrize(
    "head",
    [LinearProbe(6, 3), MlpProbe(6, 3, hidden=4), AttentionProbe(6, 3, n_heads=3)],
    ids=["linear", "mlp", "attention"],
)
def test_absorbed_standardisation_is_the_same_function(head):
    drawn(head)
    shift, factor, x = torch.randn(6), torch.rand(6) + 0.5, torch.randn(4, 5, 6)
    before = [one.clone() for one in head.parameters()]
    folded = absorb(head, shift, factor)
    torch.testing.assert_close(folded(x), head((x - shift) * factor), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="n_heads=4: must divide the width of the tokens, 6"):
        AttentionProbe(6, 2, n_heads=4)


def test_text_probe_and_the_line_to_a_probe():
    draw = Generator().manual_seed(3)
    rows = normalize(torch.randn(4, 6, generator=draw), dim=1)
    x = normalize(torch.randn(50, 6, generator=draw), dim=1)
    y, groups = torch.randint(4, (50,), generator=draw), torch.arange(50) % 3
    text, probe = text_probe(rows, 100.0), drawn(LinearProbe(6, 4))
    torch.testing.assert_close(text(x), 100 * x @ rows.T)
    assert text.weight.requires_grad
    alphas = [0.0, 0.3, 0.9, 1.0]
    found = interpolation_scores(text, probe, alphas, x, y, "worst_group", groups)
    for alpha, value in zip(alphas, found, strict=True):
        middle = interpolate(text, probe, alpha)
        torch.testing.assert_close(middle(x), (1 - alpha) * text(x) + alpha * probe(x))
        right = middle(x).argmax(1) == y
        assert value == pytest.approx(min(right[groups == g].double().mean() for g in range(3)))
    assert torch.equal(interpolate(text, probe, 0.0).weight, text.weight)
    assert torch.equal(interpolate(text, probe, 1.0).weight, probe.weight)
    with pytest.raises(ConfigError, match=r"\[4, 6\] and \[3, 6\]"):
        interpolate(text, LinearProbe(6, 3), 0.5)


def make_codes(n_classes: int, n_rows: int = 500) -> tuple[SparseCodes, Tensor]:
    """Codes of latents that fire seldom and often, and labels that a few of them decide."""
    draw = Generator().manual_seed(n_classes)
    often = torch.arange(1, 31).float() ** -0.8
    indices = torch.stack([torch.multinomial(often, 6, generator=draw) for _ in range(n_rows)])
    values = (
        2 * torch.rand(n_rows, 6, generator=draw) * (torch.rand(n_rows, 6, generator=draw) > 0.2)
    )
    codes = SparseCodes(indices, values, 40)  # ten never fire
    weight = torch.randn(40, n_classes, generator=draw)
    weight *= torch.rand(40, n_classes, generator=draw) < 0.2
    noise = 0.5 * torch.randn(n_rows, n_classes, generator=draw)
    return codes, (codes.decode(weight) + noise).argmax(1)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_sparse_path_agrees_with_sklearn(n_classes: int):
    codes, y = make_codes(n_classes)
    dense, s = codes.to_dense().double(), torch.rand(len(y), generator=Generator().manual_seed(9))
    targets = y[:, None].float() if n_classes == 2 else y
    Cs = [5.0, 0.05, 0.5]
    path = solve_sparse_path(
        codes, targets, Cs, n_classes=None if n_classes == 2 else n_classes, weights=s
    )
    for C, one in zip(Cs, path, strict=True):
        reference = LogisticRegression(
            l1_ratio=1, solver="saga", C=C, tol=1e-7, max_iter=20_000, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            reference.fit(dense.numpy(), y.numpy(), s.double().numpy())

        def objective(weight, bias, C=C):
            weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
            logits = dense @ weight.T + bias
            if n_classes == 2:
                losses = binary_cross_entropy_with_logits(
                    logits[:, 0], y.double(), reduction="none"
                )
            else:
                losses = cross_entropy(logits, y, reduction="none")
            return float(C * (s * losses).sum() + weight.abs().sum())

        expected = objective(reference.coef_, reference.intercept_)
        assert one.converged
        assert one.objective == pytest.approx(expected, rel=1e-4)
        assert objective(one.weight, one.bias) == pytest.approx(expected, rel=1e-4)
        # One number added to a latent's weights for all classes changes no probability.
        theirs = torch.as_tensor(reference.coef_)
        centred = [w - w.mean(0) * (n_classes > 2) for w in (one.weight.double(), theirs)]
        torch.testing.assert_close(*centred, atol=0.02, rtol=0)
        p = one.to_probe()(codes).softmax(1).detach()
        np.testing.assert_allclose(p, reference.predict_proba(dense.numpy()), atol=0.01)
    n_used = [len(one.to_probe().latents) for one in path]
    assert n_used[1] < n_used[2] < n_used[0] <= 30


def test_sparse_probe_reads_codes_and_padding_says_nothing():
    probe = drawn(SparseProbe(40, 3))
    codes, _ = make_codes(4)
    expected = codes.to_dense() @ probe.weight.T + probe.bias
    torch.testing.assert_close(probe(codes), expected, atol=1e-5, rtol=1e-5)
    moved = codes._replace(indices=torch.where(codes.is_active, codes.indices, 39))
    torch.testing.assert_close(probe(moved), probe(codes))


def test_the_strongest_penalty_leaves_a_bias():
    codes, y = make_codes(4)
    (one,) = solve_sparse_path(codes, y, [1e-4], n_classes=4)
    assert (one.weight == 0).all()
    shares = torch.bincount(y) / len(y)
    torch.testing.assert_close(one.bias.softmax(0), shares, atol=1e-3, rtol=0)


def test_sparse_path_says_that_it_did_not_converge_and_refuses():
    codes, y = make_codes(4)
    (one,) = solve_sparse_path(codes, y, [10.0], n_classes=4, max_iter=2)
    assert (one.converged, one.n_iterations) == (False, 2)
    assert one.violation > 1e-3
    with pytest.raises(ConfigError, match="binary task"):
        solve_sparse_path(codes, y, [1.0], n_classes=2)
    with pytest.raises(DataError, match="nan"):
        solve_sparse_path(codes._replace(values=codes.values * torch.nan), y, [1.0], n_classes=4)
