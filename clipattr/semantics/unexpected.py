"""Pairs of a class and a latent that drives it without meaning it, ranked by their evidence.

    evidence = share x specificity
    share        R_cj / sum_j' max(R_cj', 0): of what speaks for the class, what comes from j
    specificity  (R_cj - mean_c' R_c'j) / std_c' R_c'j: how much more j does for c than for others

R_cj is the mean attribution over images: mean attribution where the latent fires times the share of
images in which it does. A pair is a candidate where c is among the classes that the latent drives
most, R_cj >= half of its largest. A candidate is unexpected where the latent's images are nearer to
another word than to the class, or to a part of the class's name, each by `SIGMAS` standard errors.
The word is chosen on every other image and tested on the rest, or the best of many words would
always win; and what all images share is taken off, or every latent would mean it.

Similar classes share latents, so each latent counts once, by its strongest pair
(`first_of_each_latent`). Two kinds of chance are counted with the same steps: shuffled latents, of
which none drives anything for long (`clipattr.semantics.permutation`), and shuffled images, of
which no latent means anything (`without_meaning`). `evidence_threshold` keeps the pairs above which
both together find few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.semantics.labels import TopLabels, mean_of_examples, top_labels

MAIN_SHARE = 0.5
"""R_cj of a candidate, at least, in units of the largest of its latent"""
SIGMAS = 3.0
"""standard errors by which another word must be nearer"""
LABEL_SHARE = 1 / 3
"""score of a word that may be a part of a name, in units of the best word's"""
WORDS = 5
"""words of each latent among which a part of a name is looked for"""
# Classes x latents that are compared at a time, and pairs whose images are: 64 MB.
_ENTRIES, _PAIRS = 2**23, 2048


class Candidates(NamedTuple):
    """Pairs in which a class is among those that a latent drives most; one row for each pair."""

    classes: Int[Tensor, " pair"]
    latents: Int[Tensor, " pair"]
    attribution: Float64[Tensor, " pair"]
    share: Float64[Tensor, " pair"]
    specificity: Float64[Tensor, " pair"]

    @property
    def evidence(self) -> Float64[Tensor, " pair"]:
        """What the pairs are ranked by."""
        return self.share * self.specificity

    def select(self, chosen: Tensor) -> "Candidates":
        """Some of the pairs, by a mask or in an order."""
        return Candidates(*(column[chosen] for column in self))


class Meanings(NamedTuple):
    """What a semantic scorer sees in the images of the latents, and what it knows by name."""

    embeddings: Float[Tensor, "image embed"]
    """unit rows; nan for an image that is in no example"""
    examples: Int[Tensor, "latent n"]
    """images that define the meaning of each latent, padded with -1"""
    words: Float[Tensor, "word embed"]
    """unit rows, as are those of the classes"""
    classes: Float[Tensor, "class embed"]
    has_part: Bool[Tensor, "class word"]
    """whether a word is a part of the name of a class; `find_parts`"""

    def without_meaning(self, seed: int) -> "Meanings":
        """The same with the embeddings of other images: what latents mean is drawn by lot."""
        known = (~self.embeddings.isnan().any(dim=1)).nonzero().flatten().cpu()
        drawn = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
        embeddings = self.embeddings.clone()
        embeddings[known] = self.embeddings[drawn]
        return self._replace(embeddings=embeddings)


class Verdict(NamedTuple):
    """Of each candidate, why it is unexpected, if it is."""

    word: Int[Tensor, " pair"]
    """the latent's best word, by one half of its images; -1: it has too few"""
    gap: Float64[Tensor, " pair"]
    """cosine with that word minus cosine with the class, over the other half; nan: too few"""
    sigmas: Float64[Tensor, " pair"]
    """the gap in standard errors"""
    part: Int[Tensor, " pair"]
    """a word that is a part of the class's name and that the images are near to; -1: none"""

    @property
    def is_unexpected(self) -> Bool[Tensor, " pair"]:
        """Another word is nearer, or a part of the name is meant."""
        return (self.sigmas >= SIGMAS) | (self.part >= 0)


