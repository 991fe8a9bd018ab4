"""Values as script files: what a page that was opened from a disk is allowed to read.

Browsers refuse fetch on file://, so data are scripts that hand one JSON value to `atlas.put`.
No word of the data ever becomes a key of an object: `__proto__` would be more than a key.
"""

import base64
import json
import math
from collections.abc import Sequence

from clipattr.errors import DataError
from clipattr.report.atlas.content import ClassLatent, Column, Example, LatentEntry

_DIGITS = 5


def script(name: str, value: object) -> str:
    """A script file that hands `value` over under `name`; ASCII, so no line separator ends it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f'atlas.put("{name}",{text.replace("<", chr(92) + "u003c")});\n'


def rounded(value: float | None) -> float | int | None:
    """Five significant digits, whole numbers as integers; None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    # From 1e16 on, Python writes 1e+16, which is shorter than the digits of the integer.
    return int(short) if short.is_integer() and abs(short) < 1e16 else short


def column_values(entry: LatentEntry, columns: Sequence[Column]) -> list[float | int | None]:
    """The numbers of a latent in the order of the columns; a latent is named by all its digits."""
    if entry.numbers.keys() != {column.name for column in columns}:
        raise DataError(
            f"Latent {entry.latent} has the numbers {sorted(entry.numbers)}; the columns of the"
            f" atlas are {sorted(column.name for column in columns)}."
        )
    values = [entry.numbers[column.name] for column in columns]
    return [
        int(value) if column.is_latent and value is not None else rounded(value)
        for column, value in zip(columns, values, strict=True)
    ]


def latent_value(entry: LatentEntry, numbers: Sequence[float | int | None]) -> dict[str, object]:
    """One latent as its page reads it."""
    return {
        "numbers": numbers,
        "labels": [[label.word, rounded(label.score)] for label in entry.labels],
        "margin": rounded(entry.margin),
        "top": [_example(entry.latent, example) for example in entry.top],
        "spread": [_example(entry.latent, example) for example in entry.spread],
        "reliance": [
            [
                each.class_number,
                rounded(each.mean_attribution),
                rounded(each.share_of_images),
                rounded(each.share_positive),
                rounded(each.alignment),
                each.kind,
            ]
            for each in entry.reliance
        ],
        "dead": entry.is_dead,
    }


def pair_value(pair: ClassLatent) -> list[object]:
    """A (class, latent) pair in the order in which `atlas.pair` takes it apart."""
    return [
        pair.latent,
        rounded(pair.mean_attribution),
        rounded(pair.share_of_images),
        rounded(pair.share_positive),
        rounded(pair.alignment),
        int(pair.is_unexpected),
        rounded(pair.evidence),
        pair.kind,
        list(pair.reasons),
        pair.counterpart,
    ]


def _example(latent: int, example: Example) -> list[object]:
    """[image, value], and for a heatmap the number of its columns and its bytes in base64."""
    plain: list[object] = [example.image, rounded(example.value)]
    if example.heat is None:
        return plain
    packed = _packed(latent, example.image, example.heat)
    return [*plain, len(example.heat[0]), packed]


def _packed(latent: int, image: int, heat: Sequence[Sequence[int]]) -> str:
    widths = {len(row) for row in heat}
    flat = [value for row in heat for value in row]
    if len(widths) != 1 or not flat or min(flat) < 0 or max(flat) > 255:
        raise DataError(
            f"Heatmap of latent {latent} on image {image}: rows of {sorted(widths)} values;"
            " it must be a grid of integers from 0 to 255."
        )
    return base64.b64encode(bytes(flat)).decode("ascii")
