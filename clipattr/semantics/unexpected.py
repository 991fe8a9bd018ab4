"""Pairs of a class and a latent that drives it without meaning it, ranked by their evidence.

    evidence = share x specificity
    share        R_cj / sum_j' max(R_cj', 0): of what speaks for the class, what comes from j
    specificity  (R_cj - mean_c' R_c'j) / std_c' R_c'j: how much more j does for c than for others

R_cj is the mean attribution over images: mean attribution where the latent fires times the share of
images in which it does. A pair is a candidate where c is among the classes that the latent drives
most, R_cj >= half of its largest. A candidate is unexpected where the latent's images are nearer to
another word than to the class, by `SIGMAS` standard errors over those images, or where a part of
the class's name is among its labels.

Similar classes share latents, so each latent counts once, by its strongest pair
(`first_of_each_latent`). How many of them chance finds is counted on shuffled latents
(`clipattr.semantics.permutation`); `evidence_threshold` keeps those above which it finds few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

MAIN_SHARE = 0.5
"""R_cj of a candidate, at least, in units of the largest of its latent"""
SIGMAS = 2.0
"""standard errors by which another word must be nearer"""
LABEL_SHARE = 1 / 3
"""score of a label that counts, in units of the best label's"""
# Classes x latents that are compared at a time, and rows whose images are: 64 MB.
_ENTRIES, _ROWS = 2**23, 512


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
    """What a semantic scorer says of the latents; see `clipattr.semantics.describe`."""

    embeddings: Float[Tensor, "image embed"]
    examples: Int[Tensor, "latent n"]
    """images that define the meaning of each latent, padded with -1"""
    labels: Int[Tensor, "latent n_labels"]
    """words of each latent, best first, -1 without examples"""
    label_scores: Float[Tensor, "latent n_labels"]
    words: Float[Tensor, "word embed"]
    classes: Float[Tensor, "class embed"]
    has_part: Bool[Tensor, "class word"]
    """whether a word is a part of the name of a class; `find_parts`"""


class Verdict(NamedTuple):
    """Of each candidate, why it is unexpected, if it is."""

    gap: Float64[Tensor, " pair"]
    """score of the latent's best word minus that of the class, over its images; nan: none"""
    sigmas: Float64[Tensor, " pair"]
    """the gap in standard errors"""
    part: Int[Tensor, " pair"]
    """the label that is a part of the class's name; -1: none is"""

    @property
    def is_unexpected(self) -> Bool[Tensor, " pair"]:
        """Another word is nearer, or a part of the name is among the labels."""
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
    best = meanings.labels[candidates.latents, 0]
    gap = compare(
        meanings.embeddings,
        meanings.examples[candidates.latents].masked_fill((best < 0)[:, None], -1),
        towards=normalize(meanings.words, dim=1)[best.clamp(min=0)],
        away=normalize(meanings.classes, dim=1)[candidates.classes],
    )
    return Verdict(*gap, _find_part(candidates, meanings))


class Gap(NamedTuple):
    """How much nearer images are to one text than to another."""

    mean: Float64[Tensor, " row"]
    """cosine with the one minus cosine with the other, over the images of each row; nan: too few"""
    sigmas: Float64[Tensor, " row"]
    """the mean in standard errors; 0 where both are the same text"""


def compare(
    embeddings: Float[Tensor, "image embed"],
    examples: Int[Tensor, "row n"],
    *,
    towards: Float[Tensor, "row embed"],
    away: Float[Tensor, "row embed"],
) -> Gap:
    """Of each row of images, padded with -1, between two unit texts, in blocks of rows."""
    found = [
        _compare(embeddings, examples[rows], towards[rows].double() - away[rows].double())
        for rows in torch.arange(len(examples), device=examples.device).split(_ROWS)
    ]
    nothing = towards.new_zeros(0, dtype=torch.float64)
    means, sigmas = ([each[number] for each in found] for number in (0, 1))
    return Gap(torch.cat([nothing, *means]), torch.cat([nothing, *sigmas]))


def _compare(
    embeddings: Float[Tensor, "image embed"],
    examples: Int[Tensor, "row n"],
    direction: Float64[Tensor, "row embed"],
) -> Gap:
    """The empty prompt, which scores of both texts subtract, is gone in their difference."""
    is_known = examples >= 0
    images = normalize(embeddings[examples.clamp(min=0)].double(), dim=-1)
    cosines = torch.einsum("rne,re->rn", images, direction)
    n_images = is_known.sum(dim=1)
    mean = cosines.where(is_known, 0).sum(dim=1) / n_images
    squares = (cosines - mean[:, None]).square().where(is_known, 0).sum(dim=1)
    error = (squares / (n_images - 1).clamp(min=1) / n_images).sqrt()
    # The same text twice leaves no gap, and no error to divide it by.
    is_same = direction.abs().amax(dim=1) < 1e-6
    sigmas = torch.where(is_same, 0, mean / error)
    enough = n_images > 1
    return Gap(mean.where(enough, torch.nan), sigmas.where(enough, torch.nan))


def _find_part(candidates: Candidates, meanings: Meanings) -> Int[Tensor, " pair"]:
    """The best of the labels that count and are a part of the class's name."""
    labels, scores = (each[candidates.latents] for each in (meanings.labels, meanings.label_scores))
    counts = (scores > 0) & (scores >= LABEL_SHARE * scores[:, :1]) & (labels >= 0)
    is_part = counts & meanings.has_part[candidates.classes[:, None], labels.clamp(min=0)]
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
    by_chance: Sequence[Float64[Tensor, " shuffled"]],
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
