"""How faithful each attribution method is: curves, agreement with exact patching, intervals.

Fixed choices: the error term is kept, step 0 is the clean model, rankings hold active latents only,
and the score is that of the class each image is explained for.
"""

from typing import NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.baselines import (
    act_times_logit_lens,
    energy,
    logit_lens,
    logit_lens_table,
    random_scores,
)
from clipattr.attribution.curves import (
    area_under,
    completeness_gap,
    deletion_curve,
    insertion_curve,
)
from clipattr.attribution.exact import exact_patching
from clipattr.attribution.gradients import attribution_patching, integrated_gradients
from clipattr.attribution.ranking import active_order
from clipattr.attribution.score import HeadScore, clean_scores
from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import SparseCodes
from clipattr.config.choices import Method
from clipattr.metrics.intervals import Interval, bootstrap_mean, bootstrap_ratio
from clipattr.metrics.intervals import bootstrap_ratio_difference as ratio_difference
from clipattr.metrics.matrix_sum import MatrixSum
from clipattr.metrics.per_image import PerImage
from clipattr.metrics.ranks import spearman, top_overlap
from clipattr.spliced import Readout, Spliced

COLUMNS = ("deletion", "insertion", "spearman", "overlap")
GAP_COLUMNS = ("y_clean", "y_rest", "gap_missing", "gap_change")


class Faithfulness(NamedTuple):
    """Result of one method."""

    deletion_curve: list[float]
    insertion_curve: list[float]
    deletion_auc: Interval
    insertion_auc: Interval
    spearman_exact: Interval
    overlap_exact: Interval
    n_undefined: int
    """images without a rank agreement: too few active latents"""
    minus_logit_lens: Interval | None


