"""Cues from metadata: a column of what is known of the images says which of them have the cue."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clipattr.errors import ConfigError, DataError

PREFIX = "json:"
FEW = 10
WORDS = {"true": 1.0, "false": 0.0}
TRUTHS = {"yes": True, "no": False, 1.0: True, 0.0: False}
Value = float | str | None
Values = tuple[Value, ...]
"""What a list holds; a field without a list is a value."""


class CueRule(NamedTuple):
    """Which images have a cue: those whose field is `value`, or, without one, says yes."""

    field: str
    value: str | None

    def __str__(self) -> str:
        return PREFIX + self.field + ("" if self.value is None else f"={self.value}")

    @property
    def name(self) -> str:
        """For tables."""
        return self.field if self.value is None else f"{self.field}={self.value}"


class Cue(NamedTuple):
    """A cue of images: `known` is False where the field is empty, and `has` says nothing there."""

    has: Bool[Tensor, " images"]
    known: Bool[Tensor, " images"]


def parse_rule(text: str) -> CueRule:
    """json:sticker, or json:place=water."""
    field, equals, value = text.removeprefix(PREFIX).partition("=")
    if not text.startswith(PREFIX) or not field.strip() or (equals and not value.strip()):
        raise ConfigError(f"cue {text!r}: write json:<field> or json:<field>=<value>")
    return CueRule(field.strip(), value.strip() if equals else None)


def read_cue(
    rows: Sequence[Mapping[str, object]], rule: CueRule, *, keys: Sequence[str] | None = None
) -> Cue:
    """Which images have the cue.

    true is 1 and false is 0, as text, too; numbers are compared as numbers, all else as text. A
    list has every value that stands in it.

    Args:
        rows: what the JSON of each sample holds.
        rule: what to look for.
        keys: names of the samples, for messages.

    Raises:
        DataError: where a sample lacks the field, or says neither yes nor no where it must, and
            when none has the value, which is a typo more often than a finding.
    """
    values = [_read(_field_of(rows, row, rule, keys)) for row in range(len(rows))]
    known = torch.tensor([value is not None for value in values], dtype=torch.bool)
    if rule.value is None:
        has = [_is_true(values, row, rule, keys) for row in range(len(values))]
    else:
        wanted = _normalise(rule.value)
        has = [wanted in value if isinstance(value, tuple) else value == wanted for value in values]
        if not any(has):
            raise DataError(f"{rule}: none of {len(rows)} images has it; {_describe(values)}")
    return Cue(torch.tensor(has, dtype=torch.bool), known)


def _field_of(
    rows: Sequence[Mapping[str, object]], row: int, rule: CueRule, keys: Sequence[str] | None
) -> object:
    if rule.field not in rows[row]:
        raise DataError(
            f"{rule}: {_name(row, keys)} has no field {rule.field!r}; it has "
            f"{', '.join(rows[row]) or 'none'}"
        )
    return rows[row][rule.field]


def _read(value: object) -> Value | Values:
    if isinstance(value, list):
        return tuple(_normalise(one) for one in value)
    return _normalise(value)


def _normalise(value: object) -> Value:
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool | int | float):
        return float(value)
    text = str(value).strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text or None
    return number if math.isfinite(number) else text


def _is_true(
    values: Sequence[Value | Values], row: int, rule: CueRule, keys: Sequence[str] | None
) -> bool:
    value = values[row]
    if value is None:
        return False
    single = None if isinstance(value, tuple) else value
    found = TRUTHS.get(single.lower() if isinstance(single, str) else single)
    if found is None:
        said = list(value) if isinstance(value, tuple) else value
        raise DataError(
            f"{rule}: {_name(row, keys)} says {said!r}, which is neither yes nor no: name the "
            f"value that is the cue, as in {PREFIX}{rule.field}=VALUE; {_describe(values)}"
        )
    return found


def _name(row: int, keys: Sequence[str] | None) -> str:
    return f"image {row}" if keys is None else keys[row]


def _describe(values: Sequence[Value | Values]) -> str:
    each = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    counts = Counter("(empty)" if one is None else _show(one) for one in each)
    shown = ", ".join(f"{value} ({count})" for value, count in counts.most_common(8))
    return f"its values are {shown}" + (", ..." if len(counts) > 8 else "")


def _show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


class CueGroups(NamedTuple):
    """How many images each label has without (0) and with (1) the cue; unknown ones count apart."""

    counts: Int[Tensor, "label 2"]
    n_unknown: int
    classes: tuple[str, ...]
    cue: str

    def warnings(self) -> list[str]:
        """What of a table of groups cannot be measured, or hardly."""
        found = self._small()
        if self.n_unknown:
            found.append(f"{self.n_unknown} images say nothing of {self.cue} and are left out")
        return found

    def _small(self) -> list[str]:
        """One line, however many groups: of a hundred classes half may be small."""
        flat = self.counts.flatten()
        small = int((flat < FEW).sum())
        if not small:
            return []
        place = int(flat.argmin())
        name = f"{self.classes[place // 2]!r} {('without', 'with')[place % 2]} {self.cue}"
        if small == 1:
            return [f"the group {name} has {_count(flat[place])}: an accuracy over it says little"]
        return [
            f"{small} of {len(flat)} groups have fewer than {FEW} images, fewest {name} "
            f"({_count(flat[place])}): an accuracy over them says little"
        ]


def _count(n: Tensor) -> str:
    return "1 image" if int(n) == 1 else f"{int(n) or 'no'} images"


def group_images(
    labels: Int[Tensor, " images"], cue: Cue, classes: Sequence[str], name: str
) -> CueGroups:
    """The table label x cue, over the images whose cue is known."""
    if len(labels) != len(cue.has):
        raise DataError(f"{len(labels)} labels and {len(cue.has)} cues: each image needs both")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise DataError(
            f"labels lie in [{int(labels.min())}, {int(labels.max())}], and there are "
            f"{len(classes)} classes"
        )
    groups = (labels.long() * 2 + cue.has.long())[cue.known]
    counts = torch.bincount(groups, minlength=2 * len(classes)).reshape(len(classes), 2)
    return CueGroups(counts, int((~cue.known).sum()), tuple(classes), name)
