"""Turns what was found into the pages of the atlas."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from clipattr.config.schema import Atlas
from clipattr.jobs.atlas_choice import latents_of_class, moved_classes
from clipattr.jobs.atlas_inputs import Scored
from clipattr.jobs.atlas_pass import Found
from clipattr.jobs.atlas_tables import latent_numbers
from clipattr.jobs.atlas_unexpected import Pair, Unexpected
from clipattr.metrics.best_pairs import Examples
from clipattr.report import Fact
from clipattr.report.atlas import (
    ClassEntry,
    ClassLatent,
    Column,
    Example,
    Label,
    LatentEntry,
    Overview,
    PairPoint,
    Reliance,
    UnexpectedEntry,
    write_site,
)
from clipattr.runs import RunFolder, read_json
from clipattr.semantics.describe import Semantics
from clipattr.semantics.kinds import Kind
from clipattr.semantics.unexpected import MAIN_SHARE, SIGMAS

# Pairs of the scatter beside the unexpected ones.
_POINTS = 2000
# Images below which the meaning of a latent has no standard error.
_FEWEST = 2
_COLUMNS = {
    "frequency": ("frequency", "share of the images in which the latent fires"),
    "mean_activation": ("mean activation", "over the images in which it fires"),
    "largest_activation": ("largest activation", "over all images"),
    "clarity": ("clarity", "mean cosine between its top images: 1 is always the same"),
    "monosemanticity": (
        "monosemanticity",
        "mean cosine between all images, each pair weighted by its activations",
    ),
    "polysemanticity": (
        "polysemanticity",
        "1 - cosine between the two heaps into which its top images fall",
    ),
    "nearest_cosine": ("redundancy", "largest cosine of its direction with another latent's"),
    "nearest_latent": ("nearest latent", "whose direction that is"),
    "label_margin": ("label margin", "score of its best label minus that of the second"),
    "class_entropy": ("class entropy", "of the labels of its images: 0 one class, 1 all alike"),
    "top_class_share": ("top class share", "of its images the share with the commonest label"),
}


def shown_images(config: Atlas, found: Found) -> Int[Tensor, " image"]:
    """Rows of all images on the pages, each once."""
    rows = [found.top.ids[:, : config.atlas.shown].flatten()]
    if found.spread is not None:
        rows.append(found.spread.ids.flatten())
    every = torch.cat(rows).unique()
    return every[every >= 0]


def write_pages(
    config: Atlas,
    run: RunFolder,
    found: Found,
    semantics: Semantics,
    scored: Scored,
    unexpected: Unexpected,
    heat: UInt8[Tensor, "latent shown row column"] | None,
) -> Path:
    """Write report/ of the run and return its index.html; `heat` is of the top images."""
    pages = _Pages(config, found, semantics, scored, unexpected, heat)
    manifest = read_json(run.path / "manifest.json") or {}
    overview = pages.overview(manifest)
    return write_site(run.path / "report", overview, pages.latents(), pages.classes())


class _Pages:
    """The same few tables are read for every page."""

    def __init__(
        self,
        config: Atlas,
        found: Found,
        semantics: Semantics,
        scored: Scored,
        unexpected: Unexpected,
        heat: Tensor | None,
    ) -> None:
        self.config, self.found, self.semantics = config, found, semantics
        self.scored, self.unexpected, self.heat = scored, unexpected, heat
        self.numbers = latent_numbers(found, semantics)
        self.known = {(pair.class_number, pair.latent): pair for pair in unexpected.pairs}
        self.mean = found.reliance.mean_attribution

    def overview(self, manifest: dict[str, object]) -> Overview:
        """What all pages share."""
        config, texts = self.config, self.scored.texts
        activity = self.found.latents.activity
        assert activity is not None, "after the pass"
        n_fire = int((activity.firing_counts > 0).sum())
        kept = ("versions", "git", "seed", "data", "command", "started")
        return Overview(
            title="What the latents mean, and where the unexpected drives a prediction",
            subtitle=f"{config.sae}, {activity.n_rows:,} images of {config.data.shards}",
            summary=self._summarise(),
            facts=[
                Fact("latents", f"{len(self.mean.T):,}", f"{n_fire:,} fire on these images"),
                Fact("classes", f"{len(texts.names):,}", "whose scores are attributed"),
                Fact("words", f"{len(texts.words):,}", "among which labels are chosen"),
                Fact(
                    "unexpected",
                    f"{len(self.unexpected.listed):,}",
                    f"latents, in {len(self.known):,} pairs with a class",
                ),
            ],
            columns=[
                Column(name, *_COLUMNS[name], name == "nearest_latent") for name in self.numbers
            ],
            class_names=texts.names,
            score_name="logit" if config.probe is not None else "cosine with the prompt",
            over=self.found.reliance.over,
            map_shares=self._map_shares(),
            unexpected=[
                UnexpectedEntry(pair.class_number, self._pair(pair.class_number, pair.latent))
                for pair in self.unexpected.listed
            ],
            if_empty=self._why_empty(),
            points=self._points(),
            manifest={
                name: value if isinstance(value, str) else json.dumps(value)
                for name, value in manifest.items()
                if name in kept
            },
        )

    def _summarise(self) -> list[str]:
        threshold = self.unexpected.threshold
        settings = self.config.atlas
        rule = (
            "A latent is unexpected for a class that it drives (its mean attribution is at least "
            f"{MAIN_SHARE:.0%} of the largest that the latent has for any class) where its images "
            "are nearer to another word than to the class, or to a part of the class's name, each "
            f"by {SIGMAS:.0f} standard errors over images on which the word was not chosen."
        )
        ranking = (
            "Evidence is the share of the class's positive attribution that comes from the latent, "
            "times how much more it does for this class than for others, in standard deviations. "
            "Similar classes share latents: the list has each latent once, for its strongest class."
        )
        null = (
            f"The list has {threshold.n_found} latents. The same steps find "
            f"{self.unexpected.by_names:.1f} at least as strong where latents are shuffled in each "
            f"image, and {self.unexpected.by_meanings:.1f} where images are shuffled, so that no "
            f"latent means anything ({threshold.false_discovery_rate:.1%} together; the limit is "
            f"{settings.level:.0%}). What kind a pair is of, rules suggest; look at the pictures."
        )
        return [rule, ranking, null]

    def _why_empty(self) -> str:
        """What a reader without a list asks."""
        n_candidates, n_examples = self.unexpected.n_candidates, self.semantics.n_examples
        n_unknown = int((n_examples < _FEWEST).sum())
        found = (
            f"Of {n_candidates:,} unexpected pairs of a class and a latent none is above chance."
            if n_candidates
            else "No latent drives a class and means something else."
        )
        return (
            f"Nothing is listed. {found} {n_unknown:,} of {len(n_examples):,} latents fire on "
            f"fewer than {_FEWEST} images, too few to say what they mean; more images may help."
        )

    def _map_shares(self) -> tuple[float, float]:
        first, second = self.semantics.map_shares
        return float(first), float(second)

    def _points(self) -> list[PairPoint]:
        """All unexpected pairs, and the strongest of the others."""
        positive = self.mean.flatten()
        n_points = min(_POINTS, positive.numel())
        strongest = positive.topk(n_points).indices.tolist()
        n_latents = self.mean.shape[1]
        pairs = dict.fromkeys([*self.known, *(divmod(place, n_latents) for place in strongest)])
        return [
            PairPoint(
                number,
                latent,
                float(self.unexpected.alignment[latent, number]),
                float(self.mean[number, latent]),
                (number, latent) in self.known,
            )
            for number, latent in pairs
            if self.mean[number, latent] > 0
        ]

    def latents(self) -> Iterator[LatentEntry]:
        """One entry after the other: no list of all of them."""
        words = self.scored.texts.words
        moved = moved_classes(self.mean, n_raised=self.config.atlas.classes_shown)
        for latent, classes in enumerate(moved):
            rows = self.semantics.labels[latent].tolist()
            scores = self.semantics.label_scores[latent].tolist()
            is_dead = rows[0] < 0
            yield LatentEntry(
                latent=latent,
                labels=[
                    Label(words[row], score)
                    for row, score in zip(rows, scores, strict=True)
                    if row >= 0
                ],
                margin=None if is_dead else float(self.semantics.label_margin[latent]),
                numbers={name: self._number(name, latent) for name in self.numbers},
                x=float(self.semantics.position[latent, 0]),
                y=float(self.semantics.position[latent, 1]),
                top=_examples(self.found.top, latent, self.config.atlas.shown, self.heat),
                spread=(
                    []
                    if self.found.spread is None
                    else _examples(self.found.spread, latent, self.config.atlas.spread)
                ),
                reliance=[self._reliance(number, latent) for number in classes],
                is_dead=is_dead,
            )

    def _number(self, name: str, latent: int) -> float | None:
        value = self.numbers[name][latent]
        assert value is None or isinstance(value, (int, float)), "a column of numbers"
        return None if value is None else float(value)

    def classes(self) -> Iterator[ClassEntry]:
        """The unexpected latents of strongest evidence, then the others that drive it most."""
        n_each = 2 * self.config.atlas.classes_shown
        by_class: dict[int, list[int]] = {}
        for pair in self.unexpected.pairs:
            by_class.setdefault(pair.class_number, []).append(pair.latent)
        for number, row in enumerate(self.mean):
            found = latents_of_class(row, by_class.get(number, []), n_each=n_each)
            pairs = [self._pair(number, latent) for latent in (*found.unexpected, *found.others)]
            yield ClassEntry(number, pairs, found.n_more)

    def _reliance(self, number: int, latent: int) -> Reliance:
        pair = self.known.get((number, latent))
        return Reliance(
            number,
            float(self.mean[number, latent]),
            self._share_of_images(number, latent),
            float(self.found.reliance.share_positive[number, latent]),
            float(self.unexpected.alignment[latent, number]),
            _kind(pair),
        )

    def _pair(self, number: int, latent: int) -> ClassLatent:
        pair = self.known.get((number, latent))
        share = self._share_of_images(number, latent)
        counterpart = int(self.unexpected.counterparts[number])
        return ClassLatent(
            latent=latent,
            mean_attribution=float(self.mean[number, latent]),
            share_of_images=share,
            share_positive=float(self.found.reliance.share_positive[number, latent]),
            alignment=float(self.unexpected.alignment[latent, number]),
            is_unexpected=pair is not None,
            evidence=float("nan") if pair is None else pair.evidence,
            kind=_kind(pair),
            reasons=[] if pair is None else [each.reason for each in pair.suggestions],
            counterpart=None if counterpart in (-1, latent) else counterpart,
        )

    def _share_of_images(self, number: int, latent: int) -> float:
        share = self.found.reliance.share_of_images
        return float(share[latent] if share.ndim == 1 else share[number, latent])


def _kind(pair: Pair | None) -> str:
    if pair is None:
        return ""
    kind: Kind = pair.suggestions[0].kind
    return kind.value


def _examples(examples: Examples, latent: int, n: int, heat: Tensor | None = None) -> list[Example]:
    ids, values = examples.ids[latent, :n].tolist(), examples.values[latent, :n].tolist()
    grids = [None] * len(ids) if heat is None else heat[latent].tolist()
    return [
        Example(row, value, grid)
        for row, value, grid in zip(ids, values, grids, strict=True)
        if row >= 0
    ]
