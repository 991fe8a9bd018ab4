"""Train a head on frozen features of labelled shards, of any CLIP, and choose among several."""

import csv
import io
import logging
import math
import time
from pathlib import Path
from typing import NamedTuple

import lightning as L

from clipattr.atomic import write_text
from clipattr.clip import Clip
from clipattr.clip.templates import ClassNames, load_templates
from clipattr.config.choices import Feature, GroupMethod, HeadKind, Init, Solver
from clipattr.config.schema import TrainProbe
from clipattr.data.pixels import Pixels
from clipattr.jobs.class_head import Classes
from clipattr.jobs.model import load_model
from clipattr.jobs.probe_choice import (
    Choice,
    check_finite,
    choose,
    describe_quality,
    towards_text,
)
from clipattr.jobs.probe_convex import fit_method, fit_path
from clipattr.jobs.probe_features import FeatureReader, describe_codes, describe_site
from clipattr.jobs.probe_sets import (
    ProbeRows,
    ProbeSet,
    check_sets,
    open_cue,
    read_rows,
    read_set,
)
from clipattr.jobs.probe_sgd import build_heads, check_batch, fit_sgd
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.probes.features import EmbeddingPart, FeatureSpec, Part
from clipattr.probes.files import ProbeRecord, save_probe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.text import text_probe
from clipattr.runs import RunFolder
from clipattr.sae.sae import Sae

logger = logging.getLogger(__name__)

PATH = "path.csv"


class Inputs(NamedTuple):
    """All that can be wrong before anything is computed."""

    clip: Clip
    reader: FeatureReader
    cue_reader: FeatureReader | None
    """of the codes of the latents that stand for the cue"""
    training: ProbeSet
    validation: ProbeSet | None
    text: LinearProbe | None
    """the text head, where training or interpolation starts from it"""


def train_probe(config: TrainProbe, command: list[str]) -> None:
    """Save `<run>/probe.safetensors` with `<run>/probe.json`, metrics.json and path.csv."""
    outputs = ("probe.json", "probe.safetensors", PATH)
    classes = _load_classes(config)
    plan = Plan(config, command, _describe_inputs(config, classes), outputs)
    if plan.is_finished():
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.probe.solver is Solver.lbfgs:
        _solve(config, plan, _load(config, classes))
    else:
        _train(config, plan, _load(config, classes))


def _solve(config: TrainProbe, plan: Plan, inputs: Inputs) -> None:
    """What cannot be fitted is known only at the end; until then earlier results stay."""
    started, settings = time.time(), config.probe
    training, validation = _read_both(config, inputs)
    if settings.method is GroupMethod.erm:
        fitted = fit_path(settings, training, inputs.clip.device)
        choice = choose(fitted, validation, settings.chosen_by.name)
    else:
        choice = fit_method(settings, training, validation, config.seed)
    check_finite(choice.head, training, "penalise more: a smaller probe.C")
    choice = _move_back(config, inputs, choice, validation)
    run = plan.open()
    run.started = started
    _save(config, inputs, run, choice, training, validation)


def _train(config: TrainProbe, plan: Plan, inputs: Inputs) -> None:
    """Several processes read their shares in the training, one process all rows before it."""
    settings = config.probe
    read = _read_both(config, inputs) if config.trainer.devices == 1 else None
    check_batch(config, len(inputs.training.targets if read is None else read[0].targets))
    start = inputs.text if settings.init is Init.text else None
    heads = build_heads(config, inputs.reader.width, start)
    run = plan.open()
    rows = None if read is None else read[0]
    fitted = fit_sgd(config, inputs.reader, inputs.training, heads, rows, run.path)
    if fitted is None:
        return
    training, validation = _read_both(config, inputs) if read is None else read
    choice = choose(fitted, validation, settings.chosen_by.name)
    check_finite(choice.head, training, "the training diverged, choose a smaller probe.lr")
    choice = _move_back(config, inputs, choice, validation)
    _save(config, inputs, run, choice, training, validation)


def _move_back(
    config: TrainProbe, inputs: Inputs, choice: Choice, validation: ProbeRows | None
) -> Choice:
    """Towards the text head, where that is asked for."""
    settings = config.probe
    if not settings.wise_ft:
        return choice
    assert inputs.text is not None, "loaded for it"
    criterion = settings.chosen_by.name
    return towards_text(choice, inputs.text, settings.wise_ft, validation, criterion)


def _describe_inputs(config: TrainProbe, classes: Classes | None) -> dict[str, object]:
    found: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    if config.validation is not None:
        found["validation"] = describe_shards(config.validation, "validation")
    if config.sae is not None:
        names = ("sae.json", "sae.safetensors")
        found["sae"] = describe_files([Path(config.sae) / name for name in names])
    if classes is not None:
        found["classes"] = classes.fingerprint
    return found


