"""Over how many classes the images spread in which a latent fires."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.codes import SparseCodes
from clipattr.errors import DataError


class ClassSpreadResult(NamedTuple):
    """Per latent; -1 and nan where it never fired."""

    counts: Int[Tensor, "latent class"]
    """images of the class in which it fires"""
    n_images: Int[Tensor, " class"]
    """all images of the class"""
    entropy: Float64[Tensor, " latent"]
    """-sum_c p_c log p_c / log(classes), p_c = counts_c / sum counts: 0 one class, 1 all alike"""
    top_class: Int[Tensor, " latent"]
    """the class with the largest count, the first of equal ones"""
    top_share: Float64[Tensor, " latent"]
    """p_c of the top class"""


class ClassSpread(Metric):
    """Images counted by latent and class, as int32: 4 * latents * classes bytes.

    Images are counted, not activations summed: one strong image is not many. A class with more
    images has more to count, so with uneven classes 1 is not what chance gives; and a latent that
    fires in n images cannot spread over more than n classes, however broad it is.
    """

    full_state_update = False
    counts: Tensor
    n_images: Tensor

    def __init__(self, *, n_latents: int, n_classes: int) -> None:
        """No image yet."""
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes={n_classes}: images spread over two classes at least")
        counts = torch.zeros(n_latents, n_classes, dtype=torch.int32)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        zeros = torch.zeros(n_classes, dtype=torch.int64)
        self.add_state("n_images", zeros, dist_reduce_fx="sum")

    def update(self, codes: SparseCodes, labels: Int[Tensor, " batch"]) -> None:
        """Take in images: one row of codes and the class of each."""
        n_classes = len(self.n_images)
        is_wrong = (labels < 0) | (labels >= n_classes)
        if is_wrong.any():
            raise DataError(
                f"{int(is_wrong.sum())} of {len(labels)} labels of a batch lie outside of 0 to "
                f"{n_classes - 1}, for example {int(labels[is_wrong][0])}"
            )
        self.n_images.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int64))
        # In int64: latent * classes may not fit the int32 of the indices.
        places = (codes.indices.long() * n_classes + labels[:, None])[codes.is_active]
        ones = torch.ones_like(places, dtype=torch.int32)
        self.counts.view(-1).index_add_(0, places, ones)

    def compute(self) -> ClassSpreadResult:
        """The counts and what they say."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True)
        # entr(nan) is nan: a latent that never fired has no shares.
        entropy = torch.special.entr(shares).sum(1) / math.log(len(self.n_images))
        top_share, top_class = shares.max(1)
        top_class = top_class.masked_fill(top_share.isnan(), -1)
        return ClassSpreadResult(self.counts, self.n_images, entropy, top_class, top_share)
