"""Answer the three questions on the planted world, graded against its truth, and show the page."""

from pathlib import Path

import lightning as L
import torch

from clipattr.attribution import LastLayerHead, closed_form_attribution, logit_lens_table
from clipattr.callbacks import ExamplesCallback, ReconstructionCallback, RelianceCallback
from clipattr.clip import embed_prompts
from clipattr.config.schema import EvaluateWorld
from clipattr.files import read_sha256
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.jobs.untrained import build_untrained
from clipattr.jobs.world_attribution import compare_with_exact, measure_corrections, read_estimates
from clipattr.jobs.world_data import WorldData, load_world, split_folder
from clipattr.jobs.world_faithfulness import measure_faithfulness, run_test
from clipattr.jobs.world_metrics import collect_metrics
from clipattr.jobs.world_page import print_scorecard, write_page
from clipattr.jobs.world_results import Inside, Shortcuts
from clipattr.jobs.world_scorecard import ScorecardEntry, grade
from clipattr.jobs.world_shortcuts import (
    build_heads,
    find_cue_latents,
    measure_cue,
    measure_groups,
    pair_scores,
    read_columns,
)
from clipattr.jobs.world_unexpected import Grade, grade_list, read_list
from clipattr.jobs.world_zeroshot import zeroshot_accuracy
from clipattr.semantics.atlas_files import load_atlas
from clipattr.world.factors import Sticker
from clipattr.world.prompts import ZEROSHOT, planted_failures
from clipattr.world.sampling import Split


def evaluate_world(config: EvaluateWorld, command: list[str]) -> None:
    """Write metrics.json and report/index.html of the run."""
    plan = Plan(config, command, _describe_inputs(config), ("metrics.json", "report/index.html"))
    if plan.is_finished():
        print_scorecard(Path(config.runs) / config.name)
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = load_world(config)
    run = plan.open()
    inside = look_inside(config, data, run.path)
    shortcuts = measure_shortcuts(config, data, run.path)
    zeroshot = zeroshot_accuracy(data.frozen.clip, data.embeddings(data.test.x), data.test.factors)
    splits = {"test": data.test, "task_test": data.task_test, "task_pairs": data.pairs}
    run.update_manifest(data={name: rows.fingerprint for name, rows in splits.items()})
    run.write_metrics(collect_metrics(inside, shortcuts, zeroshot))
    write_page(config, data, inside, shortcuts, run)
    run.finish()
    print_scorecard(run.path)


def _describe_inputs(config: EvaluateWorld) -> dict[str, object]:
    splits = (Split.test, Split.task_test, Split.task_pairs)
    weights = [Path(config.sae) / "sae.safetensors", Path(config.probe) / "probe.safetensors"]
    if config.atlas is not None:
        weights += [Path(config.atlas) / name for name in ("atlas.json", "unexpected.parquet")]
    return {
        "model": describe_model(config.model),
        "shards": [describe_shards(split_folder(config, split), "world") for split in splits],
        "weights": describe_files(weights),
    }


def look_inside(config: EvaluateWorld, data: WorldData, folder: Path) -> Inside:
    """Everything about the first two questions, the untrained dictionary beside the trained one."""
    settings, spliced = config.evaluation, data.spliced
    draw = {"resamples": settings.resamples, "seed": config.seed}
    nouns = embed_prompts(data.frozen.clip, list(ZEROSHOT["shape"].prompts))
    x = data.test.x[: settings.images]
    predicted = (data.embeddings(x) @ nouns.T).argmax(dim=1)
    prompts = list(dict.fromkeys(failure.prompt for failure in planted_failures()))
    reconstruction = ReconstructionCallback(spliced)
    examples = ExamplesCallback(n_latents=spliced.sae.n_latents, n_examples=settings.top_examples)
    reliance = RelianceCallback(spliced, embed_prompts(data.frozen.clip, prompts))
    run_test(config, spliced, data.test.x, folder, [reconstruction, examples, reliance])
    control = None
    if settings.control:
        n_active = max(1, round(reconstruction.sae["l0"]))
        untrained = build_untrained(spliced, x, k=n_active, seed=config.seed)
        control = measure_faithfulness(config, untrained, x, folder, nouns, predicted)
    estimates = read_estimates(spliced, x.to(nouns.device), nouns, predicted)
    scorecard = _scorecard(config, data, prompts, reliance)
    return Inside(
        reconstruction=reconstruction,
        examples=examples,
        faithfulness=measure_faithfulness(config, spliced, x, folder, nouns, predicted),
        control=control,
        corrections=measure_corrections(estimates, **draw),
        against_exact=compare_with_exact(estimates, **draw),
        scorecard=scorecard,
        unexpected=None if config.atlas is None else _grade(config, data, scorecard),
    )


