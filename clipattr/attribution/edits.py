"""Curves, exact patching and integrated gradients at the last layer, class token: no suffix call.

An edit moves x along the image's active latents: x + sum_s c_s v_s. The centred activation moves by
sum c_s v~_s, what the projection makes of it by sum c_s A_s, and the score needs lengths and inner
products of these two alone. They are quadratic in c, with the k x k inner products of the active
directions as coefficients: read them once per image, and every edit after that costs k^2.

    u = x~ + sum c v~,  l = (x~ * gamma) P + sum c A,  s^2 = |u|^2 / d + eps
    y = (l . w / s + h . w) / sqrt(|l|^2 / s^2 + 2 l . h / s + |h|^2) + bias

Inner products are kept in float64, because |u|^2 is a small difference of large numbers where the
latents explain most of x.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.attribution.closed_form import LastLayerHead, LensTable
from clipattr.attribution.curves import Curves, check_steps
from clipattr.attribution.gradients import path_points
from clipattr.codes import SparseCodes


class _Linear(NamedTuple):
    """A product with a vector that moves, of the state and of each direction it moves along."""

    state: Float64[Tensor, "batch 1"]
    slots: Float64[Tensor, "batch active"]

    def after(self, edits: Float64[Tensor, "batch edit active"]) -> Float64[Tensor, "batch edit"]:
        """The product after each edit."""
        return self.state + (edits @ self.slots[..., None]).squeeze(-1)


class _Square(NamedTuple):
    """The square of a vector that moves: |l|^2 + 2 c . (A l) + c G c."""

    products: _Linear
    gram: Float64[Tensor, "batch active active"]

    def after(
        self, edits: Float64[Tensor, "batch edit active"]
    ) -> tuple[Float64[Tensor, "batch edit"], Float64[Tensor, "batch edit active"]]:
        """The square after each edit, and half its derivative with respect to each c_s."""
        moved = (edits @ self.gram).add_(self.products.slots[:, None])
        products = (edits * (moved + self.products.slots[:, None])).sum(dim=-1)
        return self.products.state + products, moved


class _Edited(NamedTuple):
    """The factors of the score after each edit."""

    s: Float64[Tensor, "batch edit"]
    square: Float64[Tensor, "batch edit"]
    by_shift: Float64[Tensor, "batch edit"]
    by_class: Float64[Tensor, "batch edit"]
    numerator: Float64[Tensor, "batch edit"]
    length: Float64[Tensor, "batch edit"]
    half_activation: Float64[Tensor, "batch edit active"]
    half_linear: Float64[Tensor, "batch edit active"]


class LastLayerEdits(NamedTuple):
    """All that the scores of edits of a batch depend on; made by `read_edits`."""

    values: Float64[Tensor, "batch active"]
    activation: _Square
    """|u|^2"""
    linear: _Square
    """|l|^2"""
    by_shift: _Linear
    """l . h"""
    by_class: _Linear
    """l . w"""
    shift_square: Float64[Tensor, ""]
    """|h|^2"""
    shift_logit: Float64[Tensor, "batch 1"]
    """h . w"""
    bias: Float64[Tensor, "batch 1"]
    width: int
    eps: float

    def scores(self, edits: Float64[Tensor, "batch edit active"]) -> Float64[Tensor, "batch edit"]:
        """Score of x + sum_s c_s v_s, for each edit c of each image."""
        edited = self._edit(edits)
        return edited.numerator / edited.length + self.bias

    def gradient(
        self, edits: Float64[Tensor, "batch edit active"]
    ) -> Float64[Tensor, "batch edit active"]:
        """Derivative of the score with respect to each c_s, at each edit."""
        edited = self._edit(edits)
        s, length = edited.s[..., None], edited.length[..., None]
        ds = edited.half_activation / (self.width * s)
        numerator = (self.by_class.slots[:, None] - edited.by_class[..., None] * ds / s) / s
        half_square = (edited.half_linear - edited.square[..., None] * ds / s) / s.square()
        half_square += (self.by_shift.slots[:, None] - edited.by_shift[..., None] * ds / s) / s
        return (numerator - edited.numerator[..., None] * half_square / length.square()) / length

    def attribution_patching(self) -> Float64[Tensor, "batch active"]:
        """First-order effect of deleting each latent."""
        return self.values * self.gradient(self._none())[:, 0]

    def two_point(self) -> Float64[Tensor, "batch active"]:
        """Attribution patching with the mean of the gradients at both ends."""
        ends = torch.stack([torch.zeros_like(self.values), -self.values], dim=1)
        return self.values * self.gradient(ends).mean(dim=1)

    def integrated_gradients(self, n_steps: int) -> Float64[Tensor, "batch active"]:
        """Act x gradient averaged over the path, all of its points at once."""
        alphas, weights = (
            self.values.new_tensor(each) for each in zip(*path_points(n_steps), strict=True)
        )
        gradient = self.gradient((alphas - 1)[:, None] * self.values[:, None])
        return self.values * (weights[:, None] * gradient).sum(dim=1)

    def exact_patching(self) -> Float64[Tensor, "batch active"]:
        """Effect of deleting each latent alone."""
        return self.scores(self._none()) - self.scores(torch.diag_embed(-self.values))

    def curves(self, steps: Int[Tensor, "order batch active"], n_steps: int) -> Curves:
        """Deletion and insertion of every order, all points at once; as `both_curves`."""
        check_steps(n_steps)
        points = torch.arange(n_steps + 1, device=steps.device)
        is_in_front = steps.movedim(0, 1)[:, :, None] < points[:, None]
        is_removed = torch.stack([is_in_front, ~is_in_front], dim=1)
        edits = torch.where(is_removed, -self.values[:, None, None, None], 0.0)
        found = self.scores(edits.flatten(1, 3)).view(edits.shape[:-1])
        deletion, insertion = found.movedim(0, 2)
        return Curves(deletion, insertion, n_points=found.numel(), n_run=0)

    def _none(self) -> Float64[Tensor, "batch 1 active"]:
        """The edit that changes nothing."""
        return torch.zeros_like(self.values)[:, None]

    def _edit(self, edits: Float64[Tensor, "batch edit active"]) -> _Edited:
        activation, half_activation = self.activation.after(edits)
        s = (activation / self.width + self.eps).sqrt()
        square, half_linear = self.linear.after(edits)
        by_shift, by_class = self.by_shift.after(edits), self.by_class.after(edits)
        length = (square / s.square() + 2 * by_shift / s + self.shift_square).sqrt()
        numerator = by_class / s + self.shift_logit
        return _Edited(
            s, square, by_shift, by_class, numerator, length, half_activation, half_linear
        )


@torch.no_grad()
def read_edits(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    targets: Int[Tensor, " batch"],
) -> LastLayerEdits:
    """The inner products of each image's state and active directions.

    They take k (d + D) + 2 k^2 numbers per image of the batch, for the gathered directions and
    their products; nothing of the size of the dictionary.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    latents = W_dec[codes.indices]
    latents -= latents.mean(dim=-1, keepdim=True)
    linear = (centred * head.gamma) @ head.projection
    directions = table.directions[codes.indices]
    weights, shift = head.weights[targets], head.shift.expand(len(x), -1)
    bias = head.class_bias
    no_bias = centred.new_zeros(len(x), 1, dtype=torch.float64)
    return LastLayerEdits(
        values=codes.values.double(),
        activation=_square(centred, latents),
        linear=_square(linear, directions),
        by_shift=_linear(linear, directions, shift),
        by_class=_linear(linear, directions, weights),
        shift_square=head.shift.double().square().sum(),
        shift_logit=_dot(shift, weights),
        bias=no_bias if bias is None else bias[targets, None].double(),
        width=x.shape[1],
        eps=head.eps,
    )


def _dot(one: Tensor, other: Tensor) -> Float64[Tensor, "batch 1"]:
    return (one.double() * other.double()).sum(dim=-1, keepdim=True)


def _linear(moving: Tensor, directions: Tensor, fixed: Tensor) -> _Linear:
    return _Linear(_dot(moving, fixed), (directions @ fixed[..., None]).squeeze(-1).double())


def _square(moving: Tensor, directions: Tensor) -> _Square:
    gram = (directions @ directions.mT).double()
    return _Square(_linear(moving, directions, moving), gram)
