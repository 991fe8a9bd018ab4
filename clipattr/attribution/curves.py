"""Faithfulness of an order of latents: deletion and insertion curves, and the completeness gap.

A point of a curve is an image with a set of its latents taken away. Points with the same set are
one row of the suffix, whichever order, step or curve they belong to.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.attribution.ranking import steps_of
from clipattr.attribution.references import at_reference
from clipattr.attribution.score import Score
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError


class Curves(NamedTuple):
    """Both curves of several orders, and what they cost."""

    deletion: Float[Tensor, "order batch point"]
    insertion: Float[Tensor, "order batch point"]
    n_points: int
    """points of all curves of all images"""
    n_run: int
    """rows that went through the suffix for them"""


def both_curves(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    steps: Int[Tensor, "order batch *site active"],
    n_steps: int,
    chunk_rows: int = 256,
) -> Curves:
    """Deletion and insertion of several orders at once, each different edit of an image run once.

    `steps` says for each order which slots go when (`steps_of`, `global_steps`). The clean point
    and the one without latents are shared by all, and so is every set of latents that two orders
    have in front. `chunk_rows` rows go through the suffix at a time.
    """
    points = _Points(steps.flatten(2), codes, n_steps, (False, True))
    curves, n_run = _run(score, x, W_dec, points, chunk_rows)
    return Curves(curves[0], curves[1], n_points=curves.numel(), n_run=n_run)


def deletion_curve(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    order: Int[Tensor, "batch slot"],
    n_steps: int,
    chunk_rows: int = 256,
) -> Float[Tensor, "batch point"]:
    """Score after the first 0, 1, ..., n_steps slots of the order are deleted. Lower is better.

        y(x - sum_{s < step} a_s v_s)

    Point 0 is the clean score. The rest (error term and decoder bias) is never touched. An image
    with fewer active latents than steps stays flat from there on.
    """
    points = _Points(steps_of(order)[None], codes, n_steps, (False,))
    return _run(score, x, W_dec, points, chunk_rows)[0][0, 0]


def insertion_curve(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    order: Int[Tensor, "batch slot"],
    n_steps: int,
    chunk_rows: int = 256,
) -> Float[Tensor, "batch point"]:
    """Score after the first 0, 1, ..., n_steps slots are added to the rest. Higher is better.

        y(rest + sum_{s < step} a_s v_s),  rest = x - sum_j a_j v_j

    Point 0 has no latent at all; once every active slot is in, the score is the clean one.
    """
    points = _Points(steps_of(order)[None], codes, n_steps, (True,))
    return _run(score, x, W_dec, points, chunk_rows)[0][0, 0]


def area_under(curve: Float[Tensor, "*rows point"]) -> Float64[Tensor, "*rows"]:
    """Trapezoid over the steps, divided by their number: the mean height of each image's curve.

    Divide by y(0) only after averaging over images (ratio of means): single scores can be near 0.
    """
    return torch.trapezoid(curve.double(), dim=-1) / (curve.shape[-1] - 1)


class CompletenessGap(NamedTuple):
    """Per image: what the attributions miss, and the change they should explain, both absolute.

    Over a data set the gap is missing.sum() / change.sum(): one image whose score hardly changes
    would dominate a mean of ratios.
    """

    missing: Float64[Tensor, " batch"]
    change: Float64[Tensor, " batch"]

    @property
    def ratio(self) -> Float64[Tensor, " batch"]:
        """The gap of each image by itself."""
        return self.missing / self.change


@torch.no_grad()
def completeness_gap(
    attributions: Float[Tensor, "batch *site active"],
    codes: SparseCodes,
    y_clean: Float[Tensor, " batch"],
    y_rest: Float[Tensor, " batch"],
) -> CompletenessGap:
    """How far the attributions are from adding up to the effect of all latents together.

        |sum_j R_j - (y(x) - y(rest))| / |y(x) - y(rest)|

    Reference: Sundararajan et al., 2017, completeness axiom.
    """
    explained = torch.where(codes.is_active, attributions, 0.0).double().flatten(1).sum(dim=1)
    change = y_clean.double() - y_rest.double()
    return CompletenessGap((explained - change).abs(), change.abs())


def check_steps(n_steps: int) -> None:
    """ConfigError for a curve without an edit."""
    if n_steps < 1:
        raise ConfigError(f"curve with n_steps={n_steps}: at least 1 is needed")


class _Points:
    """The points [curve, order, image, step] of curves, by what each takes away."""

    def __init__(
        self,
        steps: Int[Tensor, "order batch slot"],
        codes: SparseCodes,
        n_steps: int,
        inserts: tuple[bool, ...],
    ) -> None:
        check_steps(n_steps)
        self.steps = steps
        self.codes = codes
        self.inserts = torch.tensor(inserts, device=steps.device)
        self.shape = (len(inserts), *steps.shape[:2], n_steps + 1)

    def without(self, points: Int[Tensor, " row"]) -> tuple[Int[Tensor, " row"], SparseCodes]:
        """The image of each point, and the codes that are taken away from it."""
        curve, order, image, step = torch.unravel_index(points, self.shape)
        is_in_front: Bool[Tensor, "row slot"] = self.steps[order, image] < step[:, None]
        codes = self.codes.select(image)
        is_removed = (is_in_front ^ self.inserts[curve, None]).view(codes.values.shape)
        return image, codes._replace(values=torch.where(is_removed, codes.values, 0.0))

    def keys(self) -> Int[Tensor, " point"]:
        """A number for each point, the same for the same edit of the same image.

        The sum of a random number for the image and one for each slot that is removed: among n
        points two edits are mistaken for each other with a chance of n^2 / 2^64.
        """
        n_steps = self.shape[-1] - 1
        is_active = self.codes.is_active.flatten(1)
        draw = torch.empty(sum(is_active.shape), dtype=torch.int64)
        draw.random_(generator=torch.Generator().manual_seed(0))
        of_image, of_slot = draw.to(is_active.device).split(list(is_active.shape))
        key: Int[Tensor, "batch slot"] = torch.where(is_active, of_slot, 0)
        sums = key.new_zeros(*self.steps.shape[:2], n_steps + 2)
        place = self.steps.clamp(max=n_steps) + 1
        sums.scatter_add_(2, place, key.expand(self.steps.shape))
        deleted = sums.cumsum(dim=2)[..., :-1]
        kept = key.sum(dim=1)[:, None] - deleted
        removed = torch.where(self.inserts[:, None, None, None], kept, deleted)
        return (removed + of_image[:, None]).flatten()


@torch.no_grad()
def _run(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    W_dec: Float[Tensor, "latent model"],
    points: _Points,
    chunk_rows: int,
) -> tuple[Float[Tensor, "curve order batch point"], int]:
    """Score of every point, and how many rows were run."""
    keys = points.keys()
    different, which = keys.unique(return_inverse=True)
    numbers = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(different, len(keys)).scatter_reduce_(0, which, numbers, "amin")
    scores: list[Tensor] = []
    for chunk in first.split(chunk_rows):
        image, removed = points.without(chunk)
        scores.append(score(at_reference(x[image], removed, W_dec), image))
    return torch.cat(scores)[which].view(points.shape), len(different)
