import copy
import hashlib
import io
import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipattr.clip import Clip, Site, Tower, build_clip, embed_prompts, load_clip
from clipattr.clip.loading import (
    BUNDLED,
    CONFIG_FILE,
    MERGES_FILE,
    WEIGHTS_FILE,
    hash_weights,
)
from clipattr.errors import CheckpointError, ConfigError
from clipattr.world.prompts import ZEROSHOT
from clipattr.world.sampling import Split
from clipattr.world.shards import draw_samples

TEXT = {"context_length": 8, "vocab_size": 644, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
MODEL = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def write_model(folder: Path, model_cfg: Mapping[str, object]) -> Path:
    """A folder with a config, merges and random weights; none is the identity by accident."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BUNDLED["planted-world"] / MERGES_FILE, folder / MERGES_FILE)
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    model, _, _ = build_clip(str(folder))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


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
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Loading


def test_loaded_weights_are_the_ones_on_disk(clip: Clip, folder: Path):
    found = clip.model.state_dict()
    for name, value in load_file(folder / WEIGHTS_FILE).items():
        assert torch.equal(found[name], value), name


def test_model_is_frozen_and_in_eval_mode(clip: Clip, images: Tensor):
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not any(module.training for module in clip.model.modules())
    assert not clip.model.encode_image(images).requires_grad


def test_preprocessing_is_the_model_s_own(clip: Clip):
    image = Image.new("RGB", (50, 40), (255, 0, 51))
    expected = torch.tensor([(1 - 0.1) / 0.5, (0 - 0.2) / 0.6, (0.2 - 0.3) / 0.7])
    result = clip.preprocess(image)
    torch.testing.assert_close(result, expected[:, None, None].expand(3, 32, 32))


def test_tokenizer_reads_the_merges_of_the_folder(clip: Clip):
    """Every word of the world is one token there, and the length is the config's."""
    tokens = clip.tokenizer(["a red star"])
    assert tokens.shape == (1, 8)
    assert (tokens != 0).sum() == 5  # start, three words, end
    assert tokens.max() == 643


def test_local_checkpoint_of_an_architecture(
    folder: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", copy.deepcopy(MODEL))
    loaded = load_clip("tiny-clip", pretrained=str(folder / WEIGHTS_FILE))
    assert loaded.weights_sha256 == clip.weights_sha256


def test_missing_local_checkpoint_of_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", copy.deepcopy(MODEL))
    with pytest.raises(CheckpointError, match=f"'tiny-clip'.*{tmp_path}/none.safetensors"):
        load_clip("tiny-clip", pretrained=str(tmp_path / "none.safetensors"))


def test_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'ViT-B-33' is unknown; nearest: .*ViT-B-32"):
        load_clip("ViT-B-33")
    with pytest.raises(ConfigError, match=r"nearest: planted-world"):
        load_clip("planted-word")


def test_architecture_without_weights_names_the_tags():
    with pytest.raises(
        ConfigError, match=r"'ViT-B-32' needs model.pretrained: .*laion2b_s34b_b79k"
    ):
        load_clip("ViT-B-32")


@pytest.mark.parametrize("name", ["planted-world", "local-dir:somewhere", "hf-hub:some/model"])
def test_weight_tag_beside_a_name_with_weights_is_refused(name: str):
    """open_clip would ignore the tag, and the user would measure another model."""
    with pytest.raises(ConfigError, match=rf"{name}.* brings its own weights.*'openai'"):
        load_clip(name, pretrained="openai")


def test_missing_folder(tmp_path: Path):
    with pytest.raises(
        ConfigError,
        match=rf"{tmp_path}/none/{CONFIG_FILE} is missing \(the folder "
        r"does not exist\)",
    ):
        load_clip(f"local-dir:{tmp_path}/none")


def test_folder_without_config(broken: Path):
    (broken / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match=rf"{CONFIG_FILE} is missing \(the folder exists\)"):
        load_clip(f"local-dir:{broken}")
    with pytest.raises(ConfigError, match=f"no {CONFIG_FILE} found.*'planted-world'"):
        build_clip(str(broken))


@pytest.mark.parametrize("content", [b"{not json", b"{}", b"[]", b"\xff\xfe\x00"])
def test_broken_config(broken: Path, content: bytes):
    (broken / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{broken}/{CONFIG_FILE} holds no valid model_cfg"):
        load_clip(f"local-dir:{broken}")


def test_folder_without_weights_never_gives_a_random_model(broken: Path):
    (broken / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{broken}.*could not be loaded"):
        load_clip(f"local-dir:{broken}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(broken: Path, share: float):
    path = broken / WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{broken}.*could not be loaded"):
        load_clip(f"local-dir:{broken}")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "other shape"])
def test_weights_of_another_architecture(broken: Path, damage: str):
    weights = load_file(broken / WEIGHTS_FILE)
    match damage:
        case "missing":
            del weights["visual.proj"]
        case "unexpected":
            weights["visual.extra"] = torch.zeros(1)
        case _:
            weights["visual.proj"] = torch.zeros(32, 8)
    save_file(weights, broken / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_clip(f"local-dir:{broken}")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_weights_are_never_executed(broken: Path, tmp_path: Path, legacy: bool):
    (broken / WEIGHTS_FILE).unlink()
    weights, marker = broken / "open_clip_pytorch_model.bin", tmp_path / "executed"
    if legacy:
        weights.write_bytes(pickle.dumps({"state_dict": Bomb(marker)}))
    else:
        torch.save({"state_dict": Bomb(marker)}, weights)
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_clip(f"local-dir:{broken}")
    assert not marker.exists()


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


# The tower


def test_suffix_of_prefix_is_the_model(clip: Clip, images: Tensor):
    tower = Tower(clip.model, Site())
    x = tower.prefix(images)
    assert x.shape == (5, tower.d_model) == (5, 32)
    expected = clip.model.encode_image(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(tower.suffix(x), expected, atol=1e-5, rtol=0)


def test_prefix_is_the_last_block_s_class_token(clip: Clip, images: Tensor):
    """Oracle: what a hook on the last block of the whole model sees."""
    visual = clip.model.visual
    assert isinstance(visual, VisionTransformer)
    seen: list[Tensor] = []
    handle = visual.transformer.resblocks[-1].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    clip.model.encode_image(images)
    handle.remove()
    torch.testing.assert_close(Tower(clip.model, Site()).prefix(images), seen[0][:, 0])


def test_last_layer_is_the_suffix_written_out(clip: Clip):
    tower = Tower(clip.model, Site())
    x = 3 + 2 * torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    gamma, beta, eps, projection = tower.last_layer(torch.float64)
    assert projection.dtype == torch.float64
    rows = []
    for row in x.double():
        centred = row - row.sum() / 32
        scaled = centred / (centred.square().sum() / 32 + eps).sqrt()
        rows.append((gamma * scaled + beta) @ projection)
    torch.testing.assert_close(tower.suffix(x).double(), torch.stack(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [-1, 1])
def test_last_block_has_two_names(clip: Clip, layer: int):
    assert Tower(clip.model, Site(layer)).site == Site(1, "residual", "cls")


@pytest.mark.parametrize("layer", [0, -2, 2, -3, 99])
def test_other_layers_are_refused(clip: Clip, layer: int):
    with pytest.raises(ConfigError, match=rf"site.layer={layer} of a tower with 2 layers.*-1 or 1"):
        Tower(clip.model, Site(layer))


@pytest.mark.parametrize("site", [Site(-1, "mlp", "cls"), Site(-1, "residual", "spatial")])
def test_other_streams_and_tokens_are_refused(clip: Clip, site: Site):
    with pytest.raises(ConfigError, match=rf"'{site.stream}'.*'{site.tokens}'.*residual stream"):
        Tower(clip.model, site)


def test_convolutional_tower_is_refused(tmp_path: Path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    folder = write_model(tmp_path / "resnet", MODEL | {"vision_cfg": vision})
    resnet = load_clip(f"local-dir:{folder}")
    with pytest.raises(ConfigError, match="is a ModifiedResNet.*VisionTransformer only"):
        Tower(resnet.model, Site())


@pytest.mark.parametrize("option", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_tower_without_class_token_readout_is_refused(tmp_path: Path, option: dict[str, object]):
    folder = write_model(tmp_path / "pooled", MODEL | {"vision_cfg": VISION | option})
    model, _, _ = build_clip(str(folder))
    with pytest.raises(ConfigError, match="needs the class token followed by a projection"):
        Tower(model, Site())


# Prompts


def test_prompts_are_unit_rows_of_the_text_tower(clip: Clip):
    prompts = ["a star", "a red fish on sand", "a moon", "a bolt", "shape"]
    rows = embed_prompts(clip, prompts)
    assert rows.shape == (5, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    raw = clip.model.encode_text(clip.tokenizer(prompts))
    torch.testing.assert_close(rows, raw / raw.square().sum(dim=1, keepdim=True).sqrt())
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_prompts_do_not_depend_on_the_batch(clip: Clip, batch_size: int):
    prompts = ["a star", "a red fish on sand", "a moon", "a bolt", "shape"]
    expected = embed_prompts(clip, prompts)
    torch.testing.assert_close(embed_prompts(clip, prompts, batch_size=batch_size), expected)


# The bundled model


def test_bundled_model_knows_the_world():
    """Fails without the weights: a release that lacks them is broken."""
    weights = BUNDLED["planted-world"] / WEIGHTS_FILE
    card = (BUNDLED["planted-world"] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in re.findall(r"[0-9a-f]{64}", card)
    clip = load_clip("planted-world")
    samples = [next(draw_samples(Split.val, index, seed=20_000)) for index in range(64)]
    pictures = [Image.open(io.BytesIO(sample["jpg"])) for sample in samples]  # type: ignore[arg-type]
    with torch.no_grad():
        batch = torch.stack([clip.preprocess(picture) for picture in pictures])
        embeddings = clip.model.encode_image(batch, normalize=True)
    factors = [json.loads(sample["json"]) for sample in samples]  # type: ignore[arg-type]
    for name in ("colour", "background"):
        task = ZEROSHOT[name]
        chosen = (embeddings @ embed_prompts(clip, list(task.prompts)).T).argmax(dim=1)
        right = [
            task.values[choice] == row[task.field]
            for choice, row in zip(chosen.tolist(), factors, strict=True)
        ]
        assert sum(right) / 64 >= 0.9, name
