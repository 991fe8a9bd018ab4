"""The explained predictions on the page of the planted world, against a plain edit."""

from types import SimpleNamespace

import pytest
import torch

from clipattr.clip import Site, embed_prompts, image_tower, load_clip
from clipattr.jobs import world_page
from clipattr.jobs.world_data import WorldData
from clipattr.report import LatentCard
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.world.prompts import ZEROSHOT
from tests.tiny import save_tiny_clip


class Data(WorldData):
    """As much of the world as the predictions need."""

    def __init__(self, **values) -> None:
        self.__dict__.update(values)


class Atlas(world_page.LatentAtlas):
    """Shows what it is given."""

    def __init__(self) -> None: ...

    def card(self, latent: int, *, attribution: float, effect: float, noun: str) -> LatentCard:
        return LatentCard(latent, attribution, effect, label=noun, alignment=0.0, examples=[])


def test_effects_are_in_the_units_of_the_activation(tmp_path, monkeypatch):
    """An SAE of standardised inputs has directions that are not the rows of its decoder."""
    clip = load_clip(save_tiny_clip(tmp_path / "tiny"))
    cut = image_tower(clip.model).cut(Site())
    generator = torch.Generator().manual_seed(3)
    spread = 0.2 + 3 * torch.rand(32, generator=generator)
    x = spread * torch.randn(40, 32, generator=generator) + 1
    options = {"k": 4, "normalisation": Normalisation.standardise, "generator": generator}
    sae = TopKSae(d_model=32, n_latents=24, **options)
    sae.initialise_from(x)
    sae.requires_grad_(False)

    monkeypatch.setattr(world_page, "read_png", lambda sample: b"")
    factors = [{"noun": "star", "caption": "a star"}]
    data = Data(
        frozen=SimpleNamespace(clip=clip, cut=cut),
        spliced=Spliced(cut, sae),
        test=SimpleNamespace(factors=factors, x=x[:1], samples=[None]),
    )
    (found,) = world_page.explain_examples(data, Atlas(), 1)
    prompts = ZEROSHOT["shape"].prompts
    row = embed_prompts(clip, [prompts[prompts.index(found.prompt)]])[0]
    codes = sae.encode(x[:1])
    assert found.latents
    for card in found.latents:
        kept = codes.values.where(codes.indices != card.latent, 0.0)
        edited = x[:1] - sae.decode(codes) + sae.decode(codes._replace(values=kept))
        effect = float((data.embeddings(x[:1]) - data.embeddings(edited))[0] @ row)
        assert card.effect == pytest.approx(effect, rel=1e-3, abs=1e-6)
