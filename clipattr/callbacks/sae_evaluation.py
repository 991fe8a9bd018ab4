"""What an SAE reconstructs, and what the model loses when the reconstruction is spliced in."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import MaxMetric

from clipattr.callbacks.base import ReadoutCallback
from clipattr.clip import TextHead
from clipattr.clip.cut import Rest
from clipattr.clip.token_types import token_types
from clipattr.codes import SparseCodes
from clipattr.metrics.latent_activity import (
    FrequencyHistogram,
    LatentActivity,
    LatentActivityResult,
    frequency_histogram,
)
from clipattr.metrics.reconstruction import Reconstruction, ReconstructionResult
from clipattr.metrics.splice import Outcome, SpliceLoss, SpliceResult
from clipattr.spliced import Readout, Spliced


class TypeResult(NamedTuple):
    """The tokens of one type."""

    reconstruction: ReconstructionResult
    """of the rows of this type, with FVU about their own mean"""
    frequency: FrequencyHistogram
    splice: SpliceResult
    """when the tokens of this type are replaced and no others"""


class SaeEvaluation(ReadoutCallback):
    """Fills `types` (by token type), `latents` and `identity_error` on a `Trainer.test`.

        evaluation = SaeEvaluation(spliced, mean, head, labels)
        L.Trainer(callbacks=[evaluation]).test(SplicedModule(spliced), batches)
        evaluation.types["cls"].splice.top1.recovered

    The spliced model reads x_hat alone: this is the one place where the error term is dropped, on
    purpose. The ablated model reads `mean` (see `mean_by_type`). Both keep the rest: tokens that
    are no part of the site, or of another type, are those of the clean model.
    """

    def __init__(
        self,
        spliced: Spliced,
        mean: Float[Tensor, "*token model"],
        head: TextHead | None = None,
        labels: Int[Tensor, " images"] | None = None,
    ) -> None:
        """What is compared with what.

        Args:
            spliced: the model and its SAE.
            mean: what the ablated model reads at the site, of the shape of one image's x.
            head: classes or prompts for KL, agreement and accuracy; None: similarity alone.
            labels: the class of each image by its row number; None: no accuracy.
        """
        sae = spliced.sae
        self.spliced = spliced
        self.mean = mean
        self.head = head
        self.labels = labels
        self.places = token_types(spliced.cut)
        self.reconstructions = {
            name: Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents)
            for name in self.places
        }
        is_sigmoid = head is not None and head.is_sigmoid
        self.losses = {name: SpliceLoss(independent=is_sigmoid) for name in self.places}
        self.activity = LatentActivity(n_latents=sae.n_latents)
        self.identity = MaxMetric(nan_strategy="error")
        self.types: dict[str, TypeResult] = {}
        self.latents: LatentActivityResult | None = None
        self.identity_error = float("nan")
        super().__init__(
            *self.reconstructions.values(), *self.losses.values(), self.activity, self.identity
        )

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """The clean suffix once, and the spliced and the ablated one for each token type."""
        rest = readout.rest
        x, recon = (_with_tokens(each) for each in (readout.x, readout.recon))
        mean = _with_tokens(self.mean.to(x)[None]).expand_as(x)
        codes = readout.codes.reshape(*x.shape[:2])
        labels = None if self.labels is None else self.labels[readout.rows.cpu()].to(x.device)
        clean = self._look(x, rest)
        self.activity.update(codes)
        for name, place in self.places.items():
            of_type = SparseCodes(codes.indices[:, place], codes.values[:, place], codes.n_latents)
            self.reconstructions[name].update(x[:, place], recon[:, place], of_type)
            spliced = self._look(_replace(x, recon, place), rest)
            ablated = self._look(_replace(x, mean, place), rest)
            self.losses[name].update(clean, spliced, ablated, labels)
        if not self.identity.update_called:
            same = self.spliced.embed(readout.codes, readout.error, rest)
            self.identity.update((same - clean.embedding).abs().max())

    def _look(self, x: Float[Tensor, "batch token model"], rest: Rest) -> Outcome:
        x = x[:, 0] if self.spliced.cut.site.tokens == "cls" else x
        embedding = self.spliced.cut.suffix(x, rest)
        # In float64: a KL of nearly equal logits is a small difference of large numbers.
        return Outcome(
            embedding, None if self.head is None else self.head.logits(embedding.double())
        )

    def finish(self) -> None:
        """Divide once, over the whole set."""
        for name in self.places:
            found = self.reconstructions[name].compute()
            histogram = frequency_histogram(found.firing_counts, int(found.n_rows))
            self.types[name] = TypeResult(found, histogram, self.losses[name].compute())
        self.latents = self.activity.compute()
        self.identity_error = float(self.identity.compute())


def mean_by_type(
    spliced: Spliced, means: Float[Tensor, "*token model"]
) -> Float64[Tensor, "*token model"]:
    """Each token's mean replaced by that over all tokens of its type.

    `means` are over images, of the shape of one image's x.
    """
    found = _with_tokens(means.double()[None])[0].clone()
    types = token_types(spliced.cut)
    for name, place in types.items():
        if name != "all" or len(types) == 1:
            found[place] = found[place].mean(dim=0)
    return found.reshape(means.shape)


def _with_tokens(x: Float[Tensor, "batch *token model"]) -> Float[Tensor, "batch token model"]:
    return x[:, None] if x.dim() == 2 else x


def _replace(x: Tensor, values: Tensor, place: slice) -> Float[Tensor, "batch token model"]:
    """A copy of x with the values of some tokens."""
    edited = x.clone()
    edited[:, place] = values[:, place]
    return edited
