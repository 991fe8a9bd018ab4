"""Compares every site of a tower with the raw hooks; names the site where they disagree."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clipattr.clip import Rest, Site, Tower, image_tower
from clipattr.errors import ConfigError
from tests.tower_hooks import STREAMS, Encode, Recording, fused_weights, patched, record
from tests.towers import images_for, prefix_tokens, visual_of

# Of fp32 sums of a few thousand terms around one; a wrong quirk is off by 0.01 or more.
TOLERANCE = 1e-5

EMBEDDING = Site(-1, "embedding")


@dataclass(frozen=True)
class Subject:
    """A tower beside the model that it comes from, and what was read off the model's modules."""

    tower: Tower
    model: nn.Module
    encode: Encode
    blocks: Sequence[nn.Module]
    inputs: Tensor
    # The positions [image, token] that each choice of tokens means.
    positions: Mapping[str, Tensor]

    def sites(self, layers: Sequence[int] | None = None) -> list[Site]:
        chosen = range(len(self.blocks)) if layers is None else layers
        return [
            Site(layer, stream, tokens)
            for layer in chosen
            for stream in STREAMS
            for tokens in self.positions
        ]

    def few_sites(self) -> list[Site]:
        """Every stream once, from the first block to the last: for towers of full depth."""
        last = len(self.blocks) - 1
        middle, one = last // 2, "cls" if "cls" in self.positions else "spatial"
        return [
            Site(0, "residual_before", "all"),
            Site(0, "heads", one),
            Site(middle, "attention", "spatial"),
            Site(middle, "residual_middle", "all"),
            Site(middle, "neurons", one),
            Site(last - 1, "mlp", "all"),
            Site(last, "residual", "spatial"),
            Site(last, "residual", one),
        ]

    def take(self, activation: Tensor, tokens: str) -> Tensor:
        rows = torch.arange(len(activation))[:, None]
        chosen = activation[rows, self.positions[tokens]]
        return chosen[:, 0] if tokens == "cls" else chosen

    def put(self, activation: Tensor, tokens: str, x: Tensor) -> Tensor:
        rows = torch.arange(len(activation))[:, None]
        result = activation.clone()
        result[rows, self.positions[tokens]] = x[:, None] if tokens == "cls" else x
        return result


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    visual: Any = visual_of(model)
    is_open_clip = isinstance(visual, VisionTransformer)
    return list(visual.transformer.resblocks if is_open_clip else visual.trunk.blocks)


def image_subject(model: nn.Module, *, rows: int = 2) -> Subject:
    images = images_for(model, rows)
    n_prefix, has_cls = prefix_tokens(model)
    blocks = blocks_of(model)

    def encode(batch: Tensor) -> Tensor:
        return model.encode_image(batch, normalize=False)  # type: ignore[operator]

    lengths: list[int] = []
    handle = blocks[0].register_forward_hook(lambda *args: lengths.append(args[-1].shape[1]))
    encode(images)
    handle.remove()
    everything = torch.arange(lengths[0]).expand(rows, -1)
    positions = {"spatial": everything[:, n_prefix:], "all": everything}
    if has_cls:
        positions["cls"] = everything[:, :1]
    return Subject(image_tower(model), model, encode, blocks, images, positions)


class Errors(NamedTuple):
    """The largest differences over all sites, relative to the size of what is compared."""

    model: float = 0.0  # suffix(*prefix(inputs)) and the model
    activation: float = 0.0  # x and the hooked activation
    patch: float = 0.0  # suffix of a changed x and the model patched by a hook
    gradient: float = 0.0  # d embedding / d x and autograd through the whole model

    def worst(self, other: "Errors") -> "Errors":
        return Errors(*(max(pair) for pair in zip(self, other, strict=True)))


