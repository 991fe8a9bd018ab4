import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.shortcuts.amplification import (
    amplification_ratio,
    attribution_share,
    cue_effects,
    pair_effects,
    remove_latents,
    standardise,
)
from clipattr.shortcuts.groups import count_groups

CUE = torch.tensor([1, 4])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def codes() -> SparseCodes:
    """Random codes over 6 latents; the last slot of each row is padding that names latent 1."""
    indices = torch.rand(5, 6, generator=seeded()).topk(4, dim=1).indices
    values = torch.rand(5, 4, generator=seeded(1), dtype=torch.float64)
    indices[:, 3], values[:, 3] = 1, 0.0
    return SparseCodes(indices, values, 6)


def test_effects_are_float64_differences():
    with_cue, without = torch.tensor([1.0, 2.0]), torch.tensor([1e-8, 5.0])
    effects = pair_effects(with_cue, without)
    assert effects.tolist() == [1.0 - np.float64(np.float32(1e-8)), -3.0]


def test_standardised_effects_equal_numpy():
    scores = [torch.randn(50, generator=seeded(n)) * s for n, s in ((0, 0.01), (1, 7.0))]
    effects = [torch.randn(9, generator=seeded(n)) for n in (2, 3)]
    result = cue_effects(
        text_effects=effects[0],
        probe_effects=effects[1],
        text_scores=scores[0],
        probe_scores=scores[1],
    )
    for found, effect, score in zip(result, effects, scores, strict=True):
        expected = effect.numpy().astype(np.float64) / np.std(score.numpy().astype(np.float64))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_amplification_does_not_depend_on_the_heads_units():
    text, probe = torch.tensor([0.1, 0.3]), torch.tensor([-0.4, -0.8])
    text_scores, probe_scores = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])
    ratios = []
    for unit in (1.0, 100.0):
        effects = cue_effects(
            text_effects=text,
            probe_effects=unit * probe,
            text_scores=text_scores,
            probe_scores=unit * probe_scores,
        )
        ratios.append(amplification_ratio(effects.probe.mean(), effects.text.mean()).item())
    assert ratios == pytest.approx([-3.0, -3.0])
    assert amplification_ratio(torch.ones(2), torch.tensor([0.0, -2.0])).tolist() == [
        float("inf"),
        -0.5,
    ]


@pytest.mark.parametrize("scores", [torch.ones(5), torch.tensor([1.0, float("nan")])])
def test_constant_scores_are_refused(scores: torch.Tensor):
    with pytest.raises(DataError, match="standard deviation"):
        standardise(torch.ones(2), scores)


def test_attribution_share_equals_plain_loop(codes: SparseCodes):
    attributions = torch.randn(5, 4, generator=seeded(4))
    share = attribution_share(attributions, codes, CUE)
    for row in range(5):
        cue = total = 0.0
        for slot in range(4):
            if codes.values[row, slot] != 0:
                total += abs(attributions[row, slot].item())
                if codes.indices[row, slot].item() in CUE.tolist():
                    cue += attributions[row, slot].item()
        assert share.cue[row].item() == pytest.approx(cue, abs=1e-12)
        assert share.total[row].item() == pytest.approx(total, abs=1e-12)
    assert share.cue.abs().sum() > 0


def test_attribution_share_sums_over_tokens(codes: SparseCodes):
    attributions = torch.randn(5, 4, generator=seeded(4))
    share = attribution_share(attributions, codes, CUE)
    tokens = SparseCodes(codes.indices[None], codes.values[None], 6)
    summed = attribution_share(attributions[None], tokens, CUE)
    torch.testing.assert_close(summed.cue, share.cue.sum(0, keepdim=True))
    torch.testing.assert_close(summed.total, share.total.sum(0, keepdim=True))


def test_remove_latents_equals_dense_edit(codes: SparseCodes):
    W_dec = torch.randn(6, 3, generator=seeded(2), dtype=torch.float64)
    error = torch.randn(5, 3, generator=seeded(3), dtype=torch.float64)
    dense = codes.to_dense()
    x = dense @ W_dec + error
    dense[:, CUE] = 0
    removed = remove_latents(x, codes, W_dec, CUE)
    torch.testing.assert_close(removed, dense @ W_dec + error)
    assert not torch.allclose(removed, x)
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(remove_latents(x, codes, W_dec, nothing), x)


@pytest.fixture
def grouped() -> dict[str, torch.Tensor]:
    columns = torch.randint(0, 2, (3, 200), generator=seeded(5))
    labels, cues, predictions = columns
    keep = ~((labels == 1) & (cues == 0))  # one group stays empty
    # Predictions follow the cue, so the group without it suffers.
    predictions = torch.where(torch.rand(200, generator=seeded(6)) < 0.7, cues, predictions)
    return {"predictions": predictions[keep], "labels": labels[keep], "cues": cues[keep]}


def test_groups_equal_sklearn(grouped: dict[str, torch.Tensor]):
    groups = count_groups(**grouped, n_labels=2, n_cues=2)
    arrays = {name: tensor.numpy() for name, tensor in grouped.items()}
    expected = {}
    for label, cue in ((0, 0), (0, 1), (1, 1)):
        chosen = (arrays["labels"] == label) & (arrays["cues"] == cue)
        expected[label, cue] = accuracy_score(
            arrays["labels"][chosen], arrays["predictions"][chosen]
        )
        assert groups.accuracy[label, cue].item() == pytest.approx(expected[label, cue])
        assert groups.total[label, cue] == chosen.sum()
    assert groups.accuracy[1, 0].isnan()
    average = accuracy_score(arrays["labels"], arrays["predictions"])
    worst = min(expected, key=lambda group: expected[group])
    assert groups.average_accuracy == pytest.approx(average)
    assert groups.worst_group == worst == (0, 1)
    assert groups.worst_group_accuracy == pytest.approx(expected[worst])
    assert groups.gap == pytest.approx(average - expected[worst])


def test_group_labels_out_of_range():
    two = torch.tensor([0, 2])
    with pytest.raises(DataError, match=r"cues lie in \[0, 2\], allowed is \[0, 1\]"):
        count_groups(predictions=two, labels=two, cues=two, n_labels=3, n_cues=2)
    empty = two[:0]
    with pytest.raises(DataError, match="no images"):
        count_groups(predictions=empty, labels=empty, cues=empty, n_labels=2, n_cues=2)
