"""Cutting a tower: what a user relies on. That every tower is cut right is shown in test_towers."""

import copy

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clipattr.clip import Rest, Site, Tower, image_tower, text_tower
from clipattr.clip.site import STREAMS
from clipattr.errors import ConfigError

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 9, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
PROMPTS = torch.tensor([[1, 5, 39, 0, 0, 0, 0, 0, 0], [1, 7, 8, 9, 39, 0, 0, 0, 0]])


def build_model(
    vision: dict[str, object] | None = None, text: dict[str, object] | None = None
) -> nn.Module:
    """Random weights of which none is the identity by accident."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(16, VISION | (vision or {}), TEXT | (text or {}))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model()


@pytest.fixture(scope="module")
def tower(model: nn.Module) -> Tower:
    return image_tower(model)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_two_halves_are_the_model(model: nn.Module, tower: Tower, images: Tensor):
    expected = model.encode_image(images)
    assert expected.std() > 0.1
    for layer in range(3):
        for tokens in ("cls", "spatial", "all"):
            cut = tower.cut(Site(layer, "residual", tokens))
            torch.testing.assert_close(cut.suffix(*cut.prefix(images)), expected)


def test_the_class_token_behind_the_last_block_needs_no_rest(
    model: nn.Module, tower: Tower, images: Tensor
):
    cut = tower.cut(Site())
    assert cut.is_whole
    assert cut.prefix(images).rest == Rest()
    torch.testing.assert_close(cut.suffix(cut.read(images)), model.encode_image(images))


@pytest.mark.parametrize(
    ("site", "is_whole"),
    [
        (Site(0, "residual", "all"), True),
        (Site(0, "residual_middle", "all"), True),
        (Site(0, "residual", "cls"), False),
        (Site(-1, "residual", "spatial"), False),
        (Site(0, "mlp", "all"), False),
        (Site(-1, "mlp", "cls"), False),
        (Site(-1, "embedding"), True),
    ],
)
def test_a_suffix_without_the_rest_it_needs_is_refused(
    tower: Tower, images: Tensor, site: Site, is_whole: bool
):
    cut = tower.cut(site)
    assert cut.is_whole is is_whole
    x = cut.read(images)
    if is_whole:
        cut.suffix(x)
    else:
        with pytest.raises(ConfigError, match="depends on more than x; pass on the rest"):
            cut.suffix(x)


def test_several_edits_of_one_image_share_its_prefix(
    model: nn.Module, tower: Tower, images: Tensor
):
    """Oracle: each edited image alone."""
    cut = tower.cut(Site(1, "mlp", "cls"))
    x, rest = cut.prefix(images)
    index = torch.tensor([3, 0, 3, 3])
    edited = x[index] + torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    together = cut.suffix(edited, rest.rows(index))
    for row, image in enumerate(index.tolist()):
        _, alone = cut.prefix(images[image : image + 1])
        torch.testing.assert_close(together[row], cut.suffix(edited[row : row + 1], alone)[0])
    with pytest.raises(ConfigError, match=r"x has 4 rows and its rest 5.*rest.rows\(index\)"):
        cut.suffix(edited, rest)


@pytest.mark.parametrize("shape", [(5, 31), (5, 4, 32)])
def test_an_activation_of_another_shape_is_refused(tower: Tower, shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"must be \[rows, width\] with a width of 32"):
        tower.cut(Site()).suffix(torch.zeros(shape))


def test_no_site_is_no_work(tower: Tower, images: Tensor):
    assert tower.capture(images, []) == {}


def test_capture_reads_what_each_cut_reads(tower: Tower, images: Tensor):
    streams = [stream for stream in STREAMS if stream != "embedding"]
    sites = [Site(layer, stream) for layer in (-3, 1) for stream in streams]
    sites += [Site(-1, "embedding"), Site(0, "residual", "all")]
    captured = tower.capture(images, sites)
    assert list(captured) != []
    assert set(captured) == set(sites)
    for site, x in captured.items():
        cut = tower.cut(site)
        assert x.shape[-1] == cut.d_site
        torch.testing.assert_close(x, cut.prefix(images).x)


def test_no_block_runs_twice(model: nn.Module, images: Tensor):
    """Prefix and suffix together run every block once, and the prefix stops at the site."""
    counted = copy.deepcopy(model)
    calls = [0, 0, 0]
    for number, block in enumerate(counted.visual.transformer.resblocks):
        block.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    cut = image_tower(counted).cut(Site(1, "residual"))
    x, rest = cut.prefix(images)
    assert calls == [1, 1, 0]
    cut.suffix(x, rest)
    assert calls == [1, 1, 1]
    cut.read(images)
    assert calls == [2, 2, 1]


def test_a_copied_class_token_does_not_keep_all_tokens_alive(tower: Tower, images: Tensor):
    x = tower.cut(Site(1)).read(images)
    assert x.untyped_storage().nbytes() == x.numel() * 4


def test_gradient_flows_through_the_suffix(tower: Tower, images: Tensor):
    """Oracle: central differences."""
    cut = tower.cut(Site(0, "heads", "spatial"))
    x, rest = cut.prefix(images)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(cut.suffix(x, rest)[:, 3].sum(), x)
    step = 1e-2 * direction
    with torch.no_grad():
        up, down = (cut.suffix(x + sign * step, rest)[:, 3].sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * step).sum(), (up - down) / 2, rtol=2e-3, atol=1e-5)


# Sites that do not exist


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_layers_out_of_range(tower: Tower, layer: int):
    with pytest.raises(ConfigError, match=rf"site.layer={layer}: the tower has 3 layers.*-3 to -1"):
        tower.cut(Site(layer))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(0, "resid_post"), "'resid_post': allowed are residual_before, heads"),
        (Site(0, "residual", "eot"), "'eot': allowed are cls, spatial, all"),
        (Site(0, "embedding"), "one vector behind the last block"),
        (Site(-1, "embedding", "all"), "one vector behind the last block"),
    ],
)
def test_unknown_streams_and_tokens(tower: Tower, site: Site, message: str):
    with pytest.raises(ConfigError, match=message):
        tower.cut(site)


def test_a_text_tower_has_no_patches(model: nn.Module):
    with pytest.raises(ConfigError, match=r"no patches, allowed are cls \(EOT\) and all"):
        text_tower(model).cut(Site(0, "residual", "spatial"))


def test_negative_layers_count_from_the_end(tower: Tower):
    assert tower.cut(Site(-2)).site == Site(1)
    assert tower.cut(Site(-3, "mlp", "all")).site == Site(0, "mlp", "all")


def test_a_model_in_training_mode_is_refused(model: nn.Module):
    with pytest.raises(ConfigError, match="call model.eval"):
        image_tower(copy.deepcopy(model).train())


def test_images_of_another_size(tower: Tower):
    with pytest.raises(ConfigError, match="images of 48 x 32 pixels; the tower takes 32 x 32"):
        tower.embed(torch.zeros(1, 3, 48, 32))


# Closed forms


def written_out(layer: tuple, x: Tensor) -> Tensor:
    """The last layer in float64, row by row."""
    gamma, beta, eps, projection, bias = layer
    rows = []
    for row in x.double():
        centred = row - row.mean()
        scaled = centred / (centred.square().mean() + eps).sqrt()
        rows.append((gamma * scaled + beta) @ projection + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["image", "text", "text with a biased projection"])
def test_last_layer_is_the_suffix_written_out(model: nn.Module, kind: str):
    if kind == "text with a biased projection":
        model = build_model(text={"proj_bias": True})
    tower = image_tower(model) if kind == "image" else text_tower(model)
    cut = tower.cut(Site())
    x = 3 + 2 * torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    layer = cut.last_layer(torch.float64)
    assert layer.projection.dtype == layer.bias.dtype == torch.float64
    torch.testing.assert_close(cut.suffix(x).double(), written_out(layer, x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("vision", "site"),
    [
        ({"pool_type": "avg"}, Site()),
        ({"attentional_pool": True}, Site()),
        ({}, Site(0)),
        ({}, Site(-1, "residual", "all")),
        ({}, Site(-1, "embedding")),
    ],
)
def test_closed_forms_need_one_token_and_a_linear_head(vision: dict[str, object], site: Site):
    with pytest.raises(ConfigError, match="closed forms need the class token"):
        image_tower(build_model(vision)).cut(site).last_layer()


# Text


def test_a_short_prompt_is_read_to_its_end_only(model: nn.Module):
    """The embedding is that of the full context, from five of its nine tokens."""
    tower = text_tower(model)
    lengths: list[int] = []
    block = model.transformer.resblocks[0]
    handle = block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    embedding = tower.embed(PROMPTS)
    handle.remove()
    assert lengths == [5]
    torch.testing.assert_close(embedding, model.encode_text(PROMPTS))


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}]
)
def test_a_text_tower_that_sees_its_padding_is_read_whole(text: dict[str, object]):
    model = build_model(text=text)
    torch.testing.assert_close(text_tower(model).embed(PROMPTS), model.encode_text(PROMPTS))


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_two_halves_of_a_text_tower_are_the_tower(model: nn.Module, tokens: str):
    tower = text_tower(model)
    for stream in set(STREAMS) - {"embedding"}:
        cut = tower.cut(Site(0, stream, tokens))
        torch.testing.assert_close(cut.suffix(*cut.prefix(PROMPTS)), model.encode_text(PROMPTS))


def test_the_pooled_token_of_a_text_is_its_last(model: nn.Module):
    tower = text_tower(model)
    every = tower.cut(Site(0, "residual", "all")).read(PROMPTS)
    pooled = tower.cut(Site(0, "residual", "cls")).read(PROMPTS)
    torch.testing.assert_close(pooled, torch.stack([every[0, 2], every[1, 4]]))
