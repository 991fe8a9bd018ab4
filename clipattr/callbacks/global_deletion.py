"""Deletion of the same latents in all images of a class, by the class mean of an attribution."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.attribution import area_under, listed_steps
from clipattr.callbacks.base import ReadoutCallback
from clipattr.callbacks.effects import EffectReader
from clipattr.callbacks.faithfulness_result import (
    check_images,
    check_methods,
    check_targets,
    summarise_areas,
    summarise_difference,
)
from clipattr.config.choices import Method
from clipattr.metrics.intervals import Interval
from clipattr.metrics.per_image import PerImage
from clipattr.spliced import Readout


class GlobalDeletion(NamedTuple):
    """Result of one method."""

    deletion_auc: Interval
    insertion_auc: Interval
    minus_logit_lens: Interval | None
    """of the deletion AUC, images paired; None of logit lens itself"""


class GlobalDeletionCallback(ReadoutCallback):
    """Fills `results`: step t edits latent ranking[class, t] in every image where it fired.

    A second pass, because the rankings are means over the images: `FaithfulnessCallback.rankings`.
    """

    def __init__(
        self,
        reader: EffectReader,
        targets: Int[Tensor, " images"],
        rankings: Mapping[Method, Int[Tensor, "class step"]],
        *,
        resamples: int,
        seed: int,
    ) -> None:
        """What is edited; rows for which there is no target are left out.

        Raises:
            ConfigError: for rankings without logit_lens, and targets without a row in the head.
        """
        check_methods(rankings)
        check_targets(targets, len(reader.weights))
        self.reader = reader
        self.targets = targets
        self.rankings = rankings
        self.resamples = resamples
        self.seed = seed
        self.tables = {method: PerImage(("deletion", "insertion")) for method in rankings}
        self.scores = PerImage(("clean",))
        self.results: dict[Method, GlobalDeletion] = {}
        super().__init__(*self.tables.values(), self.scores)

    def take(self, readout: Readout) -> None:
        """Edit one batch by every ranking."""
        chosen = (readout.rows < len(self.targets)).nonzero().flatten()
        n_steps = next(iter(self.rankings.values())).shape[1]
        n_edits = 2 * len(self.rankings) * (n_steps + 1)
        for piece in self.reader.pieces(chosen, readout.codes, n_edits):
            rows = readout.rows[piece]
            targets = self.targets[rows.to(self.targets.device)].to(readout.x.device)
            effects = self.reader.read(readout, piece, targets)
            steps = [
                listed_steps(ranking[targets], effects.codes) for ranking in self.rankings.values()
            ]
            curves = effects.curves(torch.stack(steps), n_steps)
            areas = area_under(torch.stack([curves.deletion, curves.insertion], dim=-2))
            for method, of_method in zip(self.rankings, areas, strict=True):
                self.tables[method].update(rows, of_method)
            self.scores.update(rows, effects.clean[:, None])

    def finish(self) -> None:
        """Intervals over images, as of the local curves."""
        tables = {method: table.compute().values for method, table in self.tables.items()}
        # torchmetrics takes the axes from a result of one number, such as one clean score.
        check_images(len(tables[Method.logit_lens]), 2)
        clean = self.scores.compute().values[:, 0]
        reference = tables[Method.logit_lens][:, 0]
        draw = {"resamples": self.resamples, "seed": self.seed}
        for method, table in tables.items():
            areas = summarise_areas(table, clean, **draw)
            difference = summarise_difference(table[:, 0], reference, clean, **draw)
            is_reference = method is Method.logit_lens
            self.results[method] = GlobalDeletion(*areas, None if is_reference else difference)
