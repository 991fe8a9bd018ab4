"""What the page shows, as plain values: no tensors, no paths. Pictures are bytes of PNG files."""

from dataclasses import dataclass

from clipattr.metrics.intervals import Interval


@dataclass(frozen=True)
class ScorecardRow:
    """One planted failure and where each method ranks the latent that is responsible for it.

    Ranks are 1-based over all `n_latents`. `auroc` says how well the firing of `latent` separates
    `factor`. `learned` is False where the model does not show the planted effect: ranks then
    compare nothing, and the page says so. `mean_attribution` is that of the latent to the prompt
    over all images, `share_of_images` says in how many of them it fires, `share_positive` in how
    many of those it raises the prompt's score.
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
    mean_attribution: Interval
    share_of_images: float
    share_positive: float
    examples: list[bytes]


@dataclass(frozen=True)
class UnexpectedRow:
    """One planted failure, and where the list of unexpected reliance has it first; None: nowhere.

    `kind` is what the rules suggest there.
    """

    title: str
    prompt: str
    learned: bool
    rank: int | None
    kind: str


@dataclass(frozen=True)
class UnexpectedResult:
    """The list of unexpected reliance, which was told nothing, against the truth.

    `precision` and `recall` are of its first `n_graded` rows, `..._of_evidence` of a list that does
    not ask what latents mean; `n_by_chance` as strong ones come of shuffled latents and images.
    """

    rows: list[UnexpectedRow]
    precision: float
    recall: float
    precision_of_evidence: float
    recall_of_evidence: float
    kinds_learned: list[str]
    kinds_found: list[str]
    n_graded: int
    n_listed: int
    n_by_chance: float


@dataclass(frozen=True)
class MethodResult:
    """How faithful one attribution method is; `name` is its key in metrics.json.

    The curves hold the mean score after 0, 1, 2, ... latents, the errors its standard error over
    images. `global_deletion` is the deletion AUC where the same latents go from all images of a
    class. `minus_logit_lens` holds the paired difference of each of these numbers, by its name; it
    is empty for logit lens itself.
    """

    name: str
    label: str
    deletion_curve: list[float]
    insertion_curve: list[float]
    deletion_error: list[float]
    insertion_error: list[float]
    deletion_auc: Interval
    insertion_auc: Interval
    spearman_exact: Interval
    pearson_exact: Interval
    overlap_exact: Interval
    global_deletion: Interval
    minus_logit_lens: dict[str, Interval]


@dataclass(frozen=True)
class ClassRow:
    """Attribution patching minus logit lens on the images of one class; means alone."""

    name: str
    n_images: int
    spearman_exact: float
    deletion_auc: float


@dataclass(frozen=True)
class CorrectionResult:
    """What separates attribution patching from the logit lens.

    `sizes` are mean absolute values over that of the lens part, `steps` the agreement with exact
    patching as one part after the other is added, `gain` that of both corrections together.
    """

    sizes: dict[str, Interval]
    steps: dict[str, Interval]
    gain: Interval
    lens_part_pearson: Interval


@dataclass(frozen=True)
class ScatterResult:
    """Estimates beside the exact effect: some pairs (image, latent) and the correlation of all."""

    name: str
    label: str
    exact: list[float]
    estimate: list[float]
    pearson: Interval


@dataclass(frozen=True)
class ExactResult:
    """Two methods beside the exact effect, and the paired difference of their correlations.

    `lens_scale` is what the second one is multiplied with: it has no unit.
    """

    scatters: list[ScatterResult]
    difference: Interval
    n_images: int
    n_pairs: int
    lens_scale: float


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
    """Everything on the page. Any list may be empty, and None is a list: its place then says so."""

    title: str
    subtitle: str
    scorecard: list[ScorecardRow]
    methods: list[MethodResult]
    unrestricted_lens: tuple[Interval, Interval] | None
    """deletion and insertion AUC of the logit lens ranked over all latents"""
    control: list[MethodResult]
    """of an untrained dictionary"""
    classes: list[ClassRow]
    corrections: CorrectionResult | None
    against_exact: ExactResult | None
    explained: list[Explained]
    cues: list[CueResult]
    groups: list[GroupRow]
    facts: list[Fact]
    how: list[HowRow]
    manifest: dict[str, str]
    summary: list[str]
    unexpected: UnexpectedResult | None = None
