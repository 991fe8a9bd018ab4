"""Attribution of each image's class to latents at any site, as means over the images of a class."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.attribution import HeadScore, attribution_patching, merge_tokens
from clipattr.callbacks.base import ReadoutCallback
from clipattr.metrics.class_sums import ClassCounts, ClassSums, Counts
from clipattr.semantics.permutation import shuffle_latents
from clipattr.spliced import Readout, Spliced


class ClassReliance(ReadoutCallback):
    """One gradient per image: behind the last block `RelianceCallback` has all classes for less.

    Attributes:
        mean_attribution: [class, latent], over the images explained for the class; 0 without any.
        counts: images of each class, and in which of them a latent fires and has a positive sign.
    """

    def __init__(
        self,
        spliced: Spliced,
        weights: Float[Tensor, "class embed"],
        bias: Float[Tensor, " class"] | None = None,
        *,
        classes: Int[Tensor, " image"] | None = None,
        shuffle: int | None = None,
    ) -> None:
        """What is explained.

        Args:
            spliced: the model and its SAE.
            weights: rows of the head.
            bias: of the classes.
            classes: that each image is explained for, by its row number; None: the predicted one.
            shuffle: seed of false names for the latents of each image; None: their own names.
        """
        self._spliced, self._weights, self._bias = spliced, weights, bias
        self._classes, self._shuffle = classes, shuffle
        sizes = {"n_classes": len(weights), "n_latents": spliced.sae.n_latents}
        self._sums, self._counts = ClassSums(**sizes), ClassCounts(**sizes)
        self.mean_attribution: Float64[Tensor, "class latent"] | None = None
        self.counts: Counts | None = None
        super().__init__(self._sums, self._counts)

    def take(self, readout: Readout) -> None:
        """Attribute one batch; the tokens of an image are summed."""
        codes, rest = readout.codes, readout.rest
        targets = self._choose(readout)
        score = HeadScore(self._spliced.cut.suffix, self._weights, targets, self._bias, rest)
        found = attribution_patching(score, readout.x, codes, self._spliced.sae.directions)
        merged = merge_tokens(codes)
        values, names = merged.sum_over_tokens(found), merged.codes
        if self._shuffle is not None:
            names = shuffle_latents(names, readout.rows, self._shuffle)
        self._sums.update(targets, names, values)
        self._counts.update(targets, names, values)

    @torch.no_grad()
    def _choose(self, readout: Readout) -> Int[Tensor, " batch"]:
        if self._classes is not None:
            return self._classes[readout.rows.cpu()].to(readout.x.device)
        embedding = self._spliced.cut.suffix(readout.x, readout.rest).to(self._weights.dtype)
        scores = normalize(embedding, dim=-1) @ self._weights.T
        return (scores if self._bias is None else scores + self._bias).argmax(dim=1)

    def finish(self) -> None:
        """Divide once."""
        self.counts = self._counts.compute()
        images = self.counts.images.clamp(min=1)[:, None]
        self.mean_attribution = self._sums.compute() / images
