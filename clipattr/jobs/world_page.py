"""Turn the world evaluation into the content of the page, and print its scorecard."""

import io
import json
import logging
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.exact import exact_patching
from clipattr.attribution.gradients import attribution_patching
from clipattr.attribution.ranking import active_order
from clipattr.attribution.score import HeadScore, clean_scores
from clipattr.clip import embed_prompts
from clipattr.config.schema import EvaluateWorld
from clipattr.data.images import decode_image
from clipattr.data.shards import Sample
from clipattr.jobs.world_data import WorldData
from clipattr.jobs.world_how import describe_how
from clipattr.jobs.world_results import Inside, Shortcuts
from clipattr.jobs.world_tables import (
    class_rows,
    correction_result,
    exact_result,
    method_results,
    unexpected_result,
)
from clipattr.jobs.world_text import (
    describe_ratio,
    describe_unexpected,
    list_facts,
    summarise,
)
from clipattr.report import (
    CueResult,
    Explained,
    GroupRow,
    LatentCard,
    PairPicture,
    ReportContent,
    ScorecardRow,
    write_report,
)
from clipattr.runs import RunFolder, read_json
from clipattr.semantics.labels import best_label, label_scores, semantic_mean
from clipattr.world.factors import NOUNS, Sticker
from clipattr.world.prompts import ZEROSHOT, concept_prompts

logger = logging.getLogger(__name__)
EXAMPLES_SHOWN = 6
LATENTS_SHOWN = 6
PAIRS_SHOWN = 4


class LatentAtlas:
    """Label, alignment and example pictures of every latent."""

    def __init__(self, data: WorldData, examples: Int[Tensor, "latent n"]) -> None:
        self.samples = data.test.samples
        self.examples = examples
        self.names = list(concept_prompts())
        clip = data.frozen.clip
        means = semantic_mean(data.embeddings(data.test.x), examples)
        texts = embed_prompts(clip, [*concept_prompts().values(), ""])
        self.scores: Float[Tensor, "latent label"] = label_scores(means, texts[:-1], texts[-1])
        self.best = best_label(self.scores)

    def card(self, latent: int, *, attribution: float, effect: float, noun: str) -> LatentCard:
        """How a latent is shown in one prediction of a noun."""
        return LatentCard(
            latent=latent,
            attribution=attribution,
            effect=effect,
            label=self.names[int(self.best.label[latent])],
            alignment=float(self.scores[latent, self.names.index(noun)]),
            examples=self.pictures(latent),
        )

    def pictures(self, latent: int) -> list[bytes]:
        """PNG files of the latent's top images."""
        rows = [row for row in self.examples[latent].tolist() if row >= 0]
        return [read_png(self.samples[row]) for row in rows[:EXAMPLES_SHOWN]]


def read_png(sample: Sample) -> bytes:
    """The sample's picture as the bytes of a PNG file."""
    assert sample.image_field is not None
    buffer = io.BytesIO()
    # 64 colours from an adaptive palette: a third of the bytes, no visible difference.
    image = decode_image(sample.read(sample.image_field)).quantize(64)
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_page(
    config: EvaluateWorld,
    data: WorldData,
    inside: Inside,
    shortcuts: Shortcuts,
    run: RunFolder,
) -> Path:
    """Write report/index.html of the run."""
    assert inside.examples.result is not None
    atlas = LatentAtlas(data, inside.examples.result.ids)
    metrics = read_json(run.path / "metrics.json") or {}
    manifest = read_json(run.path / "manifest.json") or {}
    content = ReportContent(
        title="What drives this CLIP, and is it a shortcut?",
        subtitle=f"The planted world, {len(data.test.samples)} test images, run {config.name}",
        scorecard=_scorecard_rows(inside, atlas),
        methods=method_results(inside.faithfulness),
        unrestricted_lens=inside.faithfulness.local.logit_lens_unrestricted,
        control=method_results(inside.control) if inside.control is not None else [],
        classes=class_rows(inside.faithfulness),
        corrections=correction_result(inside.corrections),
        against_exact=exact_result(inside.against_exact),
        explained=explain_examples(data, atlas, config.evaluation.gallery),
        cues=_cue_results(data, shortcuts),
        groups=_group_rows(shortcuts),
        facts=list_facts(metrics),
        how=describe_how(config.evaluation, inside),
        manifest=_describe_manifest(manifest),
        summary=summarise(metrics),
        unexpected=unexpected_result(inside.unexpected),
    )
    return write_report(content, run.path / "report")


def _scorecard_rows(inside: Inside, atlas: LatentAtlas) -> list[ScorecardRow]:
    return [
        ScorecardRow(
            failure=entry.failure.name,
            title=entry.failure.title,
            question=entry.failure.question,
            prompt=entry.failure.prompt,
            factor=entry.failure.factor,
            latent=entry.latent,
            auroc=entry.auroc,
            rank_attribution=entry.rank_attribution,
            rank_logit_lens=entry.rank_logit_lens,
            n_latents=len(atlas.examples),
            learned=entry.learned,
            mean_attribution=entry.use.mean_attribution,
            share_of_images=entry.use.share_of_images,
            share_positive=entry.use.share_positive,
            examples=atlas.pictures(entry.latent),
        )
        for entry in inside.scorecard
    ]


