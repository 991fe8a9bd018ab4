"""The images and patches in which each latent is most active, and a sample of all it fires in."""

from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import Pool, pool_tokens
from clipattr.metrics.best_pairs import Examples
from clipattr.metrics.random_examples import RandomExamples
from clipattr.metrics.top_examples import Patches, TopExamples, TopPatches
from clipattr.spliced import Readout


class ExamplesCallback(ReadoutCallback):
    """Finds examples of every latent at any site; the same on every rank.

    Attributes:
        result: rows of the top images by pooled activation, -1 where it fired in fewer.
        patches: the top (image, token) pairs, tokens numbered as the site has them: where all are
            read, the class token is among them. None at a site with one token.
        sample: a uniform sample of the images in which it fires, by pooled activation; `strata`
            picks those to be shown. None if it was not asked for.
    """

    def __init__(
        self,
        *,
        n_latents: int,
        n_examples: int,
        pool: Pool = "max",
        n_tokens: int = 1,
        patches_per_image: int | None = 1,
        n_sample: int = 0,
        seed: int = 0,
    ) -> None:
        """Nothing was seen.

        Args:
            n_latents: of the dictionary.
            n_examples: images, and patches, per latent.
            pool: what the activations at the tokens of an image become.
            n_tokens: of an image at the site.
            patches_per_image: at most so many of an image are among the patches; None: any number.
            n_sample: images per latent that are drawn; 0: none.
            seed: of the drawing.
        """
        sizes = {"n_latents": n_latents, "n_examples": n_examples}
        self.examples = TopExamples(**sizes)
        self._pool: Pool = pool
        self._patches = (
            TopPatches(**sizes, n_tokens=n_tokens, per_image=patches_per_image)
            if n_tokens > 1
            else None
        )
        self._sample = (
            RandomExamples(n_latents=n_latents, n_examples=n_sample, seed=seed)
            if n_sample
            else None
        )
        self.result: Examples | None = None
        self.patches: Patches | None = None
        self.sample: Examples | None = None
        metrics = (self.examples, self._patches, self._sample)
        super().__init__(*[metric for metric in metrics if metric is not None])

    def take(self, readout: Readout) -> None:
        """Merge the batch into the best so far."""
        pooled = pool_tokens(readout.codes, self._pool)
        self.examples.update(pooled, readout.rows)
        if self._patches is not None:
            self._patches.update(readout.codes, readout.rows)
        if self._sample is not None:
            self._sample.update(pooled, readout.rows)

    def finish(self) -> None:
        """Merge the processes."""
        self.result = self.examples.compute()
        self.patches = None if self._patches is None else self._patches.compute()
        self.sample = None if self._sample is None else self._sample.compute()