def _grade(config: EvaluateWorld, data: WorldData, scorecard: list[ScorecardEntry]) -> Grade:
    """The list of an atlas against the failures of the nouns, of which it is."""
    assert config.atlas is not None, "or there is nothing to grade"
    load_atlas(config.atlas, expected_sae=read_sha256(Path(config.sae), "sae"))
    nouns = set(ZEROSHOT["shape"].prompts)
    entries = [entry for entry in scorecard if entry.failure.prompt in nouns]
    with torch.no_grad():
        codes = data.spliced.sae.encode(data.test.x.to(data.frozen.clip.device))
    return grade_list(
        read_list(config.atlas),
        [(entry.failure, entry.learned) for entry in entries],
        activations=codes.to_dense().cpu(),
        shows_factor=[data.test.where(entry.failure.shows_factor) for entry in entries],
        shows_class=[data.test.where(entry.failure.shows_class) for entry in entries],
    )


def _scorecard(
    config: EvaluateWorld, data: WorldData, prompts: list[str], reliance: RelianceCallback
) -> list[ScorecardEntry]:
    assert reliance.mean_attribution is not None
    spliced = data.spliced
    directions = spliced.sae.directions.detach()
    texts = embed_prompts(data.frozen.clip, prompts)
    lens = logit_lens_table(spliced.cut.suffix, directions, texts)
    head = LastLayerHead(*spliced.cut.last_layer(), texts)
    scores = data.embeddings(data.test.x) @ texts.T
    x = data.test.x.to(texts.device)
    with torch.no_grad():
        codes = spliced.sae.encode(x)
    # Dense on purpose: AUROC ranks every latent over all images, and this dictionary is small.
    activations = codes.to_dense()
    entries: list[ScorecardEntry] = []
    for failure in planted_failures():
        number = prompts.index(failure.prompt)
        targets = torch.full((len(x),), number, device=x.device)
        entries.append(
            grade(
                failure,
                activations=activations,
                scores=scores[:, number],
                shows_factor=data.test.where(failure.shows_factor).to(texts.device),
                shows_class=data.test.where(failure.shows_class).to(texts.device),
                mean_attribution=reliance.mean_attribution[number],
                logit_lens=lens[number],
                codes=codes,
                attributions=closed_form_attribution(head, x, codes, directions, targets),
                resamples=config.evaluation.resamples,
                seed=config.seed,
            )
        )
    return entries


def measure_shortcuts(config: EvaluateWorld, data: WorldData, folder: Path) -> Shortcuts:
    """Score the task's test images and the counterfactual pairs with both heads."""
    options = {"resamples": config.evaluation.resamples, "seed": config.seed}
    codes = data.spliced.sae.encode(data.task_test.x.to(data.frozen.clip.device))
    cue_latents = find_cue_latents(codes.to_dense().cpu(), data.task_test)
    on_task = build_heads(data, cue_latents)
    on_pairs = build_heads(data, cue_latents)
    run_test(config, data.spliced, data.task_test.x, folder, [on_task])
    run_test(config, data.spliced, data.pairs.x, folder, [on_pairs])
    assert on_task.result is not None, "after the test"
    assert on_pairs.result is not None, "after the test"
    task_scores, pair_rows = read_columns(on_task.result), read_columns(on_pairs.result)
    pairs = pair_scores(pair_rows, task_scores, data.pairs)
    cues = [
        measure_cue(cue, latents, on_task=task_scores, on_pairs=pair_rows, pairs=pairs, **options)
        for cue, latents in cue_latents.items()
    ]
    groups, heads = measure_groups(task_scores, data.task_test, Sticker.tag, **options)
    return Shortcuts(cues, groups, heads, pairs)