def explain_examples(data: WorldData, atlas: LatentAtlas, n_examples: int) -> list[Explained]:
    """The first test image of each of the first nouns, explained for the predicted noun."""
    nouns = [str(factors["noun"]) for factors in data.test.factors]
    rows = [nouns.index(noun) for noun in NOUNS if noun in nouns][:n_examples]
    if not rows:
        return []
    clip, spliced = data.frozen.clip, data.spliced
    prompts = ZEROSHOT["shape"].prompts
    weights = embed_prompts(clip, list(prompts))
    x = data.test.x[rows].to(clip.device)
    targets = (data.embeddings(x) @ weights.T).argmax(dim=1)
    score = HeadScore(spliced.cut.suffix, weights, targets)
    codes, W_dec = spliced.sae.encode(x), spliced.sae.directions
    attributions = attribution_patching(score, x, codes, W_dec)
    effects = exact_patching(score, x, codes, W_dec)
    order = active_order(attributions, codes)[:, :LATENTS_SHOWN]
    clean = clean_scores(score, x)
    return [
        Explained(
            image=read_png(data.test.samples[row]),
            caption=str(data.test.factors[row]["caption"]),
            prompt=prompts[int(targets[number])],
            score=float(clean[number]),
            latents=[
                atlas.card(
                    int(codes.indices[number, slot]),
                    attribution=float(attributions[number, slot]),
                    effect=float(effects[number, slot]),
                    noun=NOUNS[int(targets[number])],
                )
                for slot in order[number].tolist()
                if codes.is_active[number, slot]
            ],
        )
        for number, row in enumerate(rows)
    ]


def _cue_results(data: WorldData, shortcuts: Shortcuts) -> list[CueResult]:
    return [
        CueResult(
            cue=entry.cue.name,
            planted=entry.cue is Sticker.tag,
            effect_text=entry.effect_text,
            effect_probe=entry.effect_probe,
            amplification=entry.amplification,
            share_text=entry.share["text"],
            share_probe=entry.share["probe"],
            pairs=_pair_pictures(data, shortcuts, entry.cue),
        )
        for entry in shortcuts.cues
    ]


def _pair_pictures(data: WorldData, shortcuts: Shortcuts, cue: Sticker) -> list[PairPicture]:
    pairs, samples = shortcuts.pairs, data.pairs.samples
    return [
        PairPicture(
            without=read_png(samples[pairs.rows["none"][scene]]),
            with_cue=read_png(samples[pairs.rows[cue.name][scene]]),
            text_without=float(pairs.scores["text", "none"][scene]),
            text_with=float(pairs.scores["text", cue.name][scene]),
            probe_without=float(pairs.scores["probe", "none"][scene]),
            probe_with=float(pairs.scores["probe", cue.name][scene]),
        )
        for scene in range(min(PAIRS_SHOWN, len(pairs.rows["none"])))
    ]


def _group_rows(shortcuts: Shortcuts) -> list[GroupRow]:
    return [
        GroupRow(
            head=entry.head,
            group=f"{entry.label}, {'with' if entry.has_cue else 'without'} tag",
            count=entry.n_images,
            accuracy=entry.accuracy,
        )
        for entry in shortcuts.groups
    ]


def _describe_manifest(manifest: dict[str, object]) -> dict[str, str]:
    kept = ("versions", "git", "seed", "data", "command", "started")
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in manifest.items()
        if name in kept
    }


def print_scorecard(folder: Path) -> None:
    """Log the scorecard and where the page lies."""
    metrics = read_json(folder / "metrics.json") or {}
    logger.info("")
    logger.info(
        "%-32s %12s %12s %7s  learned", "planted failure", "attribution", "logit lens", "AUROC"
    )
    for name, row in metrics["scorecard"].items():
        ranks = f"{row['rank_attribution']:>12} {row['rank_logit_lens']:>12}"
        learned = "yes" if row["learned"] else "no"
        if row["learned"] and row["mean_attribution"]["high"] < 0:
            learned = "yes, lowers the score"
        logger.info("%-32s %s %7.3f  %s", name, ranks, row["auroc"], learned)
    logger.info("(ranks of the responsible latent among all latents, 1 is the top;")
    logger.info(" a latent that lowers the score belongs near the end)")
    logger.info("")
    for cue, row in metrics["shortcut"].items():
        ratio = describe_ratio(row["amplification"])
        logger.info("amplification of the %-5s %s", f"{cue}:", ratio)
    for line in [*summarise(metrics), *describe_unexpected(metrics)]:
        logger.info("%s", line)
    logger.info("")
    logger.info("the page: %s", (folder / "report" / "index.html").resolve())
