"""What the atlas shows, as plain values: no tensors, no paths.

Numbers that are not finite are shown as missing. Words (labels, class names, kinds, reasons) are
untrusted text: they come from vocabulary files and class files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clipattr.report.content import Fact


class Example(NamedTuple):
    """An image by its row number, the activation there, and what of the image the latent saw.

    The thumbnail lies at `thumbs/<image // 1000>/<image>.jpg`; pages show the largest square in its
    middle, as CLIP's preprocessing does. `heat`, a grid of integers from 0 to 255 with the rows of
    the image first, is drawn over that square.
    """

    image: int
    value: float
    heat: Sequence[Sequence[int]] | None = None


class Label(NamedTuple):
    """A word for a latent and how well it fits."""

    word: str
    score: float


class Reliance(NamedTuple):
    """How one class relies on a latent; `kind` is empty where nothing unexpected was suggested.

    `share_positive` is None where it is not known.
    """

    class_number: int
    mean_attribution: float
    share_of_images: float
    share_positive: float | None
    alignment: float
    kind: str = ""


@dataclass(frozen=True)
class LatentEntry:
    """One latent; labels best first, of reliance first the classes that it raises most.

    `numbers` has one value for each of `Overview.columns`. `spread` holds examples at quantiles of
    the activation, largest first; `x` and `y` are the place on the map of directions.
    """

    latent: int
    labels: Sequence[Label]
    margin: float | None
    numbers: Mapping[str, float | None]
    x: float
    y: float
    top: Sequence[Example]
    spread: Sequence[Example]
    reliance: Sequence[Reliance]
    is_dead: bool = False


class ClassLatent(NamedTuple):
    """One latent that a class relies on.

    `evidence` is not finite where it was not computed. `kind` and `reasons` are what simple rules
    suggest. `counterpart` is a latent that does align with the class, to look at side by side.
    """

    latent: int
    mean_attribution: float
    share_of_images: float
    share_positive: float | None
    alignment: float
    is_unexpected: bool
    evidence: float
    kind: str = ""
    reasons: Sequence[str] = ()
    counterpart: int | None = None


class ClassEntry(NamedTuple):
    """One class and the latents on its page, in their order.

    `n_more` unexpected ones are not shown.
    """

    number: int
    latents: Sequence[ClassLatent]
    n_more: int = 0


class UnexpectedEntry(NamedTuple):
    """A row of the ranked list over all classes."""

    class_number: int
    pair: ClassLatent


class PairPoint(NamedTuple):
    """A (class, latent) pair in the scatter of alignment against mean attribution."""

    class_number: int
    latent: int
    alignment: float
    mean_attribution: float
    is_unexpected: bool


class Column(NamedTuple):
    """A column of the table of latents: its key in `LatentEntry.numbers`, and how to read it.

    `is_latent` says that the values are numbers of latents: they become links.
    """

    name: str
    title: str
    explanation: str
    is_latent: bool = False


@dataclass(frozen=True)
class Overview:
    """What all pages share, and the ranked list. `class_names[number]` is the name of a class.

    `score_name` says what is attributed, for the axes: "cosine with the prompt", "logit". `over`
    names the images of attribution and shares: "all images". `map_shares` are the shares of the
    variance that the axes of the map show. `summary` is a paragraph each: what counts as
    unexpected, how evidence is computed, the null. `if_empty` says why the list may be empty.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    facts: Sequence[Fact]
    columns: Sequence[Column]
    class_names: Sequence[str]
    score_name: str
    over: str
    map_shares: tuple[float, float]
    unexpected: Sequence[UnexpectedEntry]
    if_empty: str
    points: Sequence[PairPoint]
    manifest: Mapping[str, str]
