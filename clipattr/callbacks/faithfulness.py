"""How faithful each attribution method is: curves, agreement with exact patching, intervals.

Fixed choices: the error term is kept, step 0 is the clean model, rankings hold active latents only,
and the score is that of the class each image is explained for. A site with tokens has one slot per
latent and image: deleted at all its tokens. An image with fewer active latents than steps has a
curve that stays flat.
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.attribution import active_order, area_under, completeness_gap, listed_steps, steps_of
from clipattr.attribution.curves import check_steps
from clipattr.callbacks.base import ReadoutCallback
from clipattr.callbacks.effects import EffectReader, Effects
from clipattr.callbacks.faithfulness_result import (
    COLUMNS,
    Faithfulness,
    Unrestricted,
    check_images,
    check_methods,
    check_targets,
    mean_by_class,
    summarise,
    summarise_unrestricted,
)
from clipattr.config.choices import Method
from clipattr.metrics.class_sums import ClassCounts, ClassSums, Counts
from clipattr.metrics.matrix_sum import MatrixSum
from clipattr.metrics.per_image import PerImage
from clipattr.metrics.ranks import pearson, spearman, top_overlap
from clipattr.spliced import Readout, Spliced


class FaithfulnessCallback(ReadoutCallback):
    """Fills `results` and what stands beside them from the rows below the number of targets."""

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
        bias: Float[Tensor, " class"] | None = None,
        sum_classes: bool = False,
    ) -> None:
        """What is compared.

        Args:
            spliced: the model and its SAE, at any site.
            weights: rows of the head; of a probe with its `bias`.
            targets: the class that each image is explained for, by its row number. Rows for which
                there is none, because there are fewer of them, are left out.
            methods: logit_lens among them: the others are compared with it.
            n_steps: latents that a curve edits; no more than can be active.
            ig_steps: points of integrated gradients.
            overlap_top: n of the top-n overlap with exact patching.
            resamples: of every interval.
            seed: of the intervals, and of the random orders.
            bias: of the classes.
            sum_classes: fill `class_totals`, the attribution summed over the images of each class,
                and `rankings`, its first latents, of `random` an order drawn for the class: 8 bytes
                x classes x latents for each method; and `counts`, of images of each class in which
                attribution patching is positive.

        Raises:
            ConfigError: for `n_steps` below 1, methods without logit_lens, targets without a row.
        """
        check_steps(n_steps)
        check_methods(methods)
        check_targets(targets, len(weights))
        sae = spliced.sae
        has_tokens = spliced.cut.site.tokens != "cls"
        self.spliced = spliced
        self.reader = EffectReader(spliced, weights, bias)
        self.targets = targets
        self.methods = methods
        self.n_steps = min(n_steps, sae.n_latents if has_tokens else sae.max_active)
        self.ig_steps = ig_steps
        self.overlap_top = overlap_top
        self.resamples = resamples
        self.seed = seed
        self.results: dict[Method, Faithfulness] = {}
        self.logit_lens_unrestricted: Unrestricted | None = None
        self.by_class: dict[Method, dict[int, dict[str, float | int]]] = {}
        self.class_totals: dict[Method, Float64[Tensor, "class latent"]] = {}
        self.rankings: dict[Method, Int[Tensor, "class step"]] = {}
        self.counts: Counts | None = None
        self.completeness_gap = float("nan")
        super().__init__(*self._build_metrics(len(weights), sae.n_latents, sum_classes))

    def _build_metrics(self, n_classes: int, n_latents: int, sum_classes: bool) -> list[Metric]:
        methods = self.methods
        self.tables = {method: PerImage(COLUMNS) for method in methods}
        self.curves = {method: MatrixSum(4, self.n_steps + 1) for method in methods}
        self.scores = PerImage(("clean", "drop"))
        self.lens_first = self.reader.lens.topk(self.n_steps, dim=1).indices
        self.whole_lens = PerImage(("deletion", "insertion"))
        self.class_sums = {
            method: ClassSums(n_classes=n_classes, n_latents=n_latents)
            for method in (methods if sum_classes else ())
        }
        self.class_counts = {
            method: ClassCounts(n_classes=n_classes, n_latents=n_latents)
            for method in self.class_sums
            if method is Method.attribution_patching
        }
        return [
            *self.tables.values(),
            *self.curves.values(),
            *self.class_sums.values(),
            *self.class_counts.values(),
            self.scores,
            self.whole_lens,
        ]

    def take(self, readout: Readout) -> None:
        """Attribute, rank and edit one batch with every method."""
        chosen = (readout.rows < len(self.targets)).nonzero().flatten()
        n_edits = 2 * (len(self.methods) + 1) * (self.n_steps + 1)
        for piece in self.reader.pieces(chosen, readout.codes, n_edits):
            rows = readout.rows[piece]
            targets = self.targets[rows.to(self.targets.device)].to(readout.x.device)
            self._take(self.reader.read(readout, piece, targets), rows, targets)

    def _take(self, effects: Effects, rows: Tensor, targets: Tensor) -> None:
        found = {method: self._attribute(method, effects, rows, targets) for method in self.methods}
        exact = found[Method.exact] if Method.exact in found else effects.exact_patching()
        orders = [steps_of(active_order(each, effects.codes)) for each in found.values()]
        orders.append(listed_steps(self.lens_first[targets], effects.codes))
        curves = effects.curves(torch.stack(orders), self.n_steps)
        both = torch.stack([curves.deletion, curves.insertion], dim=1).double()
        areas = area_under(both)
        for number, (method, attributions) in enumerate(found.items()):
            agreement = self._compare(attributions, exact, effects)
            self.tables[method].update(rows, torch.cat([areas[number].T, agreement], dim=1))
            moments = torch.cat([both[number], both[number].square()])
            self.curves[method].update(moments.sum(dim=1), len(rows))
            if self.class_sums:
                self.class_sums[method].update(targets, effects.codes, attributions)
            if method in self.class_counts:
                self.class_counts[method].update(targets, effects.codes, attributions)
        self.whole_lens.update(rows, areas[-1].T)
        drop = effects.clean - effects.rest
        self.scores.update(rows, torch.stack([effects.clean, drop], dim=1))

    def _attribute(self, method: Method, effects: Effects, rows: Tensor, targets: Tensor) -> Tensor:
        if method is not Method.random:
            return self.reader.attribute(method, effects, targets, self.ig_steps)
        # One order per image, whatever the batch: each image has a generator of its own.
        is_active = effects.codes.is_active
        draws = torch.zeros(is_active.shape, dtype=torch.float64, device=is_active.device)
        for slot, row in enumerate(rows.tolist()):
            generator = torch.Generator().manual_seed((self.seed << 32) + row)
            number = int(is_active[slot].sum())
            # Above 0, so that a sum over images tells what fired.
            drawn = torch.rand(number, generator=generator).clamp(min=2**-25)
            draws[slot, is_active[slot]] = drawn.to(draws)
        return draws

    def _compare(
        self, attributions: Tensor, exact: Tensor, effects: Effects
    ) -> Float64[Tensor, "batch column"]:
        is_active = effects.codes.is_active
        gap = completeness_gap(attributions, effects.codes, effects.clean, effects.rest)
        columns = [
            spearman(attributions, exact, is_active),
            pearson(attributions, exact, is_active),
            top_overlap(attributions, exact, is_active, self.overlap_top),
            gap.missing,
        ]
        return torch.stack(columns, dim=1)

    def finish(self) -> None:
        """Intervals over images; areas are divided by the clean score, sums first."""
        rows, scores = self.scores.compute()
        check_images(len(scores), 2)
        tables = {method: table.compute().values for method, table in self.tables.items()}
        classes = self.targets[rows.to(self.targets.device)].to(scores.device)
        for method, table in tables.items():
            self.results[method] = summarise(
                method,
                table,
                tables[Method.logit_lens],
                scores,
                self.curves[method],
                resamples=self.resamples,
                seed=self.seed,
            )
            self.by_class[method] = mean_by_class(table, scores, classes)
        whole = self.whole_lens.compute().values
        self.logit_lens_unrestricted = summarise_unrestricted(
            whole, scores, resamples=self.resamples, seed=self.seed
        )
        for method, sums in self.class_sums.items():
            self.class_totals[method] = sums.compute()
            self.rankings[method] = self._rank(method).topk(self.n_steps, dim=1).indices
        for counts in self.class_counts.values():
            self.counts = counts.compute()
        if Method.integrated_gradients in tables:
            completeness = self.results[Method.integrated_gradients].completeness
            assert completeness is not None, "its attributions have units"
            self.completeness_gap = completeness.mean

    def _rank(self, method: Method) -> Float64[Tensor, "class latent"]:
        """What orders the latents of a class.

        A sum of random numbers would order them by how often they fire, which is a method.
        """
        totals = self.class_totals[method]
        if method is not Method.random:
            return totals
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.stack(
            [torch.randperm(totals.shape[1], generator=generator) for _ in range(len(totals))]
        )
        return torch.where(totals > 0, places.to(totals), -1.0)

    def means(self) -> dict[Method, dict[str, float | int]]:
        """The numbers of `results` over all images, merged over processes, without intervals.

        Instead of `finish`, where nothing is drawn, and where an SAE may still be so bad that an
        interval is not defined.
        """
        _, scores = self.scores.compute()
        check_images(len(scores), 1)
        together = scores.new_zeros(len(scores), dtype=torch.int64)
        return {
            method: mean_by_class(table.compute().values, scores, together)[0]
            for method, table in self.tables.items()
        }
