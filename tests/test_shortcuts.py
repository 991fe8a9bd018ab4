import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.metrics.groups import count_groups
from clipattr.shortcuts.amplification import (
    amplification_ratio,
    attribution_share,
    pair_effects,
    remove_latents,
    standardise,
)

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
    for seed, unit in ((0, 0.01), (1, 7.0)):
        scores, effects = (torch.randn(n, generator=seeded(seed)) for n in (50, 9))
        scores *= unit
        expected = effects.numpy().astype(np.float64) / np.std(scores.numpy().astype(np.float64))
        found = standardise(effects, scores)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_amplification_does_not_depend_on_the_heads_units():
    text, probe, scores = (torch.tensor(each) for each in ([0.1, 0.3], [-0.4, -0.8], [0.0, 2.0]))
    ratios = []
    for unit in (1.0, 100.0):
        effects = standardise(text, scores), standardise(unit * probe, unit * scores)
        ratios.append(amplification_ratio(effects[1].mean(), effects[0].mean()).item())
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
    attributions = torch.randn(5, 4, 2, 3, generator=seeded(4))
    attributions[:, 3] = 0  # padding
    cues = [CUE, torch.tensor([0]), CUE[:0]]
    share = attribution_share(attributions, codes.indices, cues)
    assert share.cue.shape == (3, 5, 2, 3)
    for row, head, score in itertools.product(range(5), range(2), range(3)):
        of_image = attributions[row, :, head, score].tolist()
        total = sum(abs(value) for value in of_image)
        assert share.total[row, head, score].item() == pytest.approx(total, abs=1e-12)
        for number, cue in enumerate(cues):
            named = [latent in cue.tolist() for latent in codes.indices[row].tolist()]
            expected = sum(value for value, is_it in zip(of_image, named, strict=True) if is_it)
            found = share.cue[number, row, head, score].item()
            assert found == pytest.approx(expected, abs=1e-12)
    assert share.cue[:2].abs().sum() > 0
    assert attribution_share(attributions, codes.indices, []).cue.shape == (0, 5, 2, 3)


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
