"""Pasted cues, their placebos, and pairs of images with and without a cue."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipattr.errors import ConfigError, DataError
from clipattr.shortcuts.marks import Draws
from clipattr.shortcuts.overlay import (
    LOOKS,
    Kind,
    Overlay,
    blend,
    draw_overlay,
    make_placebo,
    paste_on_picture,
    paste_overlay,
)
from clipattr.shortcuts.pairs import Fill, move_region, paste_pairs, region_pairs, remove_region

SIZES = [(64, 64), (48, 96), (90, 40)]
KINDS = list(Kind)


def noise(height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_at_an_edge(kind: Kind):
    """The soft edge of every mark ends within the image."""
    for height, width in SIZES:
        for number in range(12):
            overlay = Overlay(kind, size=LOOKS[kind].max_size, jitter=0.5)
            layer = draw_overlay(overlay, key=f"k{number}", seed=3, height=height, width=width)
            edge = torch.cat(
                [layer.alpha[0], layer.alpha[-1], layer.alpha[:, 0], layer.alpha[:, -1]]
            )
            if kind is Kind.frame:
                assert edge.min() > 0.9
            else:
                assert edge.max() == 0
            assert layer.colour.min() >= 0
            assert layer.colour.max() <= 1


def test_areas_by_closed_form():
    disc = [
        n for n in range(40) if Draws(0, f"sticker\0{n}").choose("shape", ("a", "b", "c")) == "a"
    ]
    overlay = Overlay(Kind.sticker, size=0.5, jitter=0.0)
    area = draw_overlay(overlay, key=str(disc[0]), seed=0, height=200, width=240).area
    assert area == pytest.approx(np.pi * 50**2, rel=1e-3)
    ruler = Overlay(Kind.ruler, size=0.8, jitter=0.0, opacity=0.5)
    layer = draw_overlay(ruler, key="k", seed=0, height=200, width=240)
    assert layer.area == pytest.approx(160 * 160 * 0.16, rel=1e-2)
    assert layer.alpha.max() == pytest.approx(0.5)
    frame = Overlay(Kind.frame, size=0.1, jitter=0.0)
    layer = draw_overlay(frame, key="k", seed=0, height=200, width=240)
    assert layer.area == pytest.approx(200 * 240 - 160 * 200, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_placebo_has_the_area_and_the_place_of_its_cue(kind: Kind):
    image = noise(72, 96).float() / 255
    for number in range(8):
        overlay = Overlay(kind, jitter=0.4)
        key = f"k{number}"
        cue = draw_overlay(overlay, key=key, seed=1, height=72, width=96)
        placebo = make_placebo(image, overlay, key=key, seed=1)
        assert placebo.area == pytest.approx(cue.area, rel=1e-5)
        assert placebo.opacity == cue.opacity
        assert np.hypot(*np.subtract(placebo.centre, cue.centre)) < 12
        y, x = torch.meshgrid(torch.arange(72) + 0.5, torch.arange(96) + 0.5, indexing="ij")
        weight = placebo.alpha.double() / placebo.alpha.double().sum()
        found = ((weight * x).sum().item(), (weight * y).sum().item())
        assert found == pytest.approx(placebo.centre, abs=0.02)


def test_placebo_on_a_flat_image_changes_nothing():
    """A blurred plane is that plane: the placebo has no content of its own."""
    image = torch.full((3, 50, 60), 77, dtype=torch.uint8)
    for kind in KINDS:
        pasted = blend(image, make_placebo(image, Overlay(kind), key="k", seed=0))
        assert torch.equal(pasted, image)
        assert not torch.equal(paste_overlay(image, Overlay(kind), key="k", seed=0), image)


def test_blend_by_a_plain_loop():
    image = noise()
    layer = draw_overlay(Overlay(Kind.ink, opacity=0.6), key="k", seed=0, height=64, width=64)
    pasted = blend(image, layer)
    for channel, y, x in np.ndindex(3, 64, 64):
        alpha = layer.alpha[y, x].item()
        old = image[channel, y, x].item()
        wanted = old * (1 - alpha) + 255 * layer.colour[channel, y, x].item() * alpha
        assert pasted[channel, y, x].item() == pytest.approx(wanted, abs=0.51)
        assert alpha > 0 or pasted[channel, y, x] == old
    as_float = blend(image.float() / 255, layer)
    assert (as_float * 255 - pasted.float()).abs().max() <= 0.51


def test_seed_and_key_decide_and_nothing_else():
    image = noise()
    for kind in KINDS:
        overlay = Overlay(kind)
        pasted = paste_overlay(image, overlay, key="a", seed=0)
        torch.manual_seed(5)
        np.random.seed(5)
        assert torch.equal(paste_overlay(image, overlay, key="a", seed=0), pasted)
        assert not torch.equal(paste_overlay(image, overlay, key="b", seed=0), pasted)
        assert not torch.equal(paste_overlay(image, overlay, key="a", seed=1), pasted)


def test_draws_are_those_of_every_machine():
    """blake2b of seed, key and name, by hashlib and integers: known for ever."""
    assert Draws(0, "key").uniform("x", 0.0, 1.0) == pytest.approx(DRAWN, abs=1e-15)
    values = [Draws(0, str(n)).uniform("x", -1.0, 1.0) for n in range(2000)]
    assert abs(np.mean(values)) < 0.04
    assert np.var(values) == pytest.approx(1 / 3, abs=0.03)
    picks = [Draws(0, str(n)).choose("c", (0, 1, 2)) for n in range(3000)]
    assert np.bincount(picks).min() > 900


DRAWN = 0.4481952580824166


def test_another_process_draws_the_same():
    code = (
        "import hashlib\n"
        "from clipattr.shortcuts.overlay import *\n"
        "layer = draw_overlay(Overlay(Kind.sticker), key='k', seed=4, height=40, width=50)\n"
        "print(hashlib.sha256(layer.alpha.numpy().tobytes()).hexdigest(), layer.centre)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONHASHSEED": n})
        for n in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) > 64, runs[0].stderr


def test_pictures_of_pillow():
    image = noise(40, 50)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    pasted = paste_on_picture(picture, Overlay(Kind.text, text="A"), key="k", seed=0)
    wanted = paste_overlay(image, Overlay(Kind.text, text="A"), key="k", seed=0)
    assert np.array_equal(np.array(pasted), wanted.permute(1, 2, 0).numpy())
    grey = paste_on_picture(picture.convert("L"), Overlay(Kind.frame), key="k", seed=0)
    assert (grey.mode, grey.size) == ("RGB", (50, 40))


def test_words_and_colours_are_those_asked_for():
    image = torch.zeros(3, 96, 96)
    red = paste_overlay(
        image, Overlay(Kind.frame, colour=(1.0, 0.0, 0.0), jitter=0.0), key="k", seed=0
    )
    assert red[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    layers = [
        draw_overlay(
            Overlay(Kind.watermark, text=text, jitter=0.0), key="k", seed=0, height=96, width=96
        )
        for text in ("MMMM", "i")
    ]
    assert not torch.equal(layers[0].alpha, layers[1].alpha)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0.8}, "size=0.8 of a text: allowed are 0.02 to 0.7"),
        ({"size": 0.0}, "size=0.0 of a text"),
        ({"opacity": 0.0}, "opacity=0.0"),
        ({"opacity": 1.5}, "opacity=1.5"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"text": " "}, "text=' '"),
        ({"text": "a" * 41}, "allowed are 1 to 40 letters"),
        ({"colour": (0.0, 2.0, 0.0)}, "colour="),
    ],
)
def test_what_cannot_be_pasted(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        draw_overlay(Overlay(Kind.text, **settings), key="k", seed=0, height=64, width=64)


def test_small_images_are_refused():
    with pytest.raises(DataError, match="k: 12 x 64 pixels; an overlay needs 16"):
        draw_overlay(Overlay(Kind.ink), key="k", seed=0, height=64, width=12)


def test_pairs_do_not_depend_on_their_batch():
    images = torch.stack([noise(seed=n) for n in range(4)])
    keys = [f"key-{n}" for n in range(4)]
    overlay = Overlay(Kind.sticker)
    whole = paste_pairs(images, keys, overlay, seed=7)
    assert torch.equal(whole.without, images)
    for row in (3, 1):
        alone = paste_pairs(images[row : row + 1], [keys[row]], overlay, seed=7)
        assert torch.equal(alone.with_cue[0], whole.with_cue[row])
        assert torch.equal(alone.placebo[0], whole.placebo[row])
        changed = (whole.with_cue[row] != images[row]).any(0)
        layer = draw_overlay(overlay, key=keys[row], seed=7, height=64, width=64)
        assert not (changed & (layer.alpha == 0)).any()
    with pytest.raises(DataError, match="4 images and 3 keys"):
        paste_pairs(images, keys[:3], overlay)
    with pytest.raises(DataError, match=r"lie in \[-1, 1\]: must be uint8 or between 0 and 1"):
        paste_pairs(torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16), ["a"], overlay)


def disc(height: int = 64, width: int = 64, x: int = 20, y: int = 24, radius: int = 9):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


@pytest.mark.parametrize("fill", list(Fill))
def test_removed_region(fill: Fill):
    image, region = noise(), disc()
    removed = remove_region(image, region, fill)
    assert torch.equal(removed[:, ~region], image[:, ~region])
    assert (removed[:, region] != image[:, region]).float().mean() > 0.9
    other = image.clone()
    other[:, region] = 255 - other[:, region]  # what was inside has no say
    assert torch.equal(remove_region(other, region, fill), removed)
    assert torch.equal(remove_region(image, torch.zeros_like(region), fill), image)
    with pytest.raises(DataError, match="k: the region is the whole image"):
        remove_region(image, torch.ones_like(region), fill, name="k")


def test_mean_fill_by_a_plain_loop():
    image, region = noise(40, 40).float(), disc(40, 40, 20, 20, 5)
    around = [
        (y, x)
        for y in range(40)
        for x in range(40)
        if not region[y, x] and region[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].any()
    ]
    wanted = torch.stack([image[:, y, x] for y, x in around]).double().mean(0)
    removed = remove_region(image, region, Fill.mean)
    assert torch.allclose(removed[:, 20, 20].double(), wanted, atol=1e-4)


def test_blur_fill_continues_slow_changes():
    """A ramp is harmonic: evened out from its surroundings, it comes back."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    ramp = torch.stack([rows, columns, rows + columns])
    region = disc(48, 48, 24, 20, 6)
    hidden = torch.where(region, torch.tensor(200.0), ramp)
    removed = remove_region(hidden, region, Fill.blur)
    assert (removed - ramp).abs().max() < 0.5
    assert (remove_region(hidden, region, Fill.mean) - ramp).abs().max() > 4


def test_region_pairs_and_their_placebo():
    images = torch.stack([noise(seed=n) for n in range(3)])
    regions = torch.stack([disc(), disc(x=40, y=50), disc(radius=4)])
    pairs = region_pairs(images, ["a", "b", "c"], regions, seed=2)
    assert torch.equal(pairs.with_cue, images)
    for row, key in enumerate(pairs.keys):
        elsewhere = move_region(regions[row], key=key, seed=2)
        assert elsewhere.sum() == regions[row].sum()
        assert not (elsewhere & regions[row]).any()
        assert torch.equal(pairs.placebo[row][:, regions[row]], images[row][:, regions[row]])
        assert torch.equal(pairs.without[row][:, ~regions[row]], images[row][:, ~regions[row]])
    with pytest.raises(DataError, match="no place for a placebo of its shape"):
        move_region(disc(radius=30), key="k", seed=0)
