"""Odd pictures: each is decoded as open_clip would, or named; none stops the process."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from clipattr.data import images, pixels
from clipattr.data.images import DECODE_ERRORS, decode_image, image_loader
from clipattr.data.index import build_index
from clipattr.data.pixels import Pixels
from clipattr.errors import ConfigError
from tests.tars import sample, write_shard

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
CLEAR = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_16(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits, which PIL does not write in colour."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


AS_OPEN_CLIP = {
    "jpeg": encode(PICTURE, "JPEG"),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "grey": encode(PICTURE.convert("L"), "JPEG"),
    "cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "exif rotation": encode(PICTURE, "JPEG", exif=rotated()),
    "two pictures": encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
    "png": encode(PICTURE, "PNG"),
    "16 bit colour": png_16(PIXELS.astype(np.uint16) * 256 + 77, 2),
    "moving": encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]),
    "webp": encode(PICTURE, "WEBP"),
    "one pixel": encode(PICTURE.crop((0, 0, 1, 1)), "PNG"),
}
# open_clip resizes these as they are, palettes without interpolation, and converts then.
CONVERTED_FIRST = {
    "alpha": encode(CLEAR, "PNG"),
    "grey and alpha": encode(PICTURE.convert("LA"), "PNG"),
    "black and white": encode(PICTURE.convert("1"), "PNG"),
    "palette": encode(PICTURE.convert("P"), "PNG"),
    "palette, clear": encode(PICTURE.convert("P"), "PNG", transparency=3),
    "palette, half clear": encode(PICTURE.convert("P"), "PNG", transparency=bytes([0, 99] * 8)),
    "webp, lossless and clear": encode(CLEAR, "WEBP", lossless=True, exact=True),
}
SEEDS = AS_OPEN_CLIP | CONVERTED_FIRST


@pytest.mark.parametrize("name", AS_OPEN_CLIP)
def test_picture_is_that_of_open_clip(name: str):
    """Bit for bit, behind the whole preprocessing."""
    transform = open_clip.image_transform(16, is_train=False)
    theirs = transform(Image.open(io.BytesIO(AS_OPEN_CLIP[name])))
    ours = decode_image(AS_OPEN_CLIP[name])
    assert ours.mode == "RGB"
    assert torch.equal(transform(ours), theirs)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("name", sorted(AS_OPEN_CLIP.keys() - {"cmyk"}))
def test_two_halves_are_the_whole_preprocessing(name: str, mode: str):
    """Bit for bit, for every way in which open_clip resizes."""
    config = open_clip.transform.PreprocessCfg(size=16, resize_mode=mode)
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    halves = Pixels(transform)
    found = halves.read(AS_OPEN_CLIP[name])
    assert found.dtype == torch.uint8
    theirs = transform(Image.open(io.BytesIO(AS_OPEN_CLIP[name])))
    assert torch.equal(halves.normalise(found), theirs)
    assert torch.equal(halves.normalise(torch.stack([found, found])), torch.stack([theirs] * 2))


def test_a_preprocessing_that_cannot_be_taken_apart_is_refused():
    for chain in ([Normalize([0.5], [0.5])], [ToTensor(), torch.sqrt]):
        with pytest.raises(ConfigError, match="does not end in ToTensor and Normalize"):
            Pixels(Compose(chain))


@pytest.mark.parametrize("name", CONVERTED_FIRST)
def test_picture_is_converted_as_by_pil(name: str):
    """Whose warning of a palette is no warning of ours."""
    ours = decode_image(CONVERTED_FIRST[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = Image.open(io.BytesIO(CONVERTED_FIRST[name])).convert("RGB")
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_picture_holds_what_was_drawn():
    for name in ("png", "alpha", "16 bit colour", "webp, lossless and clear"):
        np.testing.assert_array_equal(np.asarray(decode_image(SEEDS[name])), PIXELS)
    assert decode_image(SEEDS["exif rotation"]).size == (32, 24)


def test_16_bit_grey_keeps_its_upper_byte():
    """PIL would make everything above 255 of 65535 white."""
    values = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    found = np.asarray(decode_image(png_16(values, 0)))
    np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))
    in_colour = np.asarray(decode_image(png_16(np.repeat(values[..., None], 3, axis=2), 2)))
    np.testing.assert_array_equal(found, in_colour)


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "EPS", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_not_opened(image_format: str):
    with pytest.raises(Image.UnidentifiedImageError):
        decode_image(encode(PICTURE, image_format))


# Bombs


def header_of(width: int, height: int) -> bytes:
    """A PNG of some bytes that promises a picture; PIL would make room for it."""
    whole = png_16(np.zeros((1, 1), dtype=np.uint16), 0)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    return whole[:8] + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:]


@pytest.mark.parametrize(
    "size", [(10_000, 9_000), (20_000, 9_000), (1_000_000, 1_000_000), (1, 501), (100_000, 2)]
)
def test_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]):
    with pytest.raises(DECODE_ERRORS, match="pixels"):
        decode_image(header_of(*size))


def test_limits_are_allowed(monkeypatch: pytest.MonkeyPatch):
    strip = Image.new("RGB", (2, 2 * images.MAX_ASPECT))
    assert decode_image(encode(strip, "PNG")).size == strip.size
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32)
    assert decode_image(AS_OPEN_CLIP["png"]).size == (32, 24)
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 32 - 1)
    with pytest.raises(ValueError, match="32 x 24 pixels; allowed are 767 in all"):
        decode_image(AS_OPEN_CLIP["png"])


def test_bomb_is_counted_like_a_broken_image(tmp_path: Path):
    sizes = [(32, 24), (1_000_000, 1_000_000), (10_000, 9_000), (1, 900)]
    rows = [sample(f"{n}", jpg=header_of(*size)) for n, size in enumerate(sizes)]
    rows[0] = sample("0", jpg=AS_OPEN_CLIP["png"])
    index = build_index([write_shard(tmp_path / "a.tar", rows)], cache=None)
    (batch,) = image_loader(index, Pixels(ToTensor()), batch_size=4, workers=0)
    assert batch.rows.tolist() == [0]
    assert torch.equal(batch.images[0], torch.from_numpy(PIXELS).permute(2, 0, 1))
    assert [bad.key for bad in batch.bad] == ["1", "2", "3"]
    assert all("pixels" in bad.reason for bad in batch.bad)


# Damage


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged EXIF data
@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=8),
    length=st.floats(0, 1),
)
def test_no_damage_raises_anything_else(
    name: str, changes: list[tuple[float, bytes]], length: float
):
    content = bytearray(SEEDS[name])
    for place, new in changes:
        # Most of what a decoder branches on stands at the front.
        start = int(place**3 * len(content))
        content[start : start + len(new)] = new
    if length > 0.5:
        del content[int(length * len(content)) :]
    try:
        found = decode_image(bytes(content))
    except DECODE_ERRORS:
        return
    assert found.mode == "RGB"


@pytest.mark.parametrize("error", [AssertionError(), IndexError("index out of range")])
def test_error_without_a_text_has_a_reason(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both are raised by PIL for a PNG with right checksums around wrong chunks."""

    def fail(*_: object) -> Image.Image:
        raise error

    monkeypatch.setattr(pixels, "decode_image", fail)
    index = build_index([write_shard(tmp_path / "a.tar", [sample("a")])], cache=None)
    (batch,) = image_loader(index, Pixels(ToTensor()), batch_size=1, workers=0)
    (bad,) = batch.bad
    assert bad.reason == f"jpg cannot be decoded: {str(error) or 'AssertionError()'}"


def test_shard_that_was_cut_or_lost_since(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", [sample("a"), sample("b")])
    index = build_index([path], cache=None)
    path.write_bytes(path.read_bytes()[: index.sample(1).fields["jpg"][0] + 9])
    (batch,) = image_loader(index, Pixels(ToTensor()), batch_size=2, workers=0)
    assert batch.rows.tolist() == [0]
    assert [bad.reason for bad in batch.bad] == [
        f"jpg cannot be read: {path} ends within b.jpg: it was cut since"
    ]
    path.unlink()
    (batch,) = image_loader(index, Pixels(ToTensor()), batch_size=2, workers=0)
    assert [bad.reason.startswith("jpg cannot be read: [Errno 2]") for bad in batch.bad] == [
        True
    ] * 2


def test_error_of_the_preprocessing_is_no_broken_image(tmp_path: Path):
    """It is a mistake in the program, and would be counted on every image."""

    def fail(_: Image.Image) -> torch.Tensor:
        raise ValueError("a mistake")

    index = build_index([write_shard(tmp_path / "a.tar", [sample("a")])], cache=None)
    with pytest.raises(ValueError, match="a mistake"):
        list(image_loader(index, Pixels(Compose([fail, ToTensor()])), batch_size=1, workers=0))
