"""Groups inferred from the activation of a cue's latents, against plain loops."""

import pytest
import torch

from clipattr.errors import DataError
from clipattr.shortcuts.inferred import infer_cue, infer_groups, split_in_two


def test_firing_decides_where_it_tells_images_apart():
    activation = torch.tensor([0.0, 0.2, 0.0, 5.0, 0.0])
    labels = torch.tensor([0, 0, 1, 1, 2])
    found = infer_groups(activation, labels)
    assert found.has_cue.tolist() == [False, True, False, True, False]
    assert found.groups.tolist() == [0, 1, 2, 3, 4]
    assert found.counts.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert found.cue.threshold == 0
    assert "they fire in 2 of 5 images" in found.cue.words


def test_the_split_is_that_of_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.cat(
            [torch.rand(40, generator=draw), 1 + torch.rand(13, generator=draw) * 2]
        ).double()
        values = (values * 8).round() / 8  # with equal values
        found = values > split_in_two(values)
        sums = {}
        for one in sorted(set(values.tolist()))[:-1]:
            sides = [values[values <= one], values[values > one]]
            sums[one] = float(sum((side - side.mean()).square().sum() for side in sides))
        best = min(sums, key=lambda one: sums[one])
        assert found.tolist() == (values > best).tolist()


def test_latents_that_always_fire_are_split_and_say_how_well():
    draw = torch.Generator().manual_seed(0)
    low, high = 1 + 0.05 * torch.rand(300, generator=draw), 3 + 0.05 * torch.rand(100)
    found = infer_cue(torch.cat([low, high]))
    assert found.has_cue.tolist() == [False] * 300 + [True] * 100
    assert 1.05 < found.threshold < 3
    assert found.separation > 0.99
    assert "two-means split" in found.words
    bell = infer_cue(10 + torch.randn(20_000, generator=draw))
    assert bell.separation == pytest.approx(2 / torch.pi, abs=0.01)
    flat = infer_cue(1 + torch.rand(20_000, generator=draw))
    assert flat.separation == pytest.approx(0.75, abs=0.01)


def test_the_rule_changes_where_nearly_all_images_fire():
    values = torch.arange(1, 101).float()
    values[:10] = 0
    assert infer_cue(values).threshold > 0
    values[10] = 0
    assert infer_cue(values).threshold == 0


def test_two_sets_have_one_threshold():
    """Firing in 89 % of one set and in 91 % of the other is the same cue."""
    draw = torch.Generator().manual_seed(0)

    def activations(n_firing: int) -> torch.Tensor:
        values = 0.5 + 0.5 * torch.rand(1000, generator=draw)
        values[torch.rand(1000, generator=draw) < 0.3] += 1
        values[n_firing:] = 0
        return values

    learned, evaluated = infer_cue(activations(890)), activations(910)
    assert int(learned.has_cue.sum()) == 890
    assert int(infer_cue(evaluated).has_cue.sum()) < 400
    found = infer_cue(evaluated, learned.threshold)
    assert found.has_cue.tolist() == (evaluated > 0).tolist()
    assert "they fire in 910 of 1000 images" in found.words
    assert infer_cue(evaluated, 1.0).has_cue.tolist() == (evaluated > 1).tolist()
    assert infer_cue(torch.zeros(3), 0.0).has_cue.tolist() == [False] * 3


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.zeros(4), "fire in none of 4 images"),
        (torch.ones(4), "all 4 images 1"),
        (torch.tensor([1.0, -1, 0, 0]), "not below 0"),
        (torch.tensor([1.0, torch.nan, 0, 0]), "finite"),
    ],
)
def test_refuses(activation: torch.Tensor, message: str):
    with pytest.raises(DataError, match=message):
        infer_groups(activation, torch.tensor([0, 1, 0, 1]))
