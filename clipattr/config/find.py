"""Settings of a search among the latents of an atlas."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from clipattr.errors import ConfigError

_EXAMPLES = "query='rainbow flag', image=photo.jpg, or latent=1234"


@dataclass
class Search:
    """What is looked for, and in which atlas."""

    atlas: str = MISSING
    """folder of a finished atlas: <runs>/<name> of the job atlas"""
    query: str | list[str] | None = None
    """words whose latents are looked for, several as a list; or else an image, or a latent"""
    image: str | None = None
    """a JPEG, PNG or WEBP file: latents whose images are like it"""
    latent: int | None = None
    """latents whose images are like those of this one"""
    templates: str | None = None
    """what a query stands in: as zeroshot.templates; none: it stands alone; null: as the labels"""
    cache: str = "runs/cache"
    """folder of embedded texts; in data.cache of the atlas its vocabulary lies already"""
    top: int = 10
    """latents listed at each end: most aligned, and least"""
    examples: int = 5
    """images of each latent in the picture"""

    @property
    def queries(self) -> list[str]:
        """Every text that is looked for."""
        if self.query is None:
            return []
        return [self.query] if isinstance(self.query, str) else self.query

    def check_search(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        for name, value in (("top", self.top), ("examples", self.examples)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be greater than 0")
        asked = {"query": self.query, "image": self.image, "latent": self.latent}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are there" if given else "none of them is there"
            raise ConfigError(f"query, image, latent: {found}. Ask by one of them: {_EXAMPLES}")
        if self.latent is not None and self.latent < 0:
            raise ConfigError(f"latent={self.latent}: latents are numbered from 0")
        if self.templates is not None and self.query is None:
            raise ConfigError(
                f"templates={self.templates}: goes with query; an image or a latent has no words"
            )
        self._check_queries()

    def _check_queries(self) -> None:
        if self.query is not None and not self.queries:
            raise ConfigError(f"query=[]: name at least one. Ask by {_EXAMPLES}")
        if not all(text.strip() for text in self.queries):
            raise ConfigError(f"query={self.query!r}: empty text has no latents")
        repeated = [text for text, times in Counter(self.queries).items() if times > 1]
        if repeated:
            raise ConfigError(f"query: {repeated[0]!r} stands there twice")

    def check_atlas(self) -> None:
        """Raise ConfigError for a folder that no atlas was written to."""
        if not (Path(self.atlas) / "atlas.json").is_file():
            raise ConfigError(
                f"atlas={self.atlas!r}: is no finished atlas, it has no atlas.json. "
                "configs/evaluate/atlas.yaml says how one is made"
            )
