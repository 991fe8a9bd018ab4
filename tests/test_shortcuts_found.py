"""Which images say what stands for a cue: those learned from, where there are any."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clipattr.clip import Rest
from clipattr.codes import SparseCodes
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig, RepairConfig
from clipattr.jobs.shortcuts_cues import KnownCue, find_cues
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.spliced import Spliced

N_IMAGES, N_LATENTS = 200, 4
CLASSES = ("plain", "cracked")


class FixedSae:
    """An SAE whose codes are what it is given, densely."""

    n_latents, b_dec = N_LATENTS, torch.zeros(1)

    def encode(self, x: Tensor) -> SparseCodes:
        return SparseCodes(torch.arange(N_LATENTS).expand_as(x), x, N_LATENTS)


class FixedSpliced(Spliced):
    def __init__(self) -> None:
        self.sae = FixedSae()  # type: ignore[assignment]


class Samples:
    """As many as there are images."""

    def __len__(self) -> int:
        return N_IMAGES

    def key(self, row: int) -> str:
        return str(row)


def make_images(activations: Tensor, has: Tensor) -> ImageSet:
    """Every other image is cracked."""
    samples: Any = Samples()
    batches = [(activations, torch.arange(N_IMAGES), Rest())]
    facts = [{"tag": bool(one)} for one in has]
    return ImageSet(samples, torch.arange(N_IMAGES) % 2, facts, batches, [])


def find(cue: CueConfig, images: ImageSet, learned: ImageSet | None) -> KnownCue:
    config = Shortcuts(cues=[cue], repair=RepairConfig(shards="others"))
    config.data.shards = "these"
    nothing: Any = None
    audited = Audited(
        clip=nothing,
        probe=nothing,
        record=nothing,
        heads={},
        prompts=CLASSES,
        classes=CLASSES,
        label="cls",
        spliced=FixedSpliced(),
        reference=None,
    )
    return find_cues(config, audited, images, learned, {})[0]


def shown_by(latent: int, seed: int) -> ImageSet:
    """The cue is in half of each label; one latent fires there, and another one at random."""
    generator = torch.Generator().manual_seed(seed)
    has = torch.arange(N_IMAGES) % 4 < 2
    activations = torch.zeros(N_IMAGES, N_LATENTS)
    activations[:, latent] = has * torch.rand(N_IMAGES, generator=generator)
    activations[:, 3] = torch.rand(N_IMAGES, generator=generator)
    return make_images(activations, has)


def test_latents_of_flags_are_those_of_the_images_to_learn_from():
    cue = CueConfig(name="tag", field="json:tag")
    evaluated, learned = shown_by(0, seed=0), shown_by(1, seed=1)
    assert find(cue, evaluated, learned).latents.tolist() == [1]
    assert find(cue, evaluated, None).latents.tolist() == [0]
    # The flags that groups are made of stay those of the evaluated images.
    assert find(cue, evaluated, learned).source == "metadata"


@pytest.mark.parametrize(
    ("is_learned", "setting"), [(True, "repair.shards=others"), (False, "data.shards=these")]
)
def test_a_cue_that_goes_with_the_label_everywhere_has_no_latents(is_learned: bool, setting: str):
    cue = CueConfig(name="tag", field="json:tag")
    has = torch.arange(N_IMAGES) % 2 == 1
    confounded = make_images(has[:, None].expand(-1, N_LATENTS).float(), has)
    images = shown_by(0, seed=0) if is_learned else confounded
    found = find(cue, images, confounded if is_learned else None)
    assert found.latents.tolist() == []
    wanted = f"no label of {setting} has 10 images with tag and 10 without"
    assert any(wanted in warning for warning in found.warnings)


def test_both_sets_have_the_threshold_of_the_images_to_learn_from():
    generator = torch.Generator().manual_seed(0)

    def firing(n: int) -> ImageSet:
        activations = torch.zeros(N_IMAGES, N_LATENTS)
        activations[:n, 2] = 0.5 + torch.rand(n, generator=generator)
        return make_images(activations, torch.zeros(N_IMAGES))

    cue = CueConfig(name="tag", latents=[2])
    often, always = firing(178), firing(182)
    assert find(cue, often, None).threshold == 0
    alone, together = find(cue, always, None), find(cue, always, often)
    assert together.threshold == 0
    assert alone.threshold is not None
    assert alone.threshold > 0.5
    assert together.flags is not None
    assert together.flags.has.tolist() == [row < 182 for row in range(N_IMAGES)]
    swapped = find(cue, often, always)
    assert swapped.source == "latents"
    assert swapped.threshold == alone.threshold
    silent = find(cue, often, make_images(torch.zeros(N_IMAGES, N_LATENTS), torch.zeros(N_IMAGES)))
    assert silent.source is None
    assert any("repair.shards: the cue's latents fire in none" in each for each in silent.warnings)
