"""What a probe says of pictures: three lines in a notebook, and the work of the job `predict`.

clip = load_clip("ViT-B-32", pretrained="laion2b_s34b_b79k")
found = predict_images("runs/probe", "photos", clip)
found.labels, found.probabilities
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm import tqdm

from clipattr.callbacks.suppressed import embed_suppressed
from clipattr.clip import Clip
from clipattr.codes import SparseCodes
from clipattr.data.images import default_workers, image_loader
from clipattr.data.pixels import Decode, Pixels
from clipattr.data.shards import BadSample, check_bad
from clipattr.errors import ConfigError, DataError
from clipattr.files import check_field
from clipattr.jobs.evaluate_sae import splice_in
from clipattr.jobs.pictures import Pictures, find_pictures
from clipattr.jobs.probe_features import Features, open_reader
from clipattr.probes.files import ProbeRecord, load_head
from clipattr.shortcuts.suppression_files import FEATURE, check_sae, load_suppression

logger = logging.getLogger(__name__)

ReadFeatures = Callable[[Float[Tensor, "image channel height width"], Sequence[str]], Features]


class Predictions(NamedTuple):
    """Of the pictures that could be decoded, sorted by path."""

    paths: list[str]
    """as seen from the folder"""
    class_names: list[str]
    probabilities: Float64[Tensor, "image class"]
    bad: list[BadSample]
    """what was left out"""
    is_multilabel: bool = False
    """whether each class is true or not by itself"""

    @property
    def is_chosen(self) -> Bool[Tensor, "image class"]:
        """The most probable class of each picture; of several labels all of at least 1/2."""
        if self.is_multilabel:
            return self.probabilities >= 0.5
        best = self.probabilities.argmax(dim=1, keepdim=True)
        return torch.zeros_like(self.probabilities, dtype=torch.bool).scatter_(1, best, True)

    @property
    def labels(self) -> list[str]:
        """What each picture is said to be; several labels are joined by " | "."""
        return [
            " | ".join(name for name, is_it in zip(self.class_names, row, strict=True) if is_it)
            for row in self.is_chosen.tolist()
        ]


@torch.no_grad()
def predict_images(
    probe: Path | str,
    images: Path | str | Pictures,
    clip: Clip,
    *,
    sae: Path | str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    decode: Decode = "exact",
    max_bad_fraction: float = 0.0,
    progress: bool = False,
) -> Predictions:
    """Class probabilities of pictures by a saved probe, of any kind and any feature.

    Args:
        probe: folder of the probe; a suppression that lies there is applied.
        images: a folder, a file, or what `find_pictures` found.
        clip: the model that the probe was trained on.
        sae: folder of the SAE, for probes that need one.
        batch_size: images per CLIP forward.
        workers: processes that decode; None: as many as there are cores for this one.
        decode: see `Pixels`.
        max_bad_fraction: share of broken files that is left out before it is an error.
        progress: show a bar.
    """
    pictures = images if isinstance(images, Pictures) else find_pictures(images)
    bad = list(pictures.bad)
    check_bad(bad, pictures.n_seen, max_bad_fraction)
    predict, record = open_classifier(probe, clip, sae)
    pixels = Pixels(clip.preprocess, decode)
    loader = image_loader(
        pictures,
        pixels,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
    )
    if record.preprocess not in ("", pixels.fingerprint):
        logger.warning(
            "%s: was trained on pictures made by %s; here they are made by %s",
            *(probe, record.preprocess, pixels.fingerprint),
        )
    paths: list[str] = []
    found: list[Tensor] = []
    with tqdm(total=len(pictures), desc="predict", unit="image", disable=not progress) as bar:
        for batch in loader:
            bad += batch.bad
            check_bad(bad, pictures.n_seen, max_bad_fraction)
            if batch.keys:
                found.append(predict(pixels.normalise(batch.images.to(clip.device)), batch.keys))
                paths += batch.keys
            bar.update(len(batch.keys) + len(batch.bad))
    probabilities = torch.cat(found)
    return Predictions(paths, record.class_names, probabilities, bad, record.is_multilabel)


Classify = Callable[
    [Float[Tensor, "image channel height width"], Sequence[str]], Float64[Tensor, "image class"]
]


def open_classifier(
    probe: Path | str, clip: Clip, sae: Path | str | None = None
) -> tuple[Classify, ProbeRecord]:
    """A function of normalised pixels and their keys, which gives probabilities on the CPU."""
    model = {"name": clip.name, "weights_sha256": clip.weights_sha256}
    head, record = load_head(probe, model)
    read = _read_suppressed if record.feature == FEATURE else _read_plain
    read_features = read(Path(probe), record, clip, None if sae is None else os.fspath(sae))

    def classify(images: Tensor, keys: Sequence[str]) -> Tensor:
        features = read_features(images, keys)
        x = features if isinstance(features, SparseCodes) else features.float().cpu()
        logits = head(x)
        n_bad = int((~logits.isfinite()).any(dim=1).sum())
        if n_bad:
            raise DataError(
                f"{n_bad} of {len(keys)} pictures, {keys[0]!r} and those behind it, have logits "
                f"that are not finite, by {clip.name} in {clip.precision}; use "
                "model.precision=fp32 or bf16"
            )
        logits = logits.double()
        return logits.sigmoid() if record.is_multilabel else logits.softmax(dim=1)

    return classify, record


def _read_plain(probe: Path, record: ProbeRecord, clip: Clip, sae: str | None) -> ReadFeatures:
    reader = open_reader(record.feature, clip, sae)
    if sae is not None and reader.sae is None:
        raise ConfigError(
            f"sae={sae}: the probe {probe} reads {record.feature}, which needs no SAE; leave it out"
        )
    return reader.of_images


def _read_suppressed(probe: Path, record: ProbeRecord, clip: Clip, sae: str | None) -> ReadFeatures:
    """The embedding without the cue, on which the probe was repaired."""
    suppression, made_from = load_suppression(probe, record.model)
    folder = made_from.sae if sae is None else sae
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{probe}/suppression.json: its SAE, {folder}, is not there; name its folder by "
            "sae=FOLDER"
        )
    check_sae(probe, made_from, folder)
    spliced = splice_in(folder, clip.name, clip)
    check_field(probe / "suppression.json", "site", made_from.site, spliced.cut.site.to_json())

    def read_features(images: Tensor, keys: Sequence[str]) -> Tensor:
        state = spliced.cut.prefix(images.to(clip.dtype))
        readout = spliced.read(state.x.float(), torch.arange(len(keys)), state.rest)
        return embed_suppressed(spliced, readout, suppression, [1.0])[0]

    return read_features
