"""The last blocks of an image tower learn, and nothing else; what is saved is the model."""

import copy
import io
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipattr.clip import Clip, load_clip
from clipattr.clip.loading import hash_weights
from clipattr.clip.names import WEIGHTS_FILE
from clipattr.clip.saving import save_clip
from clipattr.errors import ConfigError
from clipattr.probes.linear import LinearProbe
from clipattr.training.finetune_module import FinetuneModule
from tests.clip_folders import LISTED, MODEL, MODELS, write_model
from tests.test_training_images import png_of
from tests.tiny import save_tiny_clip

N_CLASSES = 3
LAST = ("transformer.resblocks.1.", "ln_post.", "proj")
OPEN_CLIP = {0: LAST[1:], 1: LAST, 2: ("transformer.", *LAST[1:])}
TIMM = {0: ("trunk.norm.", "head."), 1: ("trunk.blocks.11.", "trunk.norm.", "head.")}


def clip_of(folder: Path, family: str = "open_clip ViT") -> Clip:
    """The same weights for the same folder; others for another."""
    place = folder / family
    return load_clip(f"local-dir:{place if place.exists() else write_model(place, MODELS[family])}")


def probe_of(clip: Clip) -> LinearProbe:
    probe = LinearProbe(clip.d_embed, N_CLASSES)
    torch.nn.init.normal_(probe.weight, generator=torch.Generator().manual_seed(1))
    return probe


def module_of(clip: Clip, blocks: int = 1, **changes) -> FinetuneModule:
    options = {"lr": 1e-3, "head_lr": 1e-2, "weight_decay": 0.1, "warmup": 0, "n_steps": 10}
    return FinetuneModule(clip, probe_of(clip), blocks=blocks, **(options | changes))


def batch(clip: Clip, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = clip.model.visual.image_size
    return torch.randn(n, 3, *size, generator=generator), torch.arange(n) % N_CLASSES


def visual_parameters(clip: Clip) -> dict[str, torch.nn.Parameter]:
    return dict(clip.model.visual.named_parameters())


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_what_learns_of_an_open_clip_tower(tmp_path, blocks):
    clip = clip_of(tmp_path)
    module = module_of(clip, blocks)
    expected = {name for name in visual_parameters(clip) if name.startswith(OPEN_CLIP[blocks])}
    assert set(module.by_name) == expected
    learns = {name for name, p in clip.model.named_parameters() if p.requires_grad}
    assert learns == {f"visual.{name}" for name in expected}
    assert set(module.state_dict()) == {
        *(f"learned.{n}" for n in range(len(expected))),
        "probe.weight",
        "probe.bias",
    }


@pytest.mark.parametrize("blocks", [0, 1])
def test_what_learns_of_a_timm_tower(tmp_path, blocks):
    clip = clip_of(tmp_path, "timm ViT")
    n_blocks = len(clip.model.visual.trunk.blocks)
    wanted = tuple(name.replace("11", str(n_blocks - 1)) for name in TIMM[blocks])
    expected = {name for name in visual_parameters(clip) if name.startswith(wanted)}
    assert set(module_of(clip, blocks).by_name) == expected


def test_what_both_halves_read_stays_frozen(tmp_path):
    """The half before the cut would change with it, of which no gradient knows."""
    clip = clip_of(tmp_path)
    blocks = clip.model.visual.transformer.resblocks
    blocks[1].ln_1 = blocks[0].ln_1
    names = set(module_of(clip, 1).by_name)
    assert not any("ln_1" in name for name in names)
    assert any("ln_2" in name for name in names)
    assert any("resblocks.0.ln_1" in name for name in module_of(clip, 2).by_name)


@pytest.mark.parametrize(
    ("family", "blocks"),
    [("open_clip ViT", 0), ("open_clip ViT", 1), ("open_clip ViT", 2), ("timm ViT", 1)],
)
def test_the_gradient_is_that_of_the_whole_model(tmp_path, family, blocks):
    clip, whole = clip_of(tmp_path, family), clip_of(tmp_path, family)
    module = module_of(clip, blocks)
    images, labels = batch(clip)
    cross_entropy(module(images), labels).backward()

    whole.model.requires_grad_(True)
    probe = probe_of(whole)
    features = normalize(whole.model.encode_image(images), dim=-1)
    cross_entropy(features @ probe.weight.T + probe.bias, labels).backward()
    theirs = visual_parameters(whole)
    for name, each in module.by_name.items():
        assert theirs[name].grad.abs().max() > 0
        torch.testing.assert_close(each.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.probe.weight.grad, probe.weight.grad)
    frozen = set(visual_parameters(clip)) - set(module.by_name)
    assert all(visual_parameters(clip)[name].grad is None for name in frozen)
    assert any(theirs[name].grad.abs().max() > 0 for name in frozen)


def test_the_half_before_the_cut_leaves_no_graph(tmp_path):
    clip = clip_of(tmp_path)
    module = module_of(clip, 1)
    seen = []
    suffix = module.cut.suffix
    module.cut.suffix = lambda x, rest: (seen.append(x.requires_grad), suffix(x, rest))[1]
    clip.model.requires_grad_(True)  # even then
    module(batch(clip)[0])
    assert seen == [False]


def test_rates_and_decay_of_the_groups(tmp_path):
    clip = clip_of(tmp_path)
    module = module_of(clip, 1, warmup=4)
    optimizer = module.configure_optimizers()["optimizer"]
    groups = optimizer.param_groups
    rate_of = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(rate_of[id(p)] == 1e-3 for p in module.by_name.values())
    assert all(rate_of[id(p)] == 1e-2 for p in module.probe.parameters())
    for p in module.parameters():
        assert decay_of[id(p)] == (0.1 if p.ndim > 1 else 0.0)
    assert groups[0]["lr"] == pytest.approx(1e-3 / 4)  # the first of the warm-up


def test_class_weights_are_those_of_torch_on_the_whole_set(tmp_path, monkeypatch):
    """One batch with the shares of the set: sum_i w_i l_i / n = sum_i w_i l_i / sum_i w_i."""
    clip = clip_of(tmp_path)
    images, _ = batch(clip)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    counts = torch.bincount(labels)
    weight = len(labels) / (N_CLASSES * counts)
    module = module_of(clip, class_weight=weight)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    expected = cross_entropy(module(images), labels, weight=weight)
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)
    losses = cross_entropy(module(images), labels, reduction="none")
    a_part = module.training_step((images[:3], labels[:3]), 0)
    torch.testing.assert_close(a_part, 2 / 3 * losses[:3].mean())