def _load(config: TrainProbe, classes: Classes | None) -> Inputs:
    clip = load_model(config.model, config.trainer.accelerator)
    reader = _reader(config, clip)
    cue_reader = open_cue(config, clip)
    training = read_set(config, config.data.shards, "data.shards")
    validation = (
        None if config.validation is None else read_set(config, config.validation, "validation")
    )
    check_sets(config, training, validation)
    text = None if classes is None else _text(config, classes, clip)
    return Inputs(clip, reader, cue_reader, training, validation, text)


def _reader(config: TrainProbe, clip: Clip) -> FeatureReader:
    parts: list[Part] = []
    sae: Sae | None = None
    for feature in config.probe.features:
        match feature:
            case Feature.embedding | Feature.embedding_raw:
                parts.append(EmbeddingPart(feature is Feature.embedding))
            case Feature.site:
                assert config.site is not None, "checked by the config"
                keep = config.probe.head is HeadKind.attention
                parts.append(describe_site(clip, config.site, keep_tokens=keep))
            case Feature.codes:
                assert config.sae is not None, "checked by the config"
                part, sae = describe_codes(clip, config.sae, config.probe.pool.name)
                parts.append(part)
    return FeatureReader(FeatureSpec(tuple(parts)), clip, sae)


def _load_classes(config: TrainProbe) -> Classes | None:
    """Those of the text head, where there is one."""
    probe = config.probe
    if not probe.needs_text:
        return None
    names = tuple(probe.classes)
    return Classes(
        ClassNames(tuple(probe.prompts) or names, names),
        load_templates("none" if probe.prompts else probe.templates, setting="probe.templates"),
    )


def _text(config: TrainProbe, classes: Classes, clip: Clip) -> LinearProbe:
    head = classes.head(clip, config.data.cache, progress=config.trainer.progress)
    return text_probe(head.weights, head.logit_scale)


def _read_both(config: TrainProbe, inputs: Inputs) -> tuple[ProbeRows, ProbeRows | None]:
    """Of both sets the same threshold says which images have the cue."""
    readers = (inputs.reader, inputs.cue_reader)
    training = read_rows(config, *readers, inputs.training, "data.shards")
    if inputs.validation is None:
        return training, None
    threshold = training.threshold
    return training, read_rows(config, *readers, inputs.validation, "validation", threshold)


def _save(
    config: TrainProbe,
    inputs: Inputs,
    run: RunFolder,
    choice: Choice,
    training: ProbeRows,
    validation: ProbeRows | None,
) -> None:
    names, sets = config.probe.class_names, {"train": training}
    if validation is not None:
        sets["validation"] = validation
    quality = {name: describe_quality(choice.head, rows, names) for name, rows in sets.items()}
    metrics = {
        f"{name}_{measure}": value
        for name, measures in quality.items()
        for measure, value in measures.items()
        if isinstance(value, float) and math.isfinite(value)
    }
    fingerprint = training.found.fingerprint
    record = ProbeRecord(
        class_names=names,
        model={"name": config.model.name, "weights_sha256": inputs.clip.weights_sha256},
        label_field=", ".join(config.probe.labels),
        data_fingerprint=fingerprint,
        metrics=metrics,
        feature=str(inputs.reader.spec),
        is_multilabel=config.probe.is_multilabel,
        preprocess=Pixels(inputs.clip.preprocess, config.data.decode.name).fingerprint,
    )
    save_probe(choice.head, run.path, record)
    write_text(run.path / PATH, _table(choice.path))
    labelled = [one for one in (inputs.training, inputs.validation) if one is not None]
    bad = [one for each in labelled for one in each.images.bad]
    bad += [one for rows in sets.values() for one in rows.found.bad]
    run.write_bad([one._asdict() for one in bad])
    run.update_manifest(data=fingerprint)
    accuracy = metrics["train_accuracy"]
    run.write_metrics({"probe": {"train_accuracy": accuracy, "chosen": choice.settings, **quality}})
    run.finish()
    _tell(choice, metrics, config.probe.chosen_by.name)


def _table(path: list[dict[str, float | bool]]) -> str:
    columns = list(dict.fromkeys(name for row in path for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    # Of one fit without validation there is no score.
    writer.writerows(
        {name: "" if value != value else value for name, value in row.items()} for row in path
    )
    return text.getvalue()


def _tell(choice: Choice, metrics: dict[str, float], criterion: str) -> None:
    if len(choice.path) > 1:
        words = ", ".join(f"{name}={value:g}" for name, value in choice.settings.items())
        logger.info("chosen by %s on the validation rows: %s", criterion, words)
    logger.info("accuracy on the training rows: %.3f", metrics["train_accuracy"])
    if "validation_accuracy" in metrics:
        logger.info("accuracy on the validation rows: %.3f", metrics["validation_accuracy"])
    if "validation_worst_group" in metrics:
        logger.info("of their worst group: %.3f", metrics["validation_worst_group"])
