"""What a model loses when part of it is replaced: clean, spliced and mean-ablated side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid
from torchmetrics import Metric

from clipattr.errors import DataError
from clipattr.metrics.accuracy import TOP, wilson_interval
from clipattr.metrics.intervals import Interval

VARIANTS = ("clean", "spliced", "ablated")
MEASURES = ("similarity", "kl", "agreement", "cross_entropy", "top1", "top5")


class Outcome(NamedTuple):
    """What one variant of the model makes of a batch of images."""

    embedding: Float[Tensor, "batch embed"]
    logits: Float[Tensor, "batch class"] | None
    """scale * cosine (+ bias) with every class; None where there are no classes"""


class Measure(NamedTuple):
    """One number under each variant; accuracies have intervals."""

    clean: float
    spliced: float
    ablated: float
    intervals: tuple[Interval, Interval, Interval] | None = None

    @property
    def recovered(self) -> float:
        """(spliced - ablated) / (clean - ablated): 1 loses nothing, 0 is as bad as the mean.

        nan where the ablation changes nothing, so that there is nothing to recover.
        """
        lost = self.clean - self.ablated
        return (self.spliced - self.ablated) / lost if lost else float("nan")


class SpliceResult(NamedTuple):
    """Means over images; without classes only the similarity, without labels the first three."""

    n_images: int
    similarity: Measure
    """cosine of the embedding with that of the clean model"""
    kl: Measure | None
    """KL(clean || variant) of the class probabilities, in nats"""
    agreement: Measure | None
    """share of images with the clean model's first class"""
    cross_entropy: Measure | None
    """of the true class, in nats"""
    top1: Measure | None
    """zero-shot accuracy"""
    top5: Measure | None
    """share with the true class among the first five; None of five classes or fewer"""


class SpliceLoss(Metric):
    """Sums in float64 over images, divided once; merged over processes.

    Probabilities are those of the model: a softmax over the classes, or (`independent`) a sigmoid
    of each, as SigLIP has them; then KL and cross-entropy are sums over the classes.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, *, independent: bool = False) -> None:
        """Empty sums."""
        super().__init__()
        self.independent = independent
        sums = torch.zeros(len(MEASURES), len(VARIANTS), dtype=torch.float64)
        counts = torch.zeros(len(MEASURES), dtype=torch.int64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(
        self,
        clean: Outcome,
        spliced: Outcome,
        ablated: Outcome,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Take in a batch of images, one after the other the same in every variant."""
        variants = (clean, spliced, ablated)
        reference = clean.embedding.double()
        self._add(
            "similarity", [cosine_similarity(reference, v.embedding.double()) for v in variants]
        )
        logits = [v.logits.double() for v in variants if v.logits is not None]
        if not logits:
            return
        first = [each.argmax(dim=1) for each in logits]
        self._add("kl", [divergence(logits[0], each, self.independent) for each in logits])
        self._add("agreement", [each == first[0] for each in first])
        if labels is None:
            return
        self._add(
            "cross_entropy", [cross_entropy(each, labels, self.independent) for each in logits]
        )
        self._add("top1", [each == labels for each in first])
        if logits[0].shape[1] > TOP:
            among = [each.topk(TOP, dim=1).indices == labels[:, None] for each in logits]
            self._add("top5", [each.any(dim=1) for each in among])

    def _add(self, name: str, values: Sequence[Tensor]) -> None:
        row = MEASURES.index(name)
        self.sums[row] += torch.stack([each.double().sum() for each in values])
        self.counts[row] += len(values[0])

    def compute(self) -> SpliceResult:
        """Divide once; DataError where a number is not finite, or no image was seen."""
        if not self.counts[0]:
            raise DataError("the splice was evaluated on no image")
        if not self.sums.isfinite().all():
            raise DataError(
                "an embedding of the clean, spliced or ablated model is nan or infinite; with "
                "model.precision=fp16 the range may be too small, bf16 and fp32 have it"
            )
        found = {
            name: _measure(name, sums, count)
            for name, sums, count in zip(
                MEASURES, self.sums.tolist(), self.counts.tolist(), strict=True
            )
        }
        similarity = found.pop("similarity")
        assert similarity is not None, "counted above"
        return SpliceResult(int(self.counts[0]), similarity, **found)


def _measure(name: str, sums: Sequence[float], count: int) -> Measure | None:
    if not count:
        return None
    clean, spliced, ablated = sums
    intervals = None
    if name in ("top1", "top5"):
        intervals = (
            wilson_interval(int(clean), count),
            wilson_interval(int(spliced), count),
            wilson_interval(int(ablated), count),
        )
    return Measure(clean / count, spliced / count, ablated / count, intervals)


def divergence(
    logits: Float64[Tensor, "batch class"],
    others: Float64[Tensor, "batch class"],
    independent: bool = False,
) -> Float64[Tensor, " batch"]:
    """KL(p || q) = sum_c p_c (log p_c - log q_c); of each class yes or no where independent."""
    if not independent:
        p, q = logits.log_softmax(dim=1), others.log_softmax(dim=1)
        return (p.exp() * (p - q)).sum(dim=1)
    yes = logits.sigmoid() * (logsigmoid(logits) - logsigmoid(others))
    no = (-logits).sigmoid() * (logsigmoid(-logits) - logsigmoid(-others))
    return (yes + no).sum(dim=1)


def cross_entropy(
    logits: Float64[Tensor, "batch class"],
    labels: Int[Tensor, " batch"],
    independent: bool = False,
) -> Float64[Tensor, " batch"]:
    """-log p of the label; where independent, and of the absence of all other classes."""
    if not independent:
        return -logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    signs = torch.full_like(logits, -1).scatter_(1, labels[:, None], 1.0)
    return -logsigmoid(signs * logits).sum(dim=1)
