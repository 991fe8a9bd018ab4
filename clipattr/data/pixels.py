"""A model's own preprocessing in two halves: a file to bytes of pixels, and pixels to numbers.

The first half runs in worker processes, which hand on a quarter of the bytes; the second runs where
the model is. Together they give the bits of the whole.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from open_clip.transform import MaybeToTensor
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

from clipattr.data.images import DECODE_ERRORS, ImageError, decode_image, describe_error
from clipattr.errors import ConfigError

Geometry = Callable[[Image.Image], Image.Image]


class Pixels:
    """What becomes of a picture before it enters a model.

    Attributes:
        fingerprint: what decides the numbers, for the identity of a cache.
    """

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]) -> None:
        """Take apart what open_clip gives: transforms of a picture, to a tensor, normalise.

        Raises:
            ConfigError: for a chain that ends otherwise.
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
        self._geometry = cast(list[Geometry], chain)
        self._mean, self._std = mean, std
        self.fingerprint = str(preprocess)

    def read(self, content: bytes) -> UInt8[Tensor, "channel height width"]:
        """The pixels of a file.

        Raises:
            ImageError: what is raised behind the decoding is a mistake of the program.
        """
        try:
            image = decode_image(content)
        except DECODE_ERRORS as error:
            raise ImageError(describe_error(error)) from error
        for transform in self._geometry:
            image = transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalise(
        self, pixels: UInt8[Tensor, "*batch channel height width"]
    ) -> Float[Tensor, "*batch channel height width"]:
        """What the model takes, on the device of the pixels: (pixels / 255 - mean) / std."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        scaled = pixels.to(torch.float32).div(255)
        return scaled.sub_(mean[:, None, None]).div_(std[:, None, None])
