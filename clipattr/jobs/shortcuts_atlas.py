"""An atlas beside the audit: cues by words and by unexpected reliance, and labels of latents."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pyarrow import parquet

from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.errors import DataError
from clipattr.files import read_sha256
from clipattr.jobs.atlas_words import embed_words, load_scorer
from clipattr.jobs.shortcuts_inputs import Audited
from clipattr.report.shortcuts.content import Fact, ShortcutsContent
from clipattr.semantics.atlas_files import STEM, Atlas, load_atlas
from clipattr.semantics.search import find_latents

logger = logging.getLogger(__name__)

_UNEXPECTED = "unexpected.parquet"
# Labels of a latent that are shown, and classes that a warning names.
_LABELS, _CLASSES = 3, 20


class Meanings(NamedTuple):
    """What the latents of the audit mean, as far as an atlas says it."""

    folder: str | None
    atlas: Atlas | None
    warnings: list[str]
    """what was looked for in the atlas and is not there"""

    def labels(self, latents: Iterable[int]) -> dict[int, list[str]]:
        """The first words of each latent; nothing without an atlas, or of one that never fired."""
        if self.atlas is None:
            return {}
        found = {latent: self.atlas.words_of(latent)[:_LABELS] for latent in latents}
        return {latent: [word for word, _ in words] for latent, words in found.items() if words}


class Unexpected(NamedTuple):
    """A class that relies on a latent that means something else; a row of the atlas's list."""

    class_name: str
    latent: int
    label: str

    @property
    def name(self) -> str:
        """Of the cue, which is a folder too."""
        words = f"{self.label}, for {self.class_name}".translate(str.maketrans("/\\", "  "))
        return f"latent {self.latent} ({words})"


def atlas_files(config: Shortcuts) -> list[Path]:
    """What is read of the atlas."""
    if config.atlas is None:
        return []
    names = [f"{STEM}.json", f"{STEM}.safetensors"]
    names += [_UNEXPECTED] if config.shortcuts.unexpected else []
    return [Path(config.atlas) / name for name in names]


def add_cues(config: Shortcuts, audited: Audited) -> tuple[Shortcuts, Meanings]:
    """The config with the latents of every cue by words, and with the unexpected ones as cues.

    Raises:
        CheckpointError: for an atlas of another model or SAE.
    """
    if config.atlas is None:
        return config, Meanings(None, None, [])
    sae = read_sha256(Path(str(config.sae)), "sae")
    atlas = load_atlas(config.atlas, audited.model, sae)
    warnings: list[str] = []
    cues = _find_words(config, atlas)
    cues += _find_unexpected(config, audited, atlas, cues, warnings)
    for warning in warnings:
        logger.warning("%s", warning)
    return replace(config, cues=cues), Meanings(config.atlas, atlas, warnings)


def name_latents(content: ShortcutsContent, meanings: Meanings) -> ShortcutsContent:
    """The same content, with words for every latent on it."""
    if meanings.folder is None:
        return content
    cues = [replace(cue, labels=meanings.labels(cue.latents)) for cue in content.cues]
    amplified = content.amplified
    if amplified is not None:
        latents = meanings.labels(each.latent for each in amplified)
        amplified = [replace(each, labels=latents.get(each.latent, [])) for each in amplified]
    return replace(
        content,
        cues=cues,
        amplified=amplified,
        facts=[*content.facts, Fact("atlas", meanings.folder)],
        warnings=[*content.warnings, *meanings.warnings],
    )


def _find_words(config: Shortcuts, atlas: Atlas) -> list[CueConfig]:
    """Every cue; those known by words with the latents that the job `find` lists first."""
    texts = list(dict.fromkeys(cue.words for cue in config.cues if cue.words is not None))
    if not texts:
        return list(config.cues)
    words = embed_words(
        load_scorer(str(config.atlas), atlas, config.trainer.accelerator),
        atlas,
        texts,
        templates=atlas.origin.templates,
        cache=Path(config.data.cache) / "text",
        progress=config.trainer.progress,
    )
    top, found = config.shortcuts.latents_of_words, dict[str, list[int]]()
    for text, row in zip(texts, words.rows, strict=True):
        most = find_latents(atlas.tensors.means, row, words.reference, top).most
        found[text] = most.latents.tolist()
        scores = zip(found[text], most.scores.tolist(), strict=True)
        listed = ", ".join(f"{latent} ({score:+.3f})" for latent, score in scores)
        logger.info("%r: latents %s of %s", text, listed, config.atlas)
    return [
        cue if cue.words is None else replace(cue, latents=found[cue.words]) for cue in config.cues
    ]


def _find_unexpected(
    config: Shortcuts,
    audited: Audited,
    atlas: Atlas,
    cues: Sequence[CueConfig],
    warnings: list[str],
) -> list[CueConfig]:
    """The first latents of the list, each with the class of ours that relies on it most."""
    if not config.shortcuts.unexpected:
        return []
    path = Path(str(config.atlas)) / _UNEXPECTED
    listed = read_unexpected(path, len(atlas.tensors.means))
    ours = {name.casefold() for name in (*audited.classes, *config.prompts)}
    first: dict[int, Unexpected] = {}
    for pair in listed:
        if pair.class_name.casefold() in ours:
            first.setdefault(pair.latent, pair)
    if not first:
        warnings.append(_nothing_unexpected(path, listed, audited.classes))
    taken = {cue.name for cue in cues}
    chosen = list(first.values())[: config.shortcuts.unexpected]
    return [
        CueConfig(name=pair.name, latents=[pair.latent])
        for pair in chosen
        if pair.name not in taken
    ]


def read_unexpected(path: Path, n_latents: int) -> list[Unexpected]:
    """The pairs of unexpected.parquet, the strongest first; DataError for any other table."""
    try:
        columns = parquet.read_table(path, columns=["class", "latent", "label"]).to_pydict()
        rows = [Unexpected(*each) for each in zip(*columns.values(), strict=True)]
    except (OSError, ValueError, LookupError) as error:  # pyarrow's own are among them
        raise DataError(
            f"{path}: is no list of unexpected latents ({error}); make the atlas again"
        ) from None
    if max((each.latent for each in rows), default=-1) >= n_latents:
        raise DataError(
            f"{path}: has latents that are not among the {n_latents} of {STEM}.safetensors beside "
            "it; make the atlas again"
        )
    return rows


def _nothing_unexpected(path: Path, listed: Sequence[Unexpected], classes: Sequence[str]) -> str:
    names = sorted({each.class_name for each in listed})
    more = f" and {len(names) - _CLASSES} more" if len(names) > _CLASSES else ""
    has = f"is about {', '.join(names[:_CLASSES])}{more}" if names else "is empty"
    return (
        f"no unexpected latent became a cue: {path} {has}, and the probe tells {', '.join(classes)}"
        " apart. Names must be the same; an atlas that is made with this probe has them"
    )
