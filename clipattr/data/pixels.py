"""A model's own preprocessing in two halves: a file to bytes of pixels, and pixels to numbers.

The first half runs in worker processes, which hand on a quarter of the bytes; the second runs where
the model is. Together they give the bits of the whole, if the files are decoded exactly.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
from jaxtyping import Float, UInt8
from open_clip.transform import MaybeToTensor
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from clipattr.data.decode import Geometry, Transform
from clipattr.data.images import DECODE_ERRORS, Edit, ImageError, decode_image, describe_error
from clipattr.errors import ConfigError

Decode = Literal["exact", "fast", "draft"]


class Pixels:
    """What becomes of a picture before it enters a model.

    How it is decoded:
        exact: the model's own preprocessing, bit for bit.
        fast: the same, resized by torch: at most one grey level off, in half of the time. Files of
            every kind are decoded as in exact, so that both refuse the same ones.
        draft: the JPEG decoder halves a photo while it stays as large as it is needed (a photo of
            less than twice the size is left alone); then exact. Fast for large photos, and off by
            more than one level, since it averages squares of pixels first.

    Attributes:
        fingerprint: what decides the numbers, for the identity of a cache.
    """

    def __init__(
        self, preprocess: Callable[[Image.Image], Tensor], decode: Decode = "exact"
    ) -> None:
        """Take apart what open_clip gives: transforms of a picture, to a tensor, normalise.

        Raises:
            ConfigError: for a chain that ends otherwise, and one that only exact knows.
        """
        chain = list(preprocess.transforms) if isinstance(preprocess, Compose) else [preprocess]
        mean, std = torch.zeros(3), torch.ones(3)
        last = chain.pop()
        if isinstance(last, Normalize):
            mean, std = torch.tensor(last.mean), torch.tensor(last.std)
            last = chain.pop() if chain else None
        if not isinstance(last, (ToTensor, MaybeToTensor)):
            raise ConfigError(
                f"the preprocessing {preprocess} does not end in ToTensor and Normalize, so it "
                "cannot be shared between the workers and the model's device"
            )
        self._geometry = Geometry(cast(list[Transform], chain))
        self._decode: Decode = decode
        self._mean, self._std = mean, std
        self.fingerprint = str(preprocess)
        if decode != "exact":
            self._geometry.check_known(decode)
            self.fingerprint += f" decoded {decode}"

    def read(
        self, content: bytes, edit: Edit | None = None
    ) -> UInt8[Tensor, "channel height width"]:
        """The pixels of a file, whose picture is edited before it is resized.

        Raises:
            ImageError: what is raised behind the decoding is a mistake of the program.
        """
        needed = self._geometry.needed if self._decode == "draft" else None
        try:
            image = decode_image(content, needed)
        except DECODE_ERRORS as error:
            raise ImageError(describe_error(error)) from error
        if edit is not None:
            image = edit(image)
        return self._geometry.fast(image) if self._decode == "fast" else self._geometry.exact(image)

    def normalise(
        self, pixels: UInt8[Tensor, "*batch channel height width"]
    ) -> Float[Tensor, "*batch channel height width"]:
        """What the model takes, on the device of the pixels: (pixels / 255 - mean) / std."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        scaled = pixels.to(torch.float32).div(255)
        return scaled.sub_(mean[:, None, None]).div_(std[:, None, None])
