"""Content of the page for tests: every part of it there, every number another one."""

from clipattr.metrics.intervals import Interval
from clipattr.report import (
    ClassRow,
    CorrectionResult,
    CueResult,
    ExactResult,
    Explained,
    Fact,
    GroupRow,
    HowRow,
    LatentCard,
    MethodResult,
    PairPicture,
    ReportContent,
    ScatterResult,
    ScorecardRow,
    UnexpectedResult,
    UnexpectedRow,
)

PNG = b"\x89PNG\r\n\x1a\n" + b"only the signature is read here"
COLUMNS = ("deletion_auc", "insertion_auc", "spearman_exact", "pearson_exact", "overlap_exact")
COLUMNS += ("global_deletion",)


def interval(mean: float) -> Interval:
    return Interval(mean, mean - 0.0111, mean + 0.0222)


def method(name: str, label: str, start: float) -> MethodResult:
    return MethodResult(
        name=name,
        label=label,
        deletion_curve=[start + 0.007 * step**2 for step in range(5)],
        insertion_curve=[start - 0.009 * step for step in range(4)],
        deletion_error=[0.004] * 5,
        insertion_error=[0.003] * 4,
        deletion_auc=interval(start + 0.1),
        insertion_auc=interval(start + 0.2),
        spearman_exact=interval(start + 0.3),
        pearson_exact=interval(start + 0.35),
        overlap_exact=interval(start + 0.4),
        global_deletion=interval(start + 0.15),
        minus_logit_lens={}
        if name == "logit_lens"
        else {
            column: interval(start - 0.6 - 0.01 * number) for number, column in enumerate(COLUMNS)
        },
    )


def scorecard() -> list[ScorecardRow]:
    return [
        ScorecardRow(
            "polysemy",
            *("Two", "Which?", "a bat", "stick", 41, 0.987, 2, 17, 256, True),
            *(Interval(0.0123, 0.0101, 0.0145), 0.273, 0.918, [PNG]),
        ),
        ScorecardRow(
            "context",
            *("Place", "Why?", "a ring", "forest", 113, 0.612, 99, 93, 256, False),
            *(Interval(-0.0023, -0.0032, -0.0014), 0.417, 0.114, []),
        ),
    ]


def corrections() -> CorrectionResult:
    return CorrectionResult(
        sizes={"along the embedding": interval(0.914), "along the state": interval(0.043)},
        steps={"first": interval(0.7), "second": interval(0.9)},
        gain=interval(0.231),
        lens_part_pearson=interval(0.777),
    )


def against_exact() -> ExactResult:
    return ExactResult(
        scatters=[
            ScatterResult("attribution_patching", "One", [0.1, 0.2], [0.2, 0.3], interval(0.8)),
            ScatterResult("act_times_logit_lens", "Two", [0.1, 0.2], [0.0, 0.3], interval(0.6)),
        ],
        difference=interval(0.2),
        n_images=100,
        n_pairs=1234,
        lens_scale=0.0456,
    )


def unexpected() -> UnexpectedResult:
    return UnexpectedResult(
        rows=[
            UnexpectedRow("Two", "a bat", True, 7, "another sense"),
            UnexpectedRow("Place", "a ring", False, None, ""),
        ],
        precision=0.35,
        recall=0.62,
        precision_of_evidence=0.15,
        recall_of_evidence=0.88,
        kinds_learned=["polysemy"],
        kinds_found=["polysemy"],
        n_graded=19,
        n_listed=143,
        n_by_chance=6.4,
    )


def full_content() -> ReportContent:
    card = LatentCard(31, 0.04321, -0.01234, "striped", 0.287, [PNG, PNG])
    pair = PairPicture(PNG, PNG, -0.61, 0.28, 0.13, 1.94)
    return ReportContent(
        title="The title",
        subtitle="The subtitle",
        scorecard=scorecard(),
        methods=[
            method("exact", "Exact patching", 0.111),
            method("attribution_patching", "Attribution patching", 0.222),
            method("logit_lens", "Logit lens", 0.333),
        ],
        unrestricted_lens=(interval(0.717), interval(0.818)),
        control=[
            method("exact", "Exact patching", 0.511),
            method("attribution_patching", "Attribution patching", 0.522),
            method("logit_lens", "Logit lens", 0.533),
        ],
        classes=[ClassRow("disc", 37, 0.21, -0.02), ClassRow("ring", 41, 0.17, 0.01)],
        corrections=corrections(),
        against_exact=against_exact(),
        explained=[Explained(PNG, "a red star", "a photo of a star", 0.3456, [card])],
        cues=[
            CueResult(
                "yellow sticker",
                True,
                interval(0.314),
                interval(1.415),
                Interval(4.51, 3.92, 5.63),
                0.0234,
                0.0956,
                [pair],
            )
        ],
        groups=[
            GroupRow("probe", "pointed, sticker", 271, interval(0.95)),
            GroupRow("probe", "pointed, plain", 283, interval(0.66)),
        ],
        facts=[Fact("Dead latents", "4.3 %", "never fired")],
        how=[HowRow("Deletion AUC", "trapezoid over steps", "clipattr.attribution.curves.auc")],
        manifest={"torch": "2.15.0", "seed": "17"},
        summary=["First sentence.", "Second sentence.", "Third sentence."],
        unexpected=unexpected(),
    )


EMPTY = ReportContent("Nothing", "", [], [], None, [], [], None, None, [], [], [], [], [], {}, [])