class FaithfulnessCallback(ReadoutCallback):
    """Fills `results` and `completeness_gap` from the first `n_images` rows of the set."""

    def __init__(
        self,
        spliced: Spliced,
        weights: Float[Tensor, "class embed"],
        targets: Int[Tensor, " images"],
        *,
        methods: list[Method],
        n_steps: int,
        ig_steps: int,
        overlap_top: int,
        resamples: int,
        seed: int,
    ) -> None:
        self.spliced = spliced
        self.weights = weights
        self.targets = targets
        self.methods = methods
        self.n_steps = min(n_steps, spliced.sae.max_active)
        self.ig_steps = ig_steps
        self.overlap_top = overlap_top
        self.resamples = resamples
        self.seed = seed
        self.W_dec = spliced.sae.W_dec.detach()
        self.lens = logit_lens_table(spliced.cut.suffix, self.W_dec, weights)
        self.tables = {method: PerImage(COLUMNS) for method in methods}
        self.scores = PerImage(GAP_COLUMNS)
        self.curves = {method: MatrixSum(2, self.n_steps + 1) for method in methods}
        self.results: dict[Method, Faithfulness] = {}
        self.completeness_gap = float("nan")
        super().__init__(*self.tables.values(), *self.curves.values(), self.scores)

    def take(self, readout: Readout) -> None:
        """Attribute, rank and edit one batch with every method."""
        chosen = (readout.rows < len(self.targets)).nonzero().flatten()
        if len(chosen) == 0:
            return
        x, codes, rows = readout.x[chosen], readout.codes.select(chosen), readout.rows[chosen]
        score = HeadScore(
            self.spliced.cut.suffix,
            self.weights,
            # One row per image of this batch: `images` counts within the batch.
            self.targets[rows],
        )
        exact = exact_patching(score, x, codes, self.W_dec)
        integrated = integrated_gradients(score, x, codes, self.W_dec, self.ig_steps)
        known = {Method.exact: exact, Method.integrated_gradients: integrated}
        for method in self.methods:
            attributions = known.get(method)
            if attributions is None:
                attributions = self._attribute(method, score, x, codes, rows)
            self._measure(method, attributions, exact, score, x, codes, rows)
        self._measure_gap(integrated, score, x, codes, rows)

    def _attribute(
        self, method: Method, score: HeadScore, x: Tensor, codes: SparseCodes, rows: Tensor
    ) -> Tensor:
        match method:
            case Method.attribution_patching:
                return attribution_patching(score, x, codes, self.W_dec)
            case Method.act_times_logit_lens:
                return act_times_logit_lens(self.lens, score.targets, codes)
            case Method.logit_lens:
                return logit_lens(self.lens, score.targets, codes)
            case Method.energy:
                return energy(codes, self.W_dec)
            case Method.random:
                # One order per image, whatever the batch: each image has a generator of its own.
                orders = [
                    random_scores(codes.select(slot[None]), self._generator(x.device, row))
                    for slot, row in zip(torch.arange(len(rows)), rows.tolist(), strict=True)
                ]
                return torch.cat(orders)
            case Method.exact | Method.integrated_gradients:
                raise AssertionError(f"{method.name} is computed once, by the caller")

    def _generator(self, device: torch.device, row: int) -> torch.Generator:
        return torch.Generator(device).manual_seed((self.seed << 32) + row)

    def _measure(
        self,
        method: Method,
        attributions: Tensor,
        exact: Tensor,
        score: HeadScore,
        x: Tensor,
        codes: SparseCodes,
        rows: Tensor,
    ) -> None:
        order = active_order(attributions, codes)
        deletion = deletion_curve(score, x, codes, self.W_dec, order, self.n_steps)
        insertion = insertion_curve(score, x, codes, self.W_dec, order, self.n_steps)
        columns = [
            area_under(deletion),
            area_under(insertion),
            spearman(attributions, exact, codes.is_active),
            top_overlap(attributions, exact, codes.is_active, self.overlap_top),
        ]
        self.tables[method].update(rows, torch.stack(columns, dim=1))
        total = torch.stack([deletion.double().sum(0), insertion.double().sum(0)])
        self.curves[method].update(total, len(rows))

    def _measure_gap(
        self,
        attributions: Tensor,
        score: HeadScore,
        x: Tensor,
        codes: SparseCodes,
        rows: Tensor,
    ) -> None:
        with torch.no_grad():
            y_clean = clean_scores(score, x)
            y_rest = clean_scores(score, x - codes.decode(self.W_dec))
        gap = completeness_gap(attributions, codes, y_clean, y_rest)
        columns = [y_clean.double(), y_rest.double(), gap.missing, gap.change]
        self.scores.update(rows, torch.stack(columns, dim=1))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Intervals over images; areas are divided by the clean score, sums first."""
        scores = self.scores.compute().values.T
        self.completeness_gap = float(scores[2].sum() / scores[3].sum())
        tables = {method: table.compute().values.T for method, table in self.tables.items()}
        reference = tables[Method.logit_lens][0]
        for method, columns in tables.items():
            self.results[method] = self._summarise(method, columns, scores[0], reference)

    def _summarise(
        self, method: Method, columns: Tensor, y_clean: Tensor, reference: Tensor
    ) -> Faithfulness:
        # One seed for all: every method is resampled with the same images.
        def draw() -> torch.Generator:
            return torch.Generator(y_clean.device).manual_seed(self.seed)

        n = self.resamples

        deletion, insertion, *agreement = columns
        ranks, overlap = (column[~column.isnan()] for column in agreement)
        curves = self.curves[method].compute().tolist()
        is_reference = method is Method.logit_lens
        return Faithfulness(
            deletion_curve=curves[0],
            insertion_curve=curves[1],
            deletion_auc=bootstrap_ratio(deletion, y_clean, resamples=n, generator=draw()),
            insertion_auc=bootstrap_ratio(insertion, y_clean, resamples=n, generator=draw()),
            spearman_exact=bootstrap_mean(ranks, resamples=n, generator=draw()),
            overlap_exact=bootstrap_mean(overlap, resamples=n, generator=draw()),
            n_undefined=len(deletion) - min(len(ranks), len(overlap)),
            minus_logit_lens=None
            if is_reference
            else ratio_difference(deletion, reference, y_clean, resamples=n, generator=draw()),
        )
