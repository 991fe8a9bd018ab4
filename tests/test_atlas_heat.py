"""Heatmaps of an atlas: every example its own, at a class token and at all tokens."""

import base64
import re

import pytest
import torch
from torch import Tensor

from clipattr.clip import image_tower
from clipattr.config.load import load_config
from clipattr.config.schema import EVALUATE_JOBS, Atlas
from clipattr.jobs import atlas_heat
from clipattr.jobs.atlas_heat import read_heat
from clipattr.jobs.patch_maps import map_reads
from clipattr.jobs.shards import find_images
from clipattr.spliced import Spliced
from tests.test_atlas_job import AtlasJob
from tests.test_attribution_job import SITES

# Images that repeat, in no order, and a latent that never fired.
EXAMPLES = torch.tensor([[5, 2, 29], [2, 5, 0], [-1, -1, -1], [29, 7, -1]])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> AtlasJob:
    return AtlasJob(tmp_path_factory.mktemp("heat"))


def by_hand(job: AtlasJob, spliced: Spliced, image: int, latent: int) -> Tensor:
    pixels, site = job.images[[image]], spliced.cut.site
    if site.tokens == "cls":
        one = torch.zeros(1, dtype=torch.int64)
        return map_reads(spliced, pixels, one, torch.tensor([latent])).patches[0]
    with torch.no_grad():
        return spliced.sae.encode(spliced.cut.read(pixels)).to_dense()[0, 1:, latent]


@pytest.mark.parametrize("site", SITES)
def test_each_example_has_its_own_map(job: AtlasJob, site: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atlas_heat, "_BATCH", 2)
    monkeypatch.setattr(atlas_heat, "_PAIRS", 3)
    config = load_config(job.words(site), EVALUATE_JOBS)
    assert isinstance(config, Atlas)
    spliced = Spliced(image_tower(job.clip.model).cut(SITES[site]), job.saes[site])
    images = find_images(config.data.shards, config.data, progress=False)
    heat = read_heat(config, job.clip, spliced, images, EXAMPLES)
    assert heat is not None
    assert heat.shape == (4, 3, 4, 4)
    for latent, row in enumerate(EXAMPLES.tolist()):
        for rank, image in enumerate(row):
            if image < 0:
                assert not heat[latent, rank].any()
                continue
            expected = by_hand(job, spliced, image, latent).relu()
            expected = 255 * expected / expected.max().clamp(min=1e-9)
            found = heat[latent, rank].flatten().float()
            assert (found - expected).abs().max() <= 2.5, (latent, image)


def test_pages_have_them_unless_they_are_not_wanted(job: AtlasJob):
    packed = re.compile(r'"([A-Za-z0-9+/]{22}==)"')
    for wanted in ("true", "false"):
        folder = job.atlas("all", f"atlas.heatmaps={wanted}", f"name=heat-{wanted}")
        data = "".join(path.read_text() for path in (folder / "report" / "data").glob("*.js"))
        found = packed.findall(data)
        assert bool(found) == (wanted == "true")
        for each in found:
            assert max(base64.b64decode(each)) == 255
