"""The table in the log: images that were read, and words where there is no number."""

import pytest
import torch
from torch.nn.functional import normalize

from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback
from clipattr.clip import Site, image_tower, load_clip
from clipattr.config.choices import Method
from clipattr.config.schema import DeviceConfig
from clipattr.jobs.attribution_metrics import log_table
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule, rows_loader
from clipattr.training.trainer import build_tester
from tests.tiny import save_tiny_clip

N_TARGETS, N_READ = 9, 6
METHODS = [Method.attribution_patching, Method.logit_lens, Method.energy]


def logged(folder, sign: int, caplog) -> list[str]:
    """The table of rows whose clean scores all have this sign, three of nine not there."""
    clip = load_clip(save_tiny_clip(folder / "tiny"))
    generator = torch.Generator().manual_seed(0)
    cut = image_tower(clip.model).cut(Site())
    x = torch.randn(N_READ, 32, generator=generator)
    sae = TopKSae(d_model=32, n_latents=24, k=6, generator=generator)
    sae.initialise_from(x)
    spliced = Spliced(cut, sae.requires_grad_(False))
    weights = sign * normalize(cut.suffix(x).sum(dim=0, keepdim=True), dim=1).detach()
    targets = torch.zeros(N_TARGETS, dtype=torch.long)
    draw = {"resamples": 20, "seed": 0}
    local = FaithfulnessCallback(
        *(spliced, weights, targets),
        methods=METHODS,
        n_steps=3,
        ig_steps=4,
        overlap_top=2,
        sum_classes=True,
        **draw,
    )
    device = DeviceConfig(accelerator="cpu", progress=False)

    def test(callback):
        trainer = build_tester(device, folder, callbacks=[callback])
        trainer.test(SplicedModule(spliced), rows_loader(x, batch_size=4), verbose=False)
        return callback

    test(local)
    whole = test(GlobalDeletionCallback(local.reader, targets, local.rankings, **draw))
    caplog.clear()
    with caplog.at_level("INFO"):
        log_table("a title", local, whole)
    return caplog.messages


def test_the_table_says_how_many_images_are_in_it(tmp_path, caplog):
    lines = logged(tmp_path, 1, caplog)
    assert lines[0] == f"a title, {N_READ} images, 3 steps"
    assert len(lines) == 2 + len(METHODS) + 1
    assert not any("not defined" in line for line in lines)


@pytest.mark.parametrize("line", [2, 3, 4, 5])
def test_an_area_that_is_not_defined_is_said_in_words(tmp_path, caplog, line):
    text = logged(tmp_path, -1, caplog)[line]
    assert "not defined" in text
    assert "nan" not in text