def difference(actual: Tensor, expected: Tensor, what: str, *, unit: float = 1.0) -> float:
    """Largest difference, in units or relative to the largest number, whichever is less strict."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    assert expected.isfinite().all(), f"{what}: the oracle is not finite"
    scale = max(unit, expected.abs().max().item())
    error = (actual - expected).abs().max().item() / scale
    assert error <= TOLERANCE, f"{what}: off by {error:.1e}, allowed are {TOLERANCE:.0e}"
    return error


def check_sites(subject: Subject, sites: Sequence[Site]) -> Errors:
    """suffix(*prefix(x)), x itself, a patch and a gradient at each site."""
    recording = record(subject.encode, subject.blocks, subject.inputs)
    embedding = subject.encode(subject.inputs)
    assert embedding.std() > 0.1
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(embedding.shape, generator=generator)
    gradients = recording.gradients(direction)
    errors = Errors()
    for site in sites:
        gradient = gradients[site.layer, site.stream]
        errors = errors.worst(_check_site(subject, site, recording, direction, gradient))
    _check_embedding(subject, embedding)
    _check_capture(subject, sites, recording)
    return errors


def _check_site(
    subject: Subject, site: Site, recording: Recording, direction: Tensor, gradient: Tensor
) -> Errors:
    embedding = recording.embedding.detach()
    activation = recording.activations[site.layer, site.stream].detach()
    expected = subject.take(activation, site.tokens)
    cut = subject.tower.cut(site)
    with torch.no_grad():
        x, rest = cut.prefix(subject.inputs)
        assert torch.equal(cut.read(subject.inputs), x), f"{site}: read and prefix differ"
    assert cut.site == site
    assert x.shape[-1] == cut.d_site, f"{site}: d_site is {cut.d_site}, x has {x.shape[-1]}"
    seen = difference(x, expected, f"{site}: x")

    x = x.requires_grad_()
    result = cut.suffix(x, rest)
    same = difference(result.detach(), embedding, f"{site}: suffix(*prefix(inputs))")
    (slope,) = torch.autograd.grad((result * direction).sum(), x)
    gradient_of_site = subject.take(gradient, site.tokens)
    steepest = gradient.abs().max().item()
    sloped = difference(slope, gradient_of_site, f"{site}: gradient", unit=steepest)

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    changed = x.detach() + activation.std() * noise
    with torch.no_grad():
        result = cut.suffix(changed, rest)
        with patched(
            subject.blocks[site.layer],
            site.stream,
            lambda full: subject.put(full, site.tokens, changed),
        ):
            wanted = subject.encode(subject.inputs)
    if slope.abs().max() > 1e-3:
        assert (wanted - embedding).abs().max() > 1e-3, f"{site}: the patch does nothing"
    patch = difference(result, wanted, f"{site}: patch")
    _check_whole(subject, site, x.detach(), embedding, gradient)
    return Errors(same, seen, patch, sloped)


def _check_whole(
    subject: Subject, site: Site, x: Tensor, embedding: Tensor, gradient: Tensor
) -> None:
    """x is enough where the embedding depends on no other token of the residual stream."""
    cut = subject.tower.cut(site)
    others = subject.put(gradient, site.tokens, torch.zeros_like(x))
    enough = site.stream.startswith("residual") and not others.any()
    if cut.is_whole:
        assert enough, f"{site}: the embedding depends on other tokens"
        difference(cut.suffix(x).detach(), embedding, f"{site}: suffix without the rest")
        return
    surely = site.tokens == "all" or (site.stream == "residual" and site.tokens == "cls")
    # Where the ids say which token is pooled or which are padding, all tokens are not enough.
    is_image = subject.inputs.is_floating_point()
    assert not (surely and enough and is_image), f"{site}: no rest is needed"
    with pytest.raises(ConfigError, match="rest"):
        cut.suffix(x)


def _check_embedding(subject: Subject, expected: Tensor) -> None:
    difference(subject.tower.embed(subject.inputs), expected, "embed")
    cut = subject.tower.cut(EMBEDDING)
    x, rest = cut.prefix(subject.inputs)
    assert cut.is_whole
    assert rest == Rest()
    assert cut.d_site == expected.shape[1]
    difference(x, expected, f"{EMBEDDING}: x")
    assert torch.equal(cut.suffix(x + 1), x + 1)


def _check_capture(subject: Subject, sites: Sequence[Site], recording: Recording) -> None:
    """In one pass, whatever the order; a layer counted from the end stays the key."""
    from_the_end = [replace(site, layer=site.layer - len(subject.blocks)) for site in sites]
    wanted = [*reversed(sites), EMBEDDING, *from_the_end]
    found = subject.tower.capture(subject.inputs, wanted)
    assert found.keys() == set(wanted)
    difference(found.pop(EMBEDDING), recording.embedding.detach(), "capture of the embedding")
    for site, x in found.items():
        activation = recording.activations[site.layer % len(subject.blocks), site.stream]
        difference(x, subject.take(activation.detach(), site.tokens), f"{site}: capture")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails where the block changes a bit of the model or leaves a hook behind."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} changed"
    for name, module in model.named_modules():
        assert not module._forward_hooks, f"a hook is left on {name}"
        assert not module._forward_pre_hooks, f"a hook is left on {name}"
        assert not module.training, name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def check_attention(subject: Subject, *, linear: bool) -> None:
    """Weights against the library's own; the maps of the heads rebuild what attention adds."""
    expected = fused_weights(subject.encode, subject.blocks, subject.inputs)
    ids = None if subject.inputs.is_floating_point() else subject.inputs
    for layer in range(len(subject.blocks)):
        before = subject.tower.cut(Site(layer, "residual_before", "all")).read(subject.inputs)
        weights = subject.tower.attention_weights(layer, before, ids)
        difference(weights, expected[layer], f"attention weights of layer {layer}")
        if not linear:
            with pytest.raises(ConfigError):
                subject.tower.head_maps(layer)
            continue
        maps = subject.tower.head_maps(layer)
        normed = subject.tower.normed_input(layer, before)
        total = maps.output_bias
        for head in range(weights.shape[1]):
            value = normed @ maps.value[head] + maps.value_bias[head]
            total = total + weights[:, head] @ value @ maps.output[head]
        attention = subject.tower.cut(Site(layer, "attention", "all")).read(subject.inputs)
        difference(total, attention, f"head maps of layer {layer}")