def speaking_for(mean_attribution: Float[Tensor, "class latent"]) -> Float64[Tensor, " class"]:
    """sum_j max(R_cj, 0): all that speaks for each class, the unit of a share."""
    width = max(1, _ENTRIES // len(mean_attribution))
    blocks = mean_attribution.split(width, dim=1)
    return torch.stack([block.double().clamp(min=0).sum(dim=1) for block in blocks]).sum(dim=0)


def find_candidates(
    mean_attribution: Float[Tensor, "class latent"], speaks_for: Float64[Tensor, " class"]
) -> Candidates:
    """The pairs that are looked at, in blocks of latents.

    `speaks_for` is that of the true names, also for shuffled ones: chance is measured in the same
    units.
    """
    n_classes, n_latents = mean_attribution.shape
    width = max(1, _ENTRIES // n_classes)
    found = [
        _candidates_among(mean_attribution[:, first : first + width].double(), speaks_for, first)
        for first in range(0, n_latents, width)
    ]
    return Candidates(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _candidates_among(
    block: Float64[Tensor, "class latent"], speaks_for: Float64[Tensor, " class"], first: int
) -> Candidates:
    spread = block.std(dim=0)
    specificity = (block - block.mean(dim=0)) / spread
    is_candidate = (block > 0) & (block >= MAIN_SHARE * block.amax(dim=0)) & (specificity > 0)
    latents, classes = is_candidate.T.nonzero(as_tuple=True)
    attribution = block[classes, latents]
    share = attribution / speaks_for[classes]
    return Candidates(classes, latents + first, attribution, share, specificity[classes, latents])


def first_of_each_latent(
    latents: Int[Tensor, " pair"], evidence: Float64[Tensor, " pair"]
) -> Bool[Tensor, " pair"]:
    """Which pairs are the strongest of their latent; of equal ones the first."""
    order = evidence.argsort(descending=True, stable=True)
    _, group = latents[order].unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1 if len(group) else 0,), len(order))
    places = torch.arange(len(order))
    first = first.to(order.device).scatter_reduce(0, group, places.to(order.device), "amin")
    is_first = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    is_first[order[first]] = True
    return is_first


def find_parts(class_names: Sequence[str], words: Sequence[str]) -> Bool[Tensor, "class word"]:
    """Whether a word stands in the name of a class, whole, without being the name."""
    names = [f" {' '.join(name.lower().split())} " for name in class_names]
    wanted = [f" {' '.join(word.lower().split())} " for word in words]
    rows = [[word in name and word != name for word in wanted] for name in names]
    return torch.tensor(rows, dtype=torch.bool).view(len(names), len(wanted))


@torch.no_grad()
def judge(candidates: Candidates, meanings: Meanings) -> Verdict:
    """Compare what each latent means with the class that it drives."""
    latents, classes = candidates.latents, candidates.classes
    chosen_on, tested_on = meanings.examples[:, 0::2], meanings.examples[:, 1::2]
    # What all images share has no meaning; an image that is no example may be nan.
    centred = meanings._replace(embeddings=meanings.embeddings - meanings.embeddings.nanmean(dim=0))
    n_words = min(WORDS, len(meanings.words))
    nothing = torch.zeros_like(meanings.words[0])
    means = mean_of_examples(centred.embeddings, chosen_on)
    found = top_labels(means, meanings.words, nothing, n=n_words)
    word = found.labels[latents, 0]
    gap = compare(
        centred.embeddings,
        tested_on.masked_fill(found.labels[:, :1] < 0, -1),
        latents,
        towards=Texts(meanings.words, word.clamp(min=0)),
        away=Texts(meanings.classes, classes),
    )
    part = _choose_part(candidates, found, meanings.has_part)
    none = torch.zeros(1, meanings.words.shape[1], dtype=meanings.words.dtype)
    nearness = compare(
        centred.embeddings,
        tested_on,
        latents,
        towards=Texts(meanings.words, part.clamp(min=0)),
        away=Texts(none.to(part.device), torch.zeros_like(part)),
    )
    return Verdict(word, *gap, part.where(nearness.sigmas >= SIGMAS, -1))


class Texts(NamedTuple):
    """A text for each pair: a row of a table."""

    table: Float[Tensor, "text embed"]
    rows: Int[Tensor, " pair"]

    def select(self, pairs: Tensor) -> Float[Tensor, "pair embed"]:
        """Of some pairs."""
        return self.table[self.rows[pairs]]


class Gap(NamedTuple):
    """How much nearer images are to one text than to another."""

    mean: Float64[Tensor, " pair"]
    """cosine with the one minus cosine with the other, over the images; nan: fewer than two"""
    sigmas: Float64[Tensor, " pair"]
    """the mean in standard errors; 0 where both are the same text"""


@torch.no_grad()
def compare(
    embeddings: Float[Tensor, "image embed"],
    examples: Int[Tensor, "latent n"],
    latents: Int[Tensor, " pair"],
    *,
    towards: Texts,
    away: Texts,
) -> Gap:
    """Of the images of each pair's latent, padded with -1, between two texts; a block at a time."""
    found = [
        _compare(embeddings, examples[latents[pairs]], towards.select(pairs) - away.select(pairs))
        for pairs in torch.arange(len(latents), device=latents.device).split(_PAIRS)
    ]
    nothing = torch.zeros(0, dtype=torch.float64, device=latents.device)
    means, sigmas = ([each[number] for each in found] for number in (0, 1))
    return Gap(torch.cat([nothing, *means]), torch.cat([nothing, *sigmas]))


def _compare(
    embeddings: Float[Tensor, "image embed"],
    examples: Int[Tensor, "pair n"],
    direction: Float[Tensor, "pair embed"],
) -> Gap:
    """The empty prompt, which scores of both texts subtract, is gone in their difference."""
    is_known = examples >= 0
    cosines = torch.einsum("pne,pe->pn", embeddings[examples.clamp(min=0)], direction).double()
    n_images = is_known.sum(dim=1)
    mean = cosines.where(is_known, 0).sum(dim=1) / n_images
    squares = (cosines - mean[:, None]).square().where(is_known, 0).sum(dim=1)
    error = (squares / (n_images - 1).clamp(min=1) / n_images).sqrt()
    # The same text twice leaves no gap, and no error to divide it by.
    is_same = direction.abs().amax(dim=1) < 1e-6
    sigmas = torch.where(is_same, 0, mean / error)
    enough = n_images > 1
    return Gap(mean.where(enough, torch.nan), sigmas.where(enough, torch.nan))


def _choose_part(
    candidates: Candidates, found: TopLabels, has_part: Bool[Tensor, "class word"]
) -> Int[Tensor, " pair"]:
    """The best of the words that count and are a part of the class's name."""
    labels, scores = (each[candidates.latents] for each in (found.labels, found.scores))
    counts = (scores > 0) & (scores >= LABEL_SHARE * scores[:, :1]) & (labels >= 0)
    is_part = counts & has_part[candidates.classes[:, None], labels.clamp(min=0)]
    first = is_part.int().argmax(dim=1, keepdim=True)
    return labels.gather(1, first)[:, 0].where(is_part.any(dim=1), -1)


class Threshold(NamedTuple):
    """Of the evidence: what is kept, and what chance finds above it."""

    evidence: float
    """the smallest that is kept; inf: nothing is"""
    n_found: int
    n_by_chance: float
    """found on shuffled latents, a mean over the shuffles"""

    @property
    def false_discovery_rate(self) -> float:
        """The share of the kept pairs that chance would have found."""
        return self.n_by_chance / self.n_found if self.n_found else 0.0


def evidence_threshold(
    found: Float64[Tensor, " pair"],
    by_chance: Sequence[Float64[Tensor, " _"]],
    *,
    level: float,
) -> Threshold:
    """The lowest evidence at which chance finds at most `level` as many pairs.

    Reference: Tusher, Tibshirani and Chu 2001, significance analysis of microarrays.
    """
    ordered = found.sort(descending=True).values
    chance = torch.cat(list(by_chance)).sort().values
    # Of equal values all are kept or none.
    n_above = len(chance) - torch.searchsorted(chance, ordered)
    n_kept = len(ordered) - torch.searchsorted(ordered.flip(0), ordered)
    allowed = (n_above / len(by_chance) <= level * n_kept).nonzero().flatten()
    if not len(allowed):
        return Threshold(torch.inf, 0, 0.0)
    last = int(allowed[-1])
    return Threshold(float(ordered[last]), int(n_kept[last]), float(n_above[last]) / len(by_chance))
