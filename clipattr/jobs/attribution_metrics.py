"""The attribution evaluation's part of metrics.json, and the table in the log."""

import logging
import math
from collections.abc import Sequence

from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback
from clipattr.metrics.intervals import Interval
from clipattr.report.formatting import NOT_DEFINED

logger = logging.getLogger(__name__)

INTERVALS = (
    "deletion_auc",
    "insertion_auc",
    "deletion_drop",
    "insertion_gain",
    "spearman_exact",
    "pearson_exact",
    "overlap_exact",
    "completeness",
)


def collect_faithfulness(
    local: FaithfulnessCallback, by_class_mean: GlobalDeletionCallback, names: Sequence[str]
) -> dict[str, object]:
    """`faithfulness.<method>.<number>.{mean,low,high}`, and the same by class."""
    table: dict[str, object] = {}
    for method, found in local.results.items():
        numbers: dict[str, object] = {"n_undefined": found.n_undefined}
        for name in INTERVALS:
            interval = getattr(found, name)
            numbers[name] = None if interval is None else interval._asdict()
        numbers["minus_logit_lens"] = {
            name: interval._asdict() for name, interval in found.differences.items()
        }
        whole = by_class_mean.results[method]._asdict()
        numbers["global"] = {
            name: None if interval is None else interval._asdict()
            for name, interval in whole.items()
        }
        numbers["curves"] = {
            "deletion": found.deletion_curve,
            "insertion": found.insertion_curve,
            "deletion_error": found.deletion_error,
            "insertion_error": found.insertion_error,
        }
        table[method.name] = numbers
    unrestricted = local.logit_lens_unrestricted
    assert unrestricted is not None, "after the test"
    return {
        "faithfulness": table,
        "logit_lens_unrestricted": {
            name: interval._asdict() for name, interval in unrestricted._asdict().items()
        },
        "by_class": {
            names[number]: {method.name: found[number] for method, found in local.by_class.items()}
            for number in next(iter(local.by_class.values()))
        },
    }


def log_table(
    title: str, local: FaithfulnessCallback, by_class_mean: GlobalDeletionCallback
) -> None:
    """One line per method, and of how many images: those that were read, not those asked for."""
    header = ("deletion", "- lens", "insertion", "drop", "gain")
    header += ("Spearman", "Pearson", "overlap", "gap", "global")
    classes = next(iter(local.by_class.values()))
    n_images = sum(int(row["images"]) for row in classes.values())
    logger.info("%s, %d images, %d steps", title, n_images, local.n_steps)
    logger.info("  %-22s" + " %11s" * len(header), "", *header)
    for method, found in local.results.items():
        cells = [
            found.deletion_auc,
            found.minus_logit_lens,
            found.insertion_auc,
            found.deletion_drop,
            found.insertion_gain,
            found.spearman_exact,
            found.pearson_exact,
            found.overlap_exact,
            found.completeness,
            by_class_mean.results[method].deletion_auc,
        ]
        words = [_word(cell) for cell in cells]
        logger.info("  %-22s" + " %11s" * len(words), method.name, *words)
    unrestricted = local.logit_lens_unrestricted
    assert unrestricted is not None, "after the test"
    logger.info(
        "  %-22s %11s %11s %11s",
        "unrestricted lens",
        _word(unrestricted.deletion_auc),
        "",
        _word(unrestricted.insertion_auc),
    )


def _word(cell: Interval | None) -> str:
    """Nothing where a method has no such number."""
    if cell is None:
        return ""
    return f"{cell.mean:.4f}" if math.isfinite(cell.mean) else NOT_DEFINED
