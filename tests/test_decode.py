"""The three ways to decode: each against PIL and open_clip's own transforms."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from clipattr.data import resize
from clipattr.data.images import ImageError
from clipattr.data.pixels import Pixels
from clipattr.errors import ConfigError

SIDES = st.integers(1, 260)


def drawing(width: int, height: int, seed: int) -> Image.Image:
    """A gradient with noise, text and stripes: what overshoots, and what does not."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 200, height))
    pixels = np.stack([across, down, 255 - across], axis=2) + rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        place = int(rng.integers(width)), int(rng.integers(height))
        draw.text(place, "Text", fill=(0, 0, 0) if rng.integers(2) else (255, 255, 255))
    for column in range(width // 2, width, 2):
        draw.line((column, 0, column, height // 3), fill=(255, 255, 255))
    for row in range(height // 2, height, 3):
        draw.line((0, row, width // 3, row), fill=(0, 0, 0))
    return image


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def preprocess(**options: object) -> Compose:
    return image_transform_v2(PreprocessCfg(**options), is_train=False)


def distance(transform: Compose, content: bytes) -> int:
    """Grey levels between fast and exact."""
    exact, fast = Pixels(transform).read(content), Pixels(transform, "fast").read(content)
    assert exact.shape == fast.shape
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    return int((exact.int() - fast.int()).abs().max())


# Fast


@settings(max_examples=150, deadline=None)
@given(
    width=SIDES,
    height=SIDES,
    target=st.one_of(st.integers(1, 90), st.tuples(st.integers(1, 90), st.integers(1, 90))),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    kind=st.sampled_from(["RGB", "L", "PNG", "noise"]),
    seed=st.integers(0, 99),
)
def test_fast_is_at_most_one_level_off(
    width: int,
    height: int,
    target: int | tuple[int, int],
    mode: str,
    interpolation: str,
    kind: str,
    seed: int,
):
    """For any size, mode and kind of picture; also where PIL makes its passes the other way."""
    image = drawing(width, height, seed)
    if kind == "noise":
        bits = np.random.default_rng(seed).integers(0, 2, (height, width, 3))
        image = Image.fromarray(bits.astype(np.uint8) * 255)
    content = encode(
        image.convert("L" if kind == "L" else "RGB"), "PNG" if kind == "PNG" else "JPEG"
    )
    transform = preprocess(size=target, resize_mode=mode, interpolation=interpolation, fill_color=7)
    try:
        Pixels(transform).read(content)
    except ImageError:  # a side of which nothing would be left
        with pytest.raises(ImageError):
            Pixels(transform, "fast").read(content)
        return
    assert distance(transform, content) <= 1


@pytest.mark.parametrize("size", [(2, 1000), (1000, 2), (1, 300), (301, 2), (1203, 12), (12, 1205)])
def test_fast_of_a_strip(size: tuple[int, int]):
    for mode in ("shortest", "squash"):
        assert distance(preprocess(size=32, resize_mode=mode), encode(drawing(*size, 0))) <= 1


@pytest.mark.parametrize(
    ("size", "target"), [((256, 256), 224), ((96, 72), 32), ((40, 40), 100), ((640, 480), 224)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_sums_that_end_in_one_half_are_those_of_pil(
    size: tuple[int, int], target: int, interpolation: str
):
    """Sizes with a common divisor: bit for bit, at any number of strips."""
    transform = preprocess(size=target, resize_mode="squash", interpolation=interpolation)
    assert distance(transform, encode(drawing(*size, 1))) == 0


def test_large_picture_is_read_in_strips(monkeypatch: pytest.MonkeyPatch):
    contents = [encode(drawing(*size, 1)) for size in ((150, 90), (90, 150), (90, 400))]
    pixels = Pixels(preprocess(size=40, resize_mode="squash"), "fast")
    whole = [pixels.read(content) for content in contents]
    monkeypatch.setattr(resize, "CHUNK", 4 * 150 * 7)
    assert all(
        torch.equal(pixels.read(content), found)
        for content, found in zip(contents, whole, strict=True)
    )


def test_order_of_the_passes_is_found_or_refused(monkeypatch: pytest.MonkeyPatch):
    assert resize.order_rule() in resize.ORDER_RULES
    answers = {tuple(rule(*probe) for probe in resize.ORDER_PROBES) for rule in resize.ORDER_RULES}
    assert len(answers) == len(resize.ORDER_RULES)
    resize.order_rule.cache_clear()
    monkeypatch.setattr(resize, "ORDER_RULES", (lambda *_: True,))
    with pytest.raises(ConfigError, match="in which order Pillow"):
        Pixels(preprocess(size=8), "fast")
    resize.order_rule.cache_clear()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged EXIF data
@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=6),
    length=st.floats(0, 1),
    progressive=st.booleans(),
)
def test_fast_refuses_the_damage_that_exact_refuses(
    changes: list[tuple[float, bytes]], length: float, progressive: bool
):
    content = bytearray(encode(drawing(60, 44, 0), progressive=progressive))
    for place, new in changes:
        start = int(place**2 * len(content))
        content[start : start + len(new)] = new
    if length > 0.5:
        del content[int(length * len(content)) :]
    transform = preprocess(size=16)
    found: list[torch.Tensor | str] = []
    for pixels in (Pixels(transform), Pixels(transform, "fast")):
        try:
            found.append(pixels.read(bytes(content)))
        except ImageError as error:
            found.append(str(error))
    exact, fast = found
    if isinstance(exact, str) or isinstance(fast, str):
        assert exact == fast
    else:
        assert int((exact.int() - fast.int()).abs().max()) <= 1


def test_half_a_file_is_refused():
    content = encode(drawing(60, 44, 0))
    for decode in ("exact", "fast", "draft"):
        with pytest.raises(ImageError, match="truncated"):
            Pixels(preprocess(size=16), decode).read(content[: len(content) // 2])


@pytest.mark.parametrize("decode", ["fast", "draft"])
@pytest.mark.parametrize(
    "transform",
    [
        RandomResizedCrop(8),
        Resize(8, max_size=9),
        Resize(8, interpolation=InterpolationMode.NEAREST),
        Image.Image.copy,
    ],
)
def test_geometry_that_is_not_known_is_refused(transform: object, decode: str):
    chain = Compose([transform, ToTensor()])
    Pixels(chain)
    with pytest.raises(ConfigError, match=f"decode='{decode}' does not know how to do"):
        Pixels(chain, decode)


def test_each_way_has_its_fingerprint():
    transform = preprocess(size=8)
    found = [Pixels(transform, decode).fingerprint for decode in ("exact", "fast", "draft")]
    assert found == [str(transform), f"{transform} decoded fast", f"{transform} decoded draft"]


def test_side_of_nothing_is_a_broken_image():
    """Not an error of the program, which would stop the run."""
    for decode in ("exact", "fast", "draft"):
        with pytest.raises(ImageError, match=r"450 x 1 pixels would be resized to \(32, 0\)"):
            Pixels(preprocess(size=32, resize_mode="longest"), decode).read(
                encode(drawing(450, 1, 0))
            )


def test_pixels_travel_to_a_process():
    content = encode(drawing(50, 40, 0))
    pixels = Pixels(preprocess(size=16), "fast")
    again = pickle.loads(pickle.dumps(pixels))
    assert torch.equal(again.read(content), pixels.read(content))


# Draft


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(
    ("size", "divisor"),
    [
        ((60, 60), 1),
        ((63, 80), 1),
        ((64, 64), 2),
        ((127, 127), 2),
        ((130, 130), 4),
        ((300, 300), 8),
    ],
)
def test_draft_halves_while_the_picture_is_large_enough(
    size: tuple[int, int], divisor: int, mode: str
):
    """The oracle decodes at the size named; 32 pixels are needed, and 1/8 is the least."""
    transform = preprocess(size=32, resize_mode=mode)
    content = encode(drawing(*size, 3))
    if mode == "longest" and size == (63, 80):
        divisor = 2  # its short side may become 25
    image = Image.open(io.BytesIO(content))
    image.draft(None, (size[0] // divisor, size[1] // divisor))
    assert image.size == tuple(-(-side // divisor) for side in size)
    pixels = Pixels(transform, "draft")
    assert torch.equal(pixels.normalise(pixels.read(content)), transform(image))
    if divisor == 1:
        assert torch.equal(pixels.read(content), Pixels(transform).read(content))


def test_draft_of_a_png_is_exact():
    transform, content = preprocess(size=16), encode(drawing(90, 80, 0), "PNG")
    assert torch.equal(Pixels(transform, "draft").read(content), Pixels(transform).read(content))


# Edits


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_edit_comes_before_the_resize(decode: str):
    def paste(image: Image.Image) -> Image.Image:
        image.paste((255, 0, 0), (0, 0, 30, 20))
        return image

    transform, content = preprocess(size=16), encode(drawing(90, 80, 0))
    pixels = Pixels(transform, decode)
    theirs = transform(paste(Image.open(io.BytesIO(content)).copy()))
    ours = pixels.normalise(pixels.read(content, paste))
    one_level = 1.01 / 255 / 0.26
    torch.testing.assert_close(ours, theirs, atol=one_level if decode == "fast" else 0, rtol=0)
    assert not torch.equal(pixels.read(content), pixels.read(content, paste))
