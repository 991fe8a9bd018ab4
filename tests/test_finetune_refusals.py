"""The job finetune: what is known to be wrong costs no earlier result, a kill leaves nothing."""

import json
import os
from pathlib import Path

import pytest
import torch

from clipattr.clip import load_clip, saving
from clipattr.clip.saving import save_clip
from clipattr.data.pixels import Pixels
from tests.test_finetune_job import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_batch_larger_than_the_data_leaves_the_model(place: Place, capsys: pytest.CaptureFixture):
    assert place.train("trainer.steps=2", "trainer.checkpoint_every=1") == 0
    before = sorted(path.relative_to(place.run()) for path in place.run().rglob("*"))
    assert place.train("data.batch_size=1000") == 2
    assert "has 32 usable images; choose a smaller batch" in capsys.readouterr().err
    assert sorted(path.relative_to(place.run()) for path in place.run().rglob("*")) == before


def test_a_training_that_diverges_saves_nothing(place: Place, capsys: pytest.CaptureFixture):
    assert place.train("finetune.lr=1e30") == 2
    assert "the training diverged, choose a smaller finetune.lr" in capsys.readouterr().err
    assert not (place.run() / "model").exists()
    assert not (place.run() / "probe.json").exists()


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_held_out_images_are_others(place: Place, mode: str, capsys: pytest.CaptureFixture):
    os.symlink(place.shards, place.folder / "link")
    assert place.train(f"held_out={place.shards}", f"data.mode={mode}") == 2
    assert "are the images of the training; name others" in capsys.readouterr().err
    assert place.train(f"held_out={place.folder / 'link'}", f"data.mode={mode}") == 2
    assert "measured on images that the training has not seen" in capsys.readouterr().err
    assert not place.run().exists()


def test_the_start_is_not_in_the_folder_that_is_replaced(
    place: Place, capsys: pytest.CaptureFixture
):
    assert place.train("trainer.steps=1") == 0
    assert place.train(f"finetune.start={place.run()}") == 2
    assert "which would be replaced" in capsys.readouterr().err
    assert (place.run() / "probe.json").exists()


def test_the_preprocessing_is_recorded(place: Place):
    assert place.train("trainer.steps=1", "data.decode=draft") == 0
    record = json.loads((place.run() / "probe.json").read_text())
    saved = load_clip(f"local-dir:{place.run() / 'model'}")
    assert record["preprocess"] == Pixels(saved.preprocess, "draft").fingerprint


def test_what_a_kill_while_saving_leaves_is_swept(place: Place, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_file", killed)
        place.run().mkdir(parents=True)
        with pytest.raises(KeyboardInterrupt):
            save_clip(load_clip(place.model), None, place.run() / "model")
    (left,) = place.run().iterdir()
    left.rename(left.with_name(left.name.replace(str(os.getpid()), "999999")))
    assert place.train("trainer.steps=1") == 0
    assert not [path.name for path in place.run().iterdir() if path.name.startswith(".model")]
    assert all(one.isfinite().all() for one in place.weights().values() if torch.is_tensor(one))
