"""What edits of a batch do to its scores, at any site: in closed form where there is one.

Behind the last block of a class-token tower nothing is run (`read_edits`). Elsewhere the suffix
runs on edited activations with the rest of each image, and a latent counts once per image: deleted
at all its tokens, its attribution summed over them.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.attribution import (
    Curves,
    HeadScore,
    LastLayerEdits,
    LastLayerHead,
    act_times_logit_lens,
    at_reference,
    attribution_patching,
    both_curves,
    build_lens_table,
    clean_scores,
    energy,
    exact_patching_of_latents,
    integrated_gradients,
    logit_lens,
    logit_lens_table,
    merge_tokens,
    read_edits,
)
from clipattr.codes import SparseCodes
from clipattr.config.choices import Method
from clipattr.spliced import Readout, Spliced

# Numbers that a piece of a batch may need at a time (64 MB): memory, not the result.
_ENTRIES = 2**23


@runtime_checkable
class Effects(Protocol):
    """The edits of a batch; a slot is a latent of an image, at all its tokens."""

    codes: SparseCodes
    """[batch, slot]"""
    clean: Float64[Tensor, " batch"]
    """y(x)"""
    rest: Float64[Tensor, " batch"]
    """y(x - sum_j a_j v_j): without any latent"""

    def exact_patching(self) -> Float64[Tensor, "batch slot"]:
        """Effect of deleting each latent alone."""
        ...

    def attribution_patching(self) -> Float64[Tensor, "batch slot"]:
        """The first-order estimate of it."""
        ...

    def integrated_gradients(self, n_steps: int) -> Float64[Tensor, "batch slot"]:
        """Shares of clean - rest."""
        ...

    def curves(self, steps: Int[Tensor, "order batch slot"], n_steps: int) -> Curves:
        """Deletion and insertion of several orders."""
        ...


class LastLayerEffects:
    """In closed form."""

    def __init__(self, edits: LastLayerEdits, codes: SparseCodes) -> None:
        self.codes = codes
        self._edits = edits
        ends = torch.stack([torch.zeros_like(edits.values), -edits.values], dim=1)
        self.clean, self.rest = edits.scores(ends).unbind(dim=1)

    def exact_patching(self) -> Float64[Tensor, "batch slot"]:
        """Effect of deleting each latent alone."""
        return self._edits.exact_patching()

    def attribution_patching(self) -> Float64[Tensor, "batch slot"]:
        """The first-order estimate of it."""
        return self._edits.attribution_patching()

    def integrated_gradients(self, n_steps: int) -> Float64[Tensor, "batch slot"]:
        """Shares of clean - rest."""
        return self._edits.integrated_gradients(n_steps)

    def curves(self, steps: Int[Tensor, "order batch slot"], n_steps: int) -> Curves:
        """Deletion and insertion of several orders."""
        return self._edits.curves(steps, n_steps)


class SuffixEffects:
    """By running the suffix."""

    def __init__(
        self,
        score: HeadScore,
        x: Float[Tensor, "batch *token model"],
        codes: SparseCodes,
        directions: Float[Tensor, "latent model"],
    ) -> None:
        self._merged = merge_tokens(codes)
        self.codes = self._merged.codes
        self._arguments = (score, x, codes, directions)
        with torch.no_grad():
            self.clean = clean_scores(score, x).double()
            self.rest = clean_scores(score, at_reference(x, codes, directions)).double()

    def exact_patching(self) -> Float64[Tensor, "batch slot"]:
        """Effect of deleting each latent alone."""
        return exact_patching_of_latents(*self._arguments, self._merged).double()

    def attribution_patching(self) -> Float64[Tensor, "batch slot"]:
        """The first-order estimate of it."""
        return self._merged.sum_over_tokens(attribution_patching(*self._arguments).double())

    def integrated_gradients(self, n_steps: int) -> Float64[Tensor, "batch slot"]:
        """Shares of clean - rest."""
        shares = integrated_gradients(*self._arguments, n_steps)
        return self._merged.sum_over_tokens(shares.double())

    def curves(self, steps: Int[Tensor, "order batch slot"], n_steps: int) -> Curves:
        """Deletion and insertion of several orders."""
        per_token = torch.stack([self._merged.per_token(each) for each in steps])
        return both_curves(*self._arguments, per_token, n_steps)


class EffectReader:
    """Reads the effects on the scores of a head: prompts, or a probe with its bias."""

    def __init__(
        self,
        spliced: Spliced,
        weights: Float[Tensor, "class embed"],
        bias: Float[Tensor, " class"] | None = None,
    ) -> None:
        self.cut = spliced.cut
        self.weights = weights
        self.bias = bias
        self.directions = spliced.sae.directions.detach()
        with torch.no_grad():
            self.lens = logit_lens_table(self.cut.read_directly, self.directions, weights)
        self._head = None
        if self.cut.has_last_layer:
            self._head = LastLayerHead(*self.cut.last_layer(), weights, bias)
            self._table = build_lens_table(self._head, self.directions)

    def pieces(
        self, rows: Int[Tensor, " chosen"], codes: SparseCodes, n_edits: int
    ) -> Sequence[Int[Tensor, " piece"]]:
        """Rows of a batch that fit into memory at once, where each is edited in `n_edits` ways."""
        if self._head is None or not len(rows):
            return [rows] if len(rows) else []
        n_active = codes.indices.shape[-1]
        return rows.split(max(1, _ENTRIES // (n_active * max(n_active, n_edits))))

    def read(
        self, readout: Readout, chosen: Int[Tensor, " chosen"], targets: Int[Tensor, " chosen"]
    ) -> Effects:
        """The effects of some rows of a batch, each for its class."""
        x, codes = readout.x[chosen], readout.codes.select(chosen)
        if self._head is not None:
            edits = read_edits(self._head, self._table, x, codes, self.directions, targets)
            return LastLayerEffects(edits, codes)
        rest = readout.rest.rows(chosen)
        score = HeadScore(self.cut.suffix, self.weights, targets, self.bias, rest)
        return SuffixEffects(score, x, codes, self.directions)

    def attribute(
        self, method: Method, effects: Effects, targets: Int[Tensor, " batch"], ig_steps: int
    ) -> Float64[Tensor, "batch slot"]:
        """The attributions of a method that is no random order."""
        codes = effects.codes
        match method:
            case Method.exact:
                return effects.exact_patching()
            case Method.attribution_patching:
                return effects.attribution_patching()
            case Method.integrated_gradients:
                return effects.integrated_gradients(ig_steps)
            case Method.act_times_logit_lens:
                return act_times_logit_lens(self.lens, targets, codes).double()
            case Method.logit_lens:
                return logit_lens(self.lens, targets, codes).double()
            case Method.energy:
                return energy(codes, self.directions).double()
            case Method.random:
                raise AssertionError("a random order depends on the image's number, not on it")
