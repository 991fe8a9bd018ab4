"""Files of weights: every form that is safe is read, nothing is executed, all is hashed."""

import contextlib
import copy
import io
import pickle
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clipattr.clip import Clip, load_clip
from clipattr.clip.loading import hash_weights
from clipattr.clip.names import WEIGHTS_FILE
from clipattr.errors import CheckpointError, ConfigError
from tests.clip_folders import LISTED, MODEL, MODELS, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a test that breaks the model works on a copy."""
    return write_model(tmp_path_factory.mktemp("tiny"), MODEL)


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(f"local-dir:{folder}")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.fixture
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    """As if open_clip listed a tiny model, with its usual vocabulary."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", copy.deepcopy(LISTED))
    return "tiny-clip"


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_local_checkpoint_of_an_architecture(file: str, tmp_path: Path, tiny_architecture: str):
    folder = write_model(tmp_path / "same", LISTED)
    weights = load_file(folder / WEIGHTS_FILE)
    if file.endswith("safetensors"):
        save_file(weights, tmp_path / file)
    else:
        torch.save({"epoch": 3, "state_dict": weights, "optimizer": {}}, tmp_path / file)
    loaded = load_clip(tiny_architecture.replace("-", "/"), pretrained=str(tmp_path / file))
    assert loaded.weights_sha256 == load_clip(f"local-dir:{folder}").weights_sha256


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("file", [WEIGHTS_FILE, "open_clip_pytorch_model.bin"])
def test_truncated_weights(broken: Path, file: str, share: float):
    weights = load_file(broken / WEIGHTS_FILE)
    (broken / WEIGHTS_FILE).unlink()
    path = broken / file
    save_file(weights, path) if file == WEIGHTS_FILE else torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{broken}.*could not be loaded: .{{5}}"):
        load_clip(f"local-dir:{broken}")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "other shape", "all others"])
def test_weights_of_another_architecture(broken: Path, damage: str):
    weights = load_file(broken / WEIGHTS_FILE)
    match damage:
        case "missing":
            del weights["visual.proj"]
        case "unexpected":
            weights["visual.extra"] = torch.zeros(1)
        case "other shape":
            weights["visual.proj"] = torch.zeros(32, 8)
        case _:
            weights = {f"other.{name}": value for name, value in weights.items()}
    save_file(weights, broken / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="could not be loaded: RuntimeError: ") as caught:
        load_clip(f"local-dir:{broken}")
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


class Misfit:
    """What only the safe unpickler refuses, with a TypeError: open_clip then loads once more."""

    def __reduce__(self) -> tuple[object, tuple[()], tuple[None, dict[str, int]]]:
        return OrderedDict, (), (None, {"attribute": 1})


def write_bomb(path: Path, way: str, marker: Path) -> None:
    bomb = {"state_dict": Bomb(marker)}
    match way:
        case "torch.save":
            torch.save(bomb, path)
        case "pickle":
            path.write_bytes(pickle.dumps(bomb))
        case _:
            torch.save([Misfit(), bomb], path)


@pytest.mark.parametrize("way", ["torch.save", "pickle", "misfit"])
@pytest.mark.parametrize("file", [WEIGHTS_FILE, "w.bin", "w.pth", "w.pt"])
def test_pickled_weights_are_never_executed(
    broken: Path,
    tmp_path: Path,
    tiny_architecture: str,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    way: str,
):
    (broken / WEIGHTS_FILE).unlink()
    weights, marker = broken / file, tmp_path / "executed"
    write_bomb(weights, way, marker)
    with pytest.raises(CheckpointError, match=r"safetensors|SafetensorError|TypeError"):
        load_clip(tiny_architecture, pretrained=str(weights))
    with pytest.raises(CheckpointError):
        load_clip(f"local-dir:{broken}")
    assert not marker.exists()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set"):
        load_clip(tiny_architecture, pretrained=str(weights))
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(weights.read_bytes()), weights_only=False)
    assert marker.exists(), "the bomb is a dud, the test proves nothing"


def test_numpy_weights_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """open_clip reads big_vision's .npz into a timm tower."""
    config = copy.deepcopy(MODELS["timm ViT"])
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-timm", config)
    marker, path = tmp_path / "executed", tmp_path / "w.npz"
    content = np.array([Bomb(marker)], dtype=object)
    np.savez(path, allow_pickle=True, **{"img/embedding/kernel": content})
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        load_clip("tiny-timm", pretrained=str(path))
    assert not marker.exists()


def test_torchscript_is_never_executed(tmp_path: Path, tiny_architecture: str):
    """The form in which OpenAI published its weights."""
    path = tmp_path / "ViT-B-32.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match=r"TorchScript.*convert it: safetensors\.torch\.save"):
        load_clip(tiny_architecture, pretrained=str(path))


def test_whole_model_is_never_executed(clip: Clip, tmp_path: Path, tiny_architecture: str):
    torch.save(clip.model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_clip(tiny_architecture, pretrained=str(tmp_path / "model.pt"))
    assert "save_file(model.state_dict()" in str(caught.value)
    assert "weights_only" not in str(caught.value), "torch advises to execute the file"


# Hash


def test_hash_follows_every_weight(clip: Clip):
    model = copy.deepcopy(clip.model)
    assert hash_weights(model) == clip.weights_sha256
    for name, parameter in model.named_parameters():
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-3
        assert hash_weights(model) != clip.weights_sha256, name
        parameter.data.copy_(before)
    assert hash_weights(model) == clip.weights_sha256


def test_hash_tells_equal_weights_under_other_names_apart():
    model = nn.ModuleDict({"left": nn.Linear(2, 2), "right": nn.Linear(2, 2)})
    renamed = nn.ModuleDict({"left": model["left"], "other": model["right"]})
    assert hash_weights(model) != hash_weights(renamed)
