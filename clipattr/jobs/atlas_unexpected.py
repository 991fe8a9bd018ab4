"""The ranked list of unexpected reliance, what chance finds, and kinds that rules suggest."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.jobs.atlas_inputs import Scored
from clipattr.jobs.atlas_pass import Chance, Found
from clipattr.metrics.class_spread import ClassSpreadResult
from clipattr.semantics.describe import Semantics
from clipattr.semantics.kinds import Evidence, Suggestion, suggest_kinds
from clipattr.semantics.labels import alignment
from clipattr.semantics.unexpected import (
    Candidates,
    Meanings,
    Texts,
    Threshold,
    Verdict,
    compare,
    evidence_threshold,
    find_candidates,
    find_parts,
    first_of_each_latent,
    judge,
    speaking_for,
)


class Pair(NamedTuple):
    """A class that relies on a latent that means something else."""

    rank: int | None
    """place of the latent on the list; None: another class is listed for it"""
    class_number: int
    latent: int
    attribution: float
    share: float
    specificity: float
    evidence: float
    share_of_images: float
    share_positive: float
    alignment: float
    aligned_share: float
    gap: float
    sigmas: float
    counterpart: int | None
    suggestions: list[Suggestion]


class Unexpected(NamedTuple):
    """Pairs, strongest first, and what they stand on."""

    pairs: list[Pair]
    threshold: Threshold
    """of the latents, each by its strongest pair"""
    by_names: float
    """as strong ones of shuffled latents, a mean over the shuffles"""
    by_meanings: float
    """of shuffled images, of which no latent means anything"""
    n_candidates: int
    alignment: Float[Tensor, "latent class"]
    counterparts: Int[Tensor, " class"]
    """the latent that means each class and drives it most; -1: none"""

    @property
    def listed(self) -> list[Pair]:
        """The ranked list: each latent once."""
        return [pair for pair in self.pairs if pair.rank is not None]


def find_unexpected(
    found: Found, semantics: Semantics, scored: Scored, *, n_examples: int, level: float
) -> Unexpected:
    """Candidates of the true names, above the evidence that false names reach."""
    texts = scored.texts
    meanings = Meanings(
        scored.embeddings,
        found.top.ids[:, :n_examples],
        texts.of_words,
        texts.of_classes,
        find_parts(texts.class_words, texts.words),
    )
    speaks_for = speaking_for(found.reliance.mean_attribution)
    candidates = find_candidates(found.reliance.mean_attribution, speaks_for)
    verdict = judge(candidates, meanings)
    by_names = [_by_names(chance, speaks_for, meanings) for chance in found.chance]
    seeds = range(len(by_names))
    by_meanings = [_unexpected_evidence(candidates, meanings.without_meaning(s)) for s in seeds]
    together = [torch.cat(both) for both in zip(by_names, by_meanings, strict=True)]
    unexpected = candidates.select(verdict.is_unexpected)
    threshold = evidence_threshold(_strongest(unexpected), together, level=level)
    order = candidates.evidence.argsort(descending=True, stable=True)
    kept = verdict.is_unexpected & (candidates.evidence >= threshold.evidence)
    order = order[kept[order]]
    aligned = alignment(semantics.means, texts.of_classes, texts.empty)
    counterparts = _find_counterparts(found.reliance.mean_attribution, aligned)
    chosen, verdict = candidates.select(order), Verdict(*(column[order] for column in verdict))
    describer = _Describer(found, semantics, scored, aligned, counterparts)
    return Unexpected(
        pairs=list(describer.pairs(chosen, verdict, meanings)),
        threshold=threshold,
        by_names=_mean_above(by_names, threshold),
        by_meanings=_mean_above(by_meanings, threshold),
        n_candidates=len(unexpected.classes),
        alignment=aligned,
        counterparts=counterparts,
    )


def _by_names(chance: Chance, speaks_for: Tensor, meanings: Meanings) -> Tensor:
    """The same steps with false names of the latents."""
    candidates = find_candidates(chance.mean_attribution, speaks_for)
    return _unexpected_evidence(candidates, meanings._replace(examples=chance.examples))


def _unexpected_evidence(candidates: Candidates, meanings: Meanings) -> Tensor:
    """Of each latent that is unexpected in some pair, the evidence of its strongest."""
    return _strongest(candidates.select(judge(candidates, meanings).is_unexpected))


def _mean_above(found: list[Tensor], threshold: Threshold) -> float:
    return sum(int((each >= threshold.evidence).sum()) for each in found) / len(found)


def _strongest(candidates: Candidates) -> Tensor:
    """Evidence of each latent: that of its strongest pair."""
    evidence = candidates.evidence
    return evidence[first_of_each_latent(candidates.latents, evidence)]


def _find_counterparts(
    mean_attribution: Float[Tensor, "class latent"], aligned: Float[Tensor, "latent class"]
) -> Int[Tensor, " class"]:
    """Among the latents whose nearest class it is, the one that drives it most."""
    nearest = aligned.nan_to_num(-torch.inf).argmax(dim=1)
    numbers = torch.arange(len(mean_attribution))
    means_it = (nearest == numbers[:, None]) & ~aligned[:, 0].isnan()
    drive, latent = mean_attribution.where(means_it, -torch.inf).max(dim=1)
    return latent.where(drive > 0, -1)


class _Describer:
    """Fills in the rows of the list: what is known of a pair, and which rules hold."""

    def __init__(
        self,
        found: Found,
        semantics: Semantics,
        scored: Scored,
        aligned: Float[Tensor, "latent class"],
        counterparts: Int[Tensor, " class"],
    ) -> None:
        self.found, self.texts = found, scored.texts
        self.aligned, self.counterparts = aligned, counterparts
        # All images share a direction, which says nothing about how alike two latents are.
        self.centred = normalize(semantics.means - semantics.means.nanmean(dim=0), dim=1)

    def written_sigmas(
        self, candidates: Candidates, words: Tensor, meanings: Meanings
    ) -> Float64[Tensor, " pair"]:
        """By how much the images are nearer to the class's name in writing than to their word."""
        return compare(
            meanings.embeddings,
            meanings.examples[:, 1::2],
            candidates.latents,
            towards=Texts(self.texts.of_written, candidates.classes),
            away=Texts(self.texts.of_words, words),
        ).sigmas

    def aligned_shares(self, candidates: Candidates) -> Float64[Tensor, " pair"]:
        """Of the latents with a meaning, which share aligns with the class at least as well."""
        known = self.aligned[~self.aligned[:, 0].isnan()]
        shares = torch.zeros(len(candidates.classes), dtype=torch.float64)
        for number in candidates.classes.unique().tolist():
            rows = (candidates.classes == number).nonzero().flatten()
            column = known[:, number].sort().values
            below = torch.searchsorted(column, self.aligned[candidates.latents[rows], number])
            shares[rows] = 1 - below.double() / len(column)
        return shares

    def evidence(
        self, number: int, latent: int, part: int, word: int, written: float, aligned: float
    ) -> Evidence:
        """What the rules read."""
        counterpart: int | None = int(self.counterparts[number])
        if counterpart in (-1, latent):
            counterpart = None
        label = self.texts.words[word]
        lift, of_class = _read_spread(self.found.latents.spread, latent, number)
        return Evidence(
            class_name=self.texts.class_words[number],
            label=label,
            label_is_class=label in self.texts.class_words,
            part=self.texts.words[part] if part >= 0 else None,
            written_sigmas=written,
            alignment=float(self.aligned[latent, number]),
            aligned_share=aligned,
            counterpart=counterpart,
            counterpart_cosine=(
                None
                if counterpart is None
                else float(self.centred[latent] @ self.centred[counterpart])
            ),
            lift=lift,
            share_of_class=of_class,
        )

    def pairs(self, candidates: Candidates, verdict: Verdict, meanings: Meanings) -> Iterator[Pair]:
        """One row for each candidate, in their order."""
        written = self.written_sigmas(candidates, verdict.word, meanings).tolist()
        aligned, words = self.aligned_shares(candidates).tolist(), verdict.word.tolist()
        reliance, strength = self.found.reliance, candidates.evidence
        share = reliance.share_of_images.expand_as(reliance.mean_attribution)
        is_first = first_of_each_latent(candidates.latents, strength)
        ranks = is_first.cumsum(0).tolist()
        for row, (number, latent) in enumerate(
            zip(candidates.classes.tolist(), candidates.latents.tolist(), strict=True)
        ):
            part = int(verdict.part[row])
            evidence = self.evidence(number, latent, part, words[row], written[row], aligned[row])
            yield Pair(
                rank=ranks[row] if is_first[row] else None,
                class_number=number,
                latent=latent,
                attribution=float(candidates.attribution[row]),
                share=float(candidates.share[row]),
                specificity=float(candidates.specificity[row]),
                evidence=float(strength[row]),
                share_of_images=float(share[number, latent]),
                share_positive=float(reliance.share_positive[number, latent]),
                alignment=evidence.alignment,
                aligned_share=evidence.aligned_share,
                gap=float(verdict.gap[row]),
                sigmas=float(verdict.sigmas[row]),
                counterpart=evidence.counterpart,
                suggestions=suggest_kinds(evidence),
            )


def _read_spread(
    spread: ClassSpreadResult | None, latent: int, number: int
) -> tuple[float | None, float | None]:
    """How much more often it fires on images of the class, and their share of those it fires on."""
    if spread is None:
        return None, None
    fired, of_class = spread.counts[latent].sum().item(), int(spread.n_images[number])
    if not fired or not of_class:
        return None, None
    both = int(spread.counts[latent, number])
    frequency = fired / int(spread.n_images.sum())
    return both / of_class / frequency, both / fired
