"""Top patches, random examples and strata, against plain loops and by their distribution."""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from clipattr.codes import SparseCodes, pool_tokens
from clipattr.errors import ConfigError, DataError
from clipattr.metrics.best_pairs import BestPairs, Examples
from clipattr.metrics.random_examples import RandomExamples, shuffle, strata, unshuffle
from clipattr.metrics.top_examples import TopExamples, TopPatches

N_IMAGES, N_TOKENS, N_LATENTS, N_ACTIVE, N_EXAMPLES = 40, 6, 8, 3, 5


def draw_codes(*rows: int) -> SparseCodes:
    """Codes with ties and padding; latent 0 always fires, latent 7 at most twice."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(*rows, N_LATENTS, generator=generator)
    weights[..., 0] += 1
    weights[2:, ..., 7] = -1
    indices = weights.topk(N_ACTIVE, dim=-1).indices
    values = torch.randint(0, 6, indices.shape, generator=generator) / 4
    values = torch.where(indices == 0, values + 1, values)
    return SparseCodes(indices, values, N_LATENTS)


def draw_ids(limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(N_IMAGES, generator=generator) * (limit // N_IMAGES)
    ids[0] = limit - 1
    return ids


def fill(metric: BestPairs, codes: SparseCodes, ids: Tensor, batch: int, seed: int) -> BestPairs:
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(batch):
        metric.update(codes.select(rows), ids[rows])
    return metric


def plain_patches(
    codes: SparseCodes, ids: Tensor, per_image: int | None
) -> list[list[tuple[int, int, float]]]:
    dense = codes.to_dense()
    result = []
    for latent in range(N_LATENTS):
        found = [
            (int(ids[image]), token, float(dense[image, token, latent]))
            for image in range(N_IMAGES)
            for token in range(N_TOKENS)
            if dense[image, token, latent] > 0
        ]
        kept: list[tuple[int, int, float]] = []
        for each in sorted(found, key=lambda e: (-e[2], e[0], e[1])):
            n_same = sum(each[0] == other[0] for other in kept)
            if per_image is None or n_same < per_image:
                kept.append(each)
        result.append((kept + [(-1, -1, 0.0)] * N_EXAMPLES)[:N_EXAMPLES])
    return result


@pytest.mark.parametrize("per_image", [None, 1, 2])
@pytest.mark.parametrize("batch", [1, 7, N_IMAGES])
def test_patches_equal_a_sorted_list(per_image: int | None, batch: int):
    codes, ids = draw_codes(N_IMAGES, N_TOKENS), draw_ids(2**32 // N_TOKENS)
    expected = plain_patches(codes, ids, per_image)
    metric = TopPatches(
        n_latents=N_LATENTS, n_examples=N_EXAMPLES, n_tokens=N_TOKENS, per_image=per_image
    )
    found = fill(metric, codes, ids, batch, seed=batch).compute()
    for latent in range(N_LATENTS):
        columns = (found.images[latent], found.tokens[latent], found.values[latent])
        of_latent = [tuple(each) for each in zip(*[c.tolist() for c in columns], strict=True)]
        assert of_latent == expected[latent]


def test_one_patch_per_image_is_the_top_images_by_maximum():
    codes, ids = draw_codes(N_IMAGES, N_TOKENS), torch.arange(N_IMAGES)
    sizes = {"n_latents": N_LATENTS, "n_examples": N_EXAMPLES}
    patches = TopPatches(**sizes, n_tokens=N_TOKENS, per_image=1)
    images = TopExamples(**sizes)
    by_patch = fill(patches, codes, ids, 9, seed=0).compute()
    by_image = fill(images, pool_tokens(codes, "max"), ids, 9, seed=1).compute()
    assert torch.equal(by_patch.images, by_image.ids)
    assert torch.equal(by_patch.values, by_image.values)


def test_patches_that_do_not_fit_are_refused():
    metric = TopPatches(n_latents=N_LATENTS, n_examples=2, n_tokens=N_TOKENS)
    codes = draw_codes(1, N_TOKENS)
    largest = 2**32 // N_TOKENS - 1
    metric.update(codes, torch.tensor([largest]))
    assert metric.compute().images[0, 0] == largest
    with pytest.raises(DataError, match=rf"allowed is \[0, {largest}\]"):
        metric.update(codes, torch.tensor([largest + 1]))
    with pytest.raises(DataError, match=f"{N_TOKENS} tokens of each are due"):
        metric.update(draw_codes(1, N_TOKENS - 1), torch.tensor([0]))
    metric.update(codes.select(torch.arange(0)), torch.arange(0))
    with pytest.raises(ConfigError, match="0 patches per image"):
        TopPatches(n_latents=N_LATENTS, n_examples=2, n_tokens=N_TOKENS, per_image=0)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("batch", [50, 333, 1000])
def test_a_latent_with_many_more_rows_than_places(order: str, batch: int):
    """The table is cut many times, within a batch as well; every row is offered once."""
    values = torch.arange(1, 1001).float()
    if order == "descending":
        values = values.flip(0)
    elif order == "shuffled":
        values = values[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    codes = SparseCodes(torch.zeros(1000, 1, dtype=torch.int64), values[:, None], N_LATENTS)
    metric = TopExamples(n_latents=N_LATENTS, n_examples=3)
    for rows in torch.arange(1000).split(batch):
        metric.update(codes.select(rows), rows)
    assert metric.compute().values[0].tolist() == [1000, 999, 998]
    assert metric.compute().ids[0].tolist() == values.argsort(descending=True)[:3].tolist()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("split", [3, 12, 30])
def test_a_merged_table_goes_on(split: int):
    """What was seen is neither written over nor forgotten, be the table full or not."""
    codes, ids = draw_codes(N_IMAGES), torch.arange(N_IMAGES)
    sizes = {"n_latents": N_LATENTS, "n_examples": N_EXAMPLES}
    parts = [TopExamples(**sizes) for _ in range(2)]
    for part, rows in zip(parts, ids[:split].split(split - 1), strict=True):
        part.update(codes.select(rows), rows)
    parts[0].merge_state(parts[1])
    for rows in ids[split:].split(4):
        parts[0].update(codes.select(rows), rows)
    whole = TopExamples(**sizes)
    whole.update(codes, ids)
    assert all(map(torch.equal, parts[0].compute(), whole.compute()))


# Random examples


def test_the_shuffle_is_a_permutation_and_its_inverse_is_known():
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    random = torch.randint(0, 2**32, (10_000,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([edges, random])
    for seed in (0, 1, 2**40):
        numbers = shuffle(ids, seed)
        assert 0 <= int(numbers.min()) <= int(numbers.max()) < 2**32
        assert torch.equal(unshuffle(numbers, seed), ids)
    assert not torch.equal(shuffle(ids, 0), shuffle(ids, 1))


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("batch", [1, 7, N_IMAGES])
def test_the_sample_is_that_of_the_smallest_hashes(is_signed: bool, batch: int):
    codes, ids = draw_codes(N_IMAGES), draw_ids(2**32)
    if is_signed:
        codes = codes._replace(values=torch.where(codes.indices == 0, -codes.values, codes.values))
    metric = RandomExamples(n_latents=N_LATENTS, n_examples=N_EXAMPLES, seed=4)
    found = fill(metric, codes, ids, batch, seed=batch).compute()
    dense, hashes = codes.to_dense(), shuffle(ids, 4)
    for latent in range(N_LATENTS):
        fires = dense[:, latent].nonzero()[:, 0].tolist()
        drawn = sorted(fires, key=lambda row: int(hashes[row]))[:N_EXAMPLES]
        pairs = [(float(dense[row, latent]), int(ids[row])) for row in drawn]
        expected = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        expected += [(0.0, -1)] * (N_EXAMPLES - len(expected))
        values, of_latent = found.values[latent].tolist(), found.ids[latent].tolist()
        assert list(zip(values, of_latent, strict=True)) == expected


def test_the_sample_is_uniform():
    """How often each of 30 images is among the 6 that are drawn, over 2,000 seeds."""
    n_images, n_drawn, n_seeds = 30, 6, 2000
    codes = SparseCodes(torch.zeros(n_images, 1, dtype=torch.int64), torch.ones(n_images, 1), 1)
    counts = torch.zeros(n_images)
    pairs = torch.zeros(n_images, n_images)
    for seed in range(n_seeds):
        drawn = shuffle(torch.arange(n_images), seed).argsort()[:n_drawn]
        counts[drawn] += 1
        pairs[drawn[:, None], drawn] += 1
    assert chisquare(counts.numpy()).pvalue > 0.001
    above = torch.triu_indices(n_images, n_images, 1)
    assert chisquare(pairs[above[0], above[1]].numpy()).pvalue > 0.001
    metric = RandomExamples(n_latents=1, n_examples=n_drawn, seed=0)
    metric.update(codes, torch.arange(n_images))
    expected = shuffle(torch.arange(n_images), 0).argsort()[:n_drawn]
    assert set(metric.compute().ids[0].tolist()) == set(expected.tolist())


# Strata


def make_sample() -> Examples:
    """Latents with 11, 3, 1 and no examples; id = 100 * latent + place."""
    ids = torch.full((4, 11), -1)
    values = torch.zeros(4, 11)
    for latent, n_known in enumerate((11, 3, 1, 0)):
        ids[latent, :n_known] = 100 * latent + torch.arange(n_known)
        values[latent, :n_known] = torch.arange(n_known, 0, -1).float()
    return Examples(ids, values)


@pytest.mark.parametrize(
    ("quantiles", "expected"),
    [
        (3, [[0, 5, 10], [100, 101, 102], [200, -1, -1], [-1, -1, -1]]),
        (5, [[0, 3, 5, 8, 10], [100, 101, 102, -1, -1], [200] + [-1] * 4, [-1] * 5]),
        (1, [[0], [100], [200], [-1]]),
        ([1.0, 0.9, 0.5, 0.0], [[0, 1, 5, 10], [100, 100, 101, 102], [200] * 4, [-1] * 4]),
    ],
)
def test_strata(quantiles: int | list[float], expected: list[list[int]]):
    sample = make_sample()
    found = strata(sample, quantiles)
    assert found.ids.tolist() == expected
    for latent, ids in enumerate(expected):
        for place, identity in enumerate(ids):
            value = 0.0 if identity < 0 else float(sample.values[latent, identity % 100])
            assert float(found.values[latent, place]) == value


def test_strata_are_distinct_whatever_their_number():
    sample = make_sample()
    for number in range(1, 15):
        ids = strata(sample, number).ids[0]
        known = ids[ids >= 0].tolist()
        assert len(set(known)) == len(known) == min(number, 11)
        assert known == sorted(known)


@pytest.mark.parametrize("wrong", [0, [], [0.5, 1.5]])
def test_wrong_strata_are_refused(wrong: int | list[float]):
    with pytest.raises(ConfigError):
        strata(make_sample(), wrong)
