"""One picture that the user names: what is wrong with it is said with its path."""

from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from clipattr.data.images import ImageError
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError


def read_image_file(path: str) -> bytes:
    """The bytes of the file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"image={path}: cannot be read ({error.strerror})") from error


def decode_image_file(pixels: Pixels, content: bytes, path: str) -> UInt8[Tensor, "3 height width"]:
    """The picture as the model sees it: resized and cropped."""
    try:
        return pixels.read(content)
    except ImageError as error:
        raise DataError(f"image={path}: cannot be decoded: {error}") from error
