"""Predictions of a probe for a folder of pictures, as a table."""

import csv
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clipattr.atomic import write_bytes
from clipattr.config.schema import Predict
from clipattr.jobs.model import load_model
from clipattr.jobs.pictures import Pictures, find_pictures
from clipattr.jobs.predict_images import Predictions, predict_images
from clipattr.jobs.start import Plan, check_not_inside, describe_files, describe_model

logger = logging.getLogger(__name__)

TABLE = "predictions.csv"


def predict(config: Predict, command: list[str]) -> None:
    """Write predictions.csv of the run, and bad_samples.jsonl if a file is broken."""
    check_not_inside(config, "probe", config.probe)
    if config.sae is not None:
        check_not_inside(config, "sae", config.sae)
    pictures = find_pictures(config.images)
    plan = Plan(config, command, _describe_inputs(config, pictures), (TABLE,))
    if plan.is_finished():
        return
    clip = load_model(config.model, config.trainer.accelerator)
    found = predict_images(
        config.probe,
        pictures,
        clip,
        sae=config.sae,
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        decode=config.data.decode.name,
        max_bad_fraction=config.data.max_bad_fraction,
        progress=config.trainer.progress,
    )
    run = plan.open()
    # Names of files may be no UTF-8: they are written as the file system has them.
    table = prediction_table(found, config.top).encode(errors="surrogateescape")
    write_bytes(run.path / TABLE, table)
    run.write_bad([bad._asdict() for bad in found.bad])
    counts = Counter(dict(zip(found.class_names, found.is_chosen.sum(dim=0).tolist(), strict=True)))
    run.write_metrics({"images": len(found.paths), "bad": len(found.bad), "predicted": counts})
    run.finish()
    largest = ", ".join(f"{name} {n}" for name, n in counts.most_common(5))
    logger.info("%d images, %d broken ones left out: %s", len(found.paths), len(found.bad), largest)
    logger.info("%s", run.path / TABLE)


def prediction_table(found: Predictions, top: int | None = None) -> str:
    """CSV with a line per image.

    Without `top`: path, label, its probability, and a column of probabilities for each class. The
    label of a probe with several labels is all that hold, which have no one probability.
    With `top`: path, label, probability, label_2, probability_2, ...: the most probable classes.
    """
    text = io.StringIO()
    rows = _rows_of_all(found) if top is None else _rows_of_best(found, top)
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _rows_of_all(found: Predictions) -> Iterator[list[str]]:
    has_one = not found.is_multilabel
    yield ["path", "label", *(["probability"] if has_one else []), *found.class_names]
    for path, label, row in zip(found.paths, found.labels, found.probabilities, strict=True):
        numbers = [*([row.max().item()] if has_one else []), *row.tolist()]
        yield [path, label, *map(_write, numbers)]


def _rows_of_best(found: Predictions, top: int) -> Iterator[list[str]]:
    n_best = min(top, len(found.class_names))
    ends = ["", *(f"_{rank}" for rank in range(2, n_best + 1))]
    yield ["path", *(word + end for end in ends for word in ("label", "probability"))]
    # Stable: of equal ones the first class, as argmax has it.
    values, classes = found.probabilities.sort(dim=1, descending=True, stable=True)
    numbers, names = values[:, :n_best].tolist(), classes[:, :n_best].tolist()
    for path, *ranked in zip(found.paths, names, numbers, strict=True):
        pairs = zip(*ranked, strict=True)
        cells = ((found.class_names[name], _write(number)) for name, number in pairs)
        yield [path, *(cell for pair in cells for cell in pair)]


def _write(number: float) -> str:
    return f"{number:.9g}"


def _describe_inputs(config: Predict, pictures: Pictures) -> dict[str, object]:
    """The pictures by a hash, since they may be a million."""
    listing = hashlib.sha256(pictures.root.encode(errors="surrogateescape"))
    for file in pictures.files:
        listing.update(repr(file).encode())
    for one in pictures.bad:
        listing.update(repr(one).encode(errors="surrogateescape"))
    stems = [Path(config.probe) / "probe", Path(config.probe) / "suppression"]
    stems += [] if config.sae is None else [Path(config.sae) / "sae"]
    files = [stem.with_suffix(end) for stem in stems for end in (".json", ".safetensors")]
    return {
        "images": listing.hexdigest(),
        "model": describe_model(config.model),
        "files": describe_files(files),
    }
