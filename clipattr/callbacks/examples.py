"""The images in which each latent is most active."""

import lightning as L

from clipattr.callbacks.base import ReadoutCallback
from clipattr.metrics.top_examples import TopExamples, TopExamplesResult
from clipattr.spliced import Readout


class ExamplesCallback(ReadoutCallback):
    """Fills `result`: per latent the rows of its top images, -1 where it fired in fewer."""

    def __init__(self, *, n_latents: int, n_examples: int) -> None:
        self.examples = TopExamples(n_latents=n_latents, n_examples=n_examples)
        self.result: TopExamplesResult | None = None
        super().__init__(self.examples)

    def take(self, readout: Readout) -> None:
        """Merge the batch into the best so far."""
        self.examples.update(readout.codes, readout.rows)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same on every rank."""
        self.result = self.examples.compute()
