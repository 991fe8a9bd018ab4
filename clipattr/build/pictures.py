"""What becomes of an image on its way into a shard: by default, its header is looked at."""

import io
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from clipattr.build.sources import ItemError, Trouble
from clipattr.data.images import DECODE_ERRORS, FORMATS, MAX_ASPECT, MAX_PIXELS, decode_image
from clipattr.errors import ConfigError

# The fields of the formats that PIL names; MPO is a JPEG with a second image, as phones write it.
FIELDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
QUALITY = 95
ORIENTATION = 0x0112


class Pictures(NamedTuple):
    """What to do with images.

    Attributes:
        resize: the shorter side of larger images becomes this long; 0 leaves all as they are.
        encode: jpg, png or webp; every image is written anew in this format. Empty: those that are
            resized keep their format, and all others their bytes.
        verify: decode every image, to see whether it can be.
    """

    resize: int = 0
    encode: str = ""
    verify: bool = False

    def check(self) -> None:
        """Raise ConfigError for what cannot be done."""
        if self.resize < 0:
            raise ConfigError(f"resize={self.resize}: allowed is a number of pixels")
        if self.encode and self.encode not in ENCODERS:
            raise ConfigError(f"encode={self.encode!r}: allowed are {', '.join(ENCODERS)}")


def store_picture(content: bytes, asked: Pictures) -> tuple[str, bytes]:
    """The field of an image and the bytes to write.

    Raises:
        ItemError: for what is no image, or one that `decode_image` would refuse.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            field = FIELDS[image.format or ""]
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise ItemError(
                Trouble.bad_image,
                f"{width} x {height} pixels; allowed are {MAX_PIXELS} in all, and {MAX_ASPECT} "
                "times as many on one side as on the other",
            )
        is_large = 0 < asked.resize < min(width, height)
        if asked.encode or is_large:
            field = asked.encode or field
            size = _shrink(width, height, asked.resize) if is_large else (width, height)
            return field, _encode(content, field, size)
        if asked.verify:
            decode_image(content)
    except DECODE_ERRORS as error:
        # PIL would name its file, which is an address in memory here.
        is_unknown = isinstance(error, UnidentifiedImageError)
        found = f"it is none of {', '.join(FORMATS)}" if is_unknown else str(error) or repr(error)
        raise ItemError(Trouble.bad_image, found) from None
    return field, content


def _shrink(width: int, height: int, shorter: int) -> tuple[int, int]:
    scale = shorter / min(width, height)
    return max(shorter, round(width * scale)), max(shorter, round(height * scale))


def _encode(content: bytes, field: str, size: tuple[int, int]) -> bytes:
    """The picture as RGB. Whether it is turned for display stays as it was; nothing else does."""
    image = decode_image(content)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    orientation = _read_orientation(content)
    if orientation is not None:
        exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, ENCODERS[field], quality=QUALITY, exif=exif, icc_profile=None)
    return buffer.getvalue()


def _read_orientation(content: bytes) -> int | None:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            found = image.getexif().get(ORIENTATION)
    except DECODE_ERRORS:  # the picture is fine, only what is said of it is not
        return None
    return found if isinstance(found, int) else None