def check_inputs(subject: Subject, site: Site) -> None:
    """Through both halves flows the same gradient to the pictures as through the model."""
    images = subject.inputs.clone().requires_grad_()
    direction = torch.randn(len(images), 1, generator=torch.Generator().manual_seed(6))
    cut = subject.tower.cut(site)
    halves, whole = (
        torch.autograd.grad((embedding * direction).sum(), images)[0]
        for embedding in (cut.suffix(*cut.prefix(images)), subject.encode(images))
    )
    steepest = whole.abs().max().item()
    difference(halves, whole, f"{site}: gradient in the pictures", unit=steepest)


def check_last_layer(subject: Subject) -> None:
    """Where one token decides the embedding, a norm and a matrix do: written out in float64."""
    site = Site(-1, "residual", "cls" if "cls" in subject.positions else "spatial")
    cut = subject.tower.cut(site)
    if not (cut.is_whole and site.tokens == "cls"):
        with pytest.raises(ConfigError, match="closed forms need the class token"):
            cut.last_layer(torch.float64)
        return
    gamma, beta, eps, projection, bias = cut.last_layer(torch.float64)
    x = cut.read(subject.inputs)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
    expected = (gamma * normed + beta) @ projection + bias
    difference(cut.suffix(x).double(), expected, "last layer")


def check_rows(subject: Subject, site: Site) -> None:
    """Several edits of some images: the rest is gathered, not computed again."""
    cut = subject.tower.cut(site)
    x, rest = cut.prefix(subject.inputs)
    index = torch.tensor([1, 0, 1, 1])
    noise = torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(5))
    together = cut.suffix(x[index] + noise, rest.rows(index))
    for row, (image, change) in enumerate(zip(index.tolist(), noise, strict=True)):
        one = torch.tensor([image])
        alone = cut.suffix(x[one] + change, rest.rows(one))
        difference(together[row], alone[0], f"{site}: row {row}")
    assert Rest().rows(index) == Rest()
