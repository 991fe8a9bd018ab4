"""A wrong name is answered with the right one, before anything is downloaded."""

import json
import warnings
from pathlib import Path

import open_clip
import pytest

from clipattr.clip import build_clip, hub, load_clip
from clipattr.clip.names import CONFIG_FILE, resolve_name
from clipattr.config.load import load_config
from clipattr.config.schema import TRAIN_JOBS
from clipattr.errors import CheckpointError, ConfigError

SMALL = "laion2b_s34b_b79k"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        pytest.fail("a name must be judged before the network is asked")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", refuse)
    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ViT-B-33", "ViT-B-32"),
        ("vit-b-32", "ViT-B-32"),
        ("planted-word", "planted-world"),
        ("siglip2", "ViT-B-16-SigLIP2"),
        ("local_dir:/some/where", "local-dir:/some/where"),
        ("localdir:/some/where", "local-dir:/some/where"),
        ("Local-Dir:/some/where", "local-dir:/some/where"),
        ("hf_hub:some/model", "hf-hub:some/model"),
        ("some/model", "hf-hub:some/model"),
        ("?????", "none"),
    ],
)
def test_unknown_name_names_the_nearest(name: str, nearest: str):
    with pytest.raises(ConfigError) as caught:
        load_clip(name)
    start, end = str(caught.value).split("; nearest: ")
    assert start == f"model.name={name!r} is unknown"
    names, allowed = end.split(". Allowed: ")
    assert nearest in names.split(", ")
    assert allowed.startswith("planted-world, an open_clip architecture")


def test_folder_without_its_prefix(tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"nearest: local-dir:{tmp_path}\. "):
        load_clip(str(tmp_path))


def test_slash_in_an_architecture_name():
    assert resolve_name("ViT-B/32", SMALL) == "ViT-B-32"
    assert resolve_name("ViT-B-16/SigLIP", "webli") == "ViT-B-16-SigLIP"


def test_architecture_without_weights_names_the_tags():
    with pytest.raises(ConfigError, match=rf"'ViT-B-32' needs model.pretrained: .*{SMALL}.* local"):
        load_clip("ViT-B-32")


@pytest.mark.parametrize(
    ("name", "pretrained", "parts"),
    [
        ("ViT-B-32", "laion2b_s34b_b79", ["tag of 'ViT-B-32'", f"nearest tags: {SMALL}"]),
        ("ViT-B-16-SigLIP", "webly", ["nearest tags: webli"]),
        ("ViT-B-32-quickgelu", SMALL, ["laion400m_e31", "It is a tag of ViT-B-32"]),
        ("ViT-B-32", "/no/such.safetensors", ["'/no/such.safetensors' is neither a file nor"]),
    ],
)
def test_unknown_weights_name_the_nearest(name: str, pretrained: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_clip(name, pretrained=pretrained)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_tag_in_another_spelling_is_the_tag():
    assert resolve_name("ViT-B-32", "LAION2B-s34b-b79k") == "ViT-B-32"


def test_folder_as_weights(tmp_path: Path):
    (tmp_path / "mine.safetensors").touch()
    with pytest.raises(ConfigError) as caught:
        load_clip("ViT-B-32", pretrained=str(tmp_path))
    assert str(caught.value) == (
        f"model.pretrained={str(tmp_path)!r} is a folder, which holds mine.safetensors: "
        f"name the file, or the folder alone with model.name=local-dir:{tmp_path}"
    )


@pytest.mark.parametrize("name", ["planted-world", "local-dir:somewhere", "hf-hub:some/model"])
def test_weight_tag_beside_a_name_with_weights_is_refused(name: str):
    """open_clip would ignore the tag, and the user would measure another model."""
    with pytest.raises(ConfigError, match=rf"{name}.* brings its own weights.*'openai'"):
        load_clip(name, pretrained="openai")


def test_unknown_precision():
    with pytest.raises(ConfigError, match="model.precision='fp8': must be one of fp32, bf16, fp16"):
        load_clip("planted-world", precision="fp8")


# Activation functions


def test_activation_mismatch_names_the_right_architecture():
    with pytest.raises(
        ConfigError,
        match="'ViT-L-14-336' has GELU.*'openai' was trained with QuickGELU.*"
        "model.name=ViT-L-14-336-quickgelu$",
    ):
        load_clip("ViT-L-14-336", pretrained="openai")


class BuiltError(Exception):
    """Raised in the place of a model."""


def open_clip_warns(name: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Oracle: whether open_clip, told that the download is done, warns of a mismatch."""

    def stop(**_config: object) -> None:
        raise BuiltError

    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_a, **_k: "weights")
    for kind in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(open_clip.factory, kind, stop)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BuiltError):
            open_clip.create_model(name, pretrained=tag)
    return any("QuickGELU mismatch" in str(warning.message) for warning in caught)


def test_every_tag_is_refused_exactly_where_open_clip_warns(monkeypatch: pytest.MonkeyPatch):
    pairs = open_clip.list_pretrained()
    assert len(pairs) > 150
    refused = 0
    for name, tag in pairs:
        if open_clip_warns(name, tag, monkeypatch):
            refused += 1
            with pytest.raises(ConfigError, match="activations") as caught:
                resolve_name(name, tag)
            right = str(caught.value).split("model.name=")[-1]
            own_config = right.startswith("hf-hub:")
            assert own_config or resolve_name(right, tag) == right
        else:
            assert resolve_name(name, tag) == name
    assert refused > 20


# Folders


def test_missing_folder(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_clip(f"local-dir:{tmp_path}/none")
    assert str(caught.value) == (
        f"model.name='local-dir:{tmp_path}/none': {tmp_path}/none/{CONFIG_FILE} is missing "
        "(the folder does not exist)"
    )


def test_missing_folder_in_a_config_is_echoed_as_written(tmp_path: Path):
    path = tmp_path / "some.yaml"
    path.write_text("job: train_sae\nname: s\nheld_out: .\ndata: {shards: .}\n")
    config = load_config([str(path), "model.name=local-dir:/no/where"], TRAIN_JOBS)
    with pytest.raises(ConfigError) as caught:
        config.check_paths()
    assert str(caught.value) == "model.name='local-dir:/no/where': /no/where does not exist"


def test_folder_without_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"{CONFIG_FILE} is missing \(the folder exists\)"):
        load_clip(f"local-dir:{tmp_path}")
    with pytest.raises(ConfigError, match=f"no {CONFIG_FILE} found.*'planted-world'"):
        build_clip(str(tmp_path))


@pytest.mark.parametrize("content", [b"{not json", b"{}", b"[]", b"\xff\xfe\x00"])
def test_broken_config(tmp_path: Path, content: bytes):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/{CONFIG_FILE} holds no valid model_cfg"):
        load_clip(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], rf"ends with .safetensors or .bin or .pth \(found {CONFIG_FILE}\)"),
        (["epoch_9.pt"], rf"ends with .* \(found epoch_9.pt, {CONFIG_FILE}\)"),
        (["a.bin", "b.safetensors"], r"several files hold weights \(a.bin, b.safetensors\)"),
    ],
)
def test_folder_whose_weights_cannot_be_told(tmp_path: Path, files: list[str], message: str):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": {}}))
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"model.name='local-dir:{tmp_path}': .*{message}"):
        load_clip(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "files", [["any.pth"], ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "x.bin"]]
)
def test_folder_whose_weights_are_clear(tmp_path: Path, files: list[str]):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": {}}))
    for file in files:
        (tmp_path / file).touch()
    assert resolve_name(f"local-dir:{tmp_path}", None) == f"local-dir:{tmp_path}"
