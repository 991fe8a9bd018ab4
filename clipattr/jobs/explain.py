"""Why one image has its score: the latents behind it, as a table, numbers and a picture."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.atomic import write_bytes, write_text
from clipattr.attribution import baselines, explanation, gradients
from clipattr.attribution.exact import corrected_patching, exact_patching
from clipattr.attribution.explanation import Attribute, Explanation
from clipattr.attribution.score import HeadScore, Score, contrast
from clipattr.clip import Clip, Tower, image_tower, prompt_head
from clipattr.codes import SparseCodes
from clipattr.config.choices import ExplainMethod
from clipattr.config.fields import suggest
from clipattr.config.schema import Explain
from clipattr.data.pixels import Pixels
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.evaluate_sae import load_spliced
from clipattr.jobs.explain_known import find_known, load_meanings, load_pictures
from clipattr.jobs.image_file import decode_image_file, read_image_file
from clipattr.jobs.model import load_model
from clipattr.jobs.start import Plan, describe_files, describe_model
from clipattr.probes import load_probe
from clipattr.report.explanation import Patches, explanation_table, read_explanation
from clipattr.report.explanation_picture import explanation_png
from clipattr.spliced import Spliced

logger = logging.getLogger(__name__)

NUMBERS, TABLE, PICTURE = "explanation.json", "explanation.txt", "explanation.png"
# Images that go through the blocks behind the site at once.
_CHUNK_ROWS = 64


class Head(NamedTuple):
    """The rows whose scores are explained, with their names and what the scores are."""

    names: list[str]
    weights: Float[Tensor, "class embed"]
    bias: Float[Tensor, " class"] | None
    kind: str


def explain(config: Explain, command: list[str]) -> None:
    """Print the table; write explanation.json, explanation.txt and explanation.png of the run."""
    plan = Plan(config, command, _describe_inputs(config), (NUMBERS, TABLE, PICTURE))
    if plan.is_finished():
        logger.info("%s", (Path(config.runs) / config.name / TABLE).read_text(encoding="utf-8"))
        return
    content = read_image_file(config.image)
    clip = load_model(config.model, config.trainer.accelerator)
    pixels = Pixels(clip.preprocess)
    image = decode_image_file(pixels, content, config.image)
    spliced = load_spliced(config, clip)
    atlas = load_meanings(config, clip)
    head = _load_head(config, clip)
    inputs, tower = pixels.normalise(image.to(clip.device)), image_tower(clip.model)
    found = _explain(spliced, inputs, head, config)
    _check_finite(found, head, spliced, config)
    latents = found.latents[found.is_active].unique()
    known = find_known(spliced, tower, inputs, latents, atlas, n_examples=config.examples)
    pictures = load_pictures(config, atlas, known)
    scores = read_explanation(found, head.names, _find_patches(spliced, tower), known)
    record = {
        "image": config.image,
        "model": {"name": config.model.name, "weights_sha256": clip.weights_sha256},
        "sae": config.sae,
        "atlas": config.atlas,
        "site": spliced.cut.site.to_json(),
        "method": config.method.name,
        "kind": head.kind,
        "scores": [each.to_json() for each in scores],
    }
    text = "\n".join(explanation_table(each) for each in scores)
    run = plan.open()
    write_text(run.path / NUMBERS, json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_text(run.path / TABLE, text + "\n")
    write_bytes(run.path / PICTURE, explanation_png(image, scores, pictures))
    run.finish()
    logger.info("%s by %s, %s at %s", head.kind, config.method.name, config.image, run.path)
    logger.info("%s", text)


def _describe_inputs(config: Explain) -> dict[str, object]:
    sae = Path(config.sae)
    files = [Path(config.image), sae / "sae.json", sae / "sae.safetensors"]
    for folder, stem in ((config.probe, "probe"), (config.atlas, "atlas")):
        if folder is not None:
            files += [Path(folder) / f"{stem}.{kind}" for kind in ("json", "safetensors")]
    return {"model": describe_model(config.model), "files": describe_files(files)}


def _load_head(config: Explain, clip: Clip) -> Head:
    """One row per score; a difference of two classes is a row like any other."""
    if config.probe is None:
        names = config.prompts
        words = names if config.rather_than is None else [*names, config.rather_than]
        weights, bias, kind = prompt_head(clip, words).weights, None, "cosine"
        one, other = list(range(len(names))), [len(names)] * len(names)
    else:
        model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
        probe, record = load_probe(config.probe, expected_model=model)
        weights, bias = probe.weight.detach().to(clip.device), probe.bias.detach().to(clip.device)
        wanted = [label for label in (config.label, config.rather_than) if label is not None]
        classes = [_find_class(label, record.class_names, config.probe) for label in wanted]
        names, kind = [record.class_names[classes[0]]], "logit"
        one, other = classes[:1], classes[1:]
    if config.rather_than is None:
        return Head(names, weights[one], None if bias is None else bias[one], kind)
    if one == other:
        raise ConfigError(f"label={config.label}, rather_than={config.rather_than}: the same class")
    row = contrast(weights, bias, torch.tensor(one), torch.tensor(other))
    names = [f"{name} rather than {config.rather_than}" for name in names]
    return Head(names, row.weights, row.bias, f"difference of {kind}s")


def _find_class(label: str, names: list[str], probe: str) -> int:
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise ConfigError(
        f"label {label!r}: no class of probe={probe}.{suggest(label, names)} "
        f"Allowed are 0 to {len(names) - 1} and the names: {', '.join(names)}"
    )


def _explain(
    spliced: Spliced, image: Float[Tensor, "3 height width"], head: Head, config: Explain
) -> Explanation:
    n_scores = len(head.names)
    with torch.no_grad():
        state = spliced.cut.prefix(image[None])
    # The image goes through the prefix once; it is repeated for each score at the site.
    rows = torch.zeros(n_scores, dtype=torch.int64, device=state.x.device)
    readout = spliced.read(state.x.float()[rows], rows, state.rest.rows(rows))
    targets = torch.arange(n_scores, device=rows.device)
    score = HeadScore(spliced.cut.suffix, head.weights, targets, head.bias, readout.rest)
    return explanation.explain(
        score,
        readout.x,
        readout.codes,
        spliced.sae.directions,
        readout.error,
        n_top=config.top,
        attribute=_choose_method(config, spliced, score),
    )


def _check_finite(found: Explanation, head: Head, spliced: Spliced, config: Explain) -> None:
    """Weights that overflow, or that are damaged, show here first."""
    numbers = {
        "the score": found.score,
        "the score without latents": found.without_latents,
        f"the attribution by {config.method.name}": found.attribution,
        "the exact effect of a latent": found.exact,
        "the attribution of the error term": found.error,
        "the exact effect of the error term": found.error_exact,
    }
    for what, values in numbers.items():
        for name, row in zip(head.names, values, strict=True):
            bad = row[~row.isfinite()]
            if len(bad):
                probe = "" if config.probe is None else f", probe={config.probe}"
                raise DataError(
                    f"image={config.image}, {name!r}, at {spliced.cut.site}: {what} is "
                    f"{float(bad[0])}. Look for nan or infinity in the weights of "
                    f"model.name={config.model.name}, sae={config.sae}{probe}, and try "
                    "model.precision=fp32 where it is fp16, which overflows"
                )


def _choose_method(config: Explain, spliced: Spliced, score: HeadScore) -> Attribute:
    match config.method:
        case ExplainMethod.corrected_patching:
            return partial(corrected_patching, n_exact=config.corrected, chunk_rows=_CHUNK_ROWS)
        case ExplainMethod.exact_patching:
            return partial(exact_patching, chunk_rows=_CHUNK_ROWS)
        case ExplainMethod.integrated_gradients:
            return partial(gradients.integrated_gradients, n_steps=config.ig_points)
        case ExplainMethod.attribution_patching:
            return gradients.attribution_patching
        case ExplainMethod.two_point:
            return gradients.two_point
        case ExplainMethod.gradient_only:
            return gradients.gradient_only
        case ExplainMethod.act_times_logit_lens | ExplainMethod.logit_lens:
            return _lens(config.method, spliced, score)


def _lens(method: ExplainMethod, spliced: Spliced, head: HeadScore) -> Attribute:
    directions = spliced.sae.directions
    table = baselines.logit_lens_table(spliced.cut.read_directly, directions, head.weights)
    is_weighted = method is ExplainMethod.act_times_logit_lens
    read = baselines.act_times_logit_lens if is_weighted else baselines.logit_lens

    def attribute(score: Score, x: Tensor, codes: SparseCodes, W_dec: Tensor) -> Tensor:
        return read(table, head.targets, codes)

    return attribute


def _find_patches(spliced: Spliced, tower: Tower) -> Patches | None:
    match spliced.cut.site.tokens:
        case "spatial":
            return Patches(0, tower.patch_grid())
        case "all":
            return Patches(tower.n_prefix, tower.patch_grid())
        case _:
            return None