def test_the_head_is_computed_in_float32(tmp_path):
    clip = clip_of(tmp_path)
    module, images = module_of(clip), batch(clip)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        module.probe.weight.mul_(100)
        logits = module(images)
        embeddings = module.cut.suffix(*module.cut.prefix(images))
    assert logits.dtype == torch.float32
    expected = module.probe(normalize(embeddings.float(), dim=-1))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_line_from_the_start_to_the_end(tmp_path, alpha):
    clip, untouched = clip_of(tmp_path), clip_of(tmp_path)
    module = module_of(clip)
    ends = {}
    with torch.no_grad():
        for name, each in module.by_name.items():
            each.add_(torch.randn(each.shape))
            ends[name] = each.clone()
        module.probe.bias.add_(1.0)
    module.move_back(alpha)
    for name, each in visual_parameters(clip).items():
        start = visual_parameters(untouched)[name]
        end = ends.get(name, start)
        torch.testing.assert_close(each.data, (1 - alpha) * start + alpha * end)
        if alpha in (0.0, 1.0):
            assert torch.equal(each, end if alpha else start)
    torch.testing.assert_close(module.probe.bias.data, torch.full((N_CLASSES,), alpha))


@pytest.mark.parametrize("blocks", [-1, 3])
def test_more_blocks_than_there_are(tmp_path, blocks):
    with pytest.raises(ConfigError, match=rf"finetune.blocks={blocks}: .* has 2 blocks.* 0 to 2"):
        module_of(clip_of(tmp_path), blocks)


def test_a_tower_that_cannot_be_cut(tmp_path):
    with pytest.raises(ConfigError, match="ModifiedResNet, which has no sites"):
        module_of(clip_of(tmp_path, "ResNet"))


@pytest.mark.parametrize("family", ["open_clip ViT", "timm ViT", "CoCa", "ResNet"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, family):
    clip = clip_of(tmp_path, family)
    with torch.no_grad():
        next(clip.model.visual.parameters()).add_(0.5)
    save_clip(clip, None, tmp_path / "saved")
    again = load_clip(f"local-dir:{tmp_path / 'saved'}")
    assert again.weights_sha256 == hash_weights(clip.model) != clip.weights_sha256
    picture = Image.open(io.BytesIO(png_of(3)))
    images = clip.preprocess(picture)[None]
    assert torch.equal(again.preprocess(picture)[None], images)
    assert torch.equal(again.encode_image(images), clip.encode_image(images))
    tokens = clip.tokenizer(["a red star"])
    assert torch.equal(again.tokenizer(["a red star"]), tokens)
    assert torch.equal(again.encode_text(tokens), clip.encode_text(tokens))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_model_of_an_architecture_and_a_file_is_saved_with_its_config(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", copy.deepcopy(LISTED))
    weights = write_model(tmp_path / "same", LISTED) / WEIGHTS_FILE
    clip = load_clip("tiny-clip", pretrained=str(weights))
    save_clip(clip, str(weights), tmp_path / "saved")
    again = load_clip(f"local-dir:{tmp_path / 'saved'}")
    assert again.weights_sha256 == clip.weights_sha256
    image = Image.open(io.BytesIO(png_of(3)))
    assert torch.equal(again.preprocess(image), clip.preprocess(image))
    assert torch.equal(again.tokenizer(["a red star"]), clip.tokenizer(["a red star"]))


def test_a_saved_model_replaces_another(tmp_path):
    clip = load_clip(save_tiny_clip(tmp_path / "tiny"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "rest.bin").write_bytes(b"of another model")
    save_clip(clip, None, tmp_path / "saved")
    assert not (tmp_path / "saved" / "rest.bin").exists()
    assert load_clip(f"local-dir:{tmp_path / 'saved'}").weights_sha256 == clip.weights_sha256


def test_a_tokenizer_of_transformers_is_saved_with_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[PAD]": 1, "red": 2, "star": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = MODEL["text_cfg"] | {"hf_tokenizer_name": "some/where"}
    folder = write_model(tmp_path / "first", MODEL | {"text_cfg": text})
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(str(folder))
    clip = load_clip(f"local-dir:{folder}")
    save_clip(clip, None, tmp_path / "saved")
    again = load_clip(f"local-dir:{tmp_path / 'saved'}")
    tokens = again.tokenizer(["red star"])
    assert tokens.tolist() == [[2, 3, *[1] * 6]] == clip.tokenizer(["red star"]).tolist()


def test_a_tokenizer_of_open_clip_says_itself_what_is_saved(tmp_path):
    """As above where transformers is not installed."""

    class Words:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "words.json").write_text("{}")

    tokenizer = object.__new__(HFTokenizer)
    tokenizer.tokenizer = Words()
    clip = replace(clip_of(tmp_path), tokenizer=tokenizer)
    save_clip(clip, None, tmp_path / "saved")
    assert (tmp_path / "saved" / "words.json").exists()
