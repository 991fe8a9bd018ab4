"""Pairs of shards that show the same scene without and with cues."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.data import ShardIndex
from clipattr.data.pixels import Pixels
from clipattr.data.shards import Sample, read_json, read_label
from clipattr.errors import DataError
from clipattr.jobs.shards import find_images
from clipattr.jobs.shortcuts_inputs import Audited, read_states
from clipattr.jobs.shortcuts_pairs import (
    WITH,
    WITHOUT,
    CuePairs,
    check_count,
    embed_pairs,
    pick_pairs,
)

Scenes = Mapping[str, Mapping[str, int]]
"""scene -> state -> row"""


def read_pairs(config: Shortcuts, audited: Audited) -> dict[str, CuePairs]:
    """The pairs of each cue that is a state of these shards; each image enters CLIP once."""
    cues = [cue for cue in config.cues if cue.pair is not None]
    if not cues:
        return {}
    settings = config.pairs
    assert settings.shards is not None, "checked by the config"
    samples = find_images(
        settings.shards,
        config.data,
        ("json",),
        setting="pairs.shards",
        progress=config.trainer.progress,
    ).usable
    facts = [read_json(samples[row]) for row in range(len(samples))]
    scenes = _group_scenes(config, samples, facts)
    batches = list(read_states(config, audited, samples)[0])
    # What nobody asks for need not be there: with a field, groups are of the evaluated images.
    needs_labels = any(cue.field is None for cue in cues)
    labels = _read_labels(audited, samples, facts) if needs_labels else None
    return {cue.name: _pair(config, audited, cue, samples, scenes, batches, labels) for cue in cues}


def _pair(
    config: Shortcuts,
    audited: Audited,
    cue: CueConfig,
    samples: ShardIndex,
    scenes: Scenes,
    batches: Sequence[Batch],
    labels: Int[Tensor, " sample"] | None,
) -> CuePairs:
    """Scenes that lack a state are left out and counted."""
    assert cue.pair is not None, "chosen for it"
    encoded = set(torch.cat([row.cpu() for _, row, _ in batches]).tolist())
    states = {WITHOUT: config.pairs.without, WITH: cue.pair}
    kept = [
        [scene[state] for state in states.values()]
        for scene in scenes.values()
        if encoded.issuperset(scene.get(state, -1) for state in states.values())
    ]
    check_count(len(kept), cue, f"pairs.shards={config.pairs.shards}")
    rows = dict(zip(states, zip(*kept, strict=True), strict=True))
    parts = {side: _select(batches, row, len(samples)) for side, row in rows.items()}
    missing = len(scenes) - len(kept)
    warnings = [f"{missing} of {len(scenes)} scenes lack a picture and are left out"]
    warnings = warnings if missing else []
    of_pairs = None if labels is None else labels[list(rows[WITHOUT])]
    if labels is not None:
        _check_labels(audited, samples, labels, rows)
    elif cue.field is None:
        warnings.append(f"pairs.shards have no {audited.label}: no groups are read off the pairs")
    shown = pick_pairs(config, audited, of_pairs, len(kept))
    reader = Pixels(audited.clip.preprocess, config.data.decode.name)
    pictures = {
        side: {number: _read_picture(reader, samples[row[number]]) for number in shown}
        for side, row in rows.items()
    }
    keys = [samples.key(row) for row in rows[WITHOUT]]
    return embed_pairs(audited, keys, parts, pictures, of_pairs, warnings)


def _read_labels(
    audited: Audited, samples: ShardIndex, facts: Sequence[Mapping[str, object]]
) -> Int[Tensor, " sample"] | None:
    """None where no sample has one; where some have, the others are an error."""
    key = audited.label.removeprefix("json:")
    has_label = bool(samples.has("cls").any())
    if audited.label != "cls":
        has_label = any(key in fact for fact in facts)
    if not has_label:
        return None
    found = [read_label(samples[n], audited.label, audited.classes) for n in range(len(samples))]
    return torch.tensor(found)


def _check_labels(
    audited: Audited,
    samples: ShardIndex,
    labels: Int[Tensor, " sample"],
    rows: Mapping[str, Sequence[int]],
) -> None:
    """A pair shows one thing twice."""
    for without, with_cue in zip(rows[WITHOUT], rows[WITH], strict=True):
        one, other = (audited.classes[int(labels[row])] for row in (without, with_cue))
        if one != other:
            raise DataError(
                f"pairs.shards: {samples.key(without)} is {one!r} and {samples.key(with_cue)}, the "
                f"same scene with the cue, is {other!r}; a pair has one label"
            )


def _group_scenes(
    config: Shortcuts, samples: ShardIndex, of_samples: Sequence[Mapping[str, object]]
) -> dict[str, dict[str, int]]:
    """No state of a scene may stand there twice."""
    settings = config.pairs
    scene_key, state_key = (one.removeprefix("json:") for one in (settings.scene, settings.state))
    scenes: dict[str, dict[str, int]] = {}
    for row, facts in enumerate(of_samples):
        sample = samples[row]
        lacking = [key for key in (scene_key, state_key) if key not in facts]
        if lacking:
            raise DataError(
                f"{sample.shard}: {sample.key}.json has no key {lacking[0]!r}, as pairs.scene and "
                f"pairs.state ask for; it has {', '.join(facts)}"
            )
        states, state = scenes.setdefault(str(facts[scene_key]), {}), str(facts[state_key])
        if state in states:
            raise DataError(
                f"{sample.shard}: {sample.key} shows the scene {facts[scene_key]!r} in the state "
                f"{state!r}, and so does {samples.key(states[state])}"
            )
        states[state] = row
    return scenes


def _select(batches: Iterable[Batch], rows: Sequence[int], n_rows: int) -> list[Batch]:
    """The rows of a variant, by their place."""
    place = torch.full((n_rows,), -1)
    place[torch.tensor(rows)] = torch.arange(len(rows))
    found: list[Batch] = []
    for x, row, rest in batches:
        chosen = (place[row.cpu()] >= 0).nonzero().flatten()
        if len(chosen):
            part = chosen.to(x.device)
            found.append((x[part], place[row.cpu()[chosen]], rest.rows(part)))
    return found


def _read_picture(reader: Pixels, sample: Sample) -> Tensor:
    """As the model sees it; it was encoded before, so that it can be read."""
    assert sample.image_field is not None, "every usable sample has an image"
    return reader.read(sample.read(sample.image_field))
