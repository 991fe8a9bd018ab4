"""What the page shows, as plain values: no tensors, no paths. Pictures are bytes of PNG files."""

from dataclasses import dataclass

from clipattr.metrics.intervals import Interval


@dataclass(frozen=True)
class ScorecardRow:
    """One planted failure and where each method ranks the latent that is responsible for it.

    Ranks are 1-based over all `n_latents`. `auroc` says how well the firing of `latent` separates
    `factor`. `learned` is False where the model does not show the planted effect: ranks then
    compare nothing, and the page says so.
    """

    failure: str
    title: str
    question: str
    prompt: str
    factor: str
    latent: int
    auroc: float
    rank_attribution: int
    rank_logit_lens: int
    n_latents: int
    learned: bool
    examples: list[bytes]


@dataclass(frozen=True)
class MethodResult:
    """How faithful one attribution method is; `name` is its key in metrics.json.

    The curves hold the mean score after 0, 1, 2, ... latents. `minus_logit_lens` is the paired
    difference of the deletion AUC, negative where the method is better than logit lens; None for
    logit lens itself.
    """

    name: str
    label: str
    deletion_curve: list[float]
    insertion_curve: list[float]
    deletion_auc: Interval
    insertion_auc: Interval
    spearman_exact: Interval
    overlap_exact: Interval
    minus_logit_lens: Interval | None


@dataclass(frozen=True)
class LatentCard:
    """One latent in one prediction: estimate, exact effect, and what the latent stands for."""

    latent: int
    attribution: float
    effect: float
    label: str
    alignment: float
    examples: list[bytes]


@dataclass(frozen=True)
class Explained:
    """One explained prediction with the latents that drive it, most important first."""

    image: bytes
    caption: str
    prompt: str
    score: float
    latents: list[LatentCard]


@dataclass(frozen=True)
class PairPicture:
    """The same scene without and with a cue.

    Scores are in units of the standard deviation of that head's score over the evaluation set.
    """

    without: bytes
    with_cue: bytes
    text_without: float
    text_with: float
    probe_without: float
    probe_with: float


@dataclass(frozen=True)
class CueResult:
    """Effect of one cue on the text head and on the probe, in standard deviations of each score.

    `planted` is False for a control: a cue that does not go with the label. Shares are the
    signed attribution of the cue's latents over the sum of all absolute attribution.
    """

    cue: str
    planted: bool
    effect_text: Interval
    effect_probe: Interval
    amplification: Interval
    share_text: float
    share_probe: float
    pairs: list[PairPicture]


@dataclass(frozen=True)
class GroupRow:
    """Accuracy of one head on one group (label x cue)."""

    head: str
    group: str
    count: int
    accuracy: Interval


@dataclass(frozen=True)
class Fact:
    """A headline number, already formatted, with a note on how to read it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class HowRow:
    """How a number was made: the formula in words and the python path of the function."""

    number: str
    how: str
    where: str


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page. Any list may be empty: its section then says so."""

    title: str
    subtitle: str
    scorecard: list[ScorecardRow]
    methods: list[MethodResult]
    explained: list[Explained]
    cues: list[CueResult]
    groups: list[GroupRow]
    facts: list[Fact]
    how: list[HowRow]
    manifest: dict[str, str]
    summary: list[str]
