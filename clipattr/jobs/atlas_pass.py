"""The one pass of the atlas over the images: examples, statistics, reliance, and chance."""

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.reliance_files import ALL_IMAGES, IMAGES_OF_CLASS
from clipattr.callbacks import (
    ClassReliance,
    ExamplesCallback,
    LatentsCallback,
    RelianceCallback,
    ShuffledNames,
    ShuffledReliance,
)
from clipattr.callbacks.base import ReadoutCallback
from clipattr.config.schema import Atlas
from clipattr.jobs.attribution_inputs import Head
from clipattr.jobs.site_states import CachedStates, FreshStates
from clipattr.metrics.best_pairs import Examples
from clipattr.metrics.random_examples import strata
from clipattr.metrics.top_examples import Patches
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester

# Images per latent among which those at quantiles of its activation are found.
_SAMPLE = 64


class Reliance(NamedTuple):
    """On what each class relies; the share of the images is [latent] where they are the same."""

    mean_attribution: Float[Tensor, "class latent"]
    share_positive: Float[Tensor, "class latent"]
    share_of_images: Float[Tensor, "*classes latent"]
    over: str
    n_images: list[int]
    """over which the numbers of each class are"""


class Chance(NamedTuple):
    """The same under false names of the latents."""

    mean_attribution: Float[Tensor, "class latent"]
    examples: Int[Tensor, "latent n"]


class Found(NamedTuple):
    """What is left of the images; on the CPU."""

    top: Examples
    patches: Patches | None
    spread: Examples | None
    latents: LatentsCallback
    reliance: Reliance
    chance: list[Chance]


def run_pass(
    config: Atlas,
    folder: Path,
    spliced: Spliced,
    head: Head,
    states: CachedStates | FreshStates,
    embeddings: Float[Tensor, "image embed"],
    classes: Int[Tensor, " image"] | None,
) -> Found:
    """Every image is read once, by all callbacks."""
    settings, sae = config.atlas, spliced.sae
    pool, n_latents = settings.pool.value, sae.n_latents
    examples = ExamplesCallback(
        n_latents=n_latents,
        n_examples=max(settings.examples, settings.shown),
        pool=pool,
        n_tokens=len(states.mean) if states.mean.ndim == 2 else 1,
        n_sample=_SAMPLE if settings.spread else 0,
        seed=config.seed,
    )
    latents = LatentsCallback(
        n_latents=n_latents,
        embeddings=embeddings,
        classes=classes,
        n_classes=len(head.names),
        pool=pool,
    )
    reliance = _reliance(spliced, head, None)
    seeds = range(config.seed + 1, config.seed + 1 + settings.shuffles)
    chance = [
        (
            _reliance(spliced, head, seed),
            ExamplesCallback(n_latents=n_latents, n_examples=settings.examples, pool=pool),
            seed,
        )
        for seed in seeds
    ]
    callbacks: list[ReadoutCallback] = [examples, latents, reliance]
    for by_chance, shown, seed in chance:
        callbacks += [by_chance, ShuffledNames(shown, seed=seed)]
    trainer = build_tester(config.trainer, folder, callbacks=[*callbacks])
    trainer.test(SplicedModule(spliced), states, verbose=False)
    assert examples.result is not None, "after the test"
    sample = examples.sample
    return Found(
        top=_to_cpu(examples.result),
        patches=None if examples.patches is None else Patches(*(x.cpu() for x in examples.patches)),
        spread=None if sample is None else strata(_to_cpu(sample), settings.spread),
        latents=latents,
        reliance=_read(reliance),
        chance=[_read_chance(each, shown) for each, shown, _ in chance],
    )


def _reliance(
    spliced: Spliced, head: Head, seed: int | None
) -> RelianceCallback | ClassReliance | ShuffledReliance:
    """All classes of all images in closed form; elsewhere the predicted class of each image."""
    if not spliced.cut.has_last_layer:
        return ClassReliance(spliced, head.weights, head.bias, shuffle=seed)
    if seed is None:
        return RelianceCallback(spliced, head.weights)
    return ShuffledReliance(spliced, head.weights, seed=seed)


def _read(reliance: RelianceCallback | ClassReliance | ShuffledReliance) -> Reliance:
    assert reliance.mean_attribution is not None, "after the test"
    mean = reliance.mean_attribution.cpu()
    match reliance:
        case RelianceCallback(share_positive=positive, share_of_images=share, n_images=n_images):
            assert positive is not None, "signs are asked for"
            assert share is not None, "after the test"
            counts = [n_images] * len(mean)
            return Reliance(mean, positive.cpu(), share.cpu(), ALL_IMAGES, counts)
        case ClassReliance(counts=counts):
            assert counts is not None, "after the test"
            positive = counts.positive.cpu() / counts.fired.cpu()
            share = counts.fired.cpu() / counts.images.cpu().clamp(min=1)[:, None]
            return Reliance(mean, positive, share, IMAGES_OF_CLASS, counts.images.tolist())
        case _:
            raise AssertionError("what chance finds has no signs")


def _read_chance(
    reliance: RelianceCallback | ClassReliance | ShuffledReliance, examples: ExamplesCallback
) -> Chance:
    assert reliance.mean_attribution is not None, "after the test"
    assert examples.result is not None, "after the test"
    return Chance(reliance.mean_attribution.cpu(), examples.result.ids.cpu())


def _to_cpu(examples: Examples) -> Examples:
    return Examples(examples.ids.cpu(), examples.values.cpu())
