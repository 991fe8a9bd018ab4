"""What of every latent and class stays in memory while the rest is written: rows of tables."""

from array import array
from collections.abc import Sequence

from clipattr.report.atlas.content import ClassEntry, ClassLatent, Column, LatentEntry
from clipattr.report.atlas.scripts import column_values, pair_value, rounded

# Thumbnails beside a latent in lists.
_PICTURES = 4


class LatentTable:
    """Best label, numbers and place on the map of all latents, and their first pictures."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._words: list[str] = []
        self._scores: list[float | int | None] = []
        self._numbers: list[list[float | int | None]] = [[] for _ in columns]
        self._places: list[list[float | int | None]] = [[], []]
        self._dead: list[int] = []
        self._pictures: list[array[int]] = []

    def __len__(self) -> int:
        return len(self._words)

    def add(self, entry: LatentEntry) -> list[float | int | None]:
        """Take the row of the next latent, and return its numbers as they are written."""
        numbers = column_values(entry, self._columns)
        self._words.append(entry.labels[0].word if entry.labels else "")
        self._scores.append(rounded(entry.labels[0].score) if entry.labels else None)
        for column, value in zip(self._numbers, numbers, strict=True):
            column.append(value)
        for column, place in zip(self._places, (entry.x, entry.y), strict=True):
            column.append(rounded(place))
        if entry.is_dead:
            self._dead.append(entry.latent)
        self._pictures.append(array("q", (each.image for each in entry.top[:_PICTURES])))
        return numbers

    def value(self) -> dict[str, object]:
        """The table and the map as the overview reads them, column by column."""
        return {
            "words": self._words,
            "scores": self._scores,
            "numbers": self._numbers,
            "x": self._places[0],
            "y": self._places[1],
            "dead": self._dead,
        }

    def described(self, pair: ClassLatent) -> list[object]:
        """A pair with the words and pictures of its latent, and the word of its counterpart."""
        other = pair.counterpart
        return [
            *pair_value(pair),
            self._words[pair.latent],
            list(self._pictures[pair.latent]),
            "" if other is None else self._words[other],
        ]


class ClassTable:
    """What the table of classes shows: latents shown, all unexpected ones, strongest evidence."""

    def __init__(self) -> None:
        self._rows: list[list[float | int | None]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, entry: ClassEntry) -> None:
        """Take the row of the next class."""
        evidence = [pair.evidence for pair in entry.latents if pair.is_unexpected]
        strongest = rounded(max(evidence)) if evidence else None
        self._rows.append([len(entry.latents), len(evidence) + entry.n_more, strongest])

    def value(self) -> list[list[float | int | None]]:
        """[latents shown, unexpected, strongest evidence] of each class."""
        return self._rows
