"""The classes of a config as a head, and the class of every image."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.clip import Clip, TextHead, load_class_names, load_templates, text_head
from clipattr.clip.templates import ClassNames
from clipattr.config.evaluation import ClassesConfig
from clipattr.data.images import Samples
from clipattr.data.shards import read_label


class Classes(NamedTuple):
    """Names of classes, and templates of their prompts."""

    names: ClassNames
    templates: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """What decides the prompts, whichever files they stand in."""
        return hashlib.sha256(json.dumps([self.names, self.templates]).encode()).hexdigest()

    def read_labels(self, samples: Samples, label: str) -> Int[Tensor, " image"]:
        """The class of each sample; DataError for one that is none of these."""
        rows = range(len(samples))
        return torch.tensor([read_label(samples[row], label, self.names.names) for row in rows])

    def head(self, clip: Clip, cache: str, *, progress: bool) -> TextHead:
        """One row per class; classes that share a word share the row."""
        words = list(dict.fromkeys(self.names.words))
        head = text_head(
            clip, words, templates=self.templates, cache=Path(cache) / "text", progress=progress
        )
        rows = {word: row for row, word in enumerate(words)}
        weights = head.weights[[rows[word] for word in self.names.words]]
        return replace(head, names=self.names.names, weights=weights)


def load_classes(settings: ClassesConfig) -> Classes:
    """Those that a config names."""
    section = settings.section
    return Classes(
        load_class_names(settings.classes, setting=f"{section}.classes"),
        load_templates(settings.templates, setting=f"{section}.templates"),
    )


def needed_fields(label: str) -> tuple[str, ...]:
    """What a sample must have for its label to be read."""
    return ("cls",) if label == "cls" else ("json",)
